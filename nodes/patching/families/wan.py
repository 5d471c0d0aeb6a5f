"""Wan as ComfyUI computes it: every variant but the causal one and Animate 2 shares one class.

Its norm and rotation of queries and keys run in one pass each: pass by pass, as in the class's own
forward, they would cost more than linear attention. Ours is taken where it pays and where it gave
the same as the class's own forward for a few tokens, tried once a process; else that forward runs.
"""

import functools
import logging
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.flux.math import rope
from torch import Tensor, nn

from ....linvideo_core.kernels import is_norm_rotary_fused, norm_rotary
from ....linvideo_core.kernels.tiles import TokenGrid
from ..attention_override import Attend, run_answered
from . import HostFamily

BACKEND = "auto"
"""`norm_rotary`'s backend: "auto" leaves all to the class's own forward where no kernel runs."""

# Of the norm of the queries, keys, values or output that both ways give for a few tokens.
_MAX_DIFFERENCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
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

# Their references are frames before the video's.
_REFERENCE_FRAMES = ("SCAILWanModel", "SCAIL2WanModel")

logger = logging.getLogger(__name__)


def find_joining_inputs(diffusion_model: nn.Module, inputs: Collection[str]) -> list[str]:
    """Return the inputs whose tokens stand in the sequence beside those of the video."""
    joining = _JOINING + _JOINING_BY_CLASS.get(type(diffusion_model).__name__, ())
    if getattr(diffusion_model, "ref_conv", None) is not None:
        joining += ("reference_latent",)
    return [name for name in joining if name in inputs]


