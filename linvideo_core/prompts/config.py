"""Settings of prompts."""

import dataclasses
from pathlib import Path

from ..run.config import Settings, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig(Settings):
    """Prompts in words, with --model."""

    text_encoder: Path | None = option(
        None, "UMT5 weights that encode prompts: a folder or safetensors, diffusers' or ComfyUI's"
    )
    tokenizer: Path | None = option(
        None, "its tokenizer.json, spiece.model or their folder; none: beside or in the encoder"
    )
    negative_prompt: str | None = option(
        None,
        "what the unconditional branch is asked for; of several lines each video of a pool takes "
        "one, all else the first; none: LinVideo's own",
    )
