"""Which models are compared with a teacher where quality stands against the number of steps."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import artifact as artifact_files
from ..artifact import Artifact, apply
from ..demo import weights_path
from ..flow import Recipe, make_sigmas
from ..run.errors import SettingError
from .config import CompareConfig
from .lora_file import LoraFile, WeightChange, add_changes, find_changes


def load_linearized(path: Path | None) -> Artifact:
    """Load a linearized file; none: the embedded model's own.

    Raises ArtifactError or ValueError for a damaged one or one that was distilled already.
    """
    path = path or weights_path("linearized.safetensors")
    artifact = artifact_files.load(path)
    if artifact.header.sigmas:
        raise ValueError(
            f"{path} is distilled already; give the file that `transfer` made, with any number of "
            "steps"
        )
    return artifact


def load_distilled(paths: Sequence[Path], first: Artifact) -> dict[str, Artifact]:
    """Load files that were distilled from `first`, by their names in a comparison.

    Raises ArtifactError or ValueError for a damaged one, one that is not distilled, one with other
    linear layers than `first`, and two of one name.
    """
    made: dict[str, Artifact] = {}
    for path in paths:
        artifact = artifact_files.load(path)
        if not artifact.header.sigmas:
            raise ValueError(f"{path} is not distilled; give a file that `distill` made")
        mine, theirs = (list(found.header.linear_layers) for found in (artifact, first))
        if mine != theirs:
            raise SettingError(
                f"{path} has the linear layers {mine}, the linearized file {theirs}; give the "
                "file that it was distilled from as {artifact}",
                "artifact",
            )
        if (name := name_of(artifact)) in made:
            raise ValueError(
                f"{path} is a second {name}; give one file of each number of stages and steps"
            )
        made[name] = artifact
    return made


def name_of(artifact: Artifact) -> str:
    """Return how a comparison calls a distilled file: "distilled_4" or "single_stage_4"."""
    is_single = artifact.header.provenance.get("stages") == 1
    return f"{'single_stage' if is_single else 'distilled'}_{len(artifact.header.sigmas) - 1}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewStepLora:
    """A LoRA that makes the teacher sample in few steps, and how: at `sigmas` [steps + 1]."""

    file: LoraFile
    strength: float
    sigmas: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entrants:
    """The models that are compared with the teacher at all its steps.

    students: name -> a context that yields the model, to be entered once.
    recipes: name -> how that one is sampled; the others as the teacher.
    """

    students: Mapping[str, contextlib.AbstractContextManager[nn.Module]]
    recipes: Mapping[str, Recipe]
    without_pictures: Collection[str]


def find_entrants(
    model: nn.Module,
    linearized: Artifact,
    distilled: Mapping[str, Artifact],
    settings: CompareConfig,
    *,
    plain_steps: Sequence[int] = (),
    lora: FewStepLora | None = None,
) -> Entrants:
    """List the student at all steps, teacher and student at few, those of `distilled` and `lora`.

    model: the teacher.
    distilled: name -> a file with sigmas. The model "linearized_N_plain" takes as many Euler steps
        with guidance as one of them without having been distilled.
    plain_steps: numbers of Euler steps that teacher ("teacher_N_plain") and student also take,
        without pictures.
    lora: added to the teacher ("teacher_lora_N") and to the linearized model, without guidance.
    """
    students = {"linearized": apply(linearized, model)}
    recipes = {}
    own_steps = {len(made.header.sigmas) - 1 for made in distilled.values()}
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
    hidden = {f"teacher_{steps}_plain" for steps in plain_steps}
    hidden |= {f"linearized_{steps}_plain" for steps in set(plain_steps) - own_steps}
    return Entrants(students=students, recipes=recipes, without_pictures=hidden)


def _few_step(sigmas: Tensor) -> Recipe:
    return Recipe(sigmas=sigmas, guidance_scale=1.0, is_few_step=True)


@contextlib.contextmanager
def _with_both(
    model: nn.Module, linearized: Artifact, changes: Sequence[WeightChange]
) -> Iterator[nn.Module]:
    with apply(linearized, model), add_changes(model, changes):
        yield model
