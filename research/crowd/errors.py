"""Where a student's velocity is wrong, level by level: `python -m research.crowd.errors`.

The teacher samples captions that no training has seen, and each student is asked at every state on
the way. As shares of the mean square of the teacher's guided velocity there:
    conditional_error, unconditional_error   the mean squared errors of both branches
    guided_error   that of the two as guidance combines them, which is what moves a video
    energy         the mean square of the student's guided velocity: below 1 it is the flatter one
and `correlation`, of both branches' errors: the more alike they are, the less guidance makes of
them. With `--keep-first-steps` students sample, too, once alone and then after so many steps of the
teacher; `fidelity` is how far their videos are from its own, as in `evaluate`. Three students at
three videos took 40 minutes of two CPU cores:
    OMP_NUM_THREADS=2 python -m research.crowd.errors --device cpu --keep-first-steps 4,8
"""

import copy
import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.record import RESULTS_FOLDER, check_file, show_rows, write_record
from linvideo_core import artifact
from linvideo_core.evaluate import metrics
from linvideo_core.evaluate.config import CompareConfig
from linvideo_core.flow import bind_guided, guide, sample_euler
from linvideo_core.run.callbacks import Callbacks
from linvideo_core.run.config import option, parse, run_command, to_flags
from linvideo_core.run.devices import resolve_device
from linvideo_core.run.errors import SettingError
from linvideo_core.run.folder import check_place
from linvideo_core.run.progress import TerminalCallbacks

from .config import StoredModelConfig, read_artifacts
from .evaluate import Sampling, describe_model, open_with_captions
from .rows import Row
from .train import SHIFT, WEIGHTS

_RECORD_NAME = "crowd_errors.json"
Branches = tuple[Tensor, Tensor]
"""Velocities [B, C, F, H, W] with and without the prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErrorsConfig(StoredModelConfig):
    """Which students are asked, and at how many videos."""

    comparison: CompareConfig = dataclasses.field(
        default_factory=lambda: CompareConfig(
            num_samples=3, seeds_per_prompt=1, sampler_steps=20, shift=SHIFT, batch_size=3
        )
    )
    artifacts: str = option(
        str(WEIGHTS / "half_long.safetensors"),
        "LINVIDEO files, such as a.safetensors,b.safetensors",
    )
    out: Path = option(Path("runs/crowd_errors"), "folder of captions and table")
    record: bool = option(False, f"write results/{_RECORD_NAME}")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.list_artifacts():
            raise SettingError("{artifacts} names no file; give a student's", "artifacts")

    def list_artifacts(self) -> dict[str, Path]:
        """Return the students' files by their names, see `read_artifacts`."""
        return read_artifacts(self.artifacts)


def load_students(config: ErrorsConfig) -> dict[str, artifact.Artifact]:
    """Return the students by name; raise ValueError for a file that is none or was distilled."""
    paths = config.list_artifacts()
    students = {name: artifact.load(path) for name, path in paths.items()}
    for name, student in students.items():
        if student.header.sigmas:
            raise SettingError(
                f"{{artifacts}} {paths[name]} given, which was distilled: it knows few levels and "
                "no guidance; give the file of a transfer",
                "artifacts",
            )
    return students


class Asked:
    """A model's guided velocity that keeps both branches of every call, for one batch."""

    def __init__(self, sampling: Sampling, part: slice) -> None:
        """part: the batch's captions. The model is the teacher's, with what is applied to it."""
        embeds = sampling.teacher.prompt_embeds[sampling.index[part]]
        self.branches: list[Branches] = []
        self.sigmas = sampling.recipe_of().sigmas.to(sampling.run.device)
        self.velocity = bind_guided(
            sampling.teacher.model,
            embeds,
            sampling.teacher.negatives_for(embeds),
            sampling.config.comparison.guidance_scale,
            precision=sampling.run.precision,
            on_branches=lambda *branches: self.branches.append(branches),
        )

    def walk(self, noise: Tensor) -> list[Tensor]:
        """Return the states [B, C, F, H, W] from noise to videos."""
        states: list[Tensor] = []
        end = sample_euler(
            self.velocity, noise, self.sigmas, on_step=lambda step, x, u: states.append(x)
        )
        return [*states, end]

    @torch.no_grad()
    def visit(self, states: Sequence[Tensor]) -> None:
        """Ask at every state but the last."""
        for latents, sigma in zip(states[:-1], self.sigmas[:-1], strict=True):
            self.velocity(latents, sigma.expand(len(latents)))


