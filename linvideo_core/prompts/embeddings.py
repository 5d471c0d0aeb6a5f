"""Prompt embeddings in a safetensors file: encoded once, in whatever process, and read back.

Wan pads every prompt to one length with zeros. A file holds the rows up to its longest prompt, and
`padded_to` in its header says how long the model wants them. For an image-to-video model it holds
the images, too, that the videos start from.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..models.image_condition import ImageCondition
from ..run.callbacks import Callbacks
from ..run.errors import shown_value
from ..run.files import DIGEST, is_as_written, write_with_digest
from ..run.reading import parse_json
from . import check_file
from .text_encoder import MAX_TOKENS

_KEPT_EVERY = 32
_CONDITION = ("condition_latents", "clip_embeds")
_HALVES = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class PromptEmbeds:
    """Prompts as a model takes them.

    prompt_embeds: [P, S, T]; negative_embeds: [S, T], or [K, S, T] of several negative prompts;
        both fp16, bf16 or fp32.
    condition: the images of an image-to-video model, for both guidance branches.
    """

    prompts: list[str]
    prompt_embeds: Tensor
    negative_embeds: Tensor
    condition: ImageCondition | None = None


def identity_of(prompts: Sequence[str], negative: str, encoder: str) -> str:
    """Return 16 hex digits that tell what a file was encoded from.

    encoder: whatever tells one encoder from another.
    """
    text = json.dumps([list(prompts), negative, encoder])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def find_identity(path: Path) -> str | None:
    """Return the identity of a file made by `encode_once`; None for any other, damaged or none."""
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("identity")
        return found if is_as_written(path) else None
    except (OSError, SafetensorError):
        return None


def encode_once(
    path: Path,
    prompts: Sequence[str],
    negatives: Sequence[str],
    encode: Callable[[str], Tensor],
    *,
    identity: str,
    condition: ImageCondition | None = None,
    callbacks: Callbacks | None = None,
) -> bool:
    """Encode prompts into `path`, unless it holds just these already; say if anything was encoded.

    encode: a prompt -> [S, T], of one length for all; zeros at its end are padding.
    identity: from `identity_of`.
    condition: is written beside the prompts.

    Whatever stops it between keeps what was encoded until then, for the next call, in a file beside
    `path`.
    """
    if find_identity(path) == identity:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.stem}.unfinished.safetensors")
    rows = _read_rows(unfinished) if find_identity(unfinished) == identity else []
    callbacks = callbacks or Callbacks()
    texts = [*negatives, *prompts]
    callbacks.on_stage("encoding_prompts", len(texts), len(rows))
    try:
        for text in texts[len(rows) :]:
            rows.append(_check_row(text, encode(text).detach().cpu(), rows))
            callbacks.on_step_end(len(rows))
            if len(rows) % _KEPT_EVERY == 0:
                _write_rows(unfinished, rows, identity)
        embeds = torch.stack(_trim(rows))
        negative_embeds = embeds[: len(negatives)] if len(negatives) > 1 else embeds[0]
        tensors = {"negative_embeds": negative_embeds, "prompt_embeds": embeds[len(negatives) :]}
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        tensors |= _as_tensors(condition)
        metadata = {"identity": identity, "padded_to": str(len(rows[0]))}
        words = {"prompts": json.dumps(list(prompts)), "negative_prompt": "\n".join(negatives)}
        write_with_digest(path, tensors, metadata | words)
    # An interruption, also a host's own, is no Exception.
    except BaseException:
        if rows:
            _write_rows(unfinished, rows, identity)
        raise
    unfinished.unlink(missing_ok=True)
    return True


def read_embeds(path: Path) -> PromptEmbeds:
    """Read a file of embeddings: one of `encode_once`, or any with the two tensors.

    The tensors of an `ImageCondition` are called `condition_latents` and `clip_embeds`.
    fp16 and bf16 stay what they are, which halves what a device holds; all else becomes fp32.

    Raises FileNotFoundError or ValueError, in one sentence.
    """
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = [file.get_tensor(name) for name in ("prompt_embeds", "negative_embeds")]
            given = [file.get_tensor(name) if name in file.keys() else None for name in _CONDITION]
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{path} is not a safetensors file with prompt_embeds and negative_embeds: "
            f"{shown_value(error)}"
        ) from error
    if DIGEST in metadata and not is_as_written(path):
        raise ValueError(
            f"{path} is damaged, its embeddings are not those that were written: encode or copy "
            "them once more"
        )
    shapes = [list(tensor.shape) for tensor in found]
    are_negatives = shapes[1][-2:] == shapes[0][1:] and found[1].ndim in (2, 3)
    if len(shapes[0]) != 3 or 0 in shapes[0] + shapes[1] or not are_negatives:
        raise ValueError(
            f"{path}: prompt_embeds {shapes[0]} and negative_embeds {shapes[1]} given; [P, S, T] "
            "and [K, S, T] or [S, T] are needed, alike in S and T and none of them 0"
        )
    if not all(map(_is_sound, found)):
        raise ValueError(f"{path}: the embeddings are no finite fp16, bf16 or fp32 numbers")
    length = _read_length(path, metadata, shapes[0][1])
    is_half = found[0].dtype == found[1].dtype and found[0].dtype in _HALVES
    embeds = [_pad(tensor if is_half else tensor.float(), length) for tensor in found]
    texts = _read_texts(metadata, shapes[0][0])
    return PromptEmbeds(texts, *embeds, _read_condition(path, *given, len(texts)))


def _as_tensors(condition: ImageCondition | None) -> dict[str, Tensor]:
    tensors = (condition.latents, condition.clip_embeds) if condition else ()
    return {n: t.contiguous() for n, t in zip(_CONDITION, tensors, strict=False) if t is not None}


def _read_condition(
    path: Path, latents: Tensor | None, clip_embeds: Tensor | None, num_prompts: int
) -> ImageCondition | None:
    if latents is None and clip_embeds is None:
        return None
    given = [t for t in (latents, clip_embeds) if t is not None]
    is_shaped = latents is not None and latents.ndim == 5
    is_shaped &= clip_embeds is None or clip_embeds.ndim == 3
    is_shaped &= {len(t) for t in given} in ({1}, {num_prompts})
    if not is_shaped or not all(map(_is_sound, given)):
        raise ValueError(
            f"{path} holds {_CONDITION[0]} {_show(latents)} and {_CONDITION[1]} "
            f"{_show(clip_embeds)}; finite numbers [N, K, F, H, W] and, for Wan 2.1, [N, 257, D] "
            f"are needed, with N 1 or {num_prompts}, the number of prompts"
        )
    return ImageCondition(latents, clip_embeds)


def _is_sound(tensor: Tensor) -> bool:
    return tensor.dtype in (*_HALVES, torch.float32, torch.float64) and bool(
        tensor.isfinite().all()
    )


def _show(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _read_rows(path: Path) -> list[Tensor]:
    with safe_open(path, framework="pt") as file:
        length = int(file.metadata()["padded_to"])
        return [_pad(row, length) for row in file.get_tensor("rows")]


def _write_rows(path: Path, rows: Sequence[Tensor], identity: str) -> None:
    metadata = {"identity": identity, "padded_to": str(len(rows[0]))}
    write_with_digest(path, {"rows": torch.stack(_trim(rows))}, metadata)


def _trim(rows: Sequence[Tensor]) -> list[Tensor]:
    """Return rows [S, T] without the padding that all of them end with."""
    longest = max(map(_count_tokens, rows))
    return [row[:longest].clone() for row in rows]


def _check_row(text: str, row: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Return a prompt's embeddings; ValueError for others than finite ones as long as `rows`."""
    if row.ndim != 2 or (rows and row.shape != rows[0].shape) or not row.isfinite().all():
        raise ValueError(
            f"the prompt {text[:60]!r} became embeddings of shape {list(row.shape)}; finite ones "
            f"of {list(rows[0].shape) if rows else '[S, T]'} are needed: shorten the prompt, or "
            "use another text encoder"
        )
    return row


