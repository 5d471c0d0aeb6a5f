"""Where the prompts of a model of one's own come from: a file of embeddings, or text to encode."""

import dataclasses
import logging
from pathlib import Path

from ..run.callbacks import Callbacks
from ..run.config import option
from ..run.memory import Need, check_memory
from . import NEGATIVE_PROMPT, default_prompts, read_prompts
from .embeddings import PromptEmbeds, encode_once, find_identity, identity_of, read_embeds
from .text_encoder import MAX_TOKENS, TextEncoder, computed_in, open_encoder

logger = logging.getLogger(__name__)

EMBEDS_NAME = "prompts.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """How a text file's prompts become embeddings, for a --model of one's own."""

    text_encoder: Path | None = option(
        None, "UMT5 weights that encode prompts: a folder or safetensors, diffusers' or ComfyUI's"
    )
    tokenizer: Path | None = option(
        None, "its tokenizer.json, spiece.model or their folder; none: beside or in the encoder"
    )
    negative_prompt: str | None = option(
        None, "what the unconditional branch is asked for; none: LinVideo's own"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredPrompts:
    """Embeddings that were encoded elsewhere."""

    path: Path
    embeds: PromptEmbeds
    verb = "holds"

    @property
    def width(self) -> int:
        """The width T of the embeddings."""
        return self.embeds.prompt_embeds.shape[2]

    def need(self, device: str) -> Need:
        """Return what the embeddings take on a device."""
        return Need("the prompts", self.embeds.prompt_embeds.nbytes)

    def read(
        self, folder: Path, *, device: str, callbacks: Callbacks | None = None
    ) -> PromptEmbeds:
        """Return what the file holds."""
        return self.embeds


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrittenPrompts:
    """Prompts in words, with the encoder that they are for."""

    encoder: TextEncoder
    prompts: list[str]
    negative: str
    verb = "gives"

    @property
    def path(self) -> Path:
        """Where the encoder lies."""
        return self.encoder.path

    @property
    def width(self) -> int:
        """The width T of the embeddings."""
        return self.encoder.width

    def need(self, device: str) -> Need:
        """Return what the embeddings take on a device."""
        size = computed_in(device).itemsize
        return Need("the prompts", size * len(self.prompts) * MAX_TOKENS * self.width)

    def read(
        self, folder: Path, *, device: str, callbacks: Callbacks | None = None
    ) -> PromptEmbeds:
        """Return the embeddings, kept in `folder`, which holds them after the first time."""
        path = folder / EMBEDS_NAME
        identity = identity_of(self.prompts, self.negative, self.encoder.identity())
        if find_identity(path) != identity:
            size = computed_in(device).itemsize
            weights = Need("the text encoder", size * self.encoder.num_parameters)
            check_memory([weights], device, "encode on another --device, or export the embeddings")
            logger.info("encoding %d prompts into %s", len(self.prompts), path)
            encode = self.encoder.load(device)
            try:
                encode_once(
                    path,
                    self.prompts,
                    self.negative,
                    encode,
                    identity=identity,
                    callbacks=callbacks,
                )
            finally:
                encode.free()
        return read_embeds(path)


PromptSource = StoredPrompts | WrittenPrompts


def find_source(path: Path | None, config: PromptConfig) -> PromptSource:
    """Return where prompts come from, its headers read.

    path: a safetensors file, or prompts one a line; none: the prompts of LinVideo.

    Raises FileNotFoundError or ValueError, in one sentence, for anything else.
    """
    if path is not None and path.suffix == ".safetensors":
        if config != PromptConfig():
            raise ValueError(
                f"--prompts {path} holds embeddings already; leave --text-encoder, --tokenizer and "
                "--negative-prompt out, or give --prompts a text file"
            )
        return StoredPrompts(path=path, embeds=read_embeds(path))
    prompts = default_prompts() if path is None else read_prompts(path)
    if config.text_encoder is None:
        raise ValueError(
            "--model was given without prompt embeddings; give --text-encoder the UMT5 weights, or "
            "--prompts a safetensors file from LinVideo Export Prompts in ComfyUI"
        )
    negative = NEGATIVE_PROMPT if config.negative_prompt is None else config.negative_prompt
    encoder = open_encoder(config.text_encoder, config.tokenizer)
    return WrittenPrompts(encoder=encoder, prompts=prompts, negative=negative)
