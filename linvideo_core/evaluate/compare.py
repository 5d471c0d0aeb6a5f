"""Compare models that sample the same prompts from the same noise: a teacher and its students."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import artifact as artifact_files
from ..artifact import Artifact
from ..artifact.summary import count_bytes
from ..flow import Recipe
from ..models.attention import LinearAttention
from ..models.attention_sites import AttentionSite, install, restore, shapes_of
from ..models.config import LinearForm
from ..models.families import identify
from ..run.callbacks import Callbacks
from ..run.files import write_json
from ..teacher.teacher import Teacher
from . import plots, videos
from .config import CompareConfig
from .entrants import Entrants
from .sampler import NUM_SHOWN, Evaluator, Row

EVALUATION_NAME = "evaluation.json"
STEPS_NAME = "steps.png"
SWAPPED_SEED = 0

_CAPTIONS = {"swapped": "before training", "student": "after training"}

Students = Mapping[str, contextlib.AbstractContextManager[nn.Module]]
"""Name -> a context that yields the model; `contextlib.nullcontext(model)` for a ready one."""


@dataclasses.dataclass(kw_only=True)
class Comparison:
    """Measures and pictures of several models that sampled the same prompts from the same noise.

    rows: one a model, the teacher first: how many of its layers are linear, its measures by name.
    velocity_rows: `model`, `sigma`, `velocity_error`, `velocity_cosine` of each student.
    frames: model -> [K, F, h, w] in [0, 1] of the first few samples, on the CPU; prompts: theirs.
    """

    settings: CompareConfig
    rows: list[Row]
    velocity_rows: list[Row]
    frames: dict[str, Tensor]
    prompts: list[str]


def compare(
    teacher: Teacher,
    students: Students,
    settings: CompareConfig,
    *,
    seed: int,
    precision: str = "fp32",
    callbacks: Callbacks | None = None,
    recipes: Mapping[str, Recipe] | None = None,
) -> Comparison:
    """Sample the teacher, then every student, and measure them; on the teacher's device.

    students: each context is entered once, after the teacher was sampled. It may change
        `teacher.model` in place as long as leaving it gives the teacher back.
    recipes: name -> how that student is sampled; the others as the settings say. Velocities are
        compared of the others alone, which follow the teacher's trajectories.
    """
    evaluator = Evaluator(
        teacher, settings, seed=seed, precision=precision, callbacks=callbacks or Callbacks()
    )
    reference = evaluator.sample("teacher", teacher.model, is_teacher=True)
    evaluator.describe(reference)
    result = Comparison(
        settings=settings,
        rows=[evaluator.measure(reference, reference, None)],
        velocity_rows=[],
        frames={"teacher": reference.frames[:NUM_SHOWN].clone()},
        prompts=evaluator.prompts[:NUM_SHOWN],
    )
    for name, context in students.items():
        with context as model:
            recipe = (recipes or {}).get(name)
            samples = evaluator.sample(name, model, recipe=recipe)
            velocity_rows = [] if recipe else evaluator.compare_velocities(name, model)
        evaluator.describe(samples)
        result.rows.append(evaluator.measure(samples, reference, velocity_rows))
        result.velocity_rows += velocity_rows
        result.frames[name] = samples.frames[:NUM_SHOWN].clone()
    return result


@contextlib.contextmanager
def swap(
    model: nn.Module, layers: Sequence[int], feature_dim: int, form: LinearForm | None = None
) -> Iterator[nn.Module]:
    """Make layers linear without any training: initial feature maps, no weight changes."""
    _, sites = identify(shapes_of(model))
    chosen = [site for site in sites if site.layer in layers]
    generator = torch.Generator().manual_seed(SWAPPED_SEED)
    device = next(model.parameters()).device

    def make(site: AttentionSite) -> LinearAttention:
        linear = LinearAttention(site.num_heads, site.head_dim, feature_dim, form)
        linear.init_weights(generator)
        return linear.requires_grad_(False).to(device)

    originals = install(model, chosen, make)
    try:
        yield model
    finally:
        restore(model, chosen, originals)


def _swap_as(artifact: Artifact, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
    header = artifact.header
    return swap(model, header.linear_layers, header.feature_dim, header.form)


def compare_artifact(
    teacher: Teacher, artifact: Artifact, settings: CompareConfig, **how: Any
) -> Comparison:
    """Compare the teacher, the teacher with the same layers merely swapped, and the student.

    how: `seed`, `precision` and `callbacks` of `compare`.

    The student's row also has `bytes`, those of the artifact's tensors.
    """
    students = {
        "swapped": _swap_as(artifact, teacher.model),
        "student": artifact_files.apply(artifact, teacher.model),
    }
    comparison = compare(teacher, students, settings, **how)
    comparison.rows[-1]["bytes"] = sum(count_bytes(artifact).values())
    return comparison


def compare_few_step(
    teacher: Teacher, entrants: Entrants, settings: CompareConfig, **how: Any
) -> Comparison:
    """Compare steps against quality: the teacher at all steps and the entrants; see `compare`."""
    result = compare(teacher, entrants.students, settings, recipes=entrants.recipes, **how)
    for name in entrants.without_pictures:
        del result.frames[name]
    return result


def compare_experts(
    teacher: Teacher, made: Mapping[str, Artifact], settings: CompareConfig, **how: Any
) -> Comparison:
    """Compare two experts with their students, two models at work on each video; see `compare`.

    teacher: its model is `models.experts.Experts`; made: the file of each side.
    """

    @contextlib.contextmanager
    def both(change: Callable) -> Iterator[nn.Module]:
        with contextlib.ExitStack() as stack:
            for side, artifact in made.items():
                stack.enter_context(change(artifact, teacher.model.get_submodule(side)))
            yield teacher.model

    students = {
        "swapped": both(_swap_as),
        "student": both(artifact_files.apply),
    }
    return compare(teacher, students, settings, **how)


def save_comparison(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """Write the pictures, then evaluation.json; return what that holds.

    samples.png, samples.gif, velocity_error.png where velocities were compared, steps.png where
    models took several numbers of steps. evaluation.json has `settings`, `rows` and
    `velocity_rows`, as in `Comparison`.
    """
    frames = {_caption(name): clips for name, clips in comparison.frames.items()}
    videos.save_strip(frames, comparison.prompts, folder / "samples.png")
    videos.save_animation(frames, comparison.prompts, folder / "samples.gif")
    if comparison.velocity_rows:
        rows = [row | {"model": _caption(row["model"])} for row in comparison.velocity_rows]
        plots.plot_velocity_error(rows, folder / "velocity_error.png")
    if len({row["steps"] for row in comparison.rows}) > 1:
        plots.plot_steps(comparison.rows, folder / STEPS_NAME)
    settings = dataclasses.asdict(comparison.settings)
    # The file's key is older than the setting's name.
    settings["steps"] = settings.pop("sampler_steps")
    result = {
        "settings": settings,
        "rows": comparison.rows,
        "velocity_rows": comparison.velocity_rows,
    }
    write_json(folder / EVALUATION_NAME, result)
    return result


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """Return what `save_comparison` wrote into a folder; None where there is nothing whole."""
    try:
        result = json.loads((folder / EVALUATION_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    keys = ("settings", "rows", "velocity_rows")
    return result if isinstance(result, dict) and all(key in result for key in keys) else None


def _caption(name: str) -> str:
    return _CAPTIONS.get(name, name.replace("_", " "))
