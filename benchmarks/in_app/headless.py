"""The same transfer by the core alone, in a process of its own."""

import dataclasses
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from linvideo_core.run.config import override
from linvideo_core.run.context import Run
from linvideo_core.run.devices import resolve_precision
from linvideo_core.run.files import write_json, write_tensors
from linvideo_core.teacher.teacher import load_teacher
from linvideo_core.transfer.config import TransferConfig
from linvideo_core.transfer.pipeline import linearize
from linvideo_core.transfer.recipe import settings_by_steps, settings_for, tile_for
from linvideo_core.transfer.student import Student

from ..models.sizes import GUIDANCE_SCALE, Size
from ..models.training_steps import StepClock
from .workbench import Peak, watching


def describe_transfer(size: Size, frames: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flat settings of the transfer that the node runs with `settings`, its names."""
    renamed = {"num_videos": "num_trajectories"}
    grid = dataclasses.replace(size, num_frames=frames).grid
    return {
        **settings_for("draft", is_embedded=False, num_layers=size.config.num_layers),
        **{renamed.get(name, name): value for name, value in settings.items()},
        "tile": settings["tile"] or tile_for([grid], settings),
        **settings_by_steps(settings["steps"]),
        "guidance_scale": GUIDANCE_SCALE,
        "shift": size.shift,
        "shard_size": 1,
        "activation_checkpointing": True,
        "num_frames": frames,
        "height": size.height,
        "width": size.width,
    }


def write_prompts(path: Path, size: Size) -> None:
    """Write one prompt and a negative one of random numbers."""
    shape = (2, size.prompt_tokens, size.config.text_dim)
    embeds = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    write_tensors(path, {"prompt_embeds": embeds[:1], "negative_embeds": embeds[1]})


def train(values: Mapping[str, Any], result: Path) -> None:
    """Run the stages of a transfer; write seconds a step, or why there are none, as JSON.

    The seconds are the mean over all steps, the first one included, as in the server's log.
    """
    try:
        config = override(TransferConfig(), values)
        clock = StepClock(config.device)
        run = Run(
            folder=config.out,
            device=config.device,
            precision=resolve_precision(config.precision, config.device),
            seed=config.seed,
            callbacks=clock,
        )
        teacher = load_teacher(config.teacher, run).to(config.device)
        with Student(teacher, config.student, seed=config.seed) as student:
            linearize(student, teacher, config, run)
        write_json(result, {"seconds_per_step": statistics.fmean(clock.step_seconds)})
    except Exception as error:
        write_json(result, {"error": f"{type(error).__name__}: {error}"})
        raise


def measure(
    values: Mapping[str, Any], result: Path, read: Callable[[int], int | None], deadline: float
) -> tuple[float, Peak]:
    """Run `train` in a process of its own; return its seconds a step and its memory's peak.

    read: (process id) -> bytes.

    Raises RuntimeError where it fails, or takes longer than `deadline`.
    """
    process = multiprocessing.get_context("spawn").Process(target=train, args=(values, result))
    process.start()
    with watching(lambda: read(process.pid)) as peak:
        process.join(max(0.0, deadline - time.monotonic()))
    if process.is_alive():
        process.kill()
        process.join()
        raise RuntimeError("the time limit was reached and the headless training stopped")
    found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    if "error" in found or process.exitcode:
        raise RuntimeError(found.get("error", f"it ended with exit code {process.exitcode}"))
    return found["seconds_per_step"], peak
