"""Prompts written as text, one a line, as the CONDITIONING that a text encoder node would give."""

from typing import Any

import torch

from ..linvideo_core.demo.prompts import encode_prompts


def encode_prompt_list(prompts: list[str], clip: Any) -> list[Any]:
    """Encode prompts with a graph's CLIP, one entry each.

    Raises ValueError, in one sentence, where no CLIP is connected.
    """
    if clip is None:
        raise ValueError(
            "prompts are listed but clip is not connected: connect the CLIP of the model's text "
            "encoder"
        )
    # As nodes run: the encoder's weights may belong to ComfyUI's inference mode.
    with torch.inference_mode():
        encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in prompts]
    return [entry for entries in encoded for entry in entries]


def encode_for_demo(prompts: list[str]) -> list[Any]:
    """Encode prompts in the words of LinVideo Demo, which has no CLIP.

    Raises ValueError for a word that it does not know.
    """
    return [[encode_prompts(prompts), {}]]
