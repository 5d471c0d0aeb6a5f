"""Check a model's variants against plain ones, time them, and turn the times into rows."""

import dataclasses
import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from linvideo_core.run.errors import SettingError

from ..kernels.agreement import relative_error
from ..kernels.baselines import Contender, make_contenders
from ..kernels.speed import Setting as KernelSetting
from ..kernels.speed import check_contenders
from ..kernels.timing import extra_mb, median_of_runs, time_once
from .headless import Call, RandomTeacher, Setting, Variant, find_softmax, plan_variants
from .sizes import SIZES, VIDEO_STEPS, Size, count_flops, find_peak

METHOD = "median of calls, each until the device is done with it; first call excluded"
SAMPLED, COMPUTED = "sampled", "computed"

_LENGTHS, _HEADS = (1000,), 2
# Relative norms of differences, for models of bf16; a CPU computes in fp32.
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
_BRANCHES, _MOST_RUNS = 2, 5
_MEGABYTE, _GIGABYTE = 2**20, 2**30

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience:
    """How long is measured.

    seconds: a call's time is the median of the runs that fit, on a GPU of at least 3, at most 5.
    video_seconds: a video is sampled if that should take no longer.
    """

    seconds: float
    video_seconds: float


def check_kernels(
    softmax: Mapping[str, Contender], setting: Setting
) -> tuple[dict[str, Contender], list[Row], list[str]]:
    """Compare the fused linear path and all softmax backends with their definitions in fp64.

    Returns the backends that agree, all errors, and a sentence for each that was left out.
    Raises RuntimeError where the linear path is wrong: its speed would mean nothing.
    """
    own = make_contenders("triton" if setting.device.type == "cuda" else "reference")[0]
    kernel_setting = KernelSetting(setting.device, setting.dtype, setting.seed)
    contenders = [own, *softmax.values()]
    agreeing, rows, left_out = check_contenders(contenders, kernel_setting, _LENGTHS, _HEADS)
    names = {contender.name for contender in agreeing}
    return {k: c for k, c in softmax.items() if c.name in names}, rows, left_out


def shrink(size: Size) -> Size:
    """Return a size of the same width with two layers, one of them linear, and few tokens."""
    config = dataclasses.replace(size.config, num_layers=2)
    return dataclasses.replace(
        size, config=config, layers=(1,), num_frames=5, height=128, width=192
    )


def check_size(
    size: Size, softmax: Mapping[str, Contender], setting: Setting, *, compiled: bool = False
) -> list[Row]:
    """Compare the variants of a shrunk model with the plain one and with linear layers in fp32.

    All layers softmax must give what the plain model gives, whatever backend computes them; linear
    layers must give what the plain PyTorch definition gives in a model of the same weights.

    Returns the error of each variant.
    Raises RuntimeError for a variant that is wrong.
    """
    size = shrink(size)
    expected = _compute_expected(size, setting)
    teacher = RandomTeacher(size, softmax, setting)
    rows = []
    for variant in plan_variants(list(softmax), len(size.layers), compiled=compiled):
        try:
            found = teacher.with_call(variant, lambda call: call())
        except Exception:
            # What cannot be compiled is named when it is to be timed.
            if not variant.is_compiled:
                raise
            continue
        error = relative_error(found, expected[variant.num_linear].to(found.device))
        rows.append({**dataclasses.asdict(variant), "error": error})
        if not error < _TOLERANCE[setting.dtype]:
            raise RuntimeError(
                f"{variant} differs from the plain model by {error:.1e}; nothing was timed"
            )
    return rows


@torch.inference_mode()
def _compute_expected(size: Size, setting: Setting) -> dict[int, Tensor]:
    """Return the plain model's velocity, and in fp32 that of the model with its linear layers."""
    softmax = {"default": next(c for c in make_contenders() if c.name == "sdpa")}
    teacher = RandomTeacher(size, softmax, setting)
    plain = teacher.call_model()
    # At this head dim the definition in plain PyTorch computes fp32, on every device.
    teacher.model.float()
    variant = Variant(num_linear=len(size.layers), kept="default")
    return {0: plain, variant.num_linear: teacher.with_call(variant, lambda call: call())}


