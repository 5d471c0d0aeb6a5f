"""Where a checkpoint's tensors lie: one safetensors file, or shards with or without their index.

Headers are read first, then one tensor at a time; nothing that is pickled. Tensors may be fp8 with
a scale beside them, as ComfyUI's fp8_scaled files have it: `W.scale_weight` or `W.weight_scale`.
"""

import dataclasses
import mmap
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..run.errors import shown_value
from ..run.limits import LAYERS
from ..run.reading import parse_json, read_json

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_INDEX = ".safetensors.index.json"
_PICKLED = (".pth", ".pt", ".ckpt", ".bin")
_MOST_SHARDS = 1000
_MOST_LETTERS, _MOST_SIZES = 200, 8
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_DTYPES = {**_FLOATS, "U8": torch.uint8}
_QUANTISED = {"I8": "int8", "U8": "a 4-bit form such as nvfp4", "F8_E4M3": "mxfp8"}
KNOWN_FORMS = (
    "give the fp16, bf16, fp32, fp8 or fp8_scaled safetensors of the same model, or train it as it "
    "is inside ComfyUI, with LinVideo Linearize ('run the transfer now')"
)
_SCALES = (".scale_weight", ".weight_scale")
# What else ComfyUI writes beside scaled weights; scales of a layer's input concern fp8 products.
_BESIDE_SCALES = re.compile(r"(.*\.)?(scaled_fp8|comfy_quant|scale_input|input_scale)")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk.

    path, name: its file and its name there. dtype: in safetensors' word.
    offset: of its first byte in the file.
    scale: by which fp8_scaled weights are to be multiplied: one number, or one a row.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    scale: "StoredTensor | None" = None

    def read(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the tensor as it is stored, without its scale.

        On the CPU it is mapped from its file, in pages of its own that may be written to. A whole
        file could not be mapped so where it is larger than the computer's memory.

        Raises ValueError where a number is not finite.
        """
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=_DTYPES[self.dtype], device=device)
        count, dtype = torch.Size(self.shape).numel(), _DTYPES[self.dtype]
        before = self.offset % mmap.ALLOCATIONGRANULARITY
        size, start = before + count * dtype.itemsize, self.offset - before
        with self.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=start)
        flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=before)
        tensor = flat.view(self.shape).to(device)
        if dtype.is_floating_point and not _is_finite(tensor):
            raise ValueError(
                f"{self.name} in {self.path} holds NaN or infinity: get the file again from where "
                "it came, or give another"
            )
        return tensor

    def read_scale(self, device: torch.device | str = "cpu") -> Tensor | None:
        """Return the scale fp32 as it is multiplied, [1, 1] or [out, 1] of a matrix; or None."""
        if self.scale is None:
            return None
        return self.scale.read(device).float().view(-1, *[1] * (len(self.shape) - 1))

    def dequantise(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the tensor as it is stored, or fp32 and multiplied where it has a scale."""
        value, scale = self.read(device), self.read_scale(device)
        return value if scale is None else value.float() * scale


def _is_finite(tensor: Tensor) -> bool:
    """Say whether all numbers are finite, much faster than `isfinite` does on a CPU."""
    if tensor.dtype.itemsize == 1:
        # Without its sign, what is not finite in fp8 is larger as a byte than the largest number.
        largest = torch.tensor(torch.finfo(tensor.dtype).max, dtype=tensor.dtype)
        return bool((tensor.view(torch.uint8) & 127).max() <= int(largest.view(torch.uint8)))
    return all(bool(end.isfinite()) for end in tensor.aminmax())


def find_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a checkpoint by name, from the headers of all its files.

    path: a safetensors file, one shard of several, an index, or a folder with one checkpoint.

    Scales of fp8 weights are found with their weights, not by names of their own.

    Raises FileNotFoundError naming what is missing, or ValueError for what is no checkpoint.
    """
    found: dict[str, StoredTensor] = {}
    for shard in find_shards(path):
        for tensor in _read_header(shard):
            if (other := found.setdefault(tensor.name, tensor)) is not tensor:
                raise ValueError(
                    f"{shard} and {other.path} both hold {tensor.name}: give one checkpoint"
                )
    return _with_scales(found)


def find_quantised(tensors: Mapping[str, StoredTensor]) -> str:
    """Name the first tensor that is neither float nor fp8 with known scales; "" for none.

    Where some fp8 tensors have a scale, all must.
    """
    is_scaled = any(tensor.scale is not None for tensor in tensors.values())
    for name, tensor in tensors.items():
        is_known = tensor.dtype in _FLOATS
        if is_scaled and tensor.dtype.startswith("F8") and tensor.scale is None:
            return f"{name} is stored in fp8 without its scale"
        if (scale := tensor.scale) is not None:
            count = torch.Size(scale.shape).numel()
            is_known &= scale.dtype in _FLOATS and count in (1, *tensor.shape[:1])
        if not is_known:
            return f"{name} is stored in {_QUANTISED.get(tensor.dtype, tensor.dtype)}"
    return ""


def _read_header(path: Path) -> list[StoredTensor]:
    try:
        # Checks the header against the file's size. As "pt" it would claim memory for all of it.
        with safe_open(path, framework="np"), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(size))
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file: {shown_value(error)}"
        ) from error
    header.pop("__metadata__", None)
    found = [
        StoredTensor(path, name, t["dtype"], tuple(t["shape"]), 8 + size + t["data_offsets"][0])
        for name, t in header.items()
    ]
    for tensor in found:
        # Where a size is 0 the file holds none of what the others claim.
        if (
            not _is_plain(tensor.name)
            or len(tensor.shape) > _MOST_SIZES
            or (0 in tensor.shape and len(tensor.shape) > 1)
        ):
            raise ValueError(
                f"{path} holds {shown_value(tensor.name)} of shape {shown_value(tensor.shape)}, "
                "which is no model's tensor: get the file again from where it came"
            )
    return found


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """Return how many blocks there are, called `prefix` and a number.

    Raises ValueError where they are not numbered from 0 on, or more than a LINVIDEO file can name.
    """
    found = {n.removeprefix(prefix).partition(".")[0] for n in names if n.startswith(prefix)}
    missing = next((i for i in range(len(found)) if str(i) not in found), None)
    if missing is not None:
        raise ValueError(
            f"not a whole model: of {len(found)} blocks, {prefix}{missing}. is missing"
        )
    if not LAYERS.takes(len(found)):
        raise ValueError(f"it has {len(found)} blocks, and {LAYERS} is expected")
    return len(found)


def _with_scales(found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors, scaled ones with their scale, without what belongs to scales."""
    scaled = {f"{n.rpartition('.')[0]}.weight": n for n in found if n.endswith(_SCALES)}
    scaled = {weight: name for weight, name in scaled.items() if weight in found}
    beside = {*scaled.values(), *filter(_BESIDE_SCALES.fullmatch, found)}
    return {
        name: dataclasses.replace(tensor, scale=found[scaled[name]]) if name in scaled else tensor
        for name, tensor in found.items()
        if name not in beside
    }


def find_shards(path: Path) -> list[Path]:
    """Return the files of the checkpoint that `path` stands for, see `find_tensors`."""
    if path.is_dir():
        path = _find_in_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"model file {path} does not exist")
    if path.suffix in _PICKLED:
        raise ValueError(f"{path} is a pickle, which can run code: give a safetensors checkpoint")
    if path.suffix == ".gguf":
        raise ValueError(f"{path} is quantised (GGUF): {KNOWN_FORMS}")
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
        index = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not an index of shards ({error})") from error
    found = index.get("weight_map") if isinstance(index, dict) else None
    names = list(found.values()) if isinstance(found, dict) else []
    if not names or not all(map(_is_file_name, names)):
        raise ValueError(
            f"{path} is not an index of shards: its weight_map names no files beside it"
        )
    return sorted(set(names))


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and _is_plain(name) and name != "" and Path(name).name == name


def _is_plain(name: str) -> bool:
    return len(name) <= _MOST_LETTERS and name.isprintable()


def _list(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
