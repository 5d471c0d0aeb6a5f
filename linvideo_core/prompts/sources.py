"""Where the prompts of a model of one's own come from: a file of embeddings, or text to encode."""

import dataclasses
import logging
from pathlib import Path

from ..run.callbacks import Callbacks
from ..run.errors import SettingError
from ..run.memory import Need, check_memory
from . import NEGATIVE_PROMPT, default_prompts, read_prompts, split_prompts
from .config import PromptConfig
from .embeddings import PromptEmbeds, encode_once, find_identity, identity_of, read_embeds
from .text_encoder import (
    MAX_TOKENS,
    TextEncoder,
    clean,
    computed_in,
    cut,
    open_encoder,
    open_tokenizer,
)

logger = logging.getLogger(__name__)

EMBEDS_NAME = "prompts.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredPrompts:
    """Embeddings that were encoded elsewhere; `width` is T."""

    path: Path
    embeds: PromptEmbeds
    verb = "holds"
    width = property(lambda self: self.embeds.prompt_embeds.shape[2])
    condition = property(lambda self: self.embeds.condition)

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
    """Prompts in words, with the encoder that they are for; `path` is the encoder's.

    negative: negative prompts, one a line.
    """

    encoder: TextEncoder
    prompts: list[str]
    negative: str
    verb = "gives"
    condition = None
    path = property(lambda self: self.encoder.path)
    width = property(lambda self: self.encoder.settings["d_model"])

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
            check_memory([weights], device, "encode on another {device}, or export the embeddings")
            logger.info("encoding %d prompts into %s", len(self.prompts), path)
            tokenize = open_tokenizer(self.encoder.tokenizer)
            with self.encoder.load(device) as embed:
                encode_once(
                    path,
                    self.prompts,
                    split_prompts(self.negative) or [""],
                    lambda text: embed(cut(tokenize(clean(text)))),
                    identity=identity,
                    callbacks=callbacks,
                )
        return read_embeds(path)


PromptSource = StoredPrompts | WrittenPrompts


def find_source(path: Path | None, config: PromptConfig) -> PromptSource:
    """Return where prompts come from, its headers read.

    path: a safetensors file, or prompts one a line; none: the prompts of LinVideo.

    Raises FileNotFoundError or ValueError, in one sentence, for anything else.
    """
    if path is not None and path.suffix == ".safetensors":
        if config != PromptConfig():
            raise SettingError(
                f"{{prompts}} {path} holds embeddings already; leave {{text_encoder}}, "
                "{tokenizer} and {negative_prompt} out, or give {prompts} a text file",
                "prompts",
                "text_encoder",
                "tokenizer",
                "negative_prompt",
            )
        return StoredPrompts(path=path, embeds=read_embeds(path))
    prompts = default_prompts() if path is None else read_prompts(path)
    if config.text_encoder is None:
        raise SettingError(
            "{model} was given without prompt embeddings; give {text_encoder} the UMT5 weights, or "
            "{prompts} a safetensors file from LinVideo Export Prompts in ComfyUI",
            "text_encoder",
            "model",
            "prompts",
        )
    negative = NEGATIVE_PROMPT if config.negative_prompt is None else config.negative_prompt
    encoder = open_encoder(config.text_encoder, config.tokenizer)
    return WrittenPrompts(encoder=encoder, prompts=prompts, negative=negative)
