"""Compare models that sample the same prompts from the same noise: a teacher and its students."""

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact import Artifact, apply, load
from ..artifact.header import ArtifactHeader
from ..artifact.summary import count_bytes
from ..demo import weights_path
from ..flow import TIMESTEP_SCALE, Recipe, make_sigmas, shift_sigmas
from ..kernels.softmax import DENSITY
from ..models.attention import LinearAttention
from ..models.attention_sites import (
    AttentionSite,
    attention_at,
    install,
    restore,
    shapes_of,
    softmax_by,
)
from ..models.config import LinearForm, SoftmaxConfig
from ..models.families import identify
from ..run.callbacks import Callbacks
from ..run.errors import SettingError
from ..run.files import write_json
from ..run.reading import read_json
from ..teacher.teacher import Teacher
from . import metrics, plots, videos
from .card import SAMPLES_NAMES
from .config import CompareConfig
from .lora_file import LoraFile, WeightChange, add_changes, find_changes
from .sampler import NUM_SHOWN, Evaluator, Row, find_fps

EVALUATION_NAME = "evaluation.json"
STEPS_NAME = "steps.png"
SWAPPED_SEED = 0

_CAPTIONS = {"swapped": "before training", "student": "after training"}

Students = Mapping[str, contextlib.AbstractContextManager[nn.Module]]
"""Name -> a context that yields the model; `contextlib.nullcontext(model)` for a ready one."""


@dataclasses.dataclass(kw_only=True)
class Comparison:
    """Measures and pictures of several models that sampled the same prompts from the same noise.

    rows: one a model, the teacher first: how many layers of each kind, its measures by name.
    velocity_rows: `model`, `sigma`, `velocity_error`, `velocity_cosine` of each student.
    frames: model -> uint8 [K, F, h, w], decoded by Wan's autoencoder [K, F, h, w, 3], of the first
        few samples, on the CPU; prompts: theirs.
    fps: frames a second at which videos play.
    is_decoded: whether the frames are pixels, not the mean channel of latents.
    video_size: frames, height and width in pixels.
    """

    settings: CompareConfig
    rows: list[Row]
    velocity_rows: list[Row]
    frames: dict[str, Tensor]
    prompts: list[str]
    fps: int
    is_decoded: bool
    video_size: tuple[int, int, int]


def compare(
    teacher: Teacher,
    students: Students,
    settings: CompareConfig,
    *,
    seed: int,
    precision: str = "fp32",
    callbacks: Callbacks | None = None,
    recipes: Mapping[str, Recipe] | None = None,
    softmax: SoftmaxConfig | None = None,
) -> Comparison:
    """Sample the teacher, then every student, and measure them; on the teacher's device.

    students: each context is entered once, after the teacher was sampled. It may change
        `teacher.model` in place as long as leaving it gives the teacher back.
    recipes: name -> how that student is sampled; the others as the settings say. Velocities are
        compared of the others alone, which follow the teacher's trajectories.
    softmax: what computes the students' softmax layers, where that is sparse.

    Seconds that are compared are of calls that take turns, since whoever else uses the machine
    slows some more than others: a student's calls stand beside the teacher's, before it samples and
    after. `speedup` is the mean of these ratios, and `seconds_per_video` of a student the teacher's
    over it.
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
        frames={"teacher": reference.frames},
        prompts=evaluator.prompts[:NUM_SHOWN],
        fps=find_fps(teacher),
        is_decoded=teacher.is_demo or reference.frames.ndim == 5,
        video_size=teacher.video_size,
    )
    turns = [evaluator.time_video(teacher.model)]
    speedups = [1.0]
    for name, context in students.items():
        with context as model, _softmax_of(model, softmax):
            recipe = (recipes or {}).get(name)
            before = evaluator.time_video(model, recipe)
            samples = evaluator.sample(name, model, recipe=recipe)
            velocity_rows = [] if recipe else evaluator.compare_velocities(name, model)
            after = evaluator.time_video(model, recipe)
        turns.append(evaluator.time_video(teacher.model))
        speedups.append(statistics.fmean((turns[-2] / before, turns[-1] / after)))
        evaluator.describe(samples)
        result.rows.append(evaluator.measure(samples, reference, velocity_rows))
        result.velocity_rows += velocity_rows
        result.frames[name] = samples.frames
    for row, speedup in zip(result.rows, speedups, strict=True):
        row["speedup"] = speedup
        row["seconds_per_video"] = statistics.median(turns) / speedup
    return result


def _softmax_of(
    model: nn.Module, softmax: SoftmaxConfig | None
) -> contextlib.AbstractContextManager[None]:
    if softmax is None or not softmax.is_sparse:
        return contextlib.nullcontext()
    _, sites = identify(shapes_of(model))
    return softmax_by(model, sites, softmax.softmax_kernel, softmax.density or DENSITY)


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

    how: `seed`, `precision`, `callbacks` and `softmax` of `compare`.

    The student's row also has `bytes`, those of the artifact's tensors.
    """
    comparison = compare_experts(teacher, {"": artifact}, settings, **how)
    comparison.rows[-1]["bytes"] = sum(count_bytes(artifact).values())
    return comparison


