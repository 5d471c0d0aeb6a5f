"""Run a whole transfer of a Wan with random weights: `python -m benchmarks.models.whole_transfer`.

It is `python -m linvideo_core.transfer --model`, with the settings that follow from the model, the
quality and the card, except that every stage has few steps: what a stage takes of the GPU does not
depend on how long it lasts. PyTorch may use no more memory than `--cap-gb` says, so a row proves
that the command passes on such a card. `--flags` may ask for longer stages; a row "estimate" then
says how near the seconds come that the command had told beforehand.
    python -m benchmarks.models.whole_transfer --size 1.3b-480p --cap-gb 23
    python -m benchmarks.models.whole_transfer --size 14b-480p --cap-gb 23 --flags "--num-frames 33"
    python -m benchmarks.models.whole_transfer --size tiny --device cpu
Rows of one size, number of frames and cap replace earlier ones in --out or results.
"""

import dataclasses
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from linvideo_core.run import limits
from linvideo_core.run.callbacks import Callbacks, Stage
from linvideo_core.run.config import Settings, option, override, parse, run_command, to_flags
from linvideo_core.run.devices import device_option, resolve_device
from linvideo_core.run.memory import LOWER_RUN, explained
from linvideo_core.transfer import cli, command
from linvideo_core.transfer.config import QUALITIES, TransferConfig

from ..in_app.checkpoints import write_wan
from ..in_app.headless import write_prompts
from ..record import RESULTS_FOLDER, change_part, check_parts, replacing, show_rows
from .sizes import SIZES, Size
from .training_steps import GB, capped

_PARTS = ("memory", "estimate")
_KEY = ("model", "resolution", "frames", "cap_gb")

# Of each stage enough that its largest allocation is made, and no more.
_SHORT = (
    "--sampler-steps 4 --states-per-trajectory 4 --warm-start-steps 2 --steps 4 "
    "--evaluate-samples 2"
)
# Of whichever states it learns from.
_FEW_VIDEOS = {"num_trajectories": 1, "pool_videos": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeConfig(Settings):
    """Which transfer is run."""

    size: str = option("1.3b-480p", "model and video", choices=tuple(SIZES))
    cap_gb: float | None = option(
        None, "memory of the GPU that may be used, in GB of 2^30 bytes; none: all", limits.POSITIVE
    )
    quality: str = option("standard", "whose settings are taken", choices=QUALITIES)
    flags: str = option("", "other flags of linvideo_core.transfer")
    device: str = device_option()
    out: Path = option(Path("runs/whole-transfer"), "folder of the model, the run and the rows")
    record: bool = option(False, "write results/recipe.json, not the one in --out")


class StagePeaks(Callbacks):
    """Keeps of every stage how many units it had, its seconds, and the memory at its peak."""

    def __init__(self, device: str) -> None:
        self.rows: list[dict[str, Any]] = []
        self.estimate: dict[str, float] = {}
        self._announced = 0.0
        self._device = torch.device(device)
        self._begin("reading and estimating")

    def on_estimate(self, seconds: float) -> None:
        """Keep what was said, and when."""
        self.estimate = {"estimated_seconds": seconds}
        self._announced = time.perf_counter()

    def on_stage(self, stage: Stage, total: int, done: int = 0, detail: str = "") -> None:
        """End the stage before and begin another."""
        self.end()
        self._begin(stage)

    def on_step_end(self, done: int, **metrics: float) -> None:
        """Count a unit."""
        self._units = done

    def end(self) -> None:
        """End the last stage."""
        peak = None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            peak = torch.cuda.max_memory_reserved(self._device) / GB
        seconds = time.perf_counter() - self._start
        row = {"stage": self._stage, "units": self._units, "seconds": seconds, "peak_gb": peak}
        self.rows.append(row)
        if self.estimate:
            seconds = time.perf_counter() - self._announced
            self.estimate |= {
                "seconds": seconds,
                "real_over_estimated": seconds / self.estimate["estimated_seconds"],
            }

    def _begin(self, stage: str) -> None:
        self._stage, self._units, self._start = stage, 0, time.perf_counter()
        if self._device.type == "cuda":
            # What an earlier stage reserved and no longer uses must not count.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)


def make_settings(config: WholeConfig, size: Size, device: str) -> TransferConfig:
    """Write a model and prompts into `config.out`, and return the settings of their transfer."""
    config.out.mkdir(parents=True, exist_ok=True)
    model, prompts = (config.out / name for name in (f"{size.name}.safetensors", "p.safetensors"))
    if not model.exists():
        write_wan(model, size, "bf16", device)
    write_prompts(prompts, size)
    own = [f"--model={model}", f"--prompts={prompts}", f"--out={config.out / 'run'}"]
    own += [f"--num-frames={size.num_frames}", f"--height={size.height}", f"--width={size.width}"]
    # A run that is there would decide settings of this one.
    shutil.rmtree(config.out / "run", ignore_errors=True)
    own += [f"--shift={size.shift}", f"--quality={config.quality}", f"--device={device}"]
    if config.cap_gb is not None:
        own.append(f"--card={int(config.cap_gb)}")
    settings = cli.read([*own, *_SHORT.split(), *shlex.split(config.flags)])
    return override(settings, _FEW_VIDEOS)


def run(config: WholeConfig) -> dict[str, list[dict[str, Any]]]:
    """Run the transfer; return rows by part, one of every stage and one of its estimate."""
    size, device = SIZES[config.size], resolve_device(config.device)
    with capped(device, config.cap_gb), explained(LOWER_RUN):
        settings = make_settings(config, size, device)
        peaks = StagePeaks(device)
        command.run(settings, peaks)
        peaks.end()
    common = {
        "model": size.model,
        "resolution": size.resolution,
        "frames": settings.teacher.num_frames,
        "cap_gb": config.cap_gb,
        "tile": settings.student.form.tile or None,
        "batch": settings.training.batch_size,
        "frozen": settings.teacher.frozen_weights.frozen,
        "offloaded": settings.teacher.frozen_weights.offload_blocks,
    }
    found = {"memory": peaks.rows, "estimate": [peaks.estimate]}
    return {what: [{"what": what} | common | row for row in found[what]] for what in _PARTS}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, run the transfer, keep its rows, show them."""
    config = parse(WholeConfig, argv, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path = (RESULTS_FOLDER if config.record else config.out) / "recipe.json"
    check_parts(path, resolve_device(config.device))
    for part, rows in run(config).items():
        change_part(
            path,
            part,
            replacing(rows, _KEY, rows),
            title="What a transfer of a model of one's own takes and learns from",
            command="python -m benchmarks.models.whole_transfer "
            f"{to_flags(config, without=('out', 'device'))}",
            device=resolve_device(config.device),
        )
        sys.stdout.write(f"\n{show_rows(rows)}\n")
    sys.stdout.write(f"record: {path}\n")


if __name__ == "__main__":
    run_command(main)
