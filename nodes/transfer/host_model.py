"""A graph's diffusion model as the core trains it, around weights that stay ComfyUI's.

`freeze` returns modules of our own in the shape of the graph's model. Their linear layers hold no
weight: each asks its counterpart in the graph's model for it, forward and backward, by the function
with which ComfyUI itself casts weights. So the weights are in memory once and in the form they came
in (16 bits, fp8, int8, GGUF), with the LoRAs of other nodes, and wait in CPU memory or are streamed
as ComfyUI decides. All else (norms, modulations, the patch embedding) is small and copied.

`HostModel` makes of such a copy one call and one attention module at each site.
"""

import contextlib
import copy
import functools
from collections.abc import Iterator
from types import MethodType
from typing import Any

import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...linvideo_core.models.attention import SoftmaxAttention
from ...linvideo_core.models.attention_sites import AttentionSite
from ..patching.attention_override import attend_as_pytorch, run_answered
from ..patching.families import HostFamily, Video
from ..patching.weights import without_class
from .conditioning import Conditions

# What ComfyUI keeps in a module's own fields for its loading; a copy of the module has none of it.
_HOST_FIELDS = ("_v", "_prefetch", "_pin")
_REGISTRIES = ("_parameters", "_buffers", "_modules")
# Of a call's `transformer_options`: where the video's tokens lie.
_GRID = "linvideo_grid"


