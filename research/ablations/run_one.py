"""One process of an ablation: the jobs that `ablate` hands to its workers.

The teacher's trajectories and samples are made once a seed; every run of that seed trains on the
same and is measured against the same.
"""

import dataclasses
import shutil
from pathlib import Path

import torch

from linvideo_core import artifact
from linvideo_core.evaluate.sampler import Evaluator
from linvideo_core.models.attention_sites import shapes_of
from linvideo_core.models.families import identify
from linvideo_core.run.config import override
from linvideo_core.run.devices import resolve_device, resolve_precision
from linvideo_core.run.files import write_json
from linvideo_core.run.folder import open_run, read_metrics
from linvideo_core.run.progress import Progress
from linvideo_core.teacher.teacher import load_teacher
from linvideo_core.teacher.trajectories import Trajectories, collect
from linvideo_core.training.checkpoint import CHECKPOINT_NAME
from linvideo_core.transfer.evaluation import compare_config
from linvideo_core.transfer.layer_selection.order import learned_scores
from linvideo_core.transfer.layer_selection.rules import count_selection_steps
from linvideo_core.transfer.layer_selection.sensitivity import RANKING_NAME, read_ranking
from linvideo_core.transfer.pipeline import (
    ARTIFACT_NAME,
    WARM_START_NAME,
    TransferConfig,
    linearize,
)
from linvideo_core.transfer.student import Student

from .declared import Run
from .hardening import HardeningGap, summarize_gap
from .results import Row
from .shared_warm_start import sharing
from .teacher_cache import Reference, read_teacher, sample_teacher
from .training_clock import TrainingClock

ROW_NAME, SAMPLES_NAME, FRAMES_NAME = "row.json", "samples.safetensors", "frames.safetensors"
UNTRAINED_NAME = "untrained"

# Steps over which a step's time is measured, after some that tune and capture kernels.
_TIMED_STEPS, _UNTIMED_STEPS = 40, 10


def teacher_folder(out: Path, seed: int) -> Path:
    """Return where what all runs of a seed share is kept."""
    return out / "teacher" / f"seed-{seed}"


@dataclasses.dataclass(frozen=True)
class SampleTeacher:
    """The job of making what all runs of a seed share."""

    seed: int


@dataclasses.dataclass(frozen=True)
class TimeSteps:
    """The job of measuring seconds per step and memory of some runs, alone on the device."""

    runs: dict[str, Run]


