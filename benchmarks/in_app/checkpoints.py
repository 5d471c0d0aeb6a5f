"""Checkpoints of Wan with random weights, in the forms that people have, and a file for them."""

import math
import shutil
from pathlib import Path

import torch
from torch import Tensor

from linvideo_core.artifact import Artifact, ArtifactHeader, save
from linvideo_core.flow import make_sigmas
from linvideo_core.models.attention import LinearAttention
from linvideo_core.models.attention_sites import fingerprint, shapes_of
from linvideo_core.models.config import LinearForm
from linvideo_core.models.families import identify
from linvideo_core.models.wan import WanModel
from linvideo_core.run.errors import SettingError
from linvideo_core.run.files import write_tensors
from linvideo_core.run.memory import free_bytes, show_gb

from ..models.random_models import fill_random
from ..models.sizes import Size

FP8_SCALED, GGUF = "fp8_scaled", "gguf"

_FP8 = torch.float8_e4m3fn


def write_wan(path: Path, size: Size, form: str, device: str) -> None:
    """Write a random text-to-video Wan in native names; its weights are drawn on the device.

    form: "bf16" or "fp16"; "fp8_scaled", the blocks' matrices in fp8 with a scale each, the rest in
    fp16; "gguf", the blocks' matrices in Q8_0.

    Raises ValueError where the disk or the memory is too small, or a package is missing.
    """
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in WanModel(size.config).named_parameters()}
    num_bytes = 1 if form == FP8_SCALED else 2
    _check_room(path, num_bytes * sum(map(math.prod, shapes.values())))
    if form == GGUF:
        _write_gguf(path, shapes, device)
        return
    tensors: dict[str, Tensor] = {}
    if form == FP8_SCALED:
        tensors["scaled_fp8"] = torch.empty(0, dtype=_FP8)
    for name, shape in shapes.items():
        weight = _draw(name, shape, device)
        if form == FP8_SCALED and _is_matrix_of_block(name, shape):
            scale = weight.abs().max() / torch.finfo(_FP8).max
            tensors[f"{name.removesuffix('weight')}scale_weight"] = scale.reshape(1).cpu()
            tensors[name] = (weight / scale).to(_FP8).cpu()
        else:
            tensors[name] = weight.to(torch.bfloat16 if form == "bf16" else torch.float16).cpu()
    write_tensors(path, tensors)


def write_linear_layers(
    path: Path, size: Size, few_steps: int = 0, *, tile: str | None = None
) -> None:
    """Write a LINVIDEO file that makes `size.layers` linear by feature maps as training begins.

    few_steps: as many steps as it says to be distilled for; 0: none.
    tile: makes every layer hybrid instead, with softmax within such tiles.
    """
    with torch.device("meta"):
        shapes = shapes_of(WanModel(size.config))
    family, sites = identify(shapes)
    form = LinearForm(tile=tile)
    chosen = [site for site in sites if tile or site.layer in size.layers]
    generator, linear = torch.Generator().manual_seed(0), {}
    for site in chosen:
        attention = LinearAttention(site.num_heads, site.head_dim, site.head_dim, form)
        attention.init_weights(generator)
        linear[site.layer] = {name: x.detach() for name, x in attention.named_parameters()}
    header = ArtifactHeader(
        family=family.name,
        fingerprint=fingerprint(family, sites),
        weights_digest="0" * 16,
        linear_layers=tuple(site.layer for site in chosen),
        site_names=tuple(site.name for site in chosen),
        num_layers=len(sites),
        feature_dim=chosen[0].head_dim,
        parameters="feature_maps",
        objective="velocity",
        steps=0,
        tile=form.tile,
        attention_mass=form.attention_mass,
        sigmas=tuple(make_sigmas(few_steps, size.shift).tolist()) if few_steps else (),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save(Artifact(header=header, linear=linear), path)


def _check_room(path: Path, num_bytes: int) -> None:
    disk, memory = shutil.disk_usage(path.parent).free, free_bytes("cpu")
    if num_bytes > 0.95 * disk:
        raise SettingError(
            f"{path.name} takes {show_gb(num_bytes)} and the disk has {show_gb(disk)} free: give "
            "{out} on another disk",
            "out",
        )
    if memory is not None and 1.2 * num_bytes > memory:
        raise ValueError(
            f"{path.name} takes {show_gb(num_bytes)}, which ComfyUI will hold, and the machine has "
            f"{show_gb(memory)} of free memory: leave this row out"
        )


def _is_matrix_of_block(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2


def _draw(name: str, shape: tuple[int, ...], device: str) -> Tensor:
    # In fp32 first: some CPUs draw other numbers in 16 bits, and forms must have the same weights.
    tensor = torch.empty(shape, dtype=torch.float32, device=device)
    fill_random([(name, tensor)])
    return tensor


def _write_gguf(path: Path, shapes: dict[str, tuple[int, ...]], device: str) -> None:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ValueError("the package gguf is needed to write a GGUF file: install it") from error
    writer = gguf.GGUFWriter(str(path), "wan")
    for name, shape in shapes.items():
        weight = _draw(name, shape, device)
        if _is_matrix_of_block(name, shape):
            packed = gguf.quants.quantize(weight.cpu().numpy(), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
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