def compare_experts(
    teacher: Teacher, made: Mapping[str, Artifact], settings: CompareConfig, **how: Any
) -> Comparison:
    """Compare two experts with their students, two models at work on each video; see `compare`.

    made: submodule of the teacher's model, such as a side of `models.experts.Experts` -> its file.
    """

    @contextlib.contextmanager
    def both(change: Callable) -> Iterator[nn.Module]:
        with contextlib.ExitStack() as stack:
            for side, artifact in made.items():
                stack.enter_context(change(artifact, teacher.model.get_submodule(side)))
            yield teacher.model

    students = {"swapped": both(_swap_as), "student": both(apply)}
    return compare(teacher, students, settings, **how)


def compare_kernels(
    teacher: Teacher,
    artifact: Artifact | None,
    kernels: Sequence[SoftmaxConfig],
    settings: CompareConfig,
    *,
    dense_share: float,
    **how: Any,
) -> Comparison:
    """Compare the teacher with itself by other softmax kernels, then with the file's layers linear.

    artifact: none: without linear layers. dense_share: of the steps, from the first, in which
        sparse layers stay dense. how: `seed`, `precision` and `callbacks` of `compare`.

    Rows also have `softmax_backend` and `density`, and where videos are shown as pixels the
    `metrics.pixel_error` of those.
    """
    model = teacher.model
    sites = identify(shapes_of(model))[1]
    own = SoftmaxConfig(softmax_kernel=attention_at(model, sites[0]).kernel)
    level = shift_sigmas(torch.tensor(1 - dense_share), settings.shift).item()

    @contextlib.contextmanager
    def change(made: Artifact | None, softmax: SoftmaxConfig) -> Iterator[nn.Module]:
        how = {"kernel": softmax.softmax_kernel, "density": softmax.density or DENSITY}
        if softmax.is_sparse:
            # A step at that very level is sparse, as in ComfyUI, whatever rounding makes of it.
            how["max_timestep"] = TIMESTEP_SCALE * level * (1 + 1e-4)
        linear = apply(made, model) if made else contextlib.nullcontext()
        with linear, softmax_by(model, sites, **how):
            yield model

    cases = {_name_case(None, each): (None, each) for each in kernels if each != own}
    if artifact is not None:
        cases |= {_name_case(artifact, each): (artifact, each) for each in (own, *kernels)}
    students = {name: change(*case) for name, case in cases.items()}
    result = compare(teacher, students, settings, **how)
    for row, (_, softmax) in zip(result.rows, [(None, own), *cases.values()], strict=True):
        row["softmax_backend"] = softmax.softmax_kernel
        row["density"] = (softmax.density or DENSITY) if softmax.is_sparse else 1.0
        if result.is_decoded:
            frames = (result.frames[name] for name in (row["model"], "teacher"))
            row["pixel_error"] = metrics.pixel_error(*frames)
    return result


