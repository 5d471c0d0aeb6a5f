"""The two stages of a file: linearized by `transfer`, then distilled to few steps by `distill`."""

from collections.abc import Sequence
from pathlib import Path

from . import artifact as artifact_files
from .artifact import Artifact
from .demo import weights_path


def load_first_stage(path: Path | None) -> Artifact:
    """Load a linearized file; none: the embedded model's own.

    Raises ArtifactError or ValueError, in one sentence, for a damaged one or one that was
    distilled already.
    """
    path = path or weights_path("linearized.safetensors")
    artifact = artifact_files.load(path)
    if artifact.header.sigmas:
        raise ValueError(
            f"{path} is distilled already; give the file that `transfer` made, with any number of "
            "steps"
        )
    return artifact


def load_second_stages(paths: Sequence[Path], first: Artifact) -> dict[str, Artifact]:
    """Load files that were distilled from `first`, by their names in a comparison.

    Raises ArtifactError or ValueError, in one sentence, for a damaged one, one that is not
    distilled, one with other linear layers than `first`, and two of one name.
    """
    made: dict[str, Artifact] = {}
    for path in paths:
        artifact = artifact_files.load(path)
        if not artifact.header.sigmas:
            raise ValueError(f"{path} is not distilled; give a file that `distill` made")
        mine, theirs = (list(found.header.layers) for found in (artifact, first))
        if mine != theirs:
            raise ValueError(
                f"{path} has the linear layers {mine}, the linearized file {theirs}; give the "
                "file that it was distilled from as --artifact"
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
