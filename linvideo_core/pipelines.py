"""Apply a LINVIDEO file to a Wan pipeline of diffusers, in one call.

    from diffusers import WanPipeline
    from linvideo_core.pipelines import apply

    pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch_dtype=...)
    applied = apply(pipe, "linearized.safetensors")
    video = pipe(prompt, ...)
    applied.close()

Diffusers itself is not imported: it made the pipeline. Linear layers become attention processors of
its transformer; weight changes are added to the weights in place.
"""

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import artifact
from .artifact import ArtifactError
from .artifact.header import DTYPES
from .kernels import norm_rotary
from .kernels.tiles import TokenGrid
from .models.attention import LinearAttention, SoftmaxAttention
from .models.attention_sites import shapes_of
from .models.checkpoint import from_diffusers
from .models.families import identify


class LinearProcessor(nn.Module):
    """Computes a self-attention of diffusers' Wan by linear attention: an attention processor.

    grid: of the tokens in the transformer's present call, which hybrid layers need.
    """

    grid: TokenGrid | None = None
    # Diffusers sets it where it splits tokens between GPUs.
    _parallel_config = None

    def __init__(self, attention: LinearAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Map hidden_states [B, L, N D] to [B, L, N D].

        attn: diffusers' `WanAttention`, whose projections and norms are used.
        rotary_emb: cos and sin [1, L, 1, D], each number twice in a row.
        """
        if self._parallel_config is not None:
            raise ValueError("a LINVIDEO file does not work with diffusers' context parallelism")
        cos, sin = (x[0, :, 0, ::2].float() for x in rotary_emb)
        rotary = torch.stack([cos, sin])
        query, key = (
            norm_rotary(x, norm.weight, rotary, attn.heads, eps=norm.eps)
            for x, norm in (
                (attn.to_q(hidden_states), attn.norm_q),
                (attn.to_k(hidden_states), attn.norm_k),
            )
        )
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        out = self.attention(query, key, value, self.grid).flatten(2)
        for layer in attn.to_out:
            out = layer(out)
        return out


def apply(
    pipeline: Any,
    path: str | Path,
    *,
    low_noise_path: str | Path | None = None,
    strength: float = 1.0,
) -> contextlib.ExitStack:
    """Make a diffusers Wan pipeline linear, in place, until the result's `close` is called.

    path: LINVIDEO file for `pipeline.transformer`; low_noise_path: for `transformer_2`, the second
        expert of Wan 2.2.
    strength: 0 to 2, scales the weight changes; the feature maps are as trained at any strength.

    After `close` the pipeline is bit for bit what it was, unless others changed the same weights in
    between. LoRAs may be loaded before and after; the pipeline may be moved, also by
    `enable_model_cpu_offload`.
    Raises ArtifactError, leaving the pipeline as it was, where a file does not fit it.
    """
    files = {"transformer": path}
    if low_noise_path is not None:
        files["transformer_2"] = low_noise_path
    with contextlib.ExitStack() as undo:
        for name, file in files.items():
            transformer = getattr(pipeline, name, None)
            if not isinstance(transformer, nn.Module):
                raise ArtifactError(
                    f"{type(pipeline).__name__} has no {name} for {file}: give a Wan pipeline of "
                    "diffusers, and a low-noise file only where it has two transformers"
                )
            _apply_to(transformer, artifact.load(file), strength, undo)
        applied = undo.pop_all()
        # Whoever drops the result keeps the file applied.
        pipeline.transformer.__dict__["_linvideo"] = applied
        applied.callback(pipeline.transformer.__dict__.pop, "_linvideo")
        return applied


def _apply_to(
    transformer: nn.Module, made: artifact.Artifact, strength: float, undo: contextlib.ExitStack
) -> None:
    _check(transformer)
    model = _as_official(transformer)
    undo.enter_context(artifact.apply(made, model, strength=strength))
    attentions = {
        from_diffusers(f"{name}.norm_q").removesuffix(".norm_q"): module
        for name, module in transformer.named_modules()
    }
    processors = []
    for name in made.header.site_names:
        attention = attentions[name]
        undo.callback(attention.set_processor, attention.processor)
        processors.append(LinearProcessor(model.get_submodule(name).attention))
        attention.set_processor(processors[-1])
    if made.header.tile:
        hook = functools.partial(_tell_grid, processors)
        undo.callback(transformer.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _tell_grid(
    processors: Sequence[LinearProcessor],
    transformer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Tell layers of the grid of a call's `hidden_states` [B, C, F, H, W]."""
    latents = args[0] if args else kwargs["hidden_states"]
    sizes = zip(latents.shape[2:], transformer.config.patch_size, strict=True)
    grid = TokenGrid(tuple(length // patch for length, patch in sizes))
    for processor in processors:
        processor.grid = grid


def _check(transformer: nn.Module) -> None:
    """Raise ArtifactError for a transformer in a state that no file can be applied to."""
    modules = list(transformer.modules())
    fault = ""
    if any(isinstance(module, LinearProcessor) for module in modules):
        fault = "has a LINVIDEO file applied already: close that one first"
    elif any(getattr(module, "fused_projections", False) for module in modules):
        fault = "has fused projections: call unfuse_qkv_projections first"
    elif any(p.is_meta or p.dtype not in DTYPES for p in transformer.parameters()):
        fault = (
            "has weights that are quantised or offloaded one by one: load it in bf16, and apply "
            "the file before anything else"
        )
    if fault:
        raise ArtifactError(f"the pipeline's {type(transformer).__name__} {fault}")


def _as_official(transformer: nn.Module) -> nn.Module:
    """Return modules that hold a transformer's own parameters under their official names."""
    model = nn.Module()
    for name, parameter in transformer.named_parameters():
        # A layer with a LoRA of peft's beside it keeps its own weight as its `base_layer`.
        *path, leaf = from_diffusers(name.replace(".base_layer", "")).split(".")
        owner = model
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]
        owner.register_parameter(leaf, parameter)
    with contextlib.suppress(ValueError):  # Applying the file says what the model is instead.
        for site in identify(shapes_of(model))[1]:
            model.get_submodule(site.name).attention = SoftmaxAttention()
    return model
