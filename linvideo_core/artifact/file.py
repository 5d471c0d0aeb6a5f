"""The artifact as one safetensors file, and the names that people type for such files.

Weight changes carry the names that ComfyUI's LoRA loader reads, so that half works there too. The
header is the file's metadata: one readable entry a field, `linvideo.<field>`, its value in JSON.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..run.errors import shown_value
from ..run.files import write_tensors
from ..run.reading import parse_json
from .header import DTYPES, Artifact, ArtifactError, ArtifactHeader, Usage, refuse

SUFFIX = ".safetensors"
FORMAT_VERSION = 3
_OURS = "linvideo."
_WEIGHTS = "diffusion_model."
_DIFF, _DIFF_BIAS = ".diff", ".diff_b"
_DOWN, _UP = ".lora_down.weight", ".lora_up.weight"
_STORED_DTYPES = ("F16", "BF16", "F32", "F64")
_MAX_ENTRY = 2**20
_AGAIN = (
    "get it again from where it came or from a backup; if a run of yours made it, delete it and "
    "repeat the run's command"
)

_VERSION = _OURS + "format_version"
_ENTRIES = {
    field.name: _OURS + {"linear_layers": "layers"}.get(field.name, field.name)
    for field in dataclasses.fields(ArtifactHeader)
}
# Older files, and those of linear layers alone, have none of them.
_OF_TILES = {_ENTRIES["tile"], _ENTRIES["attention_mass"]}
# `X.diff` changes X.weight, or X itself where a parameter is called neither weight nor bias. The
# name alone does not tell which, so the file lists the latter.
_BARE = _OURS + "bare_parameters"


def save(artifact: Artifact, path: str | Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write an artifact; the earlier file at `path` is replaced at once or stays as it was.

    Raises ArtifactError when the folder is missing, the disk fails, or a value overflows `dtype`.
    """
    path = Path(path)
    if dtype not in DTYPES:
        raise ArtifactError(f"dtype {dtype} given; fp16, bf16 or fp32 is expected")
    if not path.parent.is_dir():
        raise ArtifactError(f"the folder {path.parent} does not exist: create it first")
    metadata = _encode_header(artifact)
    tensors: dict[str, Tensor] = {}
    for name, tensor in _name_tensors(artifact):
        if name in tensors:
            raise ArtifactError(f"two weight changes are called {name} in the file: rename one")
        tensors[name] = _cast(name, tensor, dtype)
    try:
        write_tensors(path, tensors, metadata)
    except OSError as error:
        raise ArtifactError(str(error)) from error