def square(own: Branches, theirs: Branches, scale: float) -> Tensor:
    """Return the mean squares at one state that `describe` takes, [6] fp64; scale: of guidance."""
    first, second = ((a - b).double() for a, b in zip(own, theirs, strict=True))
    guided, target = (guide(*pair, scale).double() for pair in (own, theirs))
    products = [
        (first, first),
        (second, second),
        (first, second),
        (guided - target, guided - target),
        (guided, guided),
        (target, target),
    ]
    return torch.stack([(a * b).mean() for a, b in products])


def describe(squares: Tensor) -> Row:
    """Return the measures of one level, see the module; squares: of `square`, over all videos."""
    conditional, unconditional, both, guided, own, whole = squares.tolist()
    return {
        "conditional_error": conditional / whole,
        "unconditional_error": unconditional / whole,
        "guided_error": guided / whole,
        "correlation": both / (conditional * unconditional) ** 0.5,
        "energy": own / whole,
    }


def measure(
    sampling: Sampling,
    students: Mapping[str, artifact.Artifact],
    first_steps: Sequence[int],
    callbacks: Callbacks,
) -> dict[str, list[Row]]:
    """Return the rows of each student, of its levels and of its samplings."""
    model, first = sampling.teacher.model, copy.deepcopy(sampling.teacher.model)
    settings, seed = sampling.config.comparison, sampling.config.seed
    levels = sampling.recipe_of().sigmas[:-1].tolist()
    squares: dict[str, Tensor] = dict.fromkeys(students, torch.zeros(()))
    distances: dict[tuple[str, int], list[Tensor]] = {}
    total = len(sampling.parts()) * (1 + len(students) * (1 + len(first_steps)))
    callbacks.on_stage("evaluation", total)
    num_done = itertools.count(1)
    for number, part in enumerate(sampling.parts()):
        teacher = Asked(sampling, part)
        states = teacher.walk(sampling.draw_noise(part, number, seed))
        callbacks.on_step_end(next(num_done))
        for name, student in students.items():
            with artifact.apply(student, model):
                asked = Asked(sampling, part)
                asked.visit(states)
                pairs = zip(asked.branches, teacher.branches, strict=True)
                found = [square(*pair, settings.guidance_scale) for pair in pairs]
                squares[name] = squares[name] + len(states[0]) * torch.stack(found).cpu()
                callbacks.on_step_end(next(num_done))
                for count in first_steps:
                    how = {"first": first, "first_steps": count}
                    videos = sampling.sample(model, part, number, seed, **how)
                    distance = metrics.sample_distance(videos, states[-1])
                    distances.setdefault((name, count), []).append(distance.cpu())
                    callbacks.on_step_end(next(num_done))
    return {
        name: [
            *(
                {"what": "levels", "step": step, "sigma": sigma} | describe(squares[name][step])
                for step, sigma in enumerate(levels)
            ),
            *(
                {
                    "what": "samplings",
                    "keep_first_steps": count,
                    "fidelity": torch.cat(each).mean().item(),
                }
                for (whose, count), each in distances.items()
                if whose == name
            ),
        ]
        for name in students
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure, write the table and show it."""
    config = parse(ErrorsConfig, argv, description=__doc__)
    path = (RESULTS_FOLDER if config.record else config.out) / _RECORD_NAME
    check_file(path)
    check_place(config.out)
    students = load_students(config)
    sampling = open_with_captions(config)
    # What does not fit is told before anything is sampled.
    files = config.list_artifacts().items()
    about = {name: describe_model(sampling, name, file) for name, file in files}
    # Students sample alone, too, but only beside others.
    steps = config.list_first_steps()
    with TerminalCallbacks() as callbacks:
        found = measure(sampling, students, [0, *steps] if steps else [], callbacks)
    videos = {"videos": config.comparison.num_samples}
    rows = [row | about[name] | videos for name, each in found.items() for row in each]
    flags = to_flags(config, without=("out", "device"))
    write_record(
        path,
        title="crowd: where the students' velocities are wrong",
        command=f"python -m research.crowd.errors {flags}".strip(),
        rows=rows,
        device=resolve_device(config.device),
    )
    shown = ("model", "step", "sigma", "guided_error", "energy", "keep_first_steps", "fidelity")
    sys.stdout.write(show_rows([{name: row.get(name) for name in shown} for row in rows]))


if __name__ == "__main__":
    run_command(main)
