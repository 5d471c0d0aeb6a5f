"""Wan as ComfyUI computes it: every variant but the causal one and Animate 2 shares one class.

Its norm and rotation of queries and keys run in one pass each: pass by pass, as in the class's own
forward, they would cost more than linear attention. Ours computes the same where it is known to be
the same and where it pays; else the class's own forward runs.
"""

import functools
import hashlib
import inspect
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import comfy.ldm.flux.math
import comfy.model_management
import torch
from torch import Tensor, nn

from ....linvideo_core.kernels import is_norm_rotary_fused, norm_rotary
from . import HostFamily

BACKEND = "auto"
"""`norm_rotary`'s backend: "auto" leaves all to the class's own forward where no kernel runs."""

# Of the source of the forward in ComfyUI 0.11.0 and 0.33.0: one that does more is not ours.
_KNOWN_FORWARDS = {"e57709825263ea246f18b461a9a6e79185fb9b3696e7fbbd6d4908779182efd4"}
# What a norm makes its bare weight of: beside its square an epsilon is nothing, even in fp32.
_CONSTANT = 1024.0

# Any variant takes these; Phantom's subjects come as the first, other references as the second.
_JOINING = ("time_dim_concat", "context_latents")
_JOINING_BY_CLASS = {
    "WanModel_S2V": ("reference_latent", "reference_motion"),
    "HumoWanModel": ("reference_latent",),
    "SCAILWanModel": ("reference_latent", "pose_latents"),
    "SCAIL2WanModel": ("reference_latent", "pose_latents"),
}

logger = logging.getLogger(__name__)


def find_joining_inputs(diffusion_model: nn.Module, inputs: Collection[str]) -> list[str]:
    """Return the inputs whose tokens stand in the sequence beside those of the video."""
    joining = _JOINING + _JOINING_BY_CLASS.get(type(diffusion_model).__name__, ())
    if getattr(diffusion_model, "ref_conv", None) is not None:
        joining += ("reference_latent",)
    return [name for name in joining if name in inputs]


def run_fused(
    attention: nn.Module,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    *args: Any,
    transformer_options: Mapping[str, Any],
    in_training: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Return what `WanSelfAttention.forward` gives, or None where only itself can compute it.

    attend: query, key, value [B, L, N, D] -> [B, L, N, D].
    x: [B, L, N D]. The others are the forward's own; of them `freqs` is [1, L, 1, D/2, 2, 2].
    in_training: also where a gradient is wanted, which the kernels have.
    """
    freqs = kwargs.get("freqs", args[0] if args else None)
    is_plain = len(args) + len(kwargs) == 1 and isinstance(freqs, Tensor)
    if not (is_plain and _pays(attention, x, in_training) and _is_known(attention)):
        return None
    L, N, D = x.shape[1], attention.num_heads, attention.head_dim
    if freqs.shape != (1, L, 1, D // 2, 2, 2) or freqs.dtype != torch.float32:
        return None
    # It is given the queries and keys of the class's own forward.
    if "attn1_patch" in transformer_options.get("patches", {}):
        return None
    # A rotation matrix is (cos, -sin), (sin, cos): its first column, in place.
    rotary = freqs[0, :, 0, :, :, 0].movedim(-1, 0)

    def project(linear: nn.Module, norm: nn.Module) -> Tensor:
        projected = linear(x)
        # Only through its forward: the host may keep the weight elsewhere, in another dtype.
        weight = norm(projected.new_full((1, 1, projected.shape[2]), _CONSTANT)).flatten()
        return norm_rotary(projected, weight, rotary, N, eps=norm.eps, backend=BACKEND)

    query = project(attention.q, attention.norm_q)
    key = project(attention.k, attention.norm_k)
    value = attention.v(x).unflatten(-1, (N, D))
    return attention.o(attend(query, key, value).flatten(2))


def _pays(attention: nn.Module, x: Tensor, in_training: bool) -> bool:
    """Return whether one pass is faster here: as a kernel, and not in another's training."""
    is_trained = torch.is_grad_enabled() or getattr(comfy.model_management, "in_training", False)
    if is_trained and not in_training:
        return False
    return BACKEND != "auto" or is_norm_rotary_fused(x.device, attention.head_dim, x.dtype)


def _is_known(attention: nn.Module) -> bool:
    norms = attention.norm_q, attention.norm_k
    are_norms = all(isinstance(norm, nn.RMSNorm) and norm.eps is not None for norm in norms)
    return are_norms and _is_known_forward(type(attention).forward)


@torch.compiler.assume_constant_result
def _is_known_forward(forward: Callable[..., Any]) -> bool:
    rotate = getattr(forward, "__globals__", {}).get("apply_rope1")
    return _is_known_code(forward, rotate)


@functools.cache
def _is_known_code(forward: Callable[..., Any], rotate: Any) -> bool:
    """Return whether a forward is what `run_fused` computes; say it once if it is not."""
    try:
        # Of the code itself: asked for a function, Python looks through what another pack wraps.
        source = inspect.getsource(forward.__code__)
    except (AttributeError, OSError):
        source = ""
    is_rotation = rotate is comfy.ldm.flux.math.apply_rope1
    if is_rotation and hashlib.sha256(source.encode()).hexdigest() in _KNOWN_FORWARDS:
        return True
    logger.info(
        "LinVideo: this ComfyUI's Wan attention is not the one that LinVideo knows; its linear "
        "layers keep the norm and rotation of ComfyUI, which takes a little longer"
    )
    return False


FAMILY = HostFamily(
    name="wan",
    attention_module="comfy.ldm.wan.model",
    attention_class="WanSelfAttention",
    find_joining_inputs=find_joining_inputs,
    run_fused=run_fused,
)
