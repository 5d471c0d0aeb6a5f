"""Wan as ComfyUI computes it: every variant but the causal one and Animate 2 shares one class."""

from collections.abc import Collection

from torch import nn

from .host_family import HostFamily
from .wan_fused import run_fused

# Any variant takes these; Phantom's teachers come as the first, other references as the second.
_JOINING = ("time_dim_concat", "context_latents")
_JOINING_BY_CLASS = {
    "WanModel_S2V": ("reference_latent", "reference_motion"),
    "HumoWanModel": ("reference_latent",),
    "SCAILWanModel": ("reference_latent", "pose_latents"),
    "SCAIL2WanModel": ("reference_latent", "pose_latents"),
}


def find_joining_inputs(diffusion_model: nn.Module, inputs: Collection[str]) -> list[str]:
    """Return the inputs whose tokens stand in the sequence beside those of the video."""
    joining = _JOINING + _JOINING_BY_CLASS.get(type(diffusion_model).__name__, ())
    if getattr(diffusion_model, "ref_conv", None) is not None:
        joining += ("reference_latent",)
    return [name for name in joining if name in inputs]


FAMILY = HostFamily(
    name="wan",
    attention_module="comfy.ldm.wan.model",
    attention_class="WanSelfAttention",
    find_joining_inputs=find_joining_inputs,
    run_fused=run_fused,
)
