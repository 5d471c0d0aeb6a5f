"""Checkpoints of Wan with random weights, in the forms that people have them in.

They are drawn on the device one tensor at a time and written as they come: a model of 14 GB takes
as long as its file takes to write, and no memory.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from linvideo_core.models.wan import WanModel
from linvideo_core.run.memory import free_bytes, show_gb

from ..models.random_models import fill_random
from ..models.sizes import Size

STORED = {"bf16": torch.bfloat16, "fp16": torch.float16}
FP8_SCALED, GGUF = "fp8_scaled", "gguf"
SUFFIXES = {GGUF: "gguf"}

_CODES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
}
_FP8 = torch.float8_e4m3fn
_Q8_BLOCK, _Q8_LARGEST = 32, 127


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to be written: what its header says, and how to make it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Return its bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_wan(path: Path, size: Size, form: str, device: str) -> None:
    """Write a random text-to-video Wan in native names.

    form: "bf16" or "fp16"; "fp8_scaled", the blocks' matrices in fp8 with a scale each, the rest in
    fp16; "gguf", the blocks' matrices in Q8_0.

    Raises ValueError where the disk or the memory is too small, or a package is missing.
    """
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in WanModel(size.config).named_parameters()}
    if form == GGUF:
        _write_gguf(path, shapes, device)
    elif form == FP8_SCALED:
        write_safetensors(path, list(_list_scaled(shapes, device)))
    else:
        dtype = STORED[form]
        entries = [
            Entry(name, dtype, shape, _drawing(name, shape, dtype, device))
            for name, shape in shapes.items()
        ]
        write_safetensors(path, entries)


def write_safetensors(path: Path, entries: Sequence[Entry]) -> None:
    """Write tensors one after another, none of which is kept.

    Raises ValueError, before anything is made, where the disk has no room for the file or the
    memory none for who will load it.
    """
    header, end = {}, 0
    for entry in entries:
        start, end = end, end + entry.num_bytes
        header[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    _check_room(path, end)
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    # No `files.replacing`: on some disks it would wait a minute until 14 GB are down.
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        for entry in entries:
            tensor = entry.make()
            assert tensor.shape == entry.shape and tensor.dtype == entry.dtype, entry.name
            file.write(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy())
    temporary.replace(path)


def _check_room(path: Path, num_bytes: int) -> None:
    disk, memory = shutil.disk_usage(path.parent).free, free_bytes("cpu")
    if num_bytes > 0.95 * disk:
        raise ValueError(
            f"{path.name} takes {show_gb(num_bytes)} and the disk has {show_gb(disk)} free: give "
            "--out on another disk"
        )
    if memory is not None and 1.2 * num_bytes > memory:
        raise ValueError(
            f"{path.name} takes {show_gb(num_bytes)}, which ComfyUI will hold, and the machine has "
            f"{show_gb(memory)} of free memory: leave this row out"
        )


def _is_matrix_of_block(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2


def _draw(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    # In fp32 first: some CPUs draw other numbers in 16 bits, and forms must have the same weights.
    tensor = torch.empty(shape, dtype=torch.float32, device=device)
    fill_random([(name, tensor)], seed=0)
    return tensor.to(dtype)


def _drawing(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> Callable[[], Tensor]:
    return lambda: _draw(name, shape, dtype, device)


def _list_scaled(shapes: dict[str, tuple[int, ...]], device: str) -> Iterator[Entry]:
    """Yield the tensors of an `_fp8_scaled` file: weight = fp8 times `scale_weight`."""

    def scale_of(name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        weight = _draw(name, shape, torch.float32, device)
        return weight, weight.abs().max() / torch.finfo(_FP8).max

    def making(name: str, shape: tuple[int, ...], is_scale: bool) -> Callable[[], Tensor]:
        def make() -> Tensor:
            weight, scale = scale_of(name, shape)
            return scale.reshape(1) if is_scale else (weight / scale).to(_FP8)

        return make

    yield Entry("scaled_fp8", _FP8, (0,), lambda: torch.empty(0, dtype=_FP8))
    for name, shape in shapes.items():
        if _is_matrix_of_block(name, shape):
            scale_name = f"{name.removesuffix('weight')}scale_weight"
            yield Entry(scale_name, torch.float32, (1,), making(name, shape, True))
            yield Entry(name, _FP8, shape, making(name, shape, False))
        else:
            half = torch.float16
            yield Entry(name, half, shape, _drawing(name, shape, half, device))


def quantise_q8_0(weight: Tensor) -> Tensor:
    """Return a matrix [out, in] as GGUF's Q8_0, [out, in / 32 * 34] uint8.

    32 numbers in a row share a scale: its two bytes in fp16, then theirs.
    """
    blocks = weight.float().unflatten(-1, (-1, _Q8_BLOCK))
    scale = blocks.abs().amax(dim=-1, keepdim=True) / _Q8_LARGEST
    numbers = (blocks / scale.clamp_min(1e-30)).round().to(torch.int8)
    packed = torch.cat([scale.half().view(torch.uint8), numbers.view(torch.uint8)], dim=-1)
    return packed.flatten(-2)


def _write_gguf(path: Path, shapes: dict[str, tuple[int, ...]], device: str) -> None:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ValueError("the package gguf is needed to write a GGUF file: install it") from error
    _check_room(path, sum(2 * math.prod(shape) for shape in shapes.values()))
    writer = gguf.GGUFWriter(str(path), "wan")
    for name, shape in shapes.items():
        weight = _draw(name, shape, torch.float32, device)
        if _is_matrix_of_block(name, shape):
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantise_q8_0(weight).cpu().numpy(), raw_dtype=kind)
        elif len(shape) > 4:
            # GGUF has four dimensions at most.
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
            writer.add_tensor(name, weight.half().flatten(1).cpu().numpy())
        else:
            stored = weight if len(shape) == 1 else weight.half()
            writer.add_tensor(name, stored.cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
