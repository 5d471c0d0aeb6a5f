"""A file's tensors on a MODEL: compared with its weights, merged into them, or loaded beside them.

The MODEL's weights are read in whatever form ComfyUI keeps them, as they came from the model's
file: changes of other nodes, merged or not, are left out.

A change is merged into weights of 16 or 32 bits by ComfyUI, together with the user's LoRAs. Merged
into a quantised weight it would round that weight a second time: on the embedded model in fp8 the
latents are then 14 % off, the change being 77 %, against 3e-6 beside the layer, where low-rank
changes are therefore computed. Whole weights have no such place and are merged, with a warning.

What is computed beside the layers is a model of its own, which ComfyUI loads, counts and offloads.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import comfy.model_patcher
import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter import LoRAAdapter
from einops import rearrange
from torch import Tensor, nn

from ...linvideo_core.artifact import Artifact, ArtifactError, ArtifactHeader
from ...linvideo_core.kernels.tiles import TokenGrid
from ...linvideo_core.models.attention import attend_linearly
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
from ...linvideo_core.models.config import LinearForm
from ...linvideo_core.models.families import identify

_PREFIX = "diffusion_model."
_ALL = slice(None)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_FLOATS_8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# A tensor of `LinearAttention`, and how it lies in the weight [out, in] of a Linear.
_AS_WEIGHT = {
    "query_map": ("n d m", "(n m) d"),
    "key_map": ("n d m", "(n m) d"),
    "gate": ("n d", "n d"),
    "window_mix": ("n", "n 1"),
    "mass_bias": ("n", "n 1"),
    "mass_gate": ("n d", "n d"),
    "mass_moments": ("c n", "n c"),
}

logger = logging.getLogger(__name__)


def compare_base(header: ArtifactHeader, model: Any) -> WeightsMatch:
    """Compare a ModelPatcher's weights with those that a file was made from.

    What cannot be read is unknown; nothing is raised.
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

    Raises ValueError for weights in a form that is not known.
    """
    diffusion_model = model.model.diffusion_model
    _, sites = identify(shapes_of(diffusion_model))
    names = digested_weights(diffusion_model, sites)
    digest = digest_weights(_read(model, name) for name in names)
    sketched = sketch_base(model)
    return BaseWeights(digest=digest, sketch=sketched.sketch, bits=sketched.bits)


def sketch_base(model: Any) -> BaseWeights:
    """Return the sketch of a ModelPatcher's weights, without their digest; raises as above."""
    names = sketched_weights(*identify(shapes_of(model.model.diffusion_model)))
    weights = [original_weight(model, name) for name in names]
    bits = sum(map(_count_bits, weights)) / sum(math.prod(weight.shape) for weight in weights)
    rows = (_read(model, name, sketched_rows(original_weight(model, name).shape)) for name in names)
    return BaseWeights(sketch=sketch(rows), bits=bits)


def original_weight(model: Any, name: str) -> Tensor:
    """Return a weight as it is kept; where changes are merged in, the one that waits for later."""
    key = _PREFIX + name
    if key in model.hook_backup:
        return model.hook_backup[key][0]
    if key in model.backup:
        return model.backup[key].weight
    return model.model.diffusion_model.get_parameter(name)


def _read(model: Any, name: str, rows: slice = _ALL) -> Tensor:
    """Return rows of a weight as what they stand for, on the CPU."""
    weight = original_weight(model, name)
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
    return 8 * (weight if isinstance(weight, QuantizedTensor) else without_class(weight)).nbytes


LowRank = Mapping[str, tuple[Tensor, Tensor]]
"""Changes of weights: name of a layer -> down [R, in] and up [out, R]."""


def add_weight_changes(
    linearized: Any, artifact: Artifact, strength: float, *, must_rest: bool
) -> LowRank:
    """Hand to ComfyUI every change that it can merge, and return the others, of low rank.

    linearized: a clone of the user's ModelPatcher; its weights are not touched.
    must_rest: nothing is merged, so that changes can be taken out of single steps.

    Raises ArtifactError when the model lacks a weight, or when whole weights must rest.
    """
    patches: dict[str, Any] = {}
    bypassed: dict[str, tuple[Tensor, Tensor]] = {}
    if artifact.deltas:
        _check_full_changes(linearized, artifact, must_rest=must_rest)
    for name, delta in artifact.deltas.items():
        if _is_patched_by_host(linearized.model.diffusion_model, name):
            patches[_PREFIX + name] = ("diff", (delta,))
        else:
            _replace_parameter(linearized, name, strength * delta.float())
    for name, (down, up) in artifact.low_rank.items():
        if must_rest or not _is_kept_plain(linearized, f"{name}.weight"):
            bypassed[name] = (down, up)
            continue
        # up, down, alpha (none: the rank), Tucker's middle factor, DoRA's scale, a new shape
        weights = (up, down, None, None, None, None)
        patches[f"{_PREFIX}{name}.weight"] = LoRAAdapter(set(), weights)
    applied = set(linearized.add_patches(patches, strength))
    if missing := sorted(patches.keys() - applied):
        raise _missing(missing[0])
    return bypassed