def _name_case(artifact: Artifact | None, softmax: SoftmaxConfig) -> str:
    density = f" {softmax.density or DENSITY:g}" if softmax.is_sparse else ""
    kind = f"{artifact.header.form.kind}, " if artifact else ""
    return f"{kind}{softmax.softmax_kernel}{density}"


def load_linearized(path: Path | None) -> Artifact:
    """Load a linearized file; none: the embedded model's own.

    Raises ArtifactError or ValueError for a damaged one or one that was distilled already.
    """
    path = path or weights_path("linearized.safetensors")
    artifact = load(path)
    if artifact.header.sigmas:
        raise ValueError(
            f"{path} is distilled already; give the file that `transfer` made, with any number of "
            "steps"
        )
    return artifact


def load_distilled(paths: Sequence[Path], first: Artifact) -> dict[str, Artifact]:
    """Load files that were distilled from `first`, by their names in a comparison.

    Raises ArtifactError or ValueError for a damaged one, one that is not distilled, one with other
    layers than `first`, and two of one name.
    """
    made: dict[str, Artifact] = {}
    for path in paths:
        artifact = load(path)
        if not artifact.header.sigmas:
            raise ValueError(f"{path} is not distilled; give a file that `distill` made")
        mine, theirs = (_describe_layers(found.header) for found in (artifact, first))
        if mine != theirs:
            raise SettingError(
                f"{path} has {mine}, the linearized file {theirs}; give the file that it was "
                "distilled from as {artifact}",
                "artifact",
            )
        if (name := name_of(artifact)) in made:
            raise ValueError(
                f"{path} is a second {name}; give one file of each number of stages and steps"
            )
        made[name] = artifact
    return made


def _describe_layers(header: ArtifactHeader) -> str:
    layers = ", ".join(map(str, header.linear_layers))
    tile = f" of tile {header.tile}" if header.tile else ""
    return f"the {header.form.kind} layers {layers}{tile}"


def name_of(artifact: Artifact) -> str:
    """Return how a comparison calls a distilled file: "distilled_4" or "single_stage_4"."""
    is_single = artifact.header.provenance.get("stages") == 1
    return f"{'single_stage' if is_single else 'distilled'}_{_count_steps(artifact)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewStepLora:
    """A LoRA that makes the teacher sample in few steps, and how: at `sigmas` [steps + 1]."""

    file: LoraFile
    strength: float
    sigmas: Tensor


def compare_few_step(
    teacher: Teacher,
    linearized: Artifact,
    distilled: Mapping[str, Artifact],
    settings: CompareConfig,
    *,
    plain_steps: Sequence[int] = (),
    lora: FewStepLora | None = None,
    **how: Any,
) -> Comparison:
    """Compare steps against quality: the teacher at all steps and `find_students`' models.

    how: `seed`, `precision`, `callbacks` and `softmax` of `compare`.

    There are no pictures of `plain_steps`, but where a distilled file takes as many.
    """
    students, recipes = find_students(
        teacher.model, linearized, distilled, settings, plain_steps=plain_steps, lora=lora
    )
    result = compare(teacher, students, settings, recipes=recipes, **how)
    shown = {f"linearized_{_count_steps(made)}_plain" for made in distilled.values()}
    for name in students:
        if name.endswith("_plain") and name not in shown:
            del result.frames[name]
    return result


