"""Where a model keeps its self-attention, and how another attention is put there and taken out.

A model family is one file that makes a `ModelFamily`; nothing else in the project knows a
family's parameter names.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    """What LinVideo must know of an architecture.

    find_sites: parameter shapes -> the self-attention sites in depth order, empty for a stranger.
    trainable_prefix: parameters under it belong to the transformer's blocks and may be trained.
    """

    name: str
    find_sites: Callable[[Shapes], list[AttentionSite]]
    trainable_prefix: str


def families() -> tuple[ModelFamily, ...]:
    """Return every known family."""
    from . import wan

    return (wan.FAMILY,)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the parameter shapes of a model, the form in which families recognise it."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def identify(shapes: Shapes) -> tuple[ModelFamily, list[AttentionSite]]:
    """Return the family of a model and its sites.

    Raises ValueError when no known family has its layers there.
    """
    for family in families():
        if sites := family.find_sites(shapes):
            return family, sites
    known = ", ".join(family.name for family in families())
    raise ValueError(f"this model has no self-attention layers of a known family (known: {known})")


def fingerprint(family: ModelFamily, sites: list[AttentionSite]) -> str:
    """Describe the architecture that a file fits, in words that an error can show."""
    site = sites[0]
    return f"{family.name}, {len(sites)} layers, {site.num_heads} heads of {site.head_dim}"


def weights_digest(model: nn.Module, sites: list[AttentionSite]) -> str:
    """Return 16 hex digits that tell one set of weights from another of the same architecture."""
    digest = hashlib.blake2b(digest_size=8)
    for site in (sites[0], sites[-1]):
        for parameter in model.get_submodule(site.name).parameters(recurse=True):
            digest.update(parameter.detach().cpu().half().numpy().tobytes())
    return digest.hexdigest()


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


def trainable_weights(
    model: nn.Module, family: ModelFamily, sites: list[AttentionSite]
) -> dict[str, Tensor]:
    """Return the model's own parameters that a transfer may change, without installed attention."""
    installed = tuple(f"{site.name}.attention." for site in sites)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(family.trainable_prefix) and not name.startswith(installed)
    }


def checkpoint_activations(model: nn.Module, sites: list[AttentionSite]) -> None:
    """Recompute each block's activations in the backward pass instead of keeping them."""
    for site in sites:
        block = model.get_submodule(site.name.rpartition(".")[0])
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
