"""Draw videos of teacher and student with their seconds: `python -m research.crowd.picture`.

They sample in turns, one video each of a caption that no training has seen, from the same noise, so
that whoever else uses the machine slows both: guided, a distilled file in its own few steps. A
label is the median of a model's seconds, `speedup` the median over turns of the teacher's seconds
over the student's. On two CPU cores, six minutes:
    OMP_NUM_THREADS=2 python -m research.crowd.picture --device cpu --record
"""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks.models.whole_video import time_in_turns
from benchmarks.record import REPOSITORY, RESULTS_FOLDER, check_file, show_rows, write_record
from linvideo_core import artifact
from linvideo_core.evaluate.config import CompareConfig
from linvideo_core.evaluate.videos import save_strip
from linvideo_core.flow import Recipe, make_sigmas
from linvideo_core.run.config import option, parse, run_command, to_flags
from linvideo_core.run.devices import resolve_device
from linvideo_core.run.errors import SettingError
from linvideo_core.run.folder import check_place

from .clips import decode_latents
from .config import StoredModelConfig
from .evaluate import Sampling, describe_model, open_with_captions
from .rows import Row
from .train import SHIFT, WEIGHTS

_RECORD_NAME, _PICTURE_NAME = "crowd_picture.json", "crowd.webp"
# Of the frames, which `save_strip` thins out once more: wide enough to be read in a page.
_SHOWN_FRAMES = slice(None, None, 5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureConfig(StoredModelConfig):
    """Which models are drawn, and of how many captions."""

    comparison: CompareConfig = dataclasses.field(
        default_factory=lambda: CompareConfig(
            num_samples=3, seeds_per_prompt=1, sampler_steps=20, shift=SHIFT, batch_size=1
        )
    )
    artifact: Path = option(WEIGHTS / "half_long.safetensors", "LINVIDEO file of the student")
    out: Path = option(Path("runs/crowd_picture"), "folder of captions, picture and table")
    record: bool = option(False, f"write results/{_RECORD_NAME} and docs/{_PICTURE_NAME}")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (size := self.comparison.batch_size) != 1:
            raise SettingError(
                f"{{batch_size}} {size} given; 1 is needed, because the seconds of single videos "
                "are shown",
                "batch_size",
            )


def sample_in_turns(sampling: Sampling, path: Path) -> tuple[dict[str, list[Tensor]], list[Row]]:
    """Return "teacher" and "student" -> latents of each turn, and a row of each with its seconds.

    path: the student's file. Raises ArtifactError where it does not fit the teacher.
    """
    model, made, parts = sampling.teacher.model, artifact.load(path), sampling.parts()
    models = {
        name: describe_model(sampling, name, file)
        for name, file in (("teacher", None), ("student", path))
    }
    recipes = {"teacher": sampling.recipe_of(), "student": sampling.recipe_of(made.header)}
    first = Recipe(sigmas=make_sigmas(1, SHIFT), guidance_scale=1.0)
    latents: dict[str, list[Tensor]] = {name: [] for name in models}

    def enter(name: str) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if name == "teacher" else artifact.apply(made, model)

    def sample(name: str, turn: int | None) -> None:
        number, recipe = (0, first) if turn is None else (turn, recipes[name])
        found = sampling.sample(model, parts[number], number, sampling.config.seed, recipe)
        if turn is not None:
            latents[name].append(found)

    timed = time_in_turns(len(parts), enter, sample, sampling.run.device)
    return latents, [models[name] | each for name, each in timed.items()]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, sample in turns, write the picture and the table, show it."""
    config = parse(PictureConfig, argv, description=__doc__)
    path = (RESULTS_FOLDER if config.record else config.out) / _RECORD_NAME
    check_file(path)
    check_place(config.out)
    sampling = open_with_captions(config)
    latents, rows = sample_in_turns(sampling, config.artifact)
    labels = {row["model"]: f"{row['model']}, {row['seconds']:.0f} s" for row in rows}
    strip = config.out / "crowd.png"
    save_strip(
        {labels[name]: draw(each) for name, each in latents.items()},
        [sampling.teacher.prompts[i] for i in sampling.index],
        strip,
    )
    picture = (REPOSITORY / "docs" if config.record else config.out) / _PICTURE_NAME
    Image.open(strip).save(picture, quality=25, method=6)
    write_record(
        path,
        title="crowd: seconds of a video, teacher and student in turns",
        command=f"python -m research.crowd.picture {to_flags(config, without=('out',))}".strip(),
        rows=rows,
        device=resolve_device(config.device),
    )
    sys.stdout.write(f"{show_rows(rows)}picture: {picture}\n")


def draw(latents: Sequence[Tensor]) -> Tensor:
    """Return some frames [B, F, H, W] of so many single videos."""
    return torch.cat([decode_latents(x.float())[:, _SHOWN_FRAMES] for x in latents])


if __name__ == "__main__":
    run_command(main)