def find_grid(
    diffusion_model: nn.Module, size: tuple[int, ...], inputs: Mapping[str, Any]
) -> TokenGrid:
    """Return where the video's tokens lie, frames that join it among them; see `HostFamily`."""
    patch_size, (F, *sides), before = diffusion_model.patch_size, size, 0
    behind = set(find_joining_inputs(diffusion_model, inputs))
    in_frames = {"time_dim_concat"}
    if type(diffusion_model).__name__ in _REFERENCE_FRAMES:
        in_frames.add("reference_latent")
    elif getattr(diffusion_model, "ref_conv", None) is not None and "reference_latent" in behind:
        behind.remove("reference_latent")
        lengths = zip(inputs["reference_latent"].shape[-2:], patch_size[1:], strict=True)
        before = math.prod(length // patch for length, patch in lengths)
    F += sum(inputs[name].shape[2] for name in in_frames & behind)
    grid = tuple(-(-n // patch) for n, patch in zip((F, *sides), patch_size, strict=True))
    return TokenGrid(grid, before=before, after=None if behind - in_frames else 0)


def run_fused(
    attention: nn.Module,
    attend: Attend,
    x: Tensor,
    *args: Any,
    transformer_options: Mapping[str, Any],
    in_training: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Return what `WanSelfAttention.forward` gives, or None where only itself can compute it.

    x: [B, L, N D]. The others are the forward's own; of them `freqs` is [1, L, 1, D/2, 2, 2].
    in_training: also where a gradient is wanted, which the kernels have.
    """
    freqs = kwargs.get("freqs", args[0] if args else None)
    is_plain = len(args) + len(kwargs) == 1 and isinstance(freqs, Tensor)
    if not (is_plain and _pays(attention, x, in_training) and _has_norms(attention)):
        return None
    D = attention.head_dim
    if freqs.shape != (1, x.shape[1], 1, D // 2, 2, 2) or freqs.dtype != torch.float32:
        return None
    # It is given the queries and keys of the class's own forward.
    if "attn1_patch" in transformer_options.get("patches", {}):
        return None
    kind = type(attention)
    if not _agrees(kind, kind.forward, D, x.device, x.dtype, BACKEND):
        return None
    return _run_in_one_pass(attention, attend, x, freqs)


def _run_in_one_pass(attention: nn.Module, attend: Attend, x: Tensor, freqs: Tensor) -> Tensor:
    N, D = attention.num_heads, attention.head_dim
    # A rotation matrix is (cos, -sin), (sin, cos): its first column, in place.
    rotary = freqs[0, :, 0, :, :, 0].movedim(-1, 0)

    def project(linear: nn.Module, norm: nn.Module) -> Tensor:
        projected = linear(x)
        # Only through its forward: the host may keep the weight elsewhere, in another dtype.
        weight = norm(projected.new_full((1, 1, projected.shape[2]), _CONSTANT)).flatten()
        return norm_rotary(projected, weight, rotary, N, eps=norm.eps, backend=BACKEND)

    # No name holds queries, keys and values while the output is projected: with all layers linear,
    # an allocator that never joins its chunks would be left with holes of their size.
    attended = attend(
        project(attention.q, attention.norm_q),
        project(attention.k, attention.norm_k),
        attention.v(x).unflatten(-1, (N, D)),
    )
    return attention.o(attended.flatten(2))


def _pays(attention: nn.Module, x: Tensor, in_training: bool) -> bool:
    """Return whether one pass is faster here: as a kernel, and not in another's training."""
    is_trained = torch.is_grad_enabled() or comfy.model_management.in_training
    if is_trained and not in_training:
        return False
    return BACKEND != "auto" or is_norm_rotary_fused(x.device, attention.head_dim, x.dtype)


def _has_norms(attention: nn.Module) -> bool:
    norms = attention.norm_q, attention.norm_k
    return all(isinstance(norm, nn.RMSNorm) and norm.eps is not None for norm in norms)


@torch.compiler.assume_constant_result
def _agrees(kind: type[nn.Module], forward: Callable[..., Tensor], *case: Any) -> bool:
    # What another pack puts in the place of either function is tried anew.
    code = forward, getattr(forward, "__globals__", {}).get("apply_rope1")
    return _agrees_once(kind, code, *case)


@functools.cache
def _agrees_once(
    kind: type[nn.Module],
    code: tuple[Any, ...],
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
) -> bool:
    """Return whether one pass gives what the class's own forward does; say it once.

    code, backend: what is tried; another is another case.
    """
    try:
        difference = _compare(kind, head_dim, device, dtype)
    except Exception as error:
        # ComfyUI may have changed in any way; its own forward is right in all of them.
        why = f"cannot be tried on a few tokens ({type(error).__name__}: {error})"
    else:
        if difference <= _MAX_DIFFERENCES.get(dtype, 0.0):
            logger.info(
                "LinVideo: norm and rotation of linear layers run in one pass on %s, which gives "
                "what this ComfyUI's Wan attention gives (difference %.0e)",
                device,
                difference,
            )
            return True
        why = f"gives something else for a few tokens (difference {difference:.0e})"
    logger.warning(
        "LinVideo: norm and rotation of linear layers stay ComfyUI's, which takes a little longer: "
        "compared with one pass of both, this ComfyUI's Wan attention %s",
        why,
    )
    return False


@torch.no_grad()
def _compare(
    kind: type[nn.Module], head_dim: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Run a small layer of a class on a few tokens both ways; return the largest difference.

    Differences of queries, keys, values and output, each over its norm. No generator is used but
    an own one: the others are the sampler's.
    """
    L, width = 17, 2 * head_dim
    settings = {"operations": nn, "device": "meta", "dtype": dtype}
    layer = kind(width, 2, operation_settings=settings).to_empty(device=device)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in layer.named_parameters():
        numbers = torch.randn(parameter.shape, generator=generator) / width**0.5
        parameter.copy_(numbers + ("norm" in name))
    # Of many sizes: beside the smallest the norm's epsilon counts.
    x = torch.randn(1, L, width, generator=generator) * torch.logspace(-3, 0, L)[:, None]
    x = x.to(device, dtype)
    freqs = rope(torch.arange(L, device=device)[None], head_dim, 10000.0).float().unsqueeze(2)
    attended: list[tuple[Tensor, ...]] = []

    def attend(*tensors: Tensor) -> Tensor:
        attended.append(tensors)
        return tensors[2]

    own = run_answered(layer, attend, x, freqs, transformer_options={})
    ours = _run_in_one_pass(layer, attend, x, freqs)
    pairs = zip((*attended[0], own), (*attended[1], ours), strict=True)
    differences = [(a.float() - b.float()).norm() / a.float().norm() for a, b in pairs]
    return float(torch.stack(differences).max())


FAMILY = HostFamily(
    name="wan",
    attention_module="comfy.ldm.wan.model",
    attention_class="WanSelfAttention",
    find_joining_inputs=find_joining_inputs,
    find_grid=find_grid,
    of_known_grid=(
        "WanModel",
        "VaceWanModel",
        "CameraWanModel",
        "WanModel_S2V",
        "HumoWanModel",
        "AnimateWanModel",
        "WanDancerModel",
        *_REFERENCE_FRAMES,
    ),
    run_fused=run_fused,
)