class Worker:
    """One process of an ablation: it has the teacher on its device and does one job at a time."""

    def __init__(
        self, config: TransferConfig, gap_samples: int, gap_points: int, progress: Progress
    ) -> None:
        """config: what all runs share, its `out` the folder of all of them.

        gap_points: moments at which the gap is measured of a run whose selection is followed.
        """
        self.config = config
        self.gap_samples, self.gap_points = gap_samples, gap_points
        self.progress = progress
        self.device = resolve_device(self.config.device)
        self.precision = resolve_precision(self.config.precision, self.device)
        teacher = load_teacher(self.config.teacher, self.config.out, self.device, progress)
        self.teacher = teacher.to(self.device)
        self._shared: dict[int, tuple[Trajectories, Reference]] = {}

    def __call__(self, job: SampleTeacher | TimeSteps | Run) -> Row:
        """Do a job and return its row."""
        try:
            match job:
                case SampleTeacher():
                    return self._sample_teacher(job.seed)
                case TimeSteps():
                    return {name: self._time_steps(run) for name, run in job.runs.items()}
                case Run():
                    return self._make_row(job)
        finally:
            if self.device.startswith("cuda"):
                # What this process merely keeps, the others on the card cannot use.
                torch.cuda.empty_cache()

    def _evaluator(self, seed: int) -> Evaluator:
        settings = compare_config(self.config.evidence, self.config.trajectories)
        return Evaluator(
            self.teacher, settings, seed=seed, precision=self.precision, progress=self.progress
        )

    def _trajectories(self, seed: int) -> Trajectories:
        return collect(
            self.teacher,
            self.config.trajectories,
            self.config.trajectories.teacher_folder
            or teacher_folder(self.config.out, seed) / "trajectories",
            seed=seed,
            precision=self.precision,
            progress=self.progress,
        )

    def _sample_teacher(self, seed: int) -> Row:
        folder = teacher_folder(self.config.out, seed)
        self._trajectories(seed)
        row = _tidy(sample_teacher(self._evaluator(seed), folder / SAMPLES_NAME))
        self._measure_untrained(seed)
        write_json(folder / ROW_NAME, {"seed": seed, **row})
        return row

    def _measure_untrained(self, seed: int) -> None:
        """Measure the teacher whose first layers are linear without training, where all begins."""
        # What draws is loaded by those alone who need it, and this comes from the pictures' room.
        from linvideo_core.evaluate.compare import swap

        folder = teacher_folder(self.config.out, seed)
        _, reference = self._share(seed)
        if seed == self.config.seed:
            reference.keep_frames(reference.teacher, folder / FRAMES_NAME)
        _, sites = identify(shapes_of(self.teacher.model))
        layers = [site.layer for site in sites][: self.config.selection.target]
        settings = self.config.student
        feature_dim = settings.feature_ratio * sites[0].head_dim
        with swap(self.teacher.model, layers, feature_dim, settings.form) as model:
            found = reference.measure(
                UNTRAINED_NAME, model, frames=self._frames_of(folder / UNTRAINED_NAME, seed)
            )
        row = {"seed": seed, **_tidy(found), "layers": layers}
        write_json(folder / UNTRAINED_NAME / ROW_NAME, row)

    def _frames_of(self, folder: Path, seed: int) -> Path | None:
        """Return where a run's first videos are kept: of one seed, which is enough to look at."""
        return folder / FRAMES_NAME if seed == self.config.seed else None

    def _share(self, seed: int) -> tuple[Trajectories, Reference]:
        if seed not in self._shared:
            path = teacher_folder(self.config.out, seed) / SAMPLES_NAME
            reference = read_teacher(self._evaluator(seed), path)
            self._shared[seed] = self._trajectories(seed), reference
        return self._shared[seed]

    def _train(
        self, run: Run, clock: TrainingClock, gap: HardeningGap | None, student: Student
    ) -> None:
        def progress(stage: str, done: int, total: int, **metrics: float) -> None:
            self.progress(stage, done, total, **metrics)
            clock.hear(stage, done, total)
            if gap is not None and gap.is_due(stage, done):
                with clock.frozen_weights():
                    gap.write(done)

        shared, _ = self._share(run.config.seed)
        linearize(student, self.teacher, run.config, self.precision, progress, shared)

    def _make_row(self, run: Run) -> Row:
        config, folder = run.config, run.folder
        open_run(folder, config, ignore=("out",))
        _, reference = self._share(config.seed)
        student = Student(self.teacher, config.student, seed=config.seed)
        gap = None
        if self.gap_samples and run.is_followed and config.selection.rule == "learned":
            measure = reference.first(self.gap_samples).measure
            gap = HardeningGap(
                student,
                config.selection,
                config.training.steps,
                folder / "gap.json",
                measure,
                num_points=self.gap_points,
            )
        clock = TrainingClock(self.device, folder / "seconds.json")
        with sharing(self.config.out / WARM_START_NAME, config):
            self._train(run, clock, gap, student)
        del student
        path = folder / ARTIFACT_NAME
        made = artifact.load(path)
        with artifact.transfer_into(self.teacher.model, made) as model:
            frames = self._frames_of(folder, config.seed)
            row = _tidy(reference.measure("student", model, frames=frames))
        row |= {
            "seed": config.seed,
            "steps": config.training.steps,
            "seconds": clock.seconds,
            "bytes": path.stat().st_size,
            "layers": list(made.header.layers),
        }
        row |= _describe_choice(run)
        if gap is not None:
            points = gap.points()
            row |= summarize_gap(points[-1])
            row["gap_course"] = [{"step": p["step"], **summarize_gap(p)} for p in points]
        write_json(folder / ROW_NAME, row)
        for stage in (WARM_START_NAME, "training"):
            (folder / stage / CHECKPOINT_NAME).unlink(missing_ok=True)
        return row

    def _time_steps(self, run: Run) -> Row:
        """Return seconds per step of a training whose layers are chosen, and its memory."""
        folder = self.config.out / "timing"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        is_cuda = self.device.startswith("cuda")
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        steps = _UNTIMED_STEPS + _TIMED_STEPS
        # However layers are chosen: a step costs the same, and what is captured is captured once.
        chosen = {"choice": "first", "layers": None, "score_start": "even"}
        settings = {"steps": steps, "warm_start_steps": 0, "out": folder, **chosen}
        short = dataclasses.replace(run, config=override(run.config, settings))
        clock = TrainingClock(self.device, folder / "seconds.json", num_untimed=_UNTIMED_STEPS)
        self._train(short, clock, None, Student(self.teacher, short.config.student, seed=0))
        shutil.rmtree(folder)
        row = {"seconds_per_step": clock.seconds / steps}
        if is_cuda:
            row["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
        return row


def _describe_choice(run: Run) -> Row:
    """Return how layers came to be chosen: what a ranking measured, what layer scores learned.

    `ranking_measure` and `layer_errors`; `last_scores` and `mean_scores` (see `learned_scores`);
    where the selection is followed, `score_course` of `step` and `layer_scores`. Lists are in depth
    order.
    """
    config, row = run.config, {}
    if config.selection.needs_ranking and (found := read_ranking(config.out / RANKING_NAME)):
        kind, errors = found
        row |= {"ranking_measure": kind, "layer_errors": [errors[i] for i in sorted(errors)]}
    if config.selection.rule == "learned":
        metrics = read_metrics(config.out / "training" / "metrics.jsonl")
        hardened_at = count_selection_steps(config.selection, config.training.steps)
        layers = range(len(metrics[0]["layer_scores"]))
        last, mean = learned_scores(metrics, layers, hardened_at)
        row |= {"last_scores": list(last.values()), "mean_scores": list(mean.values())}
        if run.is_followed:
            row["score_course"] = [
                {"step": m["step"], "layer_scores": [round(r, 4) for r in m["layer_scores"]]}
                for m in metrics
                if m["step"] < hardened_at
            ]
    return row


def _tidy(row: Row) -> Row:
    """Name a row's measures as the tables do; sampling beside others says nothing of its time."""
    named = {k: v for k, v in row.items() if k not in ("model", "seconds")}
    if "frechet_to_teacher" in named:
        named["frechet_teacher"] = named.pop("frechet_to_teacher")
    return named
