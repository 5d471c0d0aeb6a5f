"""Measure how far the teacher's flow carries an error: `python -m research.error_growth`.

The teacher samples videos; at one grid point after another a linearized student takes a single
step, and the teacher goes on from there. What the end is off by, over what that step was off by, is
the gain (`level_density.py` says what for). Then the student samples the same by itself: how far it
strays, and whether it errs more where it has come to, is what `objectives/adm.py` can win over
velocity matching.
    python -m research.error_growth                # the embedded model: minutes on a CPU
    python -m research.error_growth --record
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from linvideo_core import artifact as artifact_files
from linvideo_core.demo import DEMO_GUIDANCE_SCALE, DEMO_SHIFT
from linvideo_core.evaluate.entrants import load_linearized
from linvideo_core.evaluate.sampler import draw_noise, draw_prompts
from linvideo_core.flow import VelocityFn, make_sigmas, sample_euler
from linvideo_core.models.attention_sites import shapes_of
from linvideo_core.models.velocity import bind_guided
from linvideo_core.run.config import option, parse, positive, run_command, to_flags, to_json
from linvideo_core.run.devices import (
    device_option,
    precision_option,
    resolve_device,
    resolve_precision,
)
from linvideo_core.run.files import write_json
from linvideo_core.run.progress import Progress, TqdmProgress, silent
from linvideo_core.run.records import RESULTS_FOLDER, write_record
from linvideo_core.run.tables import render_table
from linvideo_core.teacher.teacher import TeacherConfig, load_teacher
from linvideo_core.transfer.noise_levels import fitted_gain

NAME = "flow_gain.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowGainConfig:
    """Whose flow, whose errors, and at how many noise levels."""

    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    artifact: Path | None = option(None, "LINVIDEO file that errs; none: the embedded model's own")
    videos: int = option(16, "videos that the teacher samples")
    points: int = option(12, "grid points at which the student takes a step, the first included")
    steps: int = option(25, "Euler steps of the teacher")
    guidance_scale: float = option(DEMO_GUIDANCE_SCALE, "classifier-free guidance")
    shift: float = option(DEMO_SHIFT, "warp of the noise levels")
    out: Path = option(Path("runs/flow_gain"), "folder for the table")
    record: bool = option(False, "write results/flow_gain.json")
    seed: int = option(0, "seed of noise and prompts")
    device: str = device_option()
    precision: str = precision_option()

    def __post_init__(self) -> None:
        positive(self, "videos", "points", "steps", "shift")
        if self.points > self.steps:
            raise ValueError(
                f"--points {self.points} given; at most --steps {self.steps} can be measured"
            )
        if self.teacher.model is not None and self.artifact is None:
            raise ValueError("--model was given without --artifact; give the file made for it")
        if self.record and (self.teacher != TeacherConfig() or self.artifact is not None):
            raise ValueError(
                "--record was given with --model, --prompts or --artifact; the record is of the "
                "embedded model and its own file"
            )


def measure(
    teacher: VelocityFn,
    states: Sequence[Tensor],
    errors: Mapping[int, Tensor],
    sigmas: Tensor,
    progress: Progress = silent,
) -> list[dict[str, float]]:
    """Return a row for each grid point of `errors`, in their order.

    teacher: the guided velocity that led through `states`, one a level of the grid `sigmas`
    [steps + 1]. errors: of the student's velocity at a grid point, [B, C, F, H, W] as a state.

    `sigma`; `error`, its mean square; `gain`, the mean square of the end's change over that of the
    push that the error gives in one step; `fitted_gain`.
    """
    rows = []
    for done, (point, error) in enumerate(errors.items()):
        progress("measuring the flow", done, len(errors))
        push = error * (sigmas[point + 1] - sigmas[point])
        moved = sample_euler(teacher, states[point + 1] + push, sigmas[point + 1 :])
        gain = (moved - states[-1]).square().mean() / push.square().mean()
        rows.append(
            {
                "sigma": sigmas[point].item(),
                "error": error.square().mean().item(),
                "gain": gain.item(),
                "fitted_gain": fitted_gain(sigmas[point]).item(),
            }
        )
    progress("measuring the flow", len(errors), len(errors))
    return rows


@torch.no_grad()
def measure_straying(
    teacher: VelocityFn,
    points: Sequence[int],
    states: Sequence[Tensor],
    own_states: Sequence[Tensor],
    own_velocities: Sequence[Tensor],
    sigmas: Tensor,
) -> list[dict[str, float]]:
    """Return a row for each grid point of `points`, in their order.

    states: the teacher's; own_states, own_velocities: the student's on a way of its own from the
    same noise. All are [B, C, F, H, W], one a level of the grid `sigmas` [steps + 1].

    `strayed`, the mean square between the states; `own_error`, that between the velocities of
    student and teacher at the student's.
    """
    rows = []
    for point in points:
        own = own_states[point]
        known = teacher(own, sigmas[point].expand(len(own)))
        rows.append(
            {
                "strayed": (own - states[point]).square().mean().item(),
                "own_error": (own_velocities[point] - known).square().mean().item(),
            }
        )
    return rows


def run(config: FlowGainConfig, progress: Progress = silent) -> list[dict[str, float]]:
    """Measure, write the table; return its rows, of `measure` and of `measure_straying`.

    Raises ValueError or FileNotFoundError, in one sentence, for bad input.
    """
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    made = load_linearized(config.artifact)
    teacher = load_teacher(config.teacher, config.out, device, progress).to(device)
    artifact_files.check(made, shapes_of(teacher.model))
    noise = draw_noise(teacher.latent_shape, config.videos, config.seed).to(device)
    picks = draw_prompts(len(teacher.prompt_embeds), config.videos, config.seed)
    prompt_embeds = teacher.prompt_embeds[picks]
    negative_embeds = teacher.negative_embeds.expand_as(prompt_embeds)
    velocity = bind_guided(
        teacher.model, prompt_embeds, negative_embeds, config.guidance_scale, precision=precision
    )
    sigmas = make_sigmas(config.steps, config.shift).to(device)
    states, velocities = _sample(velocity, noise, sigmas, "the teacher", progress)
    points = torch.linspace(0, config.steps - 1, config.points).round().int().tolist()
    # The same modules compute both, so the student answers all at once and is gone.
    with artifact_files.transfer_into(teacher.model, made), torch.no_grad():
        errors = {
            point: velocity(states[point], sigmas[point].expand(config.videos)) - velocities[point]
            for point in points
        }
        own = _sample(velocity, noise, sigmas, "the student", progress)
    gains = measure(velocity, states, errors, sigmas, progress)
    straying = measure_straying(velocity, points, states, *own, sigmas)
    rows = [gain | strayed for gain, strayed in zip(gains, straying, strict=True)]
    write_json(config.out / NAME, {"rows": rows})
    if config.record:
        flags = to_flags(config, without=("out", "device"))
        write_record(
            RESULTS_FOLDER / NAME,
            title="What the teacher's flow makes of an error, embedded model",
            command=f"python -m research.error_growth {flags}",
            rows=rows,
            device=device,
        )
    return rows


def _sample(
    velocity: VelocityFn, noise: Tensor, sigmas: Tensor, whose: str, progress: Progress
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the states at all grid points, the end included, and the velocities on the way."""
    states: list[Tensor] = []
    velocities: list[Tensor] = []
    num_steps = len(sigmas) - 1

    def on_step(step: int, latents: Tensor, velocity: Tensor) -> None:
        progress(f"sampling {whose}", step, num_steps)
        states.append(latents)
        velocities.append(velocity)

    states.append(sample_euler(velocity, noise, sigmas, on_step=on_step))
    progress(f"sampling {whose}", num_steps, num_steps)
    return states, velocities


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure with progress bars, show the table."""
    config, is_dry_run = parse(FlowGainConfig, argv, description=__doc__.splitlines()[0])
    if is_dry_run:
        sys.stdout.write(to_json(config))
        return
    with TqdmProgress() as progress:
        rows = run(config, progress)
    sys.stdout.write(f"\n{render_table(rows)}\ntable: {config.out / NAME}\n")


if __name__ == "__main__":
    run_command(main)
