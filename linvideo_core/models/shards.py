"""Where a checkpoint's tensors lie: one safetensors file, or shards with or without their index.

Only headers are read here, and nothing that is pickled.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_INDEX = ".safetensors.index.json"
_PICKLED = (".pth", ".pt", ".ckpt", ".bin")
_MOST_SHARDS = 1000


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: its file, its name there, its dtype in safetensors' word, its shape."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


def find_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a checkpoint by name, from the headers of all its files.

    path: a safetensors file, one shard of several, an index, or a folder with one checkpoint.

    Raises FileNotFoundError naming what is missing, or ValueError for what is no checkpoint.
    """
    found: dict[str, StoredTensor] = {}
    for shard in find_shards(path):
        try:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():
                    claim = file.get_slice(name)
                    tensor = StoredTensor(shard, name, claim.get_dtype(), tuple(claim.get_shape()))
                    if found.setdefault(name, tensor) is not tensor:
                        raise ValueError(
                            f"{shard} and {found[name].path} both hold {name}: give one checkpoint"
                        )
        except SafetensorError as error:
            raise ValueError(f"{shard} is not a readable safetensors file: {error}") from error
    return found


def find_shards(path: Path) -> list[Path]:
    """Return the files of the checkpoint that `path` stands for, see `find_tensors`."""
    if path.is_dir():
        path = _find_in_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"model file {path} does not exist")
    if path.suffix in _PICKLED:
        raise ValueError(f"{path} is a pickle, which can run code: give a safetensors checkpoint")
    if path.suffix == ".gguf":
        raise ValueError(f"{path} is quantised (GGUF): give the fp16, bf16 or fp32 safetensors")
    if path.name.endswith(_INDEX):
        shards = [path.parent / name for name in _read_index(path)]
    elif match := _SHARD.fullmatch(path.name):
        stem, _, total = match.groups()
        count = min(int(total), _MOST_SHARDS)
        shards = [
            path.with_name(f"{stem}-{i:05d}-of-{total}.safetensors") for i in range(1, count + 1)
        ]
    else:
        return [path]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(shards)} shards are missing in {path.parent}: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; download them again"
        )
    return shards


def _find_in_folder(folder: Path) -> Path:
    """Return the one index, file or first shard of a folder, or of its `transformer`."""
    files = sorted(folder.glob("*.safetensors"))
    if len(indices := sorted(folder.glob(f"*{_INDEX}"))) == 1:
        return indices[0]
    stems = {(match[1] if (match := _SHARD.fullmatch(f.name)) else f.name): f for f in files}
    if len(stems) == 1:
        return files[0]
    if stems:
        raise ValueError(f"{folder} holds {_list(stems)}: give one of these files")
    within = sorted({file.parent.name for file in folder.glob("*/*.safetensors")})
    # A diffusers pipeline: its text encoder and autoencoder lie beside the transformer.
    if "transformer" in within and "transformer_2" not in within:
        return _find_in_folder(folder / "transformer")
    if within:
        raise ValueError(f"{folder} holds folders of safetensors, {_list(within)}: give one")
    raise FileNotFoundError(f"{folder} is a folder without a safetensors checkpoint in it")


def _read_index(path: Path) -> list[str]:
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("its weight_map names no files beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index of shards ({error!r})") from error
    return sorted(names)


def _list(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
