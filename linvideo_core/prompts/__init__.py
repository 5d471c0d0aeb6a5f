"""Prompts: those written for this project, those of a text file, and their embeddings.

embeddings: encoded once into a safetensors file, read back as a model takes them; text_encoder:
the UMT5 encoder of Wan, headless.
"""

from pathlib import Path

from ..run.reading import read_text

DEFAULT_PATH = Path(__file__).with_name("prompts.txt")
_MOST_PROMPTS = 100_000

NEGATIVE_PROMPT = (
    "washed-out or garish colours, overexposed, a frozen picture in which nothing moves, smeared "
    "and blurry details, captions, watermark, logo, flat grey look, compression blocks, low "
    "quality, crude drawing, still image, warped face, misshapen hands, melted or extra fingers, "
    "extra or missing limbs, tangled bodies, cluttered background, flicker, people walking "
    "backwards"
)
"""What the unconditional branch is asked for: Wan's customary negative prompt in other words."""


def default_prompts() -> list[str]:
    """Return the prompts that come with LinVideo: varied, and full of motion."""
    return read_prompts(DEFAULT_PATH)


def check_file(path: Path) -> None:
    """Raise FileNotFoundError, in one sentence, where there is no file of prompts."""
    if not path.is_file():
        fault = "is no file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"prompt file {path} {fault}")


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a text file, one a line; empty lines do not count.

    Raises FileNotFoundError or ValueError, in one sentence, where there are none.
    """
    check_file(path)
    try:
        prompts = split_prompts(read_text(path))
    except ValueError as error:
        raise ValueError(f"{error}; give prompts in UTF-8, one a line") from None
    if not 0 < len(prompts) <= _MOST_PROMPTS:
        number = (
            f"{len(prompts):,} prompts, {_MOST_PROMPTS:,} at most are read"
            if prompts
            else "no prompts"
        )
        raise ValueError(f"{path} holds {number}; write one a line")
    return prompts


def split_prompts(text: str) -> list[str]:
    """Return the prompts of a text, one a line."""
    return [line for line in map(str.strip, text.splitlines()) if line]