def check_merged(patcher: Any) -> None:
    """Raise RuntimeError when ComfyUI has lost weight changes of a loaded ModelPatcher.

    A block compiled in place (an object patch) gives its weights other names, under which ComfyUI
    finds no changes, ours or a LoRA's, and says nothing.
    """
    if are_blocks_compiled(patcher.model):
        names = {name for name, _ in patcher.model.named_parameters()}
        if any(key not in names and not _is_merged(patcher, key) for key in patcher.patches):
            raise RuntimeError(
                "the node that compiles this model's blocks makes ComfyUI lose LinVideo's weight "
                "changes and all LoRAs: use ComfyUI's TorchCompileModel node instead"
            )


def are_blocks_compiled(model: nn.Module) -> bool:
    """Say whether a live model holds modules that another node has compiled in place."""
    # By name: the class behind it takes a second to import.
    return any("_orig_mod" in module._modules for module in model.modules())


def _is_merged(patcher: Any, key: str) -> bool:
    owner, _, parameter = key.rpartition(".")
    layer = patcher.model.get_submodule(owner)
    # Merged into the loaded weight, or by a function that runs when the weight comes to a call.
    functions = (f"{parameter}_function", f"{parameter}_lowvram_function")
    return key in patcher.backup or any(getattr(layer, name, None) for name in functions)


def is_plain(weight: Tensor) -> bool:
    """Say whether a weight is kept as numbers of 16 or 32 bits, not quantised in any way."""
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype in _FLOATS


def kept_dtype(patcher: Any, name: str) -> torch.dtype:
    """Return in which dtype ComfyUI keeps a parameter of a ModelPatcher once it was used.

    With dynamic video memory it is the file's until then.
    """
    owner, _, leaf = (_PREFIX + name).rpartition(".")
    dtype = getattr(patcher.get_model_object(owner), f"{leaf}_comfy_model_dtype", None)
    return dtype or _find_weight(patcher, name).dtype


def _is_kept_plain(linearized: Any, name: str) -> bool:
    return is_plain(_find_weight(linearized, name)) and kept_dtype(linearized, name) in _FLOATS


def _find_weight(linearized: Any, name: str) -> Tensor:
    try:
        return linearized.get_model_object(_PREFIX + name)
    except AttributeError:
        raise _missing(_PREFIX + name) from None


def _missing(key: str) -> ArtifactError:
    return ArtifactError(
        f"this model has no weight {key!a} that the file changes: load the model with ComfyUI's "
        "own loader"
    )


def _check_full_changes(linearized: Any, artifact: Artifact, *, must_rest: bool) -> None:
    if must_rest:
        raise ArtifactError(
            "this file changes whole weights, which cannot be taken out of single steps: set "
            "keep_first_steps to 0, or use a file that was trained with LoRA"
        )
    if not all(_is_kept_plain(linearized, name) for name in artifact.deltas):
        logger.warning(
            "LinVideo: this file changes whole weights and the model's are quantised, so they are "
            "rounded once more; a file trained with LoRA, or a bf16 model, keeps them exact"
        )


def _is_patched_by_host(diffusion_model: nn.Module, name: str) -> bool:
    """Say whether ComfyUI merges patches of a parameter: only weights and biases of leaf modules.

    It takes patches of others (Wan's modulations) and, without a word, never merges them.
    """
    owner, _, parameter = name.rpartition(".")
    is_leaf = not any(diffusion_model.get_submodule(owner).children())
    return is_leaf and parameter in ("weight", "bias")


def _replace_parameter(linearized: Any, name: str, change: Tensor) -> None:
    """Put a changed copy in a parameter's place for as long as the clone is loaded."""
    parameter = _find_weight(linearized, name)
    total = parameter.float() + change.to(parameter.device)
    is_kept_plain = _is_kept_plain(linearized, name)
    dtype = kept_dtype(linearized, name) if is_kept_plain else torch.bfloat16
    replacement = nn.Parameter(total.to(dtype), requires_grad=False)
    linearized.add_object_patch(_PREFIX + name, replacement)


class Part(nn.Module):
    """What one layer of the user's model computes with; while it rests, the layer is as it was.

    The tensors are weights of ComfyUI's own Linear and are read through its forward alone, because
    ComfyUI may keep them elsewhere, in another dtype, until it casts them.
    """

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device) -> None:
        """weights: [out, in] by name, of which the shapes and dtypes are taken."""
        super().__init__()
        self.is_resting = False
        for name, weight in weights.items():
            settings = {"bias": False, "dtype": weight.dtype, "device": device}
            layer = comfy.ops.manual_cast.Linear(*reversed(weight.shape), **settings)
            self.add_module(name, layer)


