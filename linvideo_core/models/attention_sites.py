"""Where a model keeps its self-attention, and how another attention is put there and taken out.

A model family is one file that makes a `ModelFamily`, see `families`; nothing else in the project
knows a family's parameter names.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import MixedAttention, SoftmaxAttention
from .lora import LowRank, switched

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One self-attention layer: its place in the depth, the module's name, its heads."""

    layer: int
    name: str
    num_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class ModelFamily:
    """What LinVideo must know of an architecture; `families` says how one is added.

    find_sites: parameter shapes -> the self-attention sites in depth order, empty for a model of
        another family.
    trainable_prefix: parameters under it belong to the transformer's blocks and may be trained.
    frozen_parts: parts of names under it that are never trained.
    feed_forward: the weight of a block that widens tokens [wide, dim], for memory estimates.
    prompts: the weight that takes prompts [dim, text_dim]; "" where there is no single one.
    sketched: linear layers of a site whose weights go into `base_weights.sketch`.
    """

    name: str
    find_sites: Callable[[Shapes], list[AttentionSite]]
    trainable_prefix: str
    feed_forward: str
    sketched: tuple[str, ...]
    frozen_parts: tuple[str, ...] = ()
    prompts: str = ""

    def trainable(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Return the shapes of those parameters that may be trained."""
        return {
            name: shape
            for name, shape in shapes.items()
            if name.startswith(self.trainable_prefix) and not self.is_frozen(name)
        }

    def is_frozen(self, name: str) -> bool:
        """Return whether a parameter or a module is never trained, though its block is."""
        return any(part in name for part in self.frozen_parts)


def match_sites(
    shapes: Shapes, pattern: str, measure: Callable[[str], tuple[int, int] | None]
) -> list[AttentionSite]:
    """Return the sites whose module's name matches, in depth order.

    pattern: of a module's name, its group the layer's number: r"blocks\\.(\\d+)\\.attn".
    measure: module's name -> its heads and their width; None for what is no site.
    """
    names = dict.fromkeys(name.rpartition(".")[0].rpartition(".")[0] for name in shapes)
    found = [(int(match[1]), name) for name in names if (match := re.fullmatch(pattern, name))]
    measured = [(layer, name, measure(name)) for layer, name in sorted(found)]
    return [AttentionSite(layer, name, *heads) for layer, name, heads in measured if heads]


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the parameter shapes of a model, the form in which families recognise it."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def fingerprint(family: ModelFamily, sites: list[AttentionSite]) -> str:
    """Describe the architecture that a file fits, in words that an error can show."""
    site = sites[0]
    return f"{family.name}, {len(sites)} layers, {site.num_heads} heads of {site.head_dim}"


def install(
    model: nn.Module, sites: list[AttentionSite], make: Callable[[AttentionSite], nn.Module]
) -> dict[int, nn.Module]:
    """Put `make(site)` in the place of each site's attention.

    Returns the modules that stood there, by layer, for `restore`.
    """
    originals = {}
    for site in sites:
        owner = model.get_submodule(site.name)
        originals[site.layer] = owner.attention
        owner.attention = make(site)
    return originals


def restore(
    model: nn.Module, sites: list[AttentionSite], originals: Mapping[int, nn.Module]
) -> None:
    """Undo `install`."""
    for site in sites:
        model.get_submodule(site.name).attention = originals[site.layer]


def attention_at(model: nn.Module, site: AttentionSite) -> nn.Module:
    """Return the attention module that stands at a site."""
    return model.get_submodule(site.name).attention


@contextlib.contextmanager
def softmax_by(
    model: nn.Module,
    sites: list[AttentionSite],
    kernel: str,
    density: float,
    *,
    max_timestep: float | None = None,
) -> Iterator[None]:
    """Let a kernel compute those sites that are softmax, while the context lasts.

    kernel, density: see `kernels.softmax.softmax_attention`.
    max_timestep: calls of the model at larger timesteps are computed as before; none: no call is.
    """
    kept = [site for site in sites if isinstance(attention_at(model, site), SoftmaxAttention)]
    originals = install(model, kept, lambda _: SoftmaxAttention(kernel, density))

    def choose(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        is_early = max_timestep is not None and args[1].max() > max_timestep
        for site in kept:
            attention = attention_at(model, site)
            attention.kernel = originals[site.layer].kernel if is_early else kernel

    hook = model.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()
        restore(model, kept, originals)


def trainable_weights(
    model: nn.Module, family: ModelFamily, sites: list[AttentionSite]
) -> dict[str, Tensor]:
    """Return the model's own parameters that a transfer may change, without installed attention."""
    installed = tuple(f"{site.name}.attention." for site in sites)
    parameters = {n: p for n, p in model.named_parameters() if not n.startswith(installed)}
    return {name: parameters[name] for name in family.trainable(parameters)}


def blocks(model: nn.Module, sites: list[AttentionSite]) -> list[nn.Module]:
    """Return the transformer blocks that hold the sites, in depth order."""
    return [model.get_submodule(site.name.rpartition(".")[0]) for site in sites]


def adapters_of(module: nn.Module) -> list[nn.Module]:
    """Return the parts of a module that turn a teacher into a student, each with its switch."""
    return [part for part in module.modules() if isinstance(part, MixedAttention | LowRank)]


def checkpoint_activations(model: nn.Module, sites: list[AttentionSite]) -> None:
    """Recompute each block's activations in the backward pass instead of keeping them."""
    for block in blocks(model, sites):
        block.forward = functools.partial(_checkpointed, block, block.forward)


def _checkpointed(
    block: nn.Module, forward: Callable[..., Tensor], /, *args: Any, **kwargs: Any
) -> Tensor:
    """Run a block, which is recomputed with those adapters on that are on now."""

    def make_contexts() -> tuple[contextlib.AbstractContextManager, ...]:
        now = {adapter: adapter.enabled for adapter in adapters_of(block)}
        return contextlib.nullcontext(), switched(now)

    # Compiled code has its adapters built in.
    options = {} if torch.compiler.is_compiling() else {"context_fn": make_contexts}
    return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)


@contextlib.contextmanager
def compiled_blocks(models: Iterable[nn.Module], sites: list[AttentionSite]) -> Iterator[None]:
    """Compile the blocks of some models while the context lasts; alike blocks share their code."""
    compiled = {
        block: block.__dict__.get("forward") for model in models for block in blocks(model, sites)
    }
    # One entry a kind of attention, batch size and gradient mode: more than the default of 8.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)
    for block in compiled:
        block.forward = torch.compile(block.forward, dynamic=False)
    try:
        yield
    finally:
        for block, forward in compiled.items():
            del block.forward
            if forward is not None:
                block.forward = forward
