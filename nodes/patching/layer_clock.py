"""How long the attention layers of a model take, measured in one call of it while it samples.

Hooks stand on the layers during that call alone. On a GPU they record events, which are read when
the sampling is over, so nothing waits; no event is recorded into a CUDA graph.
"""

import contextlib
import functools
import logging
import time
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...linvideo_core.artifact import ArtifactHeader
from ...linvideo_core.artifact.summary import LayerTimes, describe_times
from ...linvideo_core.kernels import why_not_fused
from ...linvideo_core.models.attention_sites import AttentionSite
from .attention_override import PYTORCH, is_resting, name_kernel

CLOCK = "linvideo_clock"
"""The name of a ModelPatcher's LayerClock among its attachments."""

_TRY_CUDNN = "try LinVideo Softmax Backend: with cuDNN the softmax layers may be faster on this GPU"

logger = logging.getLogger(__name__)


def why_plain(
    header: ArtifactHeader, device: torch.device, head_dim: int, dtype: torch.dtype
) -> str:
    """Return why fused kernels will not compute the layers of a file there, or ""."""
    mass = header.attention_mass if header.tile else ""
    form = {"feature_map": header.feature_map, "attention_mass": mass}
    return why_not_fused(device, head_dim, header.feature_dim, dtype, **form)


_Moment = torch.cuda.Event | float


class LayerClock:
    """Measures the layers in the first sampling of each clone of a MODEL, or of another size."""

    def __init__(
        self, header: ArtifactHeader, sites: Collection[AttentionSite], report: Any
    ) -> None:
        """header: of the applied file; sites: all of the model's; report: what shows the times."""
        self._linear = [site for site in sites if site.layer in header.linear_layers]
        self._softmax = [site for site in sites if site.layer not in header.linear_layers]
        self._header, self._report = header, report
        self._measured: weakref.WeakKeyDictionary[Any, Sequence[int]] = weakref.WeakKeyDictionary()
        self._device: torch.device | None = None
        self._restart(None)

    def _restart(self, device: torch.device | None) -> None:
        """Forget what was measured; device: where the model computes, none: measure nothing."""
        self._device = device
        self._begun: dict[str, _Moment] = {}
        self._moments: dict[str, tuple[_Moment, _Moment]] = {}
        self._softmax_kernel = ""
        self._shape, self._dtype = torch.Size(), torch.float32

    def sample(self, executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Sample, then show the times; ComfyUI's wrapper around every sampling of a model."""
        patcher = executor.class_obj.model_patcher
        is_new = self._measured.get(patcher) != noise.shape
        self._restart(patcher.load_device if is_new else None)
        if is_new:
            self._report.times = []
        output = executor(noise, *args, **kwargs)
        if lines := self._read():
            self._measured[patcher] = noise.shape
            self._report.times = lines
            self._report.show()
            logger.info("LinVideo: %s", "; ".join(lines))
        self._restart(None)
        return output

    @contextlib.contextmanager
    def measure(self, diffusion_model: nn.Module, options: Mapping[str, Any]) -> Iterator[None]:
        """Measure the layers that run within, if a call is to be measured still.

        options: the call's `transformer_options`. One in which the kernel of softmax layers rests
            is not measured: it would stand for those in which it computes.
        """
        is_wanted = self._device is not None and not self._moments and not is_resting(options)
        with contextlib.ExitStack() as undo:
            for site in (*self._linear, *self._softmax) if is_wanted else ():
                layer = diffusion_model.get_submodule(site.name)
                begin = functools.partial(self._begin, site.name)
                end = functools.partial(self._end, site.name)
                undo.callback(layer.register_forward_pre_hook(begin).remove)
                undo.callback(layer.register_forward_hook(end).remove)
                if site in self._softmax:
                    self._softmax_kernel = name_kernel(layer, options)
            yield

    def _begin(self, name: str, *_: Any) -> None:
        if (now := self._now()) is not None:
            self._begun[name] = now

    def _end(self, name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        if name in self._begun and (now := self._now()) is not None:
            self._moments[name] = self._begun.pop(name), now
            self._shape, self._dtype = output.shape[:-1], output.dtype

    def _now(self) -> _Moment | None:
        """Return this moment in the GPU's stream or in seconds, None where it cannot be taken."""
        if self._device.type == "cpu":
            return time.perf_counter()
        if self._device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self) -> list[str]:
        """Return what was measured, in words; nothing where no linear layer was."""
        if not any(site.name in self._moments for site in self._linear):
            return []
        is_plain = why_plain(self._header, self._device, self._linear[0].head_dim, self._dtype)
        linear = self._times("plain PyTorch" if is_plain else "fused Triton kernels", self._linear)
        softmax = self._times(self._softmax_kernel, self._softmax)
        lines = describe_times(self._shape, linear, softmax, kind=self._header.form.kind)
        if softmax.milliseconds and softmax.kernel == PYTORCH and self._may_gain_by_cudnn():
            lines.append(_TRY_CUDNN)
        return lines

    def _times(self, kernel: str, sites: Collection[AttentionSite]) -> LayerTimes:
        moments = (self._moments[site.name] for site in sites if site.name in self._moments)
        return LayerTimes(kernel, [_milliseconds(*pair) for pair in moments])

    def _may_gain_by_cudnn(self) -> bool:
        """Say whether cuDNN's attention is made for the GPU: Hopper and newer, in 16 bits."""
        is_nvidia = self._device.type == "cuda" and not torch.version.hip
        is_new = is_nvidia and torch.cuda.get_device_capability(self._device) >= (9, 0)
        return is_new and self._dtype.itemsize == 2


def _milliseconds(begin: _Moment, end: _Moment) -> float:
    if isinstance(begin, float):
        return 1000 * (end - begin)
    end.synchronize()
    return begin.elapsed_time(end)