def load(path: str | Path) -> Artifact:
    """Read an artifact and check everything in it.

    Raises ArtifactError saying in one sentence what is wrong with the file and what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist: choose a file that LinVideo saved")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            header, bare = _decode_header(metadata, names)
            tensors = {name: _read_tensor(file, name) for name in names}
        return _assemble(header, bare, tensors)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ArtifactError(_explain_unreadable(path, error)) from error


def _name_tensors(artifact: Artifact) -> Iterable[tuple[str, Tensor]]:
    """Yield every tensor under its name in the file."""
    header = artifact.header
    for layer, site in zip(header.linear_layers, header.site_names, strict=True):
        for name, tensor in artifact.linear[layer].items():
            yield f"{_OURS}{site}.{name}", tensor
    for name, delta in artifact.deltas.items():
        is_bias = name.endswith(".bias")
        stem = name.removesuffix(".bias" if is_bias else ".weight")
        yield _WEIGHTS + stem + (_DIFF_BIAS if is_bias else _DIFF), delta
    for name, (down, up) in artifact.low_rank.items():
        yield _WEIGHTS + name + _DOWN, down
        yield _WEIGHTS + name + _UP, up


def _is_bare(parameter: object) -> bool:
    return isinstance(parameter, str) and not parameter.endswith((".weight", ".bias"))


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
    if not cast.isfinite().all():
        raise ArtifactError(
            f"{name} holds NaN, infinity or values too large for {dtype}: a finite artifact saves, "
            "in a wider dtype if need be"
        )
    return cast


def _encode_header(artifact: Artifact) -> dict[str, str]:
    header = artifact.header
    plain = {"provenance": dict(header.provenance), "usage": header.usage.said}
    values = {entry: plain.get(name, getattr(header, name)) for name, entry in _ENTRIES.items()}
    values[_VERSION] = FORMAT_VERSION
    values[_BARE] = [name for name in artifact.deltas if _is_bare(name)]
    unused = set() if header.tile else _OF_TILES
    return {n: json.dumps(x, allow_nan=False) for n, x in values.items() if n not in unused}


def _decode_header(
    metadata: Mapping[str, str], names: list[str]
) -> tuple[ArtifactHeader, list[str]]:
    """Return the header and the names of the bare parameters."""
    if _VERSION not in metadata:
        _refuse_stranger(names)
    # Another version may have other fields, so the version is checked first.
    if (version := _parse(_VERSION, metadata[_VERSION])) != FORMAT_VERSION:
        advice = "update LinVideo, or make the file again if it is an older one"
        refuse("format_version", version, f"this LinVideo reads {FORMAT_VERSION}: {advice}")
    expected = {*_ENTRIES.values(), _VERSION, _BARE}
    if not _OF_TILES & metadata.keys():
        expected -= _OF_TILES
    if differing := expected ^ {name for name in metadata if name.startswith(_OURS)}:
        name = min(differing)
        fault = "missing" if name in expected else "unknown"
        newer = "" if name in expected else "update LinVideo, or "
        raise ArtifactError(f"the header entry {name!a} is {fault}: {newer}{_AGAIN}")
    values = {
        name: _parse(entry, metadata[entry])
        for name, entry in _ENTRIES.items()
        if entry in expected
    }
    values = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
    header = ArtifactHeader(**values | {"usage": Usage.parse(values["usage"])})
    bare = _parse(_BARE, metadata[_BARE])
    if not isinstance(bare, list) or not all(map(_is_bare, bare)):
        raise ArtifactError(f"{_BARE} is not a list of parameters called neither weight nor bias")
    return header, bare


def _parse(name: str, text: str) -> Any:
    """Parse strict JSON: no NaN, no infinity, no repeated name, no absurd depth or length."""
    if len(text) > _MAX_ENTRY:
        raise ArtifactError(f"the header entry {name} is {len(text)} characters long: too long")
    try:
        return parse_json(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except ValueError as error:
        raise ArtifactError(f"the header entry {name} is not valid JSON: {_AGAIN}") from error


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name is repeated")
    return dict(pairs)


def _refuse_stranger(names: list[str]) -> NoReturn:
    if any(name.startswith(_OURS) for name in names):
        raise ArtifactError(
            "the LinVideo header is gone, probably lost when another program rewrote the file: "
            f"{_AGAIN}"
        )
    if any(".lora_" in name or name.endswith((_DIFF, _DIFF_BIAS)) for name in names):
        raise ArtifactError("this is a plain LoRA, not a LinVideo file: load it with a LoRA loader")
    first = f"its first tensor is {names[0][:100]!a}" if names else "it has no tensors"
    raise ArtifactError(f"this is not a LinVideo file ({first}): choose one that LinVideo saved")


def _read_tensor(file: safe_open, name: str) -> Tensor:
    """Return a finite tensor of its own memory: the file on disk may be replaced later."""
    shown = shown_value(name, is_quoted=True)
    claim = file.get_slice(name)
    if claim.get_dtype() not in _STORED_DTYPES:
        raise ArtifactError(
            f"{shown} holds {claim.get_dtype()}; floating-point tensors of 16 bits or more are "
            "expected"
        )
    if 0 in claim.get_shape():
        raise ArtifactError(f"{shown} is empty, of shape {shown_value(claim.get_shape())}")
    tensor = file.get_tensor(name).clone()
    if not tensor.isfinite().all():
        raise ArtifactError(f"{shown} holds NaN or infinity: {_AGAIN}")
    return tensor


def _assemble(header: ArtifactHeader, bare: list[str], tensors: Mapping[str, Tensor]) -> Artifact:
    layers = dict(zip(header.site_names, header.linear_layers, strict=True))
    linear: dict[int, dict[str, Tensor]] = {layer: {} for layer in header.linear_layers}
    changes: dict[str, dict[str, Tensor]] = {s: {} for s in (_DIFF, _DIFF_BIAS, _DOWN, _UP)}
    for name, tensor in tensors.items():
        site, _, leaf = name.removeprefix(_OURS).rpartition(".")
        suffix = next((suffix for suffix in changes if name.endswith(suffix)), None)
        if name.startswith(_OURS) and site in layers:
            linear[layers[site]][leaf] = tensor
        elif name.startswith(_WEIGHTS) and suffix:
            changes[suffix][name.removeprefix(_WEIGHTS).removesuffix(suffix)] = tensor
        else:
            raise ArtifactError(f"the tensor {name[:100]!a} is unknown: {_AGAIN}")
    for here, there in ((bare, _DIFF), (changes[_DOWN], _UP), (changes[_UP], _DOWN)):
        if missing := sorted(set(here) - changes[there].keys()):
            name = _WEIGHTS + missing[0] + there
            raise ArtifactError(f"{name!a} is missing: {_AGAIN}")
    deltas = {name + ".bias": delta for name, delta in changes[_DIFF_BIAS].items()}
    for name, delta in changes[_DIFF].items():
        deltas[name if name in bare else name + ".weight"] = delta
    low_rank = {name: (down, changes[_UP][name]) for name, down in changes[_DOWN].items()}
    return Artifact(header=header, linear=linear, deltas=deltas, low_rank=low_rank)


def _explain_unreadable(path: Path, error: Exception) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return f"{path} cannot be read ({error}): check the disk and the file's permissions"
    words = shown_value(error)
    if not start:
        return f"{path} is empty: {_AGAIN}"
    if start[8:] in (b"", b"{"):
        return f"{path} is cut short or damaged ({words}): {_AGAIN}"
    return f"{path} is not a safetensors file ({words}): choose one that LinVideo saved"


# File systems take 255 bytes a part; an ending and a number are still added.
_MAX_BYTES = 200
# What some system's file names cannot hold; "%" starts what ComfyUI replaces in names.
_FORBIDDEN = re.compile(r'[<>:"|?*%]')
# Nothing at all, a way up, a hidden file, a home folder, what Windows cuts off, its devices.
_BAD_PART = re.compile(
    r"|[. ~].*|.*[. ]|(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[\d¹²³]) *(\..*)?", re.IGNORECASE
)


def check_name(name: str, *, is_single: bool = False) -> str:
    """Return a name typed as folder/name, with or without its ending, as folder/name.

    is_single: no folders before the name.

    Raises ArtifactError when on some system it leads out of its folder or cannot be a file's name.
    """
    stem = name.strip().replace("\\", "/").removesuffix(SUFFIX)
    parts = stem.split("/")
    is_plain = stem.isprintable() and not _FORBIDDEN.search(stem)
    if not is_plain or any(map(_BAD_PART.fullmatch, parts)) or (is_single and len(parts) > 1):
        others = ", without folders" if is_single else ", or folder/my_model"
        raise ArtifactError(
            f"the filename {name!r:.100} cannot be used: give a plain name such as my_model{others}"
        )
    if (size := len(stem.encode())) > _MAX_BYTES:
        raise ArtifactError(
            f"the filename {name!r:.100} is {size} bytes long; at most {_MAX_BYTES} are possible: "
            "give a shorter one"
        )
    return stem


def place_file(folder: Path, name: str, *, is_exact: bool = True) -> Path:
    """Return where in a folder the file of a name lies, or would lie.

    is_exact: the file has just this name; else a number may be added where it is taken.

    Raises ArtifactError as `check_name`, and where a file stands for a folder or the reverse.
    """
    path = folder / (check_name(name) + SUFFIX)
    places = path.relative_to(folder).parents[:-1]
    files = [place for place in places if (folder / place).is_file()]
    if files or (is_exact and path.is_dir()):
        there = f"{files[-1].as_posix()!r:.100} is a file" if files else "a folder has that name"
        raise ArtifactError(
            f"the filename {name!r:.100} cannot be used, since {there}: give another name"
        )
    return path
