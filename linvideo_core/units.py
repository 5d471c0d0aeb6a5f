"""Modules whose parameters are gathered and freed together, whichever of them runs.

A unit stands beside the models: their own modules stay as they are, but for a `forward` that goes
through the unit, on which whoever shards parameters hangs hooks.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

Owners = list[tuple[nn.Module, str]]
"""The modules that hold one parameter, each with its name there."""


class Unit(nn.Module):
    """Called with a member's number and arguments, runs the forward that the member had before."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.forwards = [member.forward for member in members]

    def take_calls(self) -> None:
        """Let every member's calls go through the unit from now on; see `forwards_kept`."""
        for index, member in enumerate(self.members):
            member.forward = functools.partial(self, index)

    def forward(self, member: int, *args: Any) -> Tensor:
        """Run one member."""
        # FSDP2 hangs a hook on the output, which a view would lose when it is written into.
        out = self.forwards[member](*args)
        return out.clone() if out._is_view() else out


@contextlib.contextmanager
def forwards_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Give modules the `forward` back, in the end, that they came with."""
    before = [(module, module.__dict__.get("forward")) for module in modules]
    try:
        yield
    finally:
        for module, forward in before:
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


def group_sharing(modules: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Group modules that share parameters, numbers aside."""
    groups: list[tuple[list[nn.Module], set[nn.Parameter]]] = []
    for module in modules:
        parameters = {p for p in module.parameters() if p.ndim}
        for members, shared in groups:
            if parameters & shared:
                members.append(module)
                shared |= parameters
                break
        else:
            groups.append(([module], parameters))
    return [members for members, _ in groups]


def find_owners(models: Sequence[nn.Module]) -> list[Owners]:
    """Return for each parameter of some models all that hold it, without holding it oneself."""
    owners: dict[int, Owners] = {}
    for module in dict.fromkeys(m for model in models for m in model.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, name))
    return list(owners.values())
