"""The prompt encoder of the demo: a stored vector for each word, so nothing has to be downloaded.

A prompt reads "a handwritten seven moving up-right". The text width is Wan's own 4096, so the
model's text projection keeps its published shape. "" is the unconditional prompt.
"""

import itertools
from functools import cache

import torch
from safetensors.torch import load_file
from torch import Tensor

from . import DIRECTIONS, weights_path

TEXT_DIM = 4096
NUM_TOKENS = 8
PAD = "<pad>"
DIGIT_WORDS = tuple(
    ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
)
DIRECTION_WORDS = tuple(DIRECTIONS)
VOCABULARY = ("a", "handwritten", *DIGIT_WORDS, "moving", *DIRECTION_WORDS)


def make_prompt(digit: int, direction: int) -> str:
    """Say in words what a clip with these labels shows."""
    return f"a handwritten {DIGIT_WORDS[digit]} moving {DIRECTION_WORDS[direction]}"


def all_prompts() -> list[str]:
    """List the 80 prompts; prompt i shows digit i // 8 moving in direction i % 8."""
    pairs = itertools.product(range(len(DIGIT_WORDS)), range(len(DIRECTION_WORDS)))
    return [make_prompt(digit, direction) for digit, direction in pairs]


def split_words(prompt: str) -> list[str]:
    """Split a prompt into known words; case, commas and full stops do not matter.

    Raises ValueError for an unknown word or for more than 8 words.
    """
    words = prompt.lower().replace(",", " ").replace(".", " ").split()
    for word in words:
        if word not in VOCABULARY:
            raise ValueError(
                f"The demo's prompt encoder does not know the word {word!r}; "
                f"it knows: {', '.join(VOCABULARY)}."
            )
    if len(words) > NUM_TOKENS:
        raise ValueError(f"A demo prompt has at most {NUM_TOKENS} words, not {len(words)}.")
    return words


def parse_prompt(prompt: str) -> tuple[int, int]:
    """Read (digit, direction) from a prompt, the labels that a judge should find in its clip.

    Raises ValueError unless the prompt names exactly one digit and one direction.
    """
    words = split_words(prompt)
    digits = [DIGIT_WORDS.index(word) for word in words if word in DIGIT_WORDS]
    directions = [DIRECTION_WORDS.index(word) for word in words if word in DIRECTION_WORDS]
    if len(digits) != 1 or len(directions) != 1:
        raise ValueError(
            f"A demo prompt names one digit and one direction, as in {make_prompt(7, 4)!r}; "
            f"this one is {prompt!r}."
        )
    return digits[0], directions[0]


def encode_prompts(prompts: list[str], *, device: torch.device | str = "cpu") -> Tensor:
    """Look up each word's vector and pad to 8 tokens with the stored pad vector.

    Returns prompt_embeds: [B, 8, 4096] fp32, about unit variance.

    Raises ValueError for a word outside the vocabulary.
    """
    table = _load_table()
    rows = [split_words(prompt) for prompt in prompts]
    padded = [words + [PAD] * (NUM_TOKENS - len(words)) for words in rows]
    embeds = [torch.stack([table[word] for word in words]) for words in padded]
    return torch.stack(embeds).float().to(device)


def make_word_table(seed: int) -> dict[str, Tensor]:
    """Draw a new word table: one random vector [4096] fp16 for each word and for the pad."""
    generator = torch.Generator().manual_seed(seed)
    words = (*VOCABULARY, PAD)
    return {word: torch.randn(TEXT_DIM, generator=generator).half() for word in words}


@cache
def _load_table() -> dict[str, Tensor]:
    return load_file(weights_path("prompts.safetensors"))
