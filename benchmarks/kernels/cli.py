"""Measure what attention costs as videos grow: `python -m benchmarks.kernels`.

On a GPU: the fused kernels at Wan's shapes in bf16, forward, backward and with norm and rotation,
over their byte floor and against softmax and plain PyTorch. On a CPU: one linear and one softmax
layer, one head of 128 in fp32, over a doubling number of tokens. All must agree with their
definition in fp64 before anything is timed.
    python -m benchmarks.kernels                    # minutes; the tables of docs/kernels.md
    python -m benchmarks.kernels --quick --out runs/speed
    python -m benchmarks.kernels --device cpu --most-tokens 4096 --out runs/cost
The folder `--out` then holds kernels.json and kernels.png, or cost_cpu.json and cost_cpu.png.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linvideo_core.kernels import norm_rotary
from linvideo_core.models.wan import rotary_embedding
from linvideo_core.run.config import option, parse, positive, to_flags
from linvideo_core.run.devices import resolve_device
from linvideo_core.run.errors import SettingError

from ..plots import plot_cost
from ..record import RESULTS_FOLDER, show_rows, write_record
from . import speed
from .baselines import find_public, make_contenders

_USUAL = {
    "cpu": {"most_tokens": 65536, "seconds": 25.0},
    "cuda": {"most_tokens": 131072, "seconds": 0.4},
}
_QUICK = {"most_tokens": 4096, "seconds": 0.1}
_EPS, _CPU_TOLERANCE = 1e-6, 1e-4
LAYERS = ("linear", "softmax")
_QUICK_SHAPES = (speed.Shape(4680, 12),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Where, how many tokens, and how patiently each number is measured."""

    device: str = option(
        "auto", "what is measured; auto: cuda where there is one", choices=("auto", "cpu", "cuda")
    )
    quick: bool = option(False, "a short video and few runs, to try it out; needs --out")
    fewest_tokens: int = option(1024, "tokens of the shortest video")
    most_tokens: int | None = option(
        None, "tokens of the longest video, each twice the one before; none: 65536, cuda 131072"
    )
    seconds: float | None = option(
        None, "for about how long a call is repeated, its time being the median; none: 25, cuda 0.4"
    )
    seed: int = option(0, "seed of the tensors")
    out: Path | None = option(None, "folder for record and picture; none: results")

    def __post_init__(self) -> None:
        positive(self, "fewest_tokens", *([] if self.seconds is None else ["seconds"]))
        if self.most_tokens is not None and self.most_tokens < 2 * self.fewest_tokens:
            raise SettingError(
                f"{{most_tokens}} {self.most_tokens} given; at least twice {{fewest_tokens}} "
                f"{self.fewest_tokens} is needed",
                "most_tokens",
                "fewest_tokens",
            )
        if self.quick and self.out is None:
            raise SettingError(
                "{quick} given without {out}; name a folder, so that the measured record stays",
                "quick",
                "out",
            )

    @property
    def folder(self) -> Path:
        """Where table and picture go."""
        return self.out or RESULTS_FOLDER

    @property
    def sizes(self) -> list[int]:
        """The numbers of tokens, ascending, of a settled config."""
        doublings = int(math.log2(self.most_tokens / self.fewest_tokens))
        return [self.fewest_tokens * 2**i for i in range(doublings + 1)]

    def settle(self) -> "BenchmarkConfig":
        """Return the config with the device that is meant, and its usual numbers filled in."""
        device = resolve_device(self.device)
        usual = _QUICK if self.quick else _USUAL[device]
        missing = {name: value for name, value in usual.items() if getattr(self, name) is None}
        return dataclasses.replace(self, device=device, **missing)


def make_norm_rotary(
    backend: str, shape: speed.Shape, device: torch.device, dtype: torch.dtype
) -> speed.NormRotary:
    """Return Wan's qk-norm and rotation by a backend: [B, L, N D] -> [B, L, N, D]."""
    weight, rotary = _draw_norm_rotary(shape, device, dtype)
    return lambda x: norm_rotary(x, weight, rotary, shape.heads, eps=_EPS, backend=backend)


