"""A Wan of any size with random weights, as a model and as the teacher of a transfer."""

import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from linvideo_core.kernels.hybrid_reference import initial_weights
from linvideo_core.models.attention import LinearAttention
from linvideo_core.models.attention_sites import AttentionSite
from linvideo_core.models.config import FrozenConfig, LinearForm
from linvideo_core.models.quantized import place
from linvideo_core.models.wan import WanModel
from linvideo_core.run.files import write_tensors
from linvideo_core.teacher.config import TrajectoryConfig
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.teacher.trajectories import Trajectories

from .sizes import GUIDANCE_SCALE, VIDEO_STEPS, Size

_NUM_STATES, _NUM_PROMPTS = 8, 4


def make_random_wan(size: Size, device: str, dtype: torch.dtype) -> WanModel:
    """Return a frozen model whose parameters never existed elsewhere or in another dtype."""
    with torch.device("meta"):
        model = WanModel(size.config)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    fill_random(model.named_parameters())
    return model


def make_frozen_wan(size: Size, device: str, frozen_weights: FrozenConfig) -> WanModel:
    """Return a frozen model with its weights in the form that `frozen_weights` names.

    They are drawn and rounded on the device, one at a time; blocks to be offloaded are on the CPU.
    """
    with torch.device("meta"):
        model = WanModel(size.config)
    drawn = [(name, parameter.shape) for name, parameter in model.named_parameters()]
    for part, group in itertools.groupby(drawn, key=lambda item: item[0].split(".")[:2]):
        for name, shape in group:
            value = torch.empty(shape, device=device)
            fill_random([(name, value)])
            place(model, name, value, frozen_weights.frozen)
        if part[0] == "blocks" and int(part[1]) < frozen_weights.offload_blocks:
            model.get_submodule(".".join(part)).cpu()
    return model.requires_grad_(False).eval()


@torch.no_grad()
def fill_random(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Overwrite parameters in place; what a name gets depends on the name alone.

    Matrices keep the scale of what they multiply, norms are near 1; nothing is zero, because
    multiplying zeros takes less power, and so less time, than real weights do.
    """
    for name, parameter in parameters:
        generator = torch.Generator(parameter.device)
        generator.manual_seed(_seed_of(name))
        if name.endswith("modulation"):
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        elif parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            mean, std = (1.0, 0.1) if name.endswith("weight") else (0.0, 0.02)
            parameter.normal_(mean, std, generator=generator)


def make_random_maps(layer: int, heads: int, head_dim: int, device: str) -> list[Tensor]:
    """Return a layer's random maps of queries and keys, [N, D, D/2] bf16 each: D features."""
    maps = []
    for side in ("query", "key"):
        generator = torch.Generator(device).manual_seed(_seed_of(f"{layer}.{side}"))
        size = (heads, head_dim, head_dim // 2)
        drawn = torch.randn(size, generator=generator, device=device) * head_dim**-0.75
        maps.append(drawn.to(torch.bfloat16))
    return maps


def make_random_linear(site: AttentionSite, form: LinearForm, device: str) -> LinearAttention:
    """Return a frozen linear layer of D features in a form of its own, as it may be when trained.

    Maps are in bf16. What a hybrid layer learns besides is in fp32, and nothing of it is zero.
    """
    N, D = site.num_heads, site.head_dim
    with torch.device("meta"):
        linear = LinearAttention(N, D, D, form)
    maps = make_random_maps(site.layer, N, D, device)
    weights = dict(zip(("query_map", "key_map"), maps, strict=True))
    if form.tile:
        for name, start in initial_weights(form.attention_mass, N, D).items():
            generator = torch.Generator(device).manual_seed(_seed_of(f"{site.layer}.{name}"))
            moved = 0.1 * torch.randn(start.shape, generator=generator, device=device)
            weights[name] = start.to(device) + moved
    linear.load_state_dict(weights, assign=True)
    return linear.requires_grad_(False)


def draw_inputs(size: Size, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return random latents [1, C, F, H, W] and two prompts [1, S, text_dim], fp32."""
    settings = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    latents = torch.randn(1, *size.latent_shape, **settings)
    prompt, negative = (
        torch.randn(1, size.prompt_tokens, size.config.text_dim, **settings) for _ in range(2)
    )
    return latents, prompt, negative


def count_bytes(modules: Iterable[nn.Module]) -> int:
    """Return the bytes of modules' parameters, each counted once."""
    parameters = {id(x): x for module in modules for x in module.parameters()}
    return sum(x.numel() * x.element_size() for x in parameters.values())


def make_random_teacher(size: Size, device: str, frozen_weights: FrozenConfig) -> Teacher:
    """Return a frozen teacher of random weights with random prompts, on a device."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (_NUM_PROMPTS + 1, size.prompt_tokens, size.config.text_dim)
    embeds = torch.randn(shape, generator=generator, device=device)
    teacher = Teacher(
        name=f"random {size.model}",
        model=make_frozen_wan(size, device, frozen_weights),
        prompts=[f"prompt {i}" for i in range(_NUM_PROMPTS)],
        prompt_embeds=embeds[:-1],
        negative_embeds=embeds[-1],
        latent_shape=size.latent_shape,
        decode=lambda latents: latents.mean(dim=1),
        is_demo=False,
        offload_blocks=frozen_weights.offload_blocks,
    )
    return teacher.to(device)


def draw_states(size: Size, path: Path) -> Trajectories:
    """Write the file of a video of random states and open it, as a teacher's."""
    config = TrajectoryConfig(
        num_trajectories=1,
        states_per_trajectory=_NUM_STATES,
        sampler_steps=VIDEO_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        shift=size.shift,
    )
    generator = torch.Generator().manual_seed(0)
    shape = (_NUM_STATES, *size.latent_shape)
    states = {
        name: torch.randn(shape, generator=generator).half()
        for name in ("latents", "conditional", "unconditional")
    }
    step = torch.linspace(0, VIDEO_STEPS - 1, _NUM_STATES).long()
    write_tensors(path, {**states, "step": step, "prompt": torch.zeros((), dtype=torch.int64)})
    return Trajectories([path], config)


def _seed_of(name: str) -> int:
    digest = hashlib.blake2b(f"0 {name}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
