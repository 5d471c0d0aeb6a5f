"""A MODEL's own weights read through ComfyUI, whatever form they are kept in, and compared.

Read as they came from the model's file: changes of other nodes, merged or not, are left out.
"""

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...linvideo_core.artifact import ArtifactHeader
from ...linvideo_core.models.attention_sites import shapes_of
from ...linvideo_core.models.base_weights import (
    BaseWeights,
    WeightsMatch,
    compare_weights,
    digest_weights,
    digested_weights,
    sketch,
    sketched_rows,
    sketched_weights,
)
from ...linvideo_core.models.families import identify

_PREFIX = "diffusion_model."
_ALL = slice(None)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_FLOATS_8 = (torch.float8_e4m3fn, torch.float8_e5m2)

logger = logging.getLogger(__name__)


def compare_base(header: ArtifactHeader, model: Any) -> WeightsMatch:
    """Compare a ModelPatcher's weights with those that a file was made from.

    What cannot be read is said to be unknown; nothing is raised.
    """
    try:
        # The digest reads much more of the model: only for files that have no sketch.
        found = sketch_base(model) if header.weights_sketch else describe_base(model)
    except Exception:
        # The layers may be of any pack, and a comparison must not keep a file from being applied.
        logger.info("LinVideo: this model's weights could not be read", exc_info=True)
        return WeightsMatch("unknown")
    return compare_weights(header.base_weights, found)


def describe_base(model: Any) -> BaseWeights:
    """Return what tells a ModelPatcher's weights from others: digest and sketch.

    Raises ValueError, in one sentence, for weights in a form that is not known.
    """
    diffusion_model = model.model.diffusion_model
    _, sites = identify(shapes_of(diffusion_model))
    names = digested_weights(diffusion_model, sites)
    digest = digest_weights(_read(model, name) for name in names)
    sketched = sketch_base(model)
    return BaseWeights(digest=digest, sketch=sketched.sketch, bits=sketched.bits)


def sketch_base(model: Any) -> BaseWeights:
    """Return the sketch of a ModelPatcher's weights, without their digest.

    Raises ValueError, in one sentence, for weights in a form that is not known.
    """
    names = sketched_weights(*identify(shapes_of(model.model.diffusion_model)))
    weights = [_find(model, name) for name in names]
    bits = sum(map(_count_bits, weights)) / sum(math.prod(weight.shape) for weight in weights)
    return BaseWeights(sketch=sketch(_read_sketched(model, names)), bits=bits)


def _read_sketched(model: Any, names: list[str]) -> Iterator[Tensor]:
    for name in names:
        yield _read(model, name, sketched_rows(_find(model, name).shape))


def _find(model: Any, name: str) -> Tensor:
    """Return a weight as it is kept; where changes are merged in, the one that waits for later."""
    key = _PREFIX + name
    if key in model.hook_backup:
        return model.hook_backup[key][0]
    if key in model.backup:
        return model.backup[key].weight
    return model.model.diffusion_model.get_parameter(name)


def _read(model: Any, name: str, rows: slice = _ALL) -> Tensor:
    """Return rows of a weight as what they stand for, on the CPU."""
    weight = _find(model, name)
    if weight.device.type == "meta":
        raise ValueError(f"{name} is not there: load the model with ComfyUI's own loader")
    if isinstance(weight, QuantizedTensor):
        return _dequantise(weight, rows, model.load_device).cpu()
    layer = model.model.diffusion_model.get_submodule(name.rpartition(".")[0])
    if getattr(weight, "tensor_type", None) is not None and hasattr(layer, "get_weight"):
        return _dequantise_gguf(layer, weight, rows).cpu()
    if weight.dtype not in _FLOATS + _FLOATS_8:
        raise ValueError(f"{name} is kept as {weight.dtype} in {type(weight).__name__}: not known")
    return without_class(weight).detach()[rows].cpu()


def _dequantise(weight: Any, rows: slice, device: torch.device) -> Tensor:
    """Return rows of a weight in ComfyUI's own quantised form, made wide on a device."""
    scale = weight.params.scale
    is_transposed = getattr(weight.params, "transposed", False)
    if weight.storage_dtype in _FLOATS_8 and scale.numel() == 1 and not is_transposed:
        stored = weight.layout_cls.get_plain_tensors(weight)[0]
        return (stored[rows].float() * scale).to(weight.dtype)
    # Rows of most forms cannot be taken out, and a CPU takes a second for all of a 14B's.
    return weight.to(device).dequantize()[rows]


def _dequantise_gguf(layer: nn.Module, weight: Any, rows: slice) -> Tensor:
    """Return rows of a GGUF weight, by its layer's own way, without the patches that it carries."""
    packed, shape = without_class(weight), tuple(weight.tensor_shape)
    if packed.shape[0] == shape[0]:
        packed = packed[rows].contiguous()
        shape, rows = (len(packed), *shape[1:]), _ALL
    packed.tensor_type, packed.tensor_shape = weight.tensor_type, torch.Size(shape)
    return layer.get_weight(packed, torch.float32)[rows]


def without_class(weight: Tensor) -> Tensor:
    """Return a weight's own numbers as a plain tensor: of a packed weight, what it is packed as.

    GGUF's class passes itself and its own shape on to whatever is computed with it, and its `clone`
    and `detach` give the tensor itself.
    """
    with torch._C.DisableTorchFunctionSubclass():
        return weight.as_subclass(Tensor)


def _count_bits(weight: Any) -> int:
    if isinstance(weight, QuantizedTensor):
        return 8 * weight.nbytes
    return 8 * without_class(weight).nbytes