@contextlib.contextmanager
def cast_weights(
    layer: nn.Module, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Lend a host's layer's weight and bias as plain tensors, with all patches on them.

    They may be ComfyUI's own memory: valid, and to be left unchanged, while the context lasts.
    """
    with torch.inference_mode():
        given = {"dtype": dtype, "device": device, "bias_dtype": dtype}
        # GGUF layers have a door of their own, ComfyUI's others share one.
        own_door = getattr(layer, "cast_bias_weight", None)
        if own_door is not None:
            loan, (weight, bias) = None, own_door(**given)
        elif isinstance(layer, comfy.ops.CastWeightBiasOp):
            given |= {"offloadable": True, "compute_dtype": dtype}
            weight, bias, loan = comfy.ops.cast_bias_weight(layer, **given)
        else:
            found = (layer.weight, getattr(layer, "bias", None))
            loan, (weight, bias) = None, (x if x is None else x.to(device, dtype) for x in found)
        if hasattr(weight, "_layout_cls"):
            weight = weight.dequantize().to(dtype)
        weight, bias = (x if x is None else without_class(x) for x in (weight, bias))
        smoothing = getattr(layer, "pre_quant_scale", None)
        if smoothing is not None:
            weight = weight * smoothing.to(device, dtype)
    try:
        yield weight, bias
    finally:
        comfy.ops.uncast_bias_weight(layer, weight, bias, loan)


class FrozenLinear(nn.Linear):
    """A linear layer whose weight stays in the graph's model; the gradient reaches its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        # The shape alone, by which a model is recognised.
        self.weight.requires_grad_(False)
        self.__dict__["_source"] = _Source(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]."""
        return _FrozenProduct.apply(x, self._source)


class _Source:
    """A layer of the graph's model; copies of what holds it refer to the same."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Source":
        return self


class _FrozenProduct(torch.autograd.Function):
    """`x W^T + b`, for which autograd keeps nothing: the way back asks for W again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: _Source) -> Tensor:
        ctx.source = source
        with cast_weights(source.layer, x.dtype, x.device) as (weight, bias):
            return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        with cast_weights(ctx.source.layer, upstream.dtype, upstream.device) as (weight, _):
            return upstream @ weight, None


def freeze(diffusion_model: nn.Module, device: torch.device, *, is_copied: bool) -> nn.Module:
    """Return a copy of a loaded diffusion model that can take part in training.

    is_copied: linear layers, too, are copied, in fp32: for small models, and where all is trained.

    Raises ValueError for a layer that another node computes in a way of its own.
    """
    return _Freezer(device, is_copied).copy(diffusion_model).requires_grad_(False).eval()


class _Freezer:
    """Makes copies of modules; a module that stands in two places has one."""

    def __init__(self, device: torch.device, is_copied: bool) -> None:
        self.device = device
        self.is_copied = is_copied
        self.made: dict[int, nn.Module] = {}

    def copy(self, module: nn.Module) -> nn.Module:
        """Return the copy of a module and of all below it."""
        if id(module) not in self.made:
            self.made[id(module)] = self._make(module)
        return self.made[id(module)]

    def _make(self, module: nn.Module) -> nn.Module:
        has_weight = getattr(module, "weight", None) is not None
        if has_weight and hasattr(module, "out_features"):
            _check_is_plain(module)
            return self._copy_linear(module) if self.is_copied else FrozenLinear(module)
        made = _empty_copy(module)
        children = {name: child for name, child in module._modules.items() if child is not None}
        made._modules.update({name: self.copy(child) for name, child in children.items()})
        if has_weight and not children:
            self._copy_weights(module, made)
        else:
            self._copy_tensors(module, made)
        return made

    def _copy_linear(self, layer: nn.Module) -> nn.Linear:
        made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        self._copy_weights(layer, made)
        return made

    def _copy_weights(self, layer: nn.Module, made: nn.Module) -> None:
        """Give a layer weights of its own, in fp32; one of ComfyUI's casts them to its input."""
        with cast_weights(layer, torch.float32, self.device) as tensors:
            for name, tensor in zip(("weight", "bias"), tensors, strict=True):
                if tensor is not None:
                    made._parameters[name] = nn.Parameter(tensor.clone(), requires_grad=False)
        if isinstance(made, comfy.ops.CastWeightBiasOp):
            made.comfy_cast_weights = True

    def _copy_tensors(self, module: nn.Module, made: nn.Module) -> None:
        """Copy what a module holds beside its layers, such as a modulation, as it is."""
        for name, tensor in module._parameters.items():
            if tensor is not None:
                own = without_class(tensor).detach().to(self.device, copy=True)
                made._parameters[name] = nn.Parameter(own, requires_grad=False)
        for name, tensor in module._buffers.items():
            if tensor is not None:
                made._buffers[name] = tensor.detach().to(self.device, copy=True)


def _check_is_plain(layer: nn.Module) -> None:
    """Raise ValueError where another node computes a layer in a way of its own."""
    forward = layer.__dict__.get("forward")
    # ComfyUI gives a layer its own method back when a bypass LoRA leaves it.
    if forward is not None and getattr(forward, "__func__", None) is not type(layer).forward:
        raise ValueError(
            "another node computes this model's layers in a way of its own (such as a bypass "
            "LoRA), which a transfer cannot learn from: connect the model from before it"
        )


def _empty_copy(module: nn.Module) -> nn.Module:
    """Return a module of the same class and settings, with none of its tensors and children."""
    made = module.__class__.__new__(module.__class__)
    for name, value in module.__dict__.items():
        if name in _REGISTRIES:
            made.__dict__[name] = dict.fromkeys(value)
        elif isinstance(value, MethodType) and value.__self__ is module:
            made.__dict__[name] = MethodType(value.__func__, made)
        elif not (name.startswith(_HOST_FIELDS) or name.endswith("_function")):
            made.__dict__[name] = copy.copy(value) if isinstance(value, dict) else value
    return made


class HostModel(nn.Module):
    """`(latents, timesteps, prompt_embeds) -> velocity`, its parameters under their own names."""

    def __init__(
        self,
        diffusion_model: nn.Module,
        sites: list[AttentionSite],
        conditions: Conditions,
        *,
        dtype: torch.dtype,
        family: HostFamily,
        video: Video,
        timestep_scale: float = 1.0,
    ) -> None:
        """diffusion_model: of `freeze`; nothing else may use it.

        dtype: in which it computes; timestep_scale: the model's own timesteps over [0, 1000].
        """
        super().__init__()
        for name, module in diffusion_model.named_children():
            self.add_module(name, module)
        for name, parameter in diffusion_model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        family.prepare_for_training(diffusion_model)
        for site in sites:
            _give_attention(diffusion_model.get_submodule(site.name), family)
        # Beside the registry of modules, which would list every parameter a second time.
        self.__dict__["_diffusion_model"] = diffusion_model
        self._concat, self._inputs = conditions.concat, conditions.inputs
        self._family, self._video, self._dtype = family, video, dtype
        self._timestep_scale = timestep_scale

    def forward(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Predict the velocity of latents [B, C, F, H, W] in their dtype.

        timesteps: [B] in [0, 1000]; prompt_embeds: [B, S, T].
        """
        B, dtype = len(latents), self._dtype
        x = latents.to(dtype)
        if self._concat is not None:
            x = torch.cat([x, _repeat(self._concat.to(x), B)], dim=1)
        inputs = {
            name: _repeat(value.to(x.device, dtype), B) if torch.is_tensor(value) else value
            for name, value in self._inputs.items()
        }
        size = self._video.picture_shape[1:]
        options = {
            "optimized_attention_override": attend_as_pytorch,
            _GRID: self._family.find_grid(self._diffusion_model, size, inputs),
        }
        # What is computed in which precision is the host's business: its layers cast by themselves.
        with torch.autocast(x.device.type, enabled=False):
            velocity = self._video.call(
                self._diffusion_model,
                x,
                self._timestep_scale * timesteps.float(),
                prompt_embeds.to(dtype),
                options,
                inputs,
            )
        return velocity.to(latents.dtype)


def _give_attention(layer: nn.Module, family: HostFamily) -> None:
    """Give an attention layer a submodule that attends, where the core can put another."""
    layer.attention = SoftmaxAttention()
    layer.__dict__["run_fused"] = functools.partial(family.run_fused, in_training=True)
    layer.__dict__["forward"] = MethodType(_forward, layer)


def _forward(
    self: nn.Module, x: Tensor, *args: Any, transformer_options: dict | None = None, **kwargs: Any
) -> Tensor:
    """Run the class's own forward with the submodule's attention, or a faster way to the same."""
    kwargs["transformer_options"] = dict(transformer_options or {})
    grid = kwargs["transformer_options"].get(_GRID)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attention(query, key, value, grid)

    fused = self.run_fused(self, attend, x, *args, **kwargs)
    return run_answered(self, attend, x, *args, **kwargs) if fused is None else fused


def _repeat(tensor: Tensor, batch_size: int) -> Tensor:
    return tensor.expand(batch_size, *tensor.shape[1:])