def find_students(
    model: nn.Module,
    linearized: Artifact,
    distilled: Mapping[str, Artifact],
    settings: CompareConfig,
    *,
    plain_steps: Sequence[int] = (),
    lora: FewStepLora | None = None,
) -> tuple[Students, dict[str, Recipe]]:
    """Return the models to compare with a teacher at all its steps, and how they are sampled.

    Those without a recipe are sampled as the teacher. "linearized" takes all steps.

    distilled: name -> a file with sigmas. The model "linearized_N_plain" takes as many Euler steps
        with guidance as one of them without having been distilled.
    plain_steps: numbers of Euler steps that teacher ("teacher_N_plain") and student also take.
    lora: added to the teacher ("teacher_lora_N") and to the linearized model, without guidance.
    """
    students = {"linearized": apply(linearized, model)}
    recipes = {}
    own_steps = set(map(_count_steps, distilled.values()))
    for steps in sorted(own_steps | set(plain_steps), reverse=True):
        sigmas = make_sigmas(steps, settings.shift)
        plain = Recipe(sigmas=sigmas, guidance_scale=settings.guidance_scale)
        recipes |= {f"{name}_{steps}_plain": plain for name in ("linearized", "teacher")}
        students[f"linearized_{steps}_plain"] = apply(linearized, model)
        if steps in plain_steps:
            students[f"teacher_{steps}_plain"] = contextlib.nullcontext(model)
    for name, made in distilled.items():
        students[name] = apply(made, model)
        recipes[name] = _few_step(torch.tensor(made.header.sigmas))
    if lora is not None:
        # Once for both models, so that there is one warning, and before anything is sampled.
        changes = find_changes(lora.file, model, strength=lora.strength)
        name = f"lora_{len(lora.sigmas) - 1}"
        recipes |= {f"{of}_{name}": _few_step(lora.sigmas) for of in ("linearized", "teacher")}
        students[f"teacher_{name}"] = add_changes(model, changes)
        students[f"linearized_{name}"] = _with_both(model, linearized, changes)
    return students, recipes


def _count_steps(distilled: Artifact) -> int:
    return len(distilled.header.sigmas) - 1


def _few_step(sigmas: Tensor) -> Recipe:
    return Recipe(sigmas=sigmas, guidance_scale=1.0, is_few_step=True)


@contextlib.contextmanager
def _with_both(
    model: nn.Module, linearized: Artifact, changes: Sequence[WeightChange]
) -> Iterator[nn.Module]:
    with apply(linearized, model), add_changes(model, changes):
        yield model


def save_comparison(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """Write the pictures, then evaluation.json; return what that holds.

    samples.png; samples.gif, or samples.mp4 of videos in colour; velocity_error.png where
    velocities were compared, steps.png where models took several numbers of steps. evaluation.json
    has `settings`, with the videos' size, `rows`, `velocity_rows` and `is_decoded`, as in
    `Comparison`.
    """
    frames = {_caption(name): clips for name, clips in comparison.frames.items()}
    is_colour = comparison.frames["teacher"].ndim == 5
    videos.save_strip(frames, comparison.prompts, folder / "samples.png")
    speed = {"fps": comparison.fps} if is_colour else {}
    path = folder / SAMPLES_NAMES[is_colour]
    videos.save_animation(frames, comparison.prompts, path, **speed)
    if comparison.velocity_rows:
        rows = [row | {"model": _caption(row["model"])} for row in comparison.velocity_rows]
        plots.plot_velocity_error(rows, folder / "velocity_error.png")
    if len({row["steps"] for row in comparison.rows}) > 1:
        plots.plot_steps(comparison.rows, folder / STEPS_NAME)
    settings = dataclasses.asdict(comparison.settings)
    # The file's key is older than the setting's name.
    settings["steps"] = settings.pop("sampler_steps")
    sizes = zip(("num_frames", "height", "width"), comparison.video_size, strict=True)
    result = {
        "settings": settings | dict(sizes),
        "rows": comparison.rows,
        "velocity_rows": comparison.velocity_rows,
        "is_decoded": comparison.is_decoded,
    }
    write_json(folder / EVALUATION_NAME, result)
    return result


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """Return what `save_comparison` wrote into a folder; None where there is nothing whole."""
    try:
        result = read_json(folder / EVALUATION_NAME)
    except (FileNotFoundError, ValueError):
        return None
    keys = ("settings", "rows", "velocity_rows")
    return result if isinstance(result, dict) and all(key in result for key in keys) else None


def _caption(name: str) -> str:
    return _CAPTIONS.get(name, name.replace("_", " "))
