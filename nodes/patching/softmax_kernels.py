"""What computes a MODEL's softmax layers: one kernel, the fastest dense one, or sparse attention.

Each is what ComfyUI's models know as an attention override. It serves self-attention where no
linear layer has answered; everything else goes to what was there before.
"""

import dataclasses
import functools
import logging
import re
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...linvideo_core.kernels.softmax import (
    SPARSE_HEAD_DIM,
    check_density,
    softmax_attention,
    sparse_attention,
    why_not_sparse,
)
from ...linvideo_core.models.attention_sites import shapes_of
from ...linvideo_core.models.families import identify
from .apply import show_words
from .attention_override import Call, override_self_attention
from .families import HostFamily, host_family

KERNELS = {"cuDNN": "cudnn", "FlashAttention": "flash"}
"""Name on a node -> PyTorch's kernel."""

_OWN = "ComfyUI's own attention"
_RUNS = 3
_SLOT = "optimized_attention_override"

logger = logging.getLogger(__name__)

_KEY = "linvideo_softmax"


class Words:
    """What stands under the node that chose a kernel: its sentences, each of one subject."""

    def __init__(self, node_id: str | None) -> None:
        self._node_id, self._lines = node_id, {}

    def tell(self, subject: str, line: str) -> None:
        """Show a sentence in place of an earlier one of its subject."""
        if self._lines.get(subject) != line:
            self._lines[subject] = line
            show_words("\n".join(self._lines.values()), self._node_id)

    def time(self, executor: Any, guider: Any, sigmas: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Sample, and tell how long it took; ComfyUI's wrapper around a sampler, weights loaded."""
        begin = time.perf_counter()
        output = executor(guider, sigmas, *args, **kwargs)
        if output.device.type == "cuda":
            torch.cuda.synchronize(output.device)
        seconds, steps = time.perf_counter() - begin, len(sigmas) - 1
        each = seconds / max(steps, 1)
        self.tell("time", f"Sampling took {seconds:.1f} s: {steps} steps of {each:.3g} s.")
        return output


def add_words(model: Any, node_id: str | None) -> Words:
    """Let a ModelPatcher's node tell how long samplings take; return what it says."""
    words = Words(node_id)
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, _KEY, words.time)
    return words


def use_kernel(model: Any, name: str) -> None:
    """Let a kernel of `KERNELS` compute a ModelPatcher's softmax layers."""
    attend = functools.partial(softmax_attention, kernel=KERNELS[name])
    override_self_attention(model, lambda call: call.answer(attend), f"PyTorch's {name}")


def use_fastest(model: Any, words: Words) -> None:
    """Let the fastest dense kernel compute them, measured at the first call of each size.

    Where the model is compiled nothing can be measured, and ComfyUI's own attention stays.
    """

    # Of this model alone: what ComfyUI's own attention is, other nodes decide.
    fastest: dict[tuple, tuple[str, str]] = {}

    def serve(call: Call) -> Tensor:
        if call.query.device.type != "cuda" or torch.compiler.is_compiling():
            return call.own()
        case = (call.query.device, call.query.dtype, call.query.shape, call.heads)
        if case not in fastest:
            fastest[case] = _measure(call)
        name, told = fastest[case]
        override.kernel = name
        words.tell("kernel", told)
        return _answers(call)[name]()

    override = override_self_attention(model, serve, _OWN)


def _answers(call: Call) -> dict[str, Callable[[], Tensor]]:
    """Return by name what can answer a call."""
    answers = {_OWN: call.own}
    for name, kernel in KERNELS.items():
        attend = functools.partial(softmax_attention, kernel=kernel)
        answers[f"PyTorch's {name}"] = functools.partial(call.answer, attend)
    return answers


