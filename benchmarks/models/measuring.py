"""Time every variant of one teacher in one run, and keep what was measured as it comes."""

import dataclasses
import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linvideo_core.run.files import write_json
from linvideo_core.run.progress import Progress

from ..kernels.timing import LONGEST_SPIN, METHOD, CpuInstruments, CudaInstruments, Instruments
from .arithmetic import count_flops
from .sizes import VIDEO_STEPS, Size
from .teachers import Call, Teacher
from .variants import Variant

SAMPLED, COMPUTED = "sampled", "computed"

_BRANCHES = 2
_MEGABYTE, _GIGABYTE = 2**20, 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience:
    """How long is measured.

    runs, seconds: a call's time is the median of so many runs, or of those that fit, at least 3.
    video_seconds: a video is sampled if that should take no longer.
    """

    runs: int
    seconds: float
    video_seconds: float

    def make_instruments(self, device_type: str) -> Instruments:
        """Return what measures calls of whole models on a device."""
        settings = {"runs": self.runs, "seconds": self.seconds}
        # Python takes tens of milliseconds to queue a call: no shorter spin would do.
        if device_type == "cuda":
            return CudaInstruments(**settings, spin=LONGEST_SPIN)
        return CpuInstruments(**settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What one variant gave: seconds of a call and of a video, GB (2^30 bytes).

    peak_gb: the weights and all that is allocated during a call at its peak.

    video: whether the video's seconds were "sampled", or "computed" as that many calls.
    """

    num_linear: int
    kept: str
    is_compiled: bool
    seconds: float
    peak_gb: float
    weights_gb: float
    video_seconds: float
    video: str


def measure(
    teacher: Teacher, variant: Variant, instruments: Instruments, video_seconds: float
) -> Measured:
    """Measure one variant; its first call, which may compile, gives the memory and no time.

    Raises RuntimeError where its output is not finite: such numbers are computed at another speed.
    """
    outputs: list[Tensor] = []

    def use(call: Call) -> tuple[float, float]:
        def keep_output() -> Tensor:
            outputs[:] = [call()]
            return outputs[0]

        return instruments.extra_mb(keep_output), instruments.milliseconds(keep_output)

    extra_mb, milliseconds = teacher.with_call(variant, use)
    if not outputs.pop().isfinite().all():
        raise RuntimeError(
            f"{teacher.where}, {teacher.size.name}: {variant} gives no finite output"
        )
    computed, how = _BRANCHES * VIDEO_STEPS * milliseconds / 1000, COMPUTED
    # One pair of videos shows whether calls add up to them: that of the default path.
    if variant.kept == "default" and not variant.is_compiled and computed <= video_seconds:
        computed, how = teacher.with_video(variant, instruments.once) / 1000, SAMPLED
    weights = teacher.weight_bytes(variant)
    return Measured(
        **dataclasses.asdict(variant),
        seconds=milliseconds / 1000,
        peak_gb=(weights + extra_mb * _MEGABYTE) / _GIGABYTE,
        weights_gb=weights / _GIGABYTE,
        video_seconds=computed,
        video=how,
    )


def measure_subject(
    teacher: Teacher,
    plan: Sequence[Variant],
    patience: Patience,
    device: torch.device,
    path: Path,
    progress: Progress,
    details: Mapping[str, Any],
) -> None:
    """Measure all variants and write them to `path`, after each, with how it was done.

    details: kept beside the numbers; `read_measured` asks for some of it.

    A softmax backend that cannot run is left out and named; what the default cannot do is raised.
    """
    instruments = patience.make_instruments(device.type)
    work = [max(1, count_flops(teacher.size, v.num_linear) // 10**12) for v in plan]
    measured, left_out = [], []
    kept = {"method": METHOD if device.type == "cuda" else "median of calls in a row"}
    kept |= {"where": teacher.where, "size": teacher.size.name, **details, **teacher.describe()}
    for i, variant in enumerate(plan):
        progress(f"{teacher.where}, {teacher.size.name}", sum(work[:i]), sum(work))
        try:
            measured.append(measure(teacher, variant, instruments, patience.video_seconds))
        except Exception as error:
            # Whatever a rival cannot do, the others can still be measured.
            if variant.kept == "default" and not variant.is_compiled:
                raise
            reason = (str(error) or repr(error)).splitlines()[0]
            left_out.append(f"{teacher.where}, {teacher.size.name}, {variant.kept}: {reason}")
        rows = [dataclasses.asdict(item) for item in measured]
        is_complete = i + 1 == len(plan)
        write_json(path, {"is_complete": is_complete, **kept, "left_out": left_out, "rows": rows})
        free_memory()
    progress(f"{teacher.where}, {teacher.size.name}", sum(work), sum(work))


def read_measured(path: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a finished earlier run measured, if any, and if it was made with these facts."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete it and repeat the command"
        ) from error
    is_same = all(found.get(key) == value for key, value in facts.items())
    return found if is_same and found["is_complete"] else None


def free_memory() -> None:
    """Give back what dropped models held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_memory(size: Size, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError, in one sentence, where a device cannot hold a size's weights and a call.

    The estimate of a call: two tensors as wide as the feed-forward layer, and twelve of the width.
    """
    if device.type != "cuda":
        return
    config = size.config
    block = 8 * config.dim**2 + 2 * config.dim * config.ffn_dim
    weights = config.num_layers * block * dtype.itemsize
    call = size.tokens * (2 * config.ffn_dim + 12 * config.dim) * dtype.itemsize
    free, _ = torch.cuda.mem_get_info(device)
    if weights + call > free:
        raise ValueError(
            f"--shapes {size.name} takes about {(weights + call) / _GIGABYTE:.0f} GB and "
            f"{free / _GIGABYTE:.0f} GB are free on {torch.cuda.get_device_name(device)}: leave it "
            "out, or free the device"
        )
