"""Captions of scenes: labels -> words -> prompt embeddings, by a fixed table and no network.

A caption reads "small slow disc moving right, large fast heart bouncing, upright bar, background
drifting left". Each phrase is one token of the prompt, the sum of its words' vectors over two, so
that what belongs together stays together, and order says nothing. Words are rows of a Hadamard
matrix: orthogonal, of unit variance, and exact in fp16.

    python -m research.crowd.captions --num-prompts 2000
writes prompts.safetensors, and held_out.safetensors of captions that no training has seen.
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from linvideo_core.run import limits
from linvideo_core.run.config import option, run_command
from linvideo_core.run.config import parse as parse_flags
from linvideo_core.run.files import write_tensors

from .clips import (
    BARS,
    MAX_SPRITES,
    MOTIONS,
    NO_SHAPE,
    PANS,
    SHAPES,
    SIZES,
    SPEEDS,
    Labels,
    draw_scenes,
)

TEXT_DIM = 64
NUM_TOKENS = MAX_SPRITES + 2

_MOVING = [f"moving {word}" for word in MOTIONS[:4]]
_CIRCLING = [f"circling {word}" for word in MOTIONS[4:6]]
_MOTION_WORDS = (*_MOVING, *_CIRCLING, MOTIONS[6])

# Phrase -> (shape, motion, speed, size), or the number of a bar or a pan.
SPRITE_PHRASES = {
    f"{size} {speed} {shape} {motion}": (i, j, k, m)
    for (i, shape), (j, motion), (k, speed), (m, size) in itertools.product(
        *map(enumerate, (SHAPES, _MOTION_WORDS, SPEEDS, SIZES))
    )
}
BAR_PHRASES = tuple(f"{'no' if bar == 'none' else bar} bar" for bar in BARS)
PAN_PHRASES = ("background still", *(f"background drifting {pan}" for pan in [*PANS][1:]))


def describe(labels: Labels) -> list[str]:
    """Return the captions of scenes."""
    sprites = torch.stack([labels.shape, labels.motion, labels.speed, labels.size], -1).tolist()
    phrase_of = {index: phrase for phrase, index in SPRITE_PHRASES.items()}
    scene = zip(sprites, labels.bar.tolist(), labels.pan.tolist(), strict=True)
    return [
        ", ".join(
            [
                *(phrase_of[tuple(each)] for each in sprite if each[0] != NO_SHAPE),
                BAR_PHRASES[bar],
                PAN_PHRASES[pan],
            ]
        )
        for sprite, bar, pan in scene
    ]


def parse(captions: Sequence[str]) -> Labels:
    """Read captions back; ValueError for one that is not made as above."""
    sprites, bars, pans = zip(*map(_parse_one, captions), strict=True)
    shape, motion, speed, size = torch.tensor(sprites).unbind(-1)
    bar, pan = torch.tensor(bars), torch.tensor(pans)
    return Labels(shape=shape, motion=motion, speed=speed, size=size, bar=bar, pan=pan)


def _parse_one(caption: str) -> tuple[list[tuple[int, ...]], int, int]:
    *sprites, bar, pan = ["", "", *caption.split(", ")]
    found = sorted(SPRITE_PHRASES.get(phrase, (NO_SHAPE,)) for phrase in sprites[2:])
    shapes = {index[0] for index in found}
    is_known = bar in BAR_PHRASES and pan in PAN_PHRASES and NO_SHAPE not in shapes
    if not is_known or len(shapes) != len(found) or not 1 <= len(found) <= MAX_SPRITES:
        raise ValueError(
            f"caption {caption!r} given; up to four sprites of different shapes, a bar and a "
            f"background are needed, as in {describe(draw_scenes(1, _seeded(0)).labels)[0]!r}"
        )
    absent = [(NO_SHAPE, 0, 0, 0)] * (MAX_SPRITES - len(found))
    return [*found, *absent], BAR_PHRASES.index(bar), PAN_PHRASES.index(pan)


def embed(labels: Labels) -> Tensor:
    """Return prompt_embeds [B, 6, 64] fp32; zeros stand for sprites that are not there."""
    sprites, bars, pans = (table.to(labels.bar.device) for table in _phrase_tables())
    index = (labels.shape, labels.motion, labels.speed, labels.size)
    return torch.cat([sprites[index], bars[labels.bar, None], pans[labels.pan, None]], dim=1)


def no_caption() -> Tensor:
    """Return the embeddings [6, 64] of the unconditional prompt."""
    return torch.zeros(NUM_TOKENS, TEXT_DIM)


@cache
def _phrase_tables() -> tuple[Tensor, Tensor, Tensor]:
    """Return the vectors of all phrases: [9, 7, 2, 2, 64], [3, 64] and [5, 64]."""
    phrases = (*SPRITE_PHRASES, *BAR_PHRASES, *PAN_PHRASES)
    words = sorted({word for phrase in phrases for word in phrase.split()})
    matrix = torch.ones(1, 1)
    while len(matrix) < TEXT_DIM:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    # The first row is constant.
    vectors = dict(zip(words, matrix[1:], strict=False))
    assert len(vectors) == len(words)
    rows = [sum(vectors[word] for word in phrase.split()) / 2 for phrase in phrases]
    sprites, bars, pans = torch.stack(rows).split([len(SPRITE_PHRASES), len(BARS), len(PANS)])
    sprites = sprites.view(len(SHAPES), len(MOTIONS), len(SPEEDS), len(SIZES), TEXT_DIM)
    return torch.cat([sprites, torch.zeros_like(sprites[:1])]), bars, pans


def write_prompts(path: Path, count: int, *, is_held_out: bool, seed: int = 0) -> None:
    """Write a file of different captions and their embeddings, for `--prompts` of all commands."""
    drawn = describe(draw_scenes(2 * count, _seeded(seed), is_held_out=is_held_out).labels)
    captions = list(dict.fromkeys(drawn))[:count]
    embeds = {"prompt_embeds": embed(parse(captions)), "negative_embeds": no_caption()}
    metadata = {"prompts": json.dumps(captions), "negative_prompt": ""}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {name: x.half() for name, x in embeds.items()}, metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionsConfig:
    """Which files of prompts to write."""

    num_prompts: int = option(2000, "captions of each file", limits.COUNT)
    out: Path = option(Path("runs/crowd"), "folder of the files")


def write_both(config: CaptionsConfig) -> None:
    """Write prompts.safetensors and held_out.safetensors."""
    for name, is_held_out in (("prompts", False), ("held_out", True)):
        path = config.out / f"{name}.safetensors"
        write_prompts(path, config.num_prompts, is_held_out=is_held_out)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


if __name__ == "__main__":
    run_command(lambda: write_both(parse_flags(CaptionsConfig, None, description=__doc__)))