def _measure(call: Call) -> tuple[str, str]:
    """Return the name of what answers a call fastest, and how long each took, in words."""
    times = {}
    for name, answer in _answers(call).items():
        try:
            answer()
        except ValueError:
            # A kernel that does not know the card, the dtype or the head size.
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(_RUNS):
            answer()
        end.record()
        end.synchronize()
        times[name] = begin.elapsed_time(end) / _RUNS
    fastest = min(times, key=times.get)
    shown = ", ".join(f"{name} {time:.3g} ms" for name, time in times.items())
    shape = " x ".join(map(str, call.query.shape))
    told = f"{fastest} computes the softmax layers: at {shape}, a call takes {shown}."
    logger.info("LinVideo: %s", told)
    return fastest, told


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseSettings:
    """How sparse a MODEL's softmax layers are, where and when.

    density: see `sparse_attention`.
    start_percent, end_percent: the part of sampling, 0 to 1, in which layers are sparse; before and
        after it they are what they were.
    dense_layers: layers that stay dense, counted from 0.
    """

    density: float
    start_percent: float
    end_percent: float
    dense_layers: Collection[int]

    def __post_init__(self) -> None:
        check_density(self.density)
        if not 0 <= self.start_percent < self.end_percent <= 1:
            raise ValueError(
                f"start_percent {self.start_percent} and end_percent {self.end_percent} given; "
                "numbers from 0 to 1, the second the larger one, are needed"
            )


def parse_layers(text: str) -> set[int]:
    """Return the numbers of a list such as "0, 1, 28-29"; raise ValueError for anything else."""
    layers: set[int] = set()
    for part in filter(None, re.split(r"[,\s]+", text.strip())):
        found = re.fullmatch(r"([0-9]{1,3})(?:-([0-9]{1,3}))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise ValueError(
                f"dense_layers {text!r} given; numbers and ranges such as 0, 1, 28-29 are needed"
            )
        layers.update(range(first, last + 1))
    return layers


def use_sparse(model: Any, settings: SparseSettings, words: Words) -> None:
    """Let sparse attention compute a ModelPatcher's softmax layers.

    words: say where another node's attention is asked before ours.

    Raises ValueError, in one sentence, where comfy-kitchen, card, dtype or head size do not allow
    it, and for layers that the model does not have.
    """
    try:
        family, sites = identify(shapes_of(model.model.diffusion_model))
    except ValueError:
        # Its layers are served all the same; ComfyUI numbers them.
        host, head_dim, num_layers = None, SPARSE_HEAD_DIM, None
    else:
        host, head_dim = host_family(family.name), sites[0].head_dim
        num_layers = len(sites)
    dtype = getattr(model.model, "manual_cast_dtype", None) or model.model_dtype()
    if reason := why_not_sparse(model.load_device, head_dim, dtype):
        raise ValueError(f"sparse attention cannot be computed here: {reason}")
    if num_layers and (absent := [i for i in settings.dense_layers if i >= num_layers]):
        raise ValueError(
            f"dense_layers names layer {max(absent)}; the model's are 0 to {num_layers - 1}"
        )
    sparse = _Sparse(settings, host, words)
    name = f"sparse attention, {settings.density:.0%} of the blocks exact"
    sparse.override = override_self_attention(model, sparse.serve, name)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, sparse.watch)


class _Sparse:
    """Serves the softmax layers of one MODEL sparsely, within its part of the sampling."""

    def __init__(self, settings: SparseSettings, host: HostFamily | None, words: Words) -> None:
        self.override: Any = None
        self._settings, self._host, self._words = settings, host, words

    def watch(self, executor: Any, x: Any, sigma: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run one call of the model, ComfyUI's `apply_model`, at a noise level [B]."""
        sampling, settings = executor.class_obj.model_sampling, self._settings
        percents = (settings.start_percent, settings.end_percent)
        start, end = (float(sampling.percent_to_sigma(percent)) for percent in percents)
        self.override.is_resting = not end <= float(sigma.max()) <= start
        inputs = [each for each in (*args, *kwargs.values()) if isinstance(each, dict)]
        asked = [each[_SLOT] for each in inputs if _SLOT in each]
        if self.override not in asked:
            line = "The attention of another node, placed after this one, is asked first."
            self._words.tell("other", line)
        return executor(x, sigma, *args, **kwargs)

    def serve(self, call: Call) -> Tensor:
        """Answer a call sparsely, or as it was answered before where layers stay dense."""
        settings = self._settings
        if self.override.is_resting or self._is_kept_dense(call):
            return call.own()
        tokens = call.query.shape[-2]
        sinks = self._host.find_sinks(call.options, tokens) if self._host else {}
        return call.answer(functools.partial(sparse_attention, density=settings.density, **sinks))

    def _is_kept_dense(self, call: Call) -> bool:
        if not self._settings.dense_layers:
            return False
        layer = call.options.get("block_index")
        if layer is None:
            raise RuntimeError(
                "this model does not tell ComfyUI's attention which layer it is: leave "
                "dense_layers of LinVideo Softmax Backend empty"
            )
        return layer in self._settings.dense_layers