def _draw_norm_rotary(
    shape: speed.Shape, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = 1 + 0.1 * torch.randn(shape.heads * speed.HEAD_DIM, generator=generator)
    weight = weight.to(torch.bfloat16).to(device, dtype)
    return weight, rotary_embedding((shape.tokens, 1, 1), speed.HEAD_DIM, device)


MODULES = {
    "module, eager norm and RoPE": functools.partial(make_norm_rotary, "reference"),
    "module": functools.partial(make_norm_rotary, "triton"),
}
"""Pass of the record -> norm and rotation before attention; the first is what rivals have too."""


def find_modules() -> tuple[dict[str, speed.MakeNormRotary], list[str]]:
    """Return all modules that can be measured, and a sentence for what is absent."""
    try:
        import comfy_kitchen
    except ImportError as error:
        return MODULES, [f"ComfyUI's norm and rotation are not compared: {error}"]
    rotate = functools.partial(make_kitchen_norm_rotary, comfy_kitchen.apply_rope1)
    return {**MODULES, speed.KITCHEN: rotate}, []


def make_kitchen_norm_rotary(
    apply_rope: Callable[[Tensor, Tensor], Tensor],
    shape: speed.Shape,
    device: torch.device,
    dtype: torch.dtype,
) -> speed.NormRotary:
    """Return qk-norm and rotation as ComfyUI runs them for Wan: PyTorch's norm, then its kernel."""
    weight, rotary = _draw_norm_rotary(shape, device, dtype)
    cos, sin = rotary
    turn = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))[None, :, None]
    heads = (shape.heads, speed.HEAD_DIM)
    return lambda x: apply_rope(F.rms_norm(x, weight.shape, weight, _EPS).unflatten(2, heads), turn)


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Check agreement, measure, write record and picture; return the record."""
    config = config.settle()
    config.folder.mkdir(parents=True, exist_ok=True)
    return (_run_speed if config.device == "cuda" else _run_cost)(config)


def _run_cost(config: BenchmarkConfig) -> dict[str, Any]:
    setting = speed.Setting(torch.device("cpu"), torch.float32, config.seed, config.seconds)
    contenders = [
        dataclasses.replace(contender, tolerance=_CPU_TOLERANCE)
        for contender in make_contenders("reference")
        if contender.name in ("fused", "sdpa")
    ]
    agreeing, _, left_out = speed.check_contenders(contenders, setting, (257,), heads=1)
    if left_out:
        raise RuntimeError(f"{left_out[0]}; nothing was timed")
    rows = speed.measure_over_tokens(config.sizes, agreeing, setting, heads=1)
    title = f"One attention layer, one head of {speed.HEAD_DIM}, fp32"
    return _write(config, "cost_cpu", title, rows, over_tokens=rows)


def _run_speed(config: BenchmarkConfig) -> dict[str, Any]:
    setting = speed.Setting(torch.device("cuda"), seed=config.seed, seconds=config.seconds)
    shapes = _QUICK_SHAPES if config.quick else speed.SHAPES
    public, absent = find_public()
    modules, no_module = find_modules()
    contenders = [*make_contenders(), *public]
    rows, details = speed.measure_speed(shapes, config.sizes, contenders, modules, setting)
    details["left_out"] = [*absent, *no_module, *details["left_out"]]
    title = (
        f"Fused linear attention, heads of {speed.HEAD_DIM}, bf16, batch 1; floor: bytes at the "
        f"{details['copy_terabytes_per_second']:.2f} TB/s of a copy"
    )
    return _write(config, "kernels", title, rows, details["over_tokens"], details=details)


def _write(
    config: BenchmarkConfig,
    name: str,
    title: str,
    rows: list[dict[str, Any]],
    over_tokens: list[dict[str, Any]],
    *,
    details: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a record and the plot of time and memory over tokens."""
    slopes = {layer: speed.fit_slope(over_tokens, layer, "milliseconds") for layer in LAYERS}
    fitted = ", ".join(f"{layer} n^{slope:.2f}" for layer, slope in slopes.items())
    plot_cost(over_tokens, config.folder / f"{name}.png", slopes=slopes)
    usual = _QUICK if config.quick else _USUAL[config.device]
    asked = {field: None for field, value in usual.items() if getattr(config, field) == value}
    flags = to_flags(dataclasses.replace(config, **asked), without=["out"])
    return write_record(
        config.folder / f"{name}.json",
        title=f"{title}: time grows as {fitted}",
        command=f"python -m benchmarks.kernels {flags}".strip(),
        rows=rows,
        device=config.device,
        details=details,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure, show the table."""
    config = parse(BenchmarkConfig, argv, description=__doc__)
    record = run(config)
    for sentence in record.get("details", {}).get("left_out", []):
        sys.stdout.write(f"{sentence}\n")
    sys.stdout.write(f"\n{record['title']}\n\n{show_rows(record['rows'])}\n")
    sys.stdout.write(f"table and picture: {config.folder}\n")