def _count_tokens(row: Tensor) -> int:
    """Return how many rows of [S, T] there are up to the last that is not zero, at least 1."""
    used = row.ne(0).any(dim=1).nonzero()
    return int(used[-1]) + 1 if len(used) else 1


def _pad(embeds: Tensor, length: int) -> Tensor:
    """Return embeds [..., S, T] with zeros up to `length`."""
    return torch.nn.functional.pad(embeds, (0, 0, 0, length - embeds.shape[-2]))


def _read_length(path: Path, metadata: Mapping[str, str], stored: int) -> int:
    text = metadata.get("padded_to", str(stored))
    most = max(stored, MAX_TOKENS)
    if not re.fullmatch("[0-9]{1,9}", text) or not stored <= int(text) <= most:
        raise ValueError(
            f"{path}: padded_to is {shown_value(text)}; a length from {stored} to {most} is needed"
        )
    return int(text)


def _read_texts(metadata: Mapping[str, str], count: int) -> list[str]:
    """Return the prompts that a file names, or numbers in their place."""
    try:
        texts = parse_json(metadata.get("prompts", "[]"))
    except ValueError:
        texts = []
    is_whole = isinstance(texts, list) and len(texts) == count
    if is_whole and all(isinstance(text, str) for text in texts):
        return texts
    return [f"prompt {i}" for i in range(count)]
