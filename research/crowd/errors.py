"""Where a student's velocity is wrong, level by level: `python -m research.crowd.errors`.

The teacher samples captions that no training has seen, and each student is asked at every state on
the way. Mean squares over all of a state's numbers, as shares of the teacher's guided velocity's:
    conditional_error, unconditional_error   of both branches
    guided_error   of the two as guidance combines them, which is what moves a video
    correlation    of both branches' errors: the more alike, the less guidance makes of them
    energy         of the student's guided velocity itself; below 1 it is flatter than the teacher's
Rows of `taken_over` are of videos whose first steps are the teacher's: how far their ends are from
its own (`fidelity`, see `linvideo_core.evaluate.metrics.sample_distance`). On two CPU cores, some
five minutes a student and as long for every start:
    OMP_NUM_THREADS=2 python -m research.crowd.errors --device cpu --record
"""

import dataclasses
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.record import RESULTS_FOLDER, check_file, show_rows, write_record
from linvideo_core import artifact
from linvideo_core.evaluate import metrics
from linvideo_core.evaluate.config import CompareConfig
from linvideo_core.flow import VelocityFn, bind_guided, euler_step, guide, make_sigmas
from linvideo_core.run.callbacks import Callbacks
from linvideo_core.run.config import Settings, option, parse, run_command, to_flags
from linvideo_core.run.devices import device_option, resolve_device
from linvideo_core.run.folder import check_place
from linvideo_core.run.progress import TerminalCallbacks

from .evaluate import Sampling, describe_model, open_with_captions, read_steps
from .rows import Row
from .train import SHIFT, WEIGHTS

_RECORD_NAME = "crowd_errors.json"
Branches = tuple[Tensor, Tensor]
"""Velocities [B, C, F, H, W] with and without the prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErrorsConfig(Settings):
    """Which students are asked, and at how many videos."""

    comparison: CompareConfig = dataclasses.field(
        default_factory=lambda: CompareConfig(
            num_samples=4, seeds_per_prompt=1, sampler_steps=20, shift=SHIFT, batch_size=4
        )
    )
    model: Path = option(WEIGHTS / "model.safetensors", "the teacher")
    artifacts: str = option(
        str(WEIGHTS / "half_long.safetensors"),
        "LINVIDEO files, such as a.safetensors,b.safetensors",
    )
    taken_over: str = option(
        "0,2,4,8", "steps of the teacher before a student's; none: no such rows"
    )
    out: Path = option(Path("runs/crowd_errors"), "folder of captions and table")
    record: bool = option(False, f"write results/{_RECORD_NAME}")
    seed: int = option(0, "seed of noise and captions")
    device: str = device_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.list_starts()

    def list_artifacts(self) -> list[Path]:
        """Return the students' files."""
        return [Path(name) for name in self.artifacts.split(",")]

    def list_starts(self) -> list[int]:
        """Return how many steps the teacher makes; raise SettingError where there are fewer."""
        return read_steps(self.taken_over, self.comparison.sampler_steps, "taken_over")


class Walk:
    """The teacher's way from noise to videos: its states and both branches' velocities there."""

    def __init__(
        self, sampling: Sampling, part: slice, number: int, on_step: Callable[[], None]
    ) -> None:
        """part, number: a batch of captions, and of the noise."""
        self.model = sampling.teacher.model
        self.embeds = sampling.teacher.prompt_embeds[sampling.index[part]]
        self.negatives = sampling.teacher.negatives_for(self.embeds)
        settings, self.precision = sampling.config.comparison, sampling.run.precision
        self.scale = settings.guidance_scale
        self.sigmas = make_sigmas(settings.sampler_steps, settings.shift).to(sampling.run.device)
        noise = sampling.draw_noise(part, number, sampling.config.seed)
        self.states: list[Tensor] = [noise]
        self.branches: list[Branches] = []
        velocity = self.bind(self.branches)
        for step in range(settings.sampler_steps):
            self.states.append(self.advance(velocity, self.states[-1], step))
            on_step()

    def bind(self, branches: list[Branches]) -> VelocityFn:
        """Return the model's guided velocity as it is now; branches: where those of calls go."""
        return bind_guided(
            self.model,
            self.embeds,
            self.negatives,
            self.scale,
            precision=self.precision,
            on_branches=lambda *pair: branches.append(pair),
        )

    def describe(self, step: int) -> Row:
        """Return what tells a state from the others."""
        return {"step": step, "sigma": self.sigmas[step].item()}

    @torch.no_grad()
    def advance(self, velocity: VelocityFn, latents: Tensor, step: int) -> Tensor:
        """Return the state after a step."""
        start, end = (self.sigmas[i].expand(len(latents)) for i in (step, step + 1))
        return euler_step(latents, velocity(latents, start), start, end)