class LayerMaps(Part):
    """The tensors of one layer's linear attention, and the attention that they make."""

    def __init__(
        self, tensors: Mapping[str, Tensor], form: LinearForm, device: torch.device
    ) -> None:
        """tensors: as the artifact names them."""
        super().__init__(_as_weights(tensors), device)
        self.form = form
        self.num_maps = tensors["query_map"].shape[0]
        self.num_runs = 0  # of the layer, in the model's present call
        self.is_compiled = False  # in its last run
        # Of that call; torch.compile guards it, as it guards no option of the call.
        self.grid: TokenGrid | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend in O(L); query, key, value and the result are [B, L, N, D]."""
        weights = {name: self._read(name, query.device) for name in self._modules}
        return attend_linearly(query, key, value, weights, form=self.form, grid=self.grid)

    def _read(self, name: str, device: torch.device) -> Tensor:
        """Return a tensor as the artifact has it, from what its layer makes of unit vectors."""
        (wanted, kept), layer = _AS_WEIGHT[name], self.get_submodule(name)
        weight = layer(torch.eye(layer.in_features, device=device)).T
        sizes = {"n": self.num_maps} if "(n m)" in kept else {}
        return rearrange(weight, f"{kept} -> {wanted}", **sizes)


class FeatureMaps(nn.Module):
    """The linear attention of every linear layer, and which of the model's layers they are."""

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        super().__init__()
        header = artifact.header
        self.family_name = header.family
        self.linear_layers = header.linear_layers
        self.site_names = header.site_names
        self.layers = nn.ModuleList(
            LayerMaps(artifact.linear[layer], header.form, device) for layer in header.linear_layers
        )

    @staticmethod
    def weights_of(artifact: Artifact) -> list[dict[str, Tensor]]:
        """Return the weights of each of `layers`."""
        return [_as_weights(artifact.linear[layer]) for layer in artifact.header.linear_layers]


class LowRankChange(Part):
    """The change of one layer, `strength up down`.

    Merged into a quantised weight it would be rounded away; beside the layer it is exact, costs
    little, and can rest while the layer goes on.
    """

    def __init__(self, down: Tensor, up: Tensor, strength: float, device: torch.device) -> None:
        super().__init__({"down": down, "up": up}, device)
        self.strength = strength

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Return a layer's changed output [..., out], given its input x [..., in] and its output.

        No other tensor as large as the output is made.
        """
        if self.is_resting:
            return output
        size = output.shape[-1]
        rows = self._reduce(x).reshape(-1, self.down.out_features).to(output.dtype)
        return torch.addmm(output.reshape(-1, size), rows, self._read_up(output)).view_as(output)

    def change_weight(self, weight: Tensor) -> Tensor:
        """Return a changed copy of a weight [out, in] that ComfyUI has dequantised for one call."""
        if self.is_resting:
            return weight
        identity = torch.eye(weight.shape[1], device=weight.device, dtype=weight.dtype)
        return torch.addmm(weight, self._read_up(weight).T, self._reduce(identity).T)

    def _reduce(self, x: Tensor) -> Tensor:
        return self.strength * self.down(x)

    def _read_up(self, like: Tensor) -> Tensor:
        """Return `up` as [R, out], from what its layer makes of unit vectors."""
        return self.up(torch.eye(self.up.in_features, device=like.device, dtype=like.dtype))


class LowRankChanges(nn.Module):
    """Every bypassed change, and the names of the layers that they change."""

    def __init__(self, low_rank: LowRank, strength: float, device: torch.device) -> None:
        super().__init__()
        self.layer_names = tuple(low_rank)
        self.layers = nn.ModuleList(
            LowRankChange(*pair, strength, device) for pair in low_rank.values()
        )

    @staticmethod
    def weights_of(low_rank: LowRank, strength: float) -> list[dict[str, Tensor]]:
        """Return the weights of each of `layers`."""
        return [{"down": down, "up": up} for down, up in low_rank.values()]


def make_patcher(
    kind: type[FeatureMaps] | type[LowRankChanges],
    contents: tuple[Any, ...],
    load_device: torch.device,
    offload_device: torch.device,
    *,
    disable_dynamic: bool = False,
) -> Any:
    """Return `kind(*contents)`, its tensors loaded, in a ModelPatcher."""
    patchers = comfy.model_patcher
    patcher_class = patchers.ModelPatcher if disable_dynamic else patchers.CoreModelPatcher
    module = kind(*contents, offload_device).eval()
    patcher = patcher_class(module, load_device=load_device, offload_device=offload_device)
    state = {
        f"layers.{index}.{name}.weight": weight
        for index, weights in enumerate(kind.weights_of(*contents))
        for name, weight in weights.items()
    }
    module.load_state_dict(state, assign=patcher.is_dynamic())
    module.requires_grad_(False)
    # ComfyUI makes a patcher anew for another GPU, or to hold ordinary weights.
    patcher.cached_patcher_init = (make_patcher, (kind, contents, load_device, offload_device))
    return patcher


def _as_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: rearrange(x, " -> ".join(_AS_WEIGHT[name])).contiguous()
        for name, x in tensors.items()
    }
