"""One run of `research.hybrid`: a student with hybrid layers, trained and measured."""

import contextlib
import dataclasses
import functools
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from linvideo_core.evaluate import metrics
from linvideo_core.evaluate.config import CompareConfig
from linvideo_core.evaluate.sampler import Evaluator
from linvideo_core.kernels.tiles import Size, Tiles
from linvideo_core.models.attention_sites import install, restore, shapes_of
from linvideo_core.models.config import ATTENTION_MASSES
from linvideo_core.models.families import identify
from linvideo_core.run.callbacks import Callbacks
from linvideo_core.run.config import parse
from linvideo_core.run.context import Run
from linvideo_core.run.devices import resolve_precision
from linvideo_core.run.files import write_json, write_with_digest
from linvideo_core.teacher.teacher import Teacher, load_teacher
from linvideo_core.teacher.trajectories import collect
from linvideo_core.training.trainer import fit
from linvideo_core.transfer.config import TRAINING_NAME, WARM_START_NAME, TransferConfig
from linvideo_core.transfer.student import Student, TransferTask, accelerated
from linvideo_core.transfer.warm_start import fit_feature_maps

from .softmax_quality import SparseReference, small_blocks
from .sparse_baselines import BLOCK, PiecewiseAttention, SparseLinearAttention, count_exact

Row = dict[str, Any]

LINEAR, WINDOW, SLA = "linear", "window", "sla"
SOL_ATTN, PISA, PISA_BLOCKS = "sol_attn", "pisa", "pisa_blocks"
UNTRAINED: dict[str, Callable[[float], nn.Module]] = {
    SOL_ATTN: SparseReference,
    PISA: PiecewiseAttention,
    PISA_BLOCKS: functools.partial(PiecewiseAttention, is_blockwise=True),
}
"""Name -> what makes an attention of a density that needs no training."""
FORMS = (LINEAR, WINDOW, SLA, *UNTRAINED, *ATTENTION_MASSES)
"""All that is compared: "linear" has no softmax, "window" mixes the softmax of one frame in by one
learned number a head, "sla" is `SparseLinearAttention`, and a hybrid layer has the name of its
attention mass."""

# Layers that training chose most often (results/evidence.json), by their number.
_LAYERS = {5: (0, 1, 3, 4, 9), 8: (0, 1, 4, 5, 6, 7, 8, 9), 10: tuple(range(10))}
_NUM_LAYERS = 10
_FEATURES = "features"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained: a form in some of the layers.

    tile: (frames, height, width) in tokens, of hybrid forms and of "window".
    density: of "sla" and what is untrained. layers: how many are replaced, 5, 8 or 10.
    steps_factor: times the steps of other rows; 0 for what is not trained.
    """

    form: str
    tile: Size | None = None
    density: float | None = None
    layers: int = 10
    steps_factor: int = 1

    @property
    def tile_name(self) -> str:
        """Its tile in words, such as "1x4x4"."""
        if self.density is not None:
            return f"density {self.density:g}"
        return "x".join(map(str, self.tile or ())) or "none"

    @property
    def flags(self) -> str:
        """Those of a transfer that has such layers, as far as it has them."""
        if self.form == WINDOW:
            return f"--window {math.prod(self.tile)}"
        is_hybrid = self.form in ATTENTION_MASSES
        return f"--tile {self.tile_name} --attention-mass {self.form}" if is_hybrid else ""

    def share_of_tokens(self, grid: Size) -> float:
        """Return the pairs of tokens that softmax sees in its layers, over all pairs.

        Of what has a density the exact blocks alone: no pooled terms, as no feature counts in
        linear attention either, and of Sol-Attn not the neighbours of each block, up to 7 % more.
        """
        if self.density is not None:
            num_blocks = math.ceil(math.prod(grid) / BLOCK)
            return count_exact(self.density, num_blocks) / num_blocks
        return Tiles(grid=grid, tile=self.tile).share if self.tile else 0.0

    def cost(self, grid: Size) -> float:
        """Return the pairs of tokens that softmax sees in all layers, over those of the teacher."""
        return 1 - self.layers / _NUM_LAYERS * (1 - self.share_of_tokens(grid))


def parse_flags(flags: str, seed: int, device: str, out: Path) -> TransferConfig:
    """Return the settings that all runs of a seed share."""
    own = ["--seed", seed, "--device", device, "--out", out, "--teacher-folder", out / "teacher"]
    words = [*shlex.split(flags), "--objective", "velocity", *map(str, own)]
    return parse(TransferConfig, words, description=__doc__)


def prepare(flags: str, seed: int, out: Path, device: str) -> None:
    """Sample what all runs of a seed share: the teacher's states, and its features."""
    torch.set_num_threads(1)
    config = parse_flags(flags, seed, device, out)
    teacher, run = _open(config, out / "teacher")
    collect(teacher, config.trajectories, run)
    path = _features_path(out, seed)
    if not path.exists():
        samples = _evaluator(teacher, config, run).sample("teacher", teacher.model)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_with_digest(path, {_FEATURES: samples.features}, {})


