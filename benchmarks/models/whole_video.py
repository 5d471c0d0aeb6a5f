"""Time whole videos of a model file: `python -m benchmarks.models.whole_video`.

Teacher and student sample in turns, one guided video each, from the same noise. `seconds` is the
median over turns, `speedup` that of teacher over student within a turn: whoever else uses the
machine slows both. The student is a LINVIDEO file or, without one, the same model with untrained
feature maps, which take as long. On two CPU cores:
    OMP_NUM_THREADS=2 python -m benchmarks.models.whole_video --device cpu
    python -m benchmarks.models.whole_video --artifact runs/transfer/linearized.safetensors
"""

import contextlib
import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from linvideo_core import artifact
from linvideo_core.evaluate.compare import swap
from linvideo_core.evaluate.sampler import count_layers
from linvideo_core.flow import bind_guided, make_sigmas, sample_euler
from linvideo_core.models.checkpoint import load_wan
from linvideo_core.models.wan import WanConfig
from linvideo_core.run import limits
from linvideo_core.run.config import Settings, option, parse, run_command, to_flags
from linvideo_core.run.devices import device_option, resolve_device, resolve_precision
from linvideo_core.run.errors import SettingError

from ..kernels.timing import time_once
from ..record import RESULTS_FOLDER, check_file, show_rows, write_record
from .random_models import draw_inputs
from .sizes import FRAME_STRIDE, PIXEL_STRIDE, Size, spread_layers

_RECORD_NAME = "whole_video.json"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoConfig(Settings):
    """Which model and video, and how often it is sampled."""

    model: Path = option(
        Path("research/crowd/weights/model.safetensors"), "Wan safetensors: the teacher"
    )
    artifact: Path | None = option(None, "LINVIDEO file of the student; none: untrained maps")
    linear_layers: int = option(6, "without a file: layers that are made linear", limits.LAYERS)
    num_frames: int = option(61, "video frames", limits.FRAMES)
    height: int = option(256, "video height in pixels", limits.PIXELS)
    width: int = option(256, "video width in pixels", limits.PIXELS)
    prompt_tokens: int = option(6, "tokens of a prompt", limits.COUNT)
    steps: int = option(30, "guided Euler steps", limits.SAMPLER_STEPS)
    shift: float = option(5.0, "warp of the noise levels", limits.SHIFT)
    guidance_scale: float = option(3.0, "classifier-free guidance", limits.GUIDANCE_SCALE)
    turns: int = option(3, "videos of each model", limits.COUNT)
    out: Path = option(Path("runs/whole_video"), "folder of the table")
    record: bool = option(False, f"write results/{_RECORD_NAME}, not the one in --out")
    device: str = device_option()


def run(config: VideoConfig) -> list[Row]:
    """Return a row of the teacher and one of the student: `seconds` of a video, and `speedup`."""
    device = resolve_device(config.device)
    model = load_wan(config.model).requires_grad_(False).to(device)
    size = find_size(config, model.config)
    made = None if config.artifact is None else artifact.load(config.artifact)
    head_dim = model.config.dim // model.config.num_heads

    def enter(name: str) -> contextlib.AbstractContextManager[object]:
        if name == "teacher":
            return contextlib.nullcontext()
        return swap(model, size.layers, head_dim) if made is None else artifact.apply(made, model)

    def sample(name: str, turn: int | None) -> None:
        latents, prompt, negative = draw_inputs(size, device)
        how = {"precision": resolve_precision("auto", device)}
        velocity_fn = bind_guided(model, prompt, negative, config.guidance_scale, **how)
        steps = 1 if turn is None else config.steps
        sample_euler(velocity_fn, latents, make_sigmas(steps, config.shift))

    counts = {}
    names = ("teacher", "student")
    for name in names:
        with enter(name):
            counts[name] = count_layers(model)
    timed = time_in_turns(names, config.turns, enter, sample, device)
    return [
        {"model": name, "tokens": size.tokens, **counts[name], "steps": config.steps, **each}
        for name, each in timed.items()
    ]


def time_in_turns(
    names: Sequence[str],
    turns: int,
    enter: Callable[[str], contextlib.AbstractContextManager[object]],
    sample: Callable[[str, int | None], None],
    device: str,
) -> dict[str, Row]:
    """Return by name `turns`, the seconds of each, `seconds`, their median, and `speedup`.

    That is the median over turns of the first one's seconds over its own.
    enter: makes the model the one of that name for a while. sample: a video of it in a turn, from
        0 on; in none, a step alone: before the first turn, as it may compile, and not timed.
    """
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in (None, *range(turns)):
        for name, seconds in taken.items():
            call = functools.partial(sample, name, turn)
            with enter(name):
                if turn is None:
                    call()
                else:
                    seconds.append(time_once(call, torch.device(device)) / 1000)
    first = taken[names[0]]
    return {
        name: {
            "seconds": statistics.median(each),
            "speedup": statistics.median(x / y for x, y in zip(first, each, strict=True)),
            "turns": each,
        }
        for name, each in taken.items()
    }


def find_size(config: VideoConfig, wan: WanConfig) -> Size:
    """Return the video that is sampled, with `linear_layers` spread over the model's layers.

    Raises SettingError for more than there are, and for sides and frames that are no whole tokens.
    """
    if config.artifact is None and config.linear_layers > wan.num_layers:
        raise SettingError(
            f"{{linear_layers}} {config.linear_layers} given; {config.model} has "
            f"{wan.num_layers} layers",
            "linear_layers",
        )
    _, height, width = wan.patch_size
    for name, step in (("height", PIXEL_STRIDE * height), ("width", PIXEL_STRIDE * width)):
        if (given := getattr(config, name)) % step:
            raise SettingError(f"{{{name}}} {given} given; a multiple of {step} is needed", name)
    if (config.num_frames - 1) % FRAME_STRIDE:
        raise SettingError(
            f"{{num_frames}} {config.num_frames} given; 4 n + 1 is needed, such as 61", "num_frames"
        )
    return Size(
        name=config.model.stem,
        model=config.model.stem,
        resolution=f"{config.width} x {config.height}",
        config=wan,
        layers=spread_layers(wan.num_layers, config.linear_layers),
        num_frames=config.num_frames,
        height=config.height,
        width=config.width,
        shift=config.shift,
        prompt_tokens=config.prompt_tokens,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, time both, write and show the table."""
    config = parse(VideoConfig, argv, description=__doc__)
    path = (RESULTS_FOLDER if config.record else config.out) / _RECORD_NAME
    check_file(path)
    rows = run(config)
    write_record(
        path,
        title="Seconds of a whole video, teacher and student in turns",
        command=f"python -m benchmarks.models.whole_video {to_flags(config, without=['out'])}",
        rows=rows,
        device=resolve_device(config.device),
    )
    sys.stdout.write(f"{show_rows(rows)}table: {path}\n")


if __name__ == "__main__":
    run_command(main)
