"""Agreement before speed: every contender against its definition in fp64, value and gradients."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linvideo_core.kernels import reference

from .baselines import Contender

LENGTHS = (4096, 4097)
INPUTS = ("query", "key", "value", "query_map", "key_map")

# Rows of an L x L matrix that exist at a time.
_CHUNK = 512

Row = dict[str, Any]


class Exact(NamedTuple):
    """Output and gradients in fp64; the gradients are those of query, key, value and the maps."""

    output: Tensor
    gradients: Sequence[Tensor] = ()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm()).item()


def compute_linear(inputs: Sequence[Tensor], upstream: Tensor) -> Exact:
    """Compute the definition's output and its five gradients; it is linear in memory."""
    leaves = [x.detach().double().requires_grad_(True) for x in inputs]
    output = reference.linear_attention(*leaves)
    return Exact(output.detach(), torch.autograd.grad(output, leaves, upstream.double()))


def compute_softmax(inputs: Sequence[Tensor], upstream: Tensor) -> Exact:
    """Compute softmax attention and the gradients of query, key and value, in chunks of queries."""
    query, key, value = (x.detach().double() for x in inputs[:3])
    key, value = key.requires_grad_(True), value.requires_grad_(True)
    outputs, dq, dk, dv = [], [], torch.zeros_like(key), torch.zeros_like(value)
    chunks = zip(query.split(_CHUNK, dim=1), upstream.double().split(_CHUNK, dim=1), strict=True)
    for q, do in chunks:
        q = q.detach().requires_grad_(True)
        scores = torch.einsum("blnd,bsnd->bnls", q, key) / math.sqrt(query.shape[3])
        output = torch.einsum("bnls,bsnd->blnd", scores.softmax(dim=-1), value)
        gradients = torch.autograd.grad(output, (q, key, value), do)
        outputs.append(output.detach())
        dq.append(gradients[0])
        dk += gradients[1]
        dv += gradients[2]
    return Exact(torch.cat(outputs, dim=1), (torch.cat(dq, dim=1), dk, dv))


def compute_causal(inputs: Sequence[Tensor], upstream: Tensor) -> Exact:
    """Compute causal linear attention that is not normalised, in chunks of queries; value only."""
    query, key, value, query_map, key_map = (x.detach().double() for x in inputs)
    query, key = reference.hedgehog(query, query_map), reference.hedgehog(key, key_map)
    outputs = []
    for first in range(0, query.shape[1], _CHUNK):
        scores = torch.einsum("blnm,bsnm->bnls", query[:, first : first + _CHUNK], key)
        outputs.append(torch.einsum("bnls,bsnd->blnd", scores.tril(first), value))
    return Exact(torch.cat(outputs, dim=1))


_DEFINITIONS: dict[str, Callable[[Sequence[Tensor], Tensor], Exact]] = {
    "linear": compute_linear,
    "softmax": compute_softmax,
    "causal": compute_causal,
}


def compare(contender: Contender, inputs: Sequence[Tensor], upstream: Tensor, exact: Exact) -> Row:
    """Return the relative errors of a contender's value ("forward") and gradients, by input."""
    if not contender.is_differentiable:
        with torch.no_grad():
            return {"forward": relative_error(contender.attend(*inputs), exact.output)}
    leaves = [x.detach().requires_grad_(True) for x in inputs]
    output = contender.attend(*leaves)
    wanted = leaves if contender.has_maps else leaves[:3]
    gradients = torch.autograd.grad(output, wanted, upstream)
    pairs = zip(INPUTS[: len(wanted)], gradients, exact.gradients, strict=True)
    errors = {name: relative_error(found, expected) for name, found, expected in pairs}
    return {"forward": relative_error(output, exact.output), **errors}


def check(
    contenders: Sequence[Contender], inputs: Sequence[Tensor], seed: int
) -> Iterator[tuple[Contender, Row | str]]:
    """Yield each contender with its errors, or with why it cannot be compared.

    Raises RuntimeError where the first, our own, is wrong: its speed would mean nothing.
    """
    generator = torch.Generator(inputs[0].device).manual_seed(seed)
    upstream = torch.randn(
        inputs[0].shape, generator=generator, dtype=inputs[2].dtype, device=inputs[2].device
    )
    exact: dict[str, Exact] = {}
    for contender in contenders:
        if contender.kind not in exact:
            exact[contender.kind] = _DEFINITIONS[contender.kind](inputs, upstream)
        try:
            errors = compare(contender, inputs, upstream, exact[contender.kind])
        except Exception as error:
            # Whatever a rival cannot do, the others can still be measured.
            if contender is contenders[0]:
                raise
            yield (
                contender,
                f"{contender.name} cannot run: {(str(error) or repr(error)).splitlines()[0]}",
            )
            continue
        name, worst = max(
            errors.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1]
        )
        if worst < contender.tolerance:
            yield contender, errors
            continue
        wrong = (
            f"{contender.name} differs from its definition in fp64 by {worst:.1e} ({name}, "
            f"{inputs[0].shape[1]} tokens): not timed"
        )
        if contender is contenders[0]:
            raise RuntimeError(wrong)
        yield contender, wrong
