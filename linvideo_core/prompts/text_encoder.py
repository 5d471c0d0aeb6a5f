"""Wan's text encoder, UMT5, from files that people have, run once through `transformers`.

A prompt becomes what Wan's own pipeline hands to its transformer: the text cleaned, at most 512
tokens with the end of the text among them, the encoder's output of the real tokens, zeros after.
Weights come as diffusers' `text_encoder` and `tokenizer` folders or ComfyUI's one file, fp16 or
fp8_scaled, in which the tokenizer lies too; headers alone decide whether they fit. `transformers`,
`sentencepiece` and `ftfy` are an optional extra.
"""

import contextlib
import dataclasses
import hashlib
import html
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.shards import StoredTensor, count_blocks, find_quantised, find_tensors
from ..run.errors import SettingError

MAX_TOKENS = 512
EXTRA = ("transformers", "sentencepiece", "ftfy")

_END = 1  # UMT5's </s>
_SHARED, _EMBEDDED = "shared.weight", "encoder.embed_tokens.weight"
_SENTENCEPIECE = "spiece_model"
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
_FORMS = (
    "give diffusers' text_encoder folder of Wan (with tokenizer beside it) or ComfyUI's "
    "umt5_xxl_fp16.safetensors or umt5_xxl_fp8_e4m3fn_scaled.safetensors"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A UMT5 encoder whose headers were read and fit; `load` reads the weights.

    tensors: parameter name in `transformers` -> where it lies.
    tokenizer: a tokenizer.json, a spiece.model, or the ComfyUI file that holds one.
    settings: of `transformers.UMT5Config`, read off the tensors' shapes.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    tokenizer: Path
    settings: Mapping[str, int]

    @property
    def num_parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(torch.Size(tensor.shape).numel() for tensor in self.tensors.values())

    def identity(self) -> str:
        """Return what tells this encoder and tokenizer from others."""
        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
            if "norm" in name or "relative_attention_bias" in name:
                digest.update(tensor.read().float().numpy().tobytes())
        digest.update(_read_tokenizer(self.tokenizer))
        return digest.hexdigest()

    @contextlib.contextmanager
    def load(self, device: torch.device | str) -> Iterator[Callable[[list[int]], Tensor]]:
        """Yield what makes embeddings [512, T] of at most 512 tokens, zeros after the last.

        Computed as `computed_in` says; the memory of the weights is given back afterwards.
        """
        model = self._load_model(device)

        @torch.no_grad()
        def embed(tokens: list[int]) -> Tensor:
            ids = torch.tensor([tokens], device=device)
            embeds = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            return nn.functional.pad(embeds[0], (0, 0, 0, MAX_TOKENS - len(tokens)))

        try:
            yield embed
        finally:
            # Whoever still holds `embed` holds no weights.
            model.to("meta")
            if torch.device(device).type == "cuda":
                torch.cuda.empty_cache()

    def _load_model(self, device: torch.device | str) -> nn.Module:
        model = _make_model(self.settings)
        dtype = computed_in(device)
        stored = sorted(self.tensors.items(), key=lambda item: (item[1].path, item[1].offset))
        state = {name: tensor.dequantise(device).to(dtype) for name, tensor in stored}
        state[_EMBEDDED] = state[_SHARED]
        names = model.state_dict().keys()
        model.load_state_dict({name: state[name] for name in names}, assign=True)
        return model.eval().requires_grad_(False)


def _make_model(settings: Mapping[str, int]) -> nn.Module:
    """Return the encoder on the meta device."""
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        return UMT5EncoderModel(UMT5Config(**settings))


def computed_in(device: torch.device | str) -> torch.dtype:
    """Return the encoder's dtype on a device: bf16, as Wan runs it, and fp32 on a CPU."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def clean(text: str) -> str:
    """Return a prompt as Wan's pipeline reads it: mended, unescaped, single spaces."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def cut(tokens: list[int]) -> list[int]:
    """Return at most 512 tokens, the last of which ends the text."""
    body = tokens[:-1] if tokens and tokens[-1] == _END else tokens
    return [*body[: MAX_TOKENS - 1], _END]


def open_encoder(path: Path, tokenizer: Path | None = None) -> TextEncoder:
    """Return `read_encoder`'s; raises SettingError where an optional package is missing."""
    if missing := [name for name in EXTRA if importlib.util.find_spec(name) is None]:
        raise SettingError(
            f"encoding prompts needs {', '.join(missing)}, not installed here; pip install "
            f"{' '.join(EXTRA)}, or give {{prompts}} a safetensors file of embeddings",
            "prompts",
        )
    return read_encoder(path, tokenizer)


def read_encoder(path: Path, tokenizer: Path | None = None) -> TextEncoder:
    """Read the headers of an encoder's files, and find its tokenizer.

    path: a folder with safetensors, a pipeline's folder with text_encoder/ in it, or a file.
    tokenizer: a tokenizer.json, a spiece.model or a folder with one; none: beside or in `path`.

    Raises FileNotFoundError or ValueError, in one sentence, for anything else.
    """
    if not path.exists():
        raise FileNotFoundError(f"text encoder {path} does not exist; {_FORMS}")
    if path.suffix in (".pth", ".pt", ".bin"):
        raise ValueError(f"{path} is a pickle, which can run code; {_FORMS}")
    if path.suffix == ".gguf":
        raise ValueError(f"{path} is quantised (GGUF); {_FORMS}")
    root = path / "text_encoder" if (path / "text_encoder").is_dir() else path
    stored = find_tensors(root)
    try:
        tensors = _own_tensors(stored)
        settings = _read_settings({name: tensor.shape for name, tensor in tensors.items()})
        _check(tensors, settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {_FORMS}") from error
    found = tokenizer or _find_tokenizer(path, root, stored)
    if found.is_dir():
        found = _find_file([found / "tokenizer", found], found)
    if not found.is_file():
        raise FileNotFoundError(f"tokenizer {found} does not exist; give tokenizer.json")
    return TextEncoder(path=path, tensors=tensors, tokenizer=found, settings=settings)


def open_tokenizer(path: Path) -> Callable[[str], list[int]]:
    """Return what makes tokens of a text, from a file that `TextEncoder` names."""
    data = _read_tokenizer(path)
    if path.suffix == ".json":
        from tokenizers import Tokenizer

        fast = Tokenizer.from_str(data.decode("utf-8"))
        fast.no_padding()
        fast.no_truncation()
        return lambda text: fast.encode(text).ids
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_proto=data)
    return lambda text: pieces.encode(text)


def _read_tokenizer(path: Path) -> bytes:
    if path.suffix != ".safetensors":
        return path.read_bytes()
    return find_tensors(path)[_SENTENCEPIECE].read().numpy().tobytes()


def _find_tokenizer(path: Path, root: Path, stored: Mapping[str, StoredTensor]) -> Path:
    if _SENTENCEPIECE in stored:
        return stored[_SENTENCEPIECE].path
    folder = root if root.is_dir() else root.parent
    return _find_file([folder, folder / "tokenizer", folder.parent / "tokenizer"], path)


def _find_file(folders: Iterable[Path], path: Path) -> Path:
    for folder in folders:
        for name in _TOKENIZER_FILES:
            if (folder / name).is_file():
                return folder / name
    raise SettingError(
        f"no {' or '.join(_TOKENIZER_FILES)} was found for {path}; give {{tokenizer}} a path, such "
        "as the tokenizer folder of a diffusers Wan model",
        "tokenizer",
    )


def _own_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the encoder's tensors: names are the same in diffusers' and ComfyUI's files."""
    tensors = {n: t for n, t in stored.items() if n.startswith("encoder.block.")}
    for name in (_SHARED, "encoder.final_layer_norm.weight"):
        if found := stored.get(name) or stored.get(_EMBEDDED if name == _SHARED else name):
            tensors[name] = found
    if not any(name.startswith("encoder.block.") for name in tensors):
        shown = ", ".join(repr(name[:60]) for name in sorted(stored)[:2])
        raise ValueError(f"it is not a UMT5 encoder, as its tensors are called {shown}")
    return tensors


def _read_settings(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    layer = "encoder.block.0.layer"
    try:
        vocab_size, width = shapes[_SHARED]
        num_buckets, num_heads = shapes[f"{layer}.0.SelfAttention.relative_attention_bias.weight"]
        inner = shapes[f"{layer}.0.SelfAttention.q.weight"][0]
        return {
            "vocab_size": vocab_size,
            "d_model": width,
            "d_kv": inner // num_heads,
            "d_ff": shapes[f"{layer}.1.DenseReluDense.wi_0.weight"][0],
            "num_layers": count_blocks(shapes, "encoder.block."),
            "num_heads": num_heads,
            "relative_attention_num_buckets": num_buckets,
        }
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"it is not a whole UMT5 encoder ({error})") from error


def _check(tensors: Mapping[str, StoredTensor], settings: Mapping[str, int]) -> None:
    if quantised := find_quantised(tensors):
        raise ValueError(quantised)
    state = _make_model(settings).state_dict()
    needed = {name: tuple(t.shape) for name, t in state.items() if name != _EMBEDDED}
    given = {name: tensor.shape for name, tensor in tensors.items()}
    if needed != given:
        names = [n for n in {**needed, **given} if given.get(n) != needed.get(n)]
        # T5 has its relative positions in the first block alone, UMT5 in each.
        raise ValueError(
            "it does not fit UMT5 (T5 is another encoder): missing, unexpected or of another "
            f"shape are {names[:2]}"
        )
