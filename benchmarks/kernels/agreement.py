"""Agreement before speed: every contender against its definition in fp64, value and gradients."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from linvideo_core.kernels import reference

from .contenders import RATIOS, TOLERANCE, Contender, Setting, Shape, make_inputs, make_module

logger = logging.getLogger(__name__)

LENGTHS, HEADS = (4096, 4097), 12
INPUTS = ("query", "key", "value", "query_map", "key_map")

Row = dict[str, Any]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm()).item()


def define_softmax(query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> Tensor:
    """Return softmax attention by its formula, an L x L matrix a head."""
    scores = torch.einsum("blnd,bsnd->bnls", query, key) / math.sqrt(query.shape[3])
    return torch.einsum("bnls,bsnd->blnd", scores.softmax(dim=-1), value)


def define_causal(
    query: Tensor, key: Tensor, value: Tensor, query_map: Tensor, key_map: Tensor
) -> Tensor:
    """Return causal linear attention that is not normalised, by its formula."""
    query, key = reference.hedgehog(query, query_map), reference.hedgehog(key, key_map)
    scores = torch.einsum("blnm,bsnm->bnls", query, key).tril()
    return torch.einsum("bnls,bsnd->blnd", scores, value)


_DEFINITIONS = {
    "linear": reference.linear_attention,
    "softmax": define_softmax,
    "causal": define_causal,
}


def compare(contender: Contender, inputs: Sequence[Tensor], upstream: Tensor) -> Row:
    """Return the relative errors of a contender's value ("forward") and gradients, by input."""
    count = 0 if not contender.is_differentiable else 5 if contender.has_maps else 3

    def compute(attend: Any, dtype: torch.dtype) -> tuple[Tensor, Sequence[Tensor]]:
        leaves = [x.detach().to(dtype).requires_grad_(i < count) for i, x in enumerate(inputs)]
        output = attend(*leaves)
        if not count:
            return output, ()
        return output, torch.autograd.grad(output, leaves[:count], upstream.to(output.dtype))

    output, gradients = compute(contender.attend, inputs[0].dtype)
    define = contender.definition or _DEFINITIONS[contender.kind]
    exact, exact_gradients = compute(define, torch.float64)
    pairs = zip(INPUTS[:count], gradients, exact_gradients, strict=True)
    errors = {name: relative_error(found, expected) for name, found, expected in pairs}
    return {"forward": relative_error(output, exact), **errors}


def check_contenders(
    contenders: Sequence[Contender],
    setting: Setting,
    lengths: Sequence[int] = LENGTHS,
    heads: int = HEADS,
) -> tuple[list[Contender], list[Row], list[str]]:
    """Return the contenders that agree with their definition, all errors, and who was left out.

    Raises RuntimeError where the first, our own, is wrong: its speed would mean nothing.
    """
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    cases = [(tokens, ratio) for tokens in lengths for ratio in RATIOS]
    for tokens, ratio in tqdm(cases, "checking agreement"):
        inputs = make_inputs(Shape(tokens, heads), ratio, setting)
        generator = torch.Generator(setting.device).manual_seed(0)
        upstream = torch.empty_like(inputs[0]).normal_(generator=generator)
        for contender in contenders:
            # Softmax has no features: once is enough.
            if contender.name in left_out or not (contender.has_maps or ratio == RATIOS[0]):
                continue
            try:
                errors = compare(contender, inputs, upstream)
                _check_tolerance(contender, errors, tokens)
            except Exception as error:
                reason = f"{contender.name} cannot be timed: {first_line(error)}"
                # Whatever a rival cannot do, the others can still be measured.
                if contender is contenders[0]:
                    raise RuntimeError(reason) from error
                left_out[contender.name] = reason
                logger.warning("left out: %s", reason)
                continue
            features = ratio if contender.has_maps else 0
            rows.append(
                {"contender": contender.name, "ratio": features, "tokens": tokens, **errors}
            )
    agreeing = [c for c in contenders if c.name not in left_out]
    return agreeing, rows, list(left_out.values())


def _check_tolerance(contender: Contender, errors: Row, tokens: int) -> None:
    for name, error in errors.items():
        if not error < contender.tolerance:
            raise RuntimeError(
                f"it differs from its definition in fp64 by {error:.1e} ({name}, {tokens} tokens)"
            )


def first_line(error: Exception) -> str:
    """Return what an error says first, for a sentence."""
    return (str(error) or repr(error)).splitlines()[0]


def check_modules(
    own: Contender, modules: Sequence[str], setting: Setting, tokens: int, heads: int = HEADS
) -> list[Row]:
    """Return the error of each module against eager norm and rotation of fp64 and the definition.

    The rotation itself rounds to fp32, which is exact enough.
    Raises RuntimeError for a module that is wrong.
    """
    rows = []
    shape, exact_setting = Shape(tokens, heads), setting._replace(dtype=torch.float64)
    define = Contender("definition", "linear", reference.linear_attention)
    for ratio in RATIOS:
        inputs = make_inputs(shape, ratio, setting)
        wide = [x.double() for x in inputs]
        expected = make_module(modules[0], define, wide, exact_setting)()
        for module in modules:
            error = relative_error(make_module(module, own, inputs, setting)(), expected)
            if not error < TOLERANCE:
                raise RuntimeError(
                    f"{module} differs from its definition by {error:.1e}; nothing was timed"
                )
            rows.append({"contender": own.name, "ratio": ratio, "tokens": tokens, module: error})
    return rows
