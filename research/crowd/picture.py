"""Draw videos of teacher and student with their seconds: `python -m research.crowd.picture`.

They sample in turns, one video each of a caption that no training has seen, from the same noise, so
that whoever else uses the machine slows all: guided, a distilled file in its own few steps. With
`--keep-first-steps` the student has rows besides whose first steps are the teacher's. A label is
the median of a row's seconds, `speedup` the median over turns of the teacher's seconds over its
own. On two CPU cores, five minutes, two to three more for each of these numbers:
    OMP_NUM_THREADS=2 python -m research.crowd.picture --device cpu --keep-first-steps 8 --record
"""

import contextlib
import copy
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


def sample_in_turns(
    sampling: Sampling, path: Path, first_steps: Sequence[int] = ()
) -> tuple[dict[str, list[Tensor]], list[Row]]:
    """Return by the name of each row the latents of each turn, and the rows with their seconds.

    The names are "teacher", "student" and, for each of `first_steps`, "after 4" and the like.
    path: the student's file. Raises ArtifactError where it does not fit the teacher, SettingError
    where first steps are asked of a distilled one.
    """
    model, made, parts = sampling.teacher.model, artifact.load(path), sampling.parts()
    if first_steps and made.header.sigmas:
        raise SettingError(
            f"{{keep_first_steps}} given, and {{artifact}} {path} was distilled: its few steps are "
            "all its own; leave one out, or give the file of a transfer",
            "keep_first_steps",
            "artifact",
        )
    student = describe_model(sampling, "student", path)
    after = {f"after {count}": count for count in first_steps}
    models = {"teacher": describe_model(sampling, "teacher", None), "student": student}
    models |= {
        name: {**student, "model": name, "keep_first_steps": count} for name, count in after.items()
    }
    teacher = copy.deepcopy(model) if after else None
    recipe = sampling.recipe_of(made.header)
    one_step = Recipe(sigmas=make_sigmas(1, SHIFT), guidance_scale=1.0)
    latents: dict[str, list[Tensor]] = {name: [] for name in models}

    def enter(name: str) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if name == "teacher" else artifact.apply(made, model)

    def sample(name: str, turn: int | None) -> None:
        seed = sampling.config.seed
        if turn is None:
            sampling.sample(model, parts[0], 0, seed, one_step)
            return
        how = {"first": teacher, "first_steps": after[name]} if name in after else {}
        own = None if name == "teacher" else recipe
        latents[name].append(sampling.sample(model, parts[turn], turn, seed, own, **how))

    timed = time_in_turns([*models], len(parts), enter, sample, sampling.run.device)
    return latents, [models[name] | each for name, each in timed.items()]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, sample in turns, write the picture and the table, show it."""
    config = parse(PictureConfig, argv, description=__doc__)
    path = (RESULTS_FOLDER if config.record else config.out) / _RECORD_NAME
    check_file(path)
    check_place(config.out)
    sampling = open_with_captions(config)
    latents, rows = sample_in_turns(sampling, config.artifact, config.list_first_steps())
    labels = {row["model"]: f"{row['model']}, {row['seconds']:.0f} s" for row in rows}
    strip = config.out / "crowd.png"
    save_strip(
        {labels[name]: draw(each) for name, each in latents.items()},
        [sampling.teacher.prompts[i] for i in sampling.index],
        strip,
    )
    picture = (REPOSITORY / "docs" if config.record else config.out) / _PICTURE_NAME
    Image.open(strip).save(picture, quality=15, method=6)
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
