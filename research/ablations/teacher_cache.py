"""A teacher's samples on disk: sampled once, then compared with any number of students.

What `bench` makes of the teacher is written beside the noise levels' states that it keeps, so that
a student is measured against the very samples, in whatever process.
"""

import dataclasses
from pathlib import Path

from safetensors import safe_open
from torch import nn

from linvideo_core.evaluate.sampler import NUM_SHOWN, Evaluator, Row, Samples
from linvideo_core.run.files import write_tensors

from .frame_cache import write_frames

_TENSORS = ("latents", "frames", "features", "digit_logits", "motion_logits")


def sample_teacher(evaluator: Evaluator, path: Path) -> Row:
    """Sample the teacher, keep it in `path`, and return its own row."""
    samples = evaluator.sample("teacher", evaluator.teacher.model, is_teacher=True)
    tensors = {name: getattr(samples, name) for name in _TENSORS}
    tensors |= {f"state/{i}": state for i, (state, _) in evaluator.states.items()}
    tensors |= {f"velocity/{i}": velocity for i, (_, velocity) in evaluator.states.items()}
    metadata = {
        "counts": "{},{}".format(*samples.counts),
        "steps": str(samples.steps),
        "seconds": str(samples.seconds),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {k: t for k, t in tensors.items() if t is not None}, metadata)
    return evaluator.measure(samples, samples, None)


class Reference:
    """A bench with the teacher's kept samples, on which any student is measured alone."""

    def __init__(self, evaluator: Evaluator, teacher: Samples) -> None:
        """teacher: as `read_teacher` returns it, of the bench's own settings."""
        self.evaluator = evaluator
        self.teacher = teacher

    def measure(self, name: str, model: nn.Module, *, frames: Path | None = None) -> Row:
        """Sample a student and return its row; `frames`: where to keep its first few videos."""
        samples = self.evaluator.sample(name, model)
        if frames is not None:
            self.keep_frames(samples, frames)
        velocity_rows = (
            self.evaluator.compare_velocities(name, model) if self.evaluator.states else None
        )
        return self.evaluator.measure(samples, self.teacher, velocity_rows)

    def keep_frames(self, samples: Samples, path: Path) -> None:
        """Write the first few videos of some samples, the teacher's or a student's."""
        write_frames(path, samples.frames[:NUM_SHOWN], self.evaluator.prompts[:NUM_SHOWN])

    def first(self, count: int) -> "Reference":
        """Return the same over the first `count` samples, without velocities."""
        few = slice(0, count)
        tensors = {name: getattr(self.teacher, name) for name in _TENSORS}
        teacher = dataclasses.replace(
            self.teacher, **{name: t if t is None else t[few] for name, t in tensors.items()}
        )
        return Reference(_like(self.evaluator, num_samples=len(teacher.latents)), teacher)


def read_teacher(evaluator: Evaluator, path: Path) -> Reference:
    """Take back what `sample_teacher` kept; `bench` gets the teacher's states."""
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    linear, layers = map(int, metadata["counts"].split(","))
    samples = Samples(
        model="teacher",
        counts=(linear, layers),
        steps=int(metadata["steps"]),
        seconds=float(metadata["seconds"]),
        **{name: found.get(name) for name in _TENSORS},
    )
    numbers = sorted(int(name.partition("/")[2]) for name in found if name.startswith("state/"))
    evaluator.states = {
        i: tuple(found[f"{kind}/{i}"].to(evaluator.device) for kind in ("state", "velocity"))
        for i in numbers
    }
    return Reference(evaluator, samples)


def _like(evaluator: Evaluator, **changes: int) -> Evaluator:
    return Evaluator(
        evaluator.teacher,
        dataclasses.replace(evaluator.settings, **changes),
        seed=evaluator.seed,
        precision=evaluator.precision,
        progress=evaluator.progress,
    )
