"""The settings of `research.crowd.evaluate`, and lists of files and steps."""

import dataclasses
from pathlib import Path

from benchmarks.number_lists import read_densities, read_numbers
from linvideo_core.evaluate.config import CompareConfig
from linvideo_core.run.config import Settings, option
from linvideo_core.run.devices import device_option
from linvideo_core.run.errors import SettingError, shown_value
from linvideo_core.run.limits import Limits
from linvideo_core.teacher.config import TIME_COMPRESSION

from .clips import NUM_FRAMES
from .rows import RECORD_NAME
from .tracks import LAG
from .train import SHIFT, WEIGHTS

WHOLE = NUM_FRAMES - TIME_COMPRESSION + 1
"""Frames of a whole clip, as commands count them: 4 n + 1."""
# What a repeated command may change: measures are kept by the files that they are of.
FREE_FIELDS = (
    "artifacts",
    "densities",
    "keep_first_steps",
    "student_guidance",
    "model",
    "judge",
    "prompts",
    "record",
    "device",
    "out",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredModelConfig(Settings):
    """What is sampled by a command that needs no files of one's own; `out` has its captions."""

    comparison: CompareConfig = dataclasses.field(default_factory=CompareConfig)
    model: Path = option(WEIGHTS / "model.safetensors", "the teacher")
    keep_first_steps: str = option(
        "", "first steps that the teacher makes, such as 4,8; none: no such samplings"
    )
    out: Path = option(Path("runs/crowd"), "folder of captions")
    seed: int = option(0, "seed of noise and captions")
    device: str = device_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.list_first_steps()

    def list_first_steps(self) -> list[int]:
        """Return how many first steps the teacher makes, of several samplings; none by default."""
        return read_steps(self.keep_first_steps, self.comparison.sampler_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrowdConfig:
    """What is compared."""

    comparison: CompareConfig = dataclasses.field(
        default_factory=lambda: CompareConfig(
            num_samples=2000, seeds_per_prompt=2, shift=SHIFT, batch_size=40
        )
    )
    model: Path = option(Path("runs/crowd/model.safetensors"), "the teacher")
    prompts: Path = option(Path("runs/crowd/held_out.safetensors"), "captions to sample")
    judge: Path = option(Path("runs/crowd/judge/judge.safetensors"), "the judge")
    artifacts: str = option("", "LINVIDEO files, such as a.safetensors,b.safetensors; none: no one")
    densities: str = option(
        "", "shares of exact blocks of sparse softmax layers, such as 0.1,0.2; none: no such rows"
    )
    keep_first_steps: str = option(
        "",
        "first steps of students' videos that the teacher makes, such as 4,8; none: no such rows",
    )
    student_guidance: str = option(
        "", "guidance scales of students in rows of their own, such as 3.2,3.5; none: no such rows"
    )
    num_frames: int = option(WHOLE, "frames of a video: of less than 61, rendered clips are cut")
    compile: bool = option(False, "compile the blocks of what samples: a minute, then faster")
    out: Path = option(Path("runs/crowd/evaluation"), "folder of the measures and of crowd.json")
    record: bool = option(False, f"write results/{RECORD_NAME}, too")
    seed: int = option(0, "seed of noise and captions")
    device: str = device_option()

    def __post_init__(self) -> None:
        size, repeats = self.comparison.batch_size, self.comparison.seeds_per_prompt
        if size % repeats:
            raise SettingError(
                f"{{batch_size}} {size} given; a multiple of {{seeds_per_prompt}} {repeats} is "
                "needed",
                "batch_size",
                "seeds_per_prompt",
            )
        if self.num_frames <= LAG:
            raise SettingError(
                f"{{num_frames}} {self.num_frames} given; {LAG + 1} are needed, to tell speeds by",
                "num_frames",
            )
        self.list_densities()
        files = self.list_artifacts()
        self.list_first_steps()
        self.list_guidance_scales()
        for field in ("keep_first_steps", "student_guidance"):
            if (given := getattr(self, field)) and not files:
                raise SettingError(
                    f"{{{field}}} {given} given, which is of students: name their files by "
                    "{artifacts}",
                    field,
                    "artifacts",
                )

    def list_densities(self) -> dict[str, float]:
        """Return the densities of sparse rows by their names in folders."""
        return read_densities(self.densities, "densities") if self.densities else {}

    def list_first_steps(self) -> list[int]:
        """Return how many first steps the teacher makes in rows of their own."""
        return read_steps(self.keep_first_steps, self.comparison.sampler_steps)

    def list_guidance_scales(self) -> list[float]:
        """Return the guidance scales of students in rows of their own."""
        if not self.student_guidance:
            return []
        field, usual = "student_guidance", self.comparison.guidance_scale
        scales = [*read_numbers(self.student_guidance, field, Limits(low=1, high=100)).values()]
        if usual in scales:
            raise SettingError(
                f"{{{field}}} {self.student_guidance} given, and {usual:g} is the teacher's, of "
                "which there are rows anyway; leave it out",
                field,
            )
        return scales

    def list_artifacts(self) -> dict[str, Path]:
        """Return the LINVIDEO files by their names, see `read_artifacts`."""
        return read_artifacts(self.artifacts)


def read_artifacts(words: str) -> dict[str, Path]:
    """Return the files of a list such as "run/linearized.safetensors,b.safetensors".

    They are called by their folder's and their own name, such as "run-linearized". Raises
    SettingError where two are called alike.
    """
    paths = [Path(word.strip()) for word in words.split(",") if word.strip()]
    found: dict[str, Path] = {}
    for path in paths:
        name = f"{path.absolute().parent.name}-{path.stem}"
        if name in found:
            raise SettingError(
                f"{{artifacts}} {shown_value(words)} given, and two rows would be called {name}; "
                "others are needed",
                "artifacts",
            )
        found[name] = path
    return found


def read_steps(words: str, num_steps: int) -> list[int]:
    """Return the numbers of first steps of a list such as "4,8"; none of "".

    Raises SettingError for what is no number from 1 on, below `num_steps`, or stands twice.
    """
    limits = Limits(low=1, high=num_steps - 1, is_whole=True)
    return [*read_numbers(words, "keep_first_steps", limits).values()] if words else []