def do_run(case: Case, flags: str, steps: int, seed: int, out: Path, device: str) -> Row:
    """Train one student, unless it was, and return its row; `prepare` was called before.

    steps: of a row whose steps_factor is 1.
    """
    steps *= case.steps_factor
    name = f"{case.form}-{case.tile_name}-{case.layers}-{steps}".replace(" ", "-")
    folder = out / "runs" / name / f"seed-{seed}"
    if (path := folder / "row.json").exists():
        return json.loads(path.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    flags = f"{flags} --steps {max(1, steps)} {case.flags}"
    config = parse_flags(flags, seed, device, out)
    teacher, run = _open(config, folder)
    grid = teacher.model.config.find_grid(teacher.latent_shape)
    begin = time.monotonic()
    if case.form in UNTRAINED:
        with untrained(teacher.model, case):
            measures = _measure(teacher, config, run, out)
    else:
        with Student(teacher, config.student, seed=seed) as student:
            train(student, teacher, case, config, run)
            measures = _measure(teacher, config, run, out)
    row = {
        "form": case.form,
        "tile": case.tile_name,
        "share_of_tokens": case.share_of_tokens(grid),
        "layers": case.layers,
        "steps": steps,
        "seed": seed,
        **measures,
        "seconds": time.monotonic() - begin,
        "cost": case.cost(grid),
    }
    write_json(path, row)
    return row


@contextlib.contextmanager
def untrained(model: nn.Module, case: Case) -> Iterator[None]:
    """Let a case's layers attend as it does without training, while the context lasts."""
    _, sites = identify(shapes_of(model))
    chosen = [site for site in sites if site.layer in _LAYERS[case.layers]]
    originals = install(model, chosen, lambda _: UNTRAINED[case.form](case.density))
    try:
        with small_blocks():
            yield
    finally:
        restore(model, chosen, originals)


def train(student: Student, teacher: Teacher, case: Case, config: TransferConfig, run: Run) -> None:
    """Fit the layers of a case to the teacher's attention, then the student to its velocity."""
    if case.form == SLA:
        for mixed in student.mixed.values():
            mixed.linear = SparseLinearAttention(mixed.linear, case.density)
    with student.disabled():
        trajectories = collect(teacher, config.trajectories, run)
    fit_feature_maps(
        student.model,
        student.mixed,
        teacher,
        trajectories,
        config.warm_start,
        config.training,
        run.below(WARM_START_NAME),
        prompt_dropout=config.objective.prompt_dropout,
    )
    task = TransferTask(
        student,
        teacher,
        trajectories,
        selection=dataclasses.replace(config.selection, target=case.layers),
        objective=config.objective,
        training=config.training,
        run=run,
        linear_layers=_LAYERS[case.layers],
    )
    with accelerated(task.models, student, config.training, run):
        fit(task, config.training, run.below(TRAINING_NAME))


def _open(config: TransferConfig, folder: Path) -> tuple[Teacher, Run]:
    precision = resolve_precision(config.precision, config.device)
    run = Run(folder=folder, device=config.device, precision=precision, seed=config.seed)
    return load_teacher(config.teacher).to(config.device), run


def _evaluator(teacher: Teacher, config: TransferConfig, run: Run) -> Evaluator:
    settings = CompareConfig(
        num_samples=config.evaluation.evaluate_samples,
        sampler_steps=config.trajectories.sampler_steps,
        batch_size=config.evaluation.evaluate_batch_size,
    )
    how = {"seed": run.seed, "precision": run.precision, "callbacks": Callbacks()}
    return Evaluator(teacher, settings, **how)


def _measure(teacher: Teacher, config: TransferConfig, run: Run, out: Path) -> Row:
    """Return the measures of the teacher's model as it is now, against the teacher's features."""
    evaluator = _evaluator(teacher, config, run)
    samples = evaluator.sample("student", teacher.model)
    reference = load_file(_features_path(out, run.seed))[_FEATURES]
    own, others = map(metrics.feature_statistics, (samples.features, reference))
    real = (evaluator.judge.real_mean, evaluator.judge.real_cov)
    student, teachers = (metrics.frechet_distance(*each, *real) for each in (own, others))
    digits, directions = evaluator.labels
    return {
        "frechet": metrics.frechet_distance(*own, *others),
        "frechet_share": student / teachers,
        "digit": metrics.accuracy(samples.digit_logits, digits),
        "motion": metrics.accuracy(samples.motion_logits, directions),
    }


def _features_path(out: Path, seed: int) -> Path:
    return out / "teacher" / f"features-{seed}.safetensors"