def measure(
    teacher: RandomTeacher, variant: Variant, patience: Patience, device: torch.device
) -> Row:
    """Measure one variant; its first call, which may compile, gives the memory and no time.

    Returns the variant's fields, `seconds` of a call, `peak_gb` (2^30 bytes: the weights and all
    that is allocated during a call), `weights_gb`, `video_seconds`, and `video`: whether those were
    "sampled", or "computed" as that many calls.
    Raises RuntimeError where its output is not finite: such numbers are computed at another speed.
    """
    outputs: list[Tensor] = []
    fewest = 3 if device.type == "cuda" else 1

    def use(call: Call) -> tuple[float, float]:
        def keep_output() -> Tensor:
            outputs[:] = [call()]
            return outputs[0]

        memory = extra_mb(keep_output, device)
        runs = {"runs": _MOST_RUNS, "seconds": patience.seconds, "fewest": fewest}
        return memory, median_of_runs(keep_output, device, **runs)

    memory, milliseconds = teacher.with_call(variant, use)
    if not outputs.pop().isfinite().all():
        raise RuntimeError(f"{teacher.size.name}: {variant} gives no finite output")
    computed, how = _BRANCHES * VIDEO_STEPS * milliseconds / 1000, COMPUTED
    # One pair of videos shows whether calls add up to them: that of the default path.
    if variant.kept == "default" and not variant.is_compiled and computed <= patience.video_seconds:
        computed = teacher.with_video(variant, lambda call: time_once(call, device)) / 1000
        how = SAMPLED
    weights = teacher.weight_bytes(variant)
    return {
        **dataclasses.asdict(variant),
        "seconds": milliseconds / 1000,
        "peak_gb": (weights + memory * _MEGABYTE) / _GIGABYTE,
        "weights_gb": weights / _GIGABYTE,
        "video_seconds": computed,
        "video": how,
    }


def measure_size(
    size: Size,
    backends: Sequence[str],
    setting: Setting,
    patience: Patience,
    *,
    compiled: bool = False,
) -> Row:
    """Check agreement, then measure all variants of a size.

    A softmax backend that cannot run is left out and named; what the default cannot do is raised.

    Returns `rows` of `measure`, and how they came about.
    """
    wanted, absent = find_softmax(backends, setting.device.type)
    softmax, kernels, wrong = check_kernels(wanted, setting)
    models = check_size(size, softmax, setting, compiled=compiled)
    free_memory()
    teacher = RandomTeacher(size, softmax, setting)
    rows, left_out = [], [*absent, *wrong]
    plan = plan_variants(list(softmax), len(size.layers), compiled=compiled)
    for variant in tqdm(plan, size.name):
        try:
            rows.append(measure(teacher, variant, patience, setting.device))
        except Exception as error:
            # Whatever a rival cannot do, the others can still be measured.
            if variant.kept == "default" and not variant.is_compiled:
                raise
            reason = (str(error) or repr(error)).splitlines()[0]
            left_out.append(f"{size.name}, {variant.kept}: {reason}")
        free_memory()
    return {
        "size": size.name,
        "where": "headless",
        "method": METHOD,
        "agreement": [*kernels, *models],
        "left_out": left_out,
        "rows": rows,
    }


def free_memory() -> None:
    """Give back what dropped models held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_memory(size: Size, device: torch.device, dtype: torch.dtype) -> None:
    """Raise SettingError where a device cannot hold a size's weights and a call.

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
        raise SettingError(
            f"{{shapes}} {size.name} takes about {(weights + call) / _GIGABYTE:.0f} GB and "
            f"{free / _GIGABYTE:.0f} GB are free on {torch.cuda.get_device_name(device)}: leave it "
            "out, or free the device",
            "shapes",
        )


def to_rows(run: Mapping[str, Any]) -> list[Row]:
    """Turn what `measure_size` returns, with its `device`, into the record's rows.

    Each baseline, the softmax model by one backend, has a row of its own, one of the linearized
    model whose kept layers it computes, and one where the fastest backend computes them. Compiled
    models are compared with compiled ones.
    """
    size, peak = SIZES[run["size"]], find_peak(run["device"])
    rows = []
    for is_compiled in (False, True):
        alike = [row for row in run["rows"] if row["is_compiled"] == is_compiled]
        linear = [row for row in alike if row["num_linear"]]
        best = min(linear, key=lambda row: row["seconds"], default=None)
        for baseline in (row for row in alike if not row["num_linear"]):
            same = [row for row in linear if row["kept"] == baseline["kept"] or row is best]
            for row in (baseline, *same):
                rows.append({**_to_row(size, row, baseline, peak), "where": run["where"]})
    return rows


def _to_row(size: Size, found: Row, baseline: Row, peak: float | None) -> Row:
    flops = count_flops(size, found["num_linear"])
    return {
        "model": size.model,
        "resolution": size.resolution,
        "what": "denoise",
        "linear_layers": found["num_linear"],
        "baseline": baseline["kept"],
        "kept_layers": found["kept"],
        "compiled": found["is_compiled"],
        "speedup": baseline["seconds"] / found["seconds"],
        "seconds": found["seconds"],
        "peak_gb": found["peak_gb"],
        "mfu": flops / found["seconds"] / peak if peak else None,
        "video_seconds": found["video_seconds"],
        "video": found["video"],
        "gpus": 1,
    }