def measure_levels(walk: Walk, on_step: Callable[[], None]) -> list[Row]:
    """Return a row for each state on the way, of the model as it is now."""
    found: list[Branches] = []
    velocity, rows = walk.bind(found), []
    for step, theirs in enumerate(walk.branches):
        walk.advance(velocity, walk.states[step], step)
        rows.append(walk.describe(step) | compare(found[-1], theirs, walk.scale))
        on_step()
    return rows


def compare(own: Branches, theirs: Branches, scale: float) -> Row:
    """Return the measures of one state: see the module; scale: of guidance."""
    errors = [(a - b).double() for a, b in zip(own, theirs, strict=True)]
    guided, target = (guide(*pair, scale).double() for pair in (own, theirs))
    whole = target.square().mean()
    conditional, unconditional = (error.square().mean() for error in errors)
    shared = (errors[0] * errors[1]).mean() / (conditional * unconditional).sqrt()
    measured = {
        "conditional_error": conditional / whole,
        "unconditional_error": unconditional / whole,
        "guided_error": (guided - target).square().mean() / whole,
        "correlation": shared,
        "energy": guided.square().mean() / whole,
    }
    return {name: value.item() for name, value in measured.items()}


def take_over(walk: Walk, start: int, on_step: Callable[[], None]) -> Tensor:
    """Return the videos [B, C, F, H, W] of the model as it is now, from a state on the way."""
    velocity, latents = walk.bind([]), walk.states[start]
    for step in range(start, len(walk.branches)):
        latents = walk.advance(velocity, latents, step)
        on_step()
    return latents


def measure(sampling: Sampling, config: ErrorsConfig, callbacks: Callbacks) -> list[Row]:
    """Return the rows of all students: means over batches of captions."""
    parts, paths, starts = sampling.parts(), config.list_artifacts(), config.list_starts()
    # What does not fit is told before anything is sampled.
    about = {path: describe_model(sampling, path.stem, path) for path in paths}
    num_steps = config.comparison.sampler_steps
    of_student = num_steps + sum(num_steps - start for start in starts)
    batches: list[list[Row]] = []
    for number, part in enumerate(parts):
        total, detail = num_steps + len(paths) * of_student, f"{number + 1} of {len(parts)}"
        callbacks.on_stage("evaluation", total, 0, detail=detail)
        count = itertools.count(1)

        def on_step(count: Iterator[int] = count) -> None:
            callbacks.on_step_end(next(count))

        walk, rows = Walk(sampling, part, number, on_step), []
        for path in paths:
            with artifact.apply(artifact.load(path), walk.model):
                of_levels = measure_levels(walk, on_step)
                rows += [{"what": "levels", **about[path], **row} for row in of_levels]
                for start in starts:
                    end = take_over(walk, start, on_step)
                    distance = metrics.sample_distance(end, walk.states[-1]).mean().item()
                    row = walk.describe(start) | {"fidelity": distance}
                    rows.append({"what": "taken_over", **about[path], **row})
        batches.append(rows)
    return [_mean(rows) for rows in zip(*batches, strict=True)]


def _mean(rows: Sequence[Row]) -> Row:
    """Return the rows of one state of all batches as one, of the means of its numbers."""
    numbers = [name for name, value in rows[0].items() if isinstance(value, float)]
    return {**rows[0], **{name: statistics.fmean(row[name] for row in rows) for name in numbers}}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure, write the table and show it."""
    config = parse(ErrorsConfig, argv, description=__doc__)
    path = (RESULTS_FOLDER if config.record else config.out) / _RECORD_NAME
    check_file(path)
    check_place(config.out)
    sampling = open_with_captions(
        config.comparison, config.model, config.out, config.seed, config.device
    )
    with TerminalCallbacks() as callbacks:
        rows = measure(sampling, config, callbacks)
    flags = to_flags(config, without=("out", "device"))
    write_record(
        path,
        title="crowd: where the students' velocities are wrong",
        command=f"python -m research.crowd.errors {flags}".strip(),
        rows=[{**row, "videos": config.comparison.num_samples} for row in rows],
        device=resolve_device(config.device),
    )
    shown = ("what", "model", "step", "sigma", "guided_error", "energy", "fidelity")
    sys.stdout.write(show_rows([{name: row.get(name) for name in shown} for row in rows]))


if __name__ == "__main__":
    run_command(main)
