"""How a module's forward is replaced while a model is at work, and given back.

The part of ours that a module uses and what stood in its place before lie in the module's
`__dict__`: as attributes they would become part of the user's model.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

_PART, _FORWARD, _PREVIOUS = "_linvideo_part", "_linvideo_forward", "_linvideo_previous"


class Part(nn.Module):
    """What a replaced forward computes with; while it rests, its module is as it was before."""

    def __init__(self) -> None:
        super().__init__()
        self.is_resting = False


def replace_forward(module: nn.Module, function: Callable[..., Any], part: Part) -> None:
    """Let a module compute `function(module, ...)`, which finds its part with `part_of`.

    function: for one module always the same.
    """
    fields = module.__dict__
    fields[_PART] = part
    if "forward" in fields:
        fields[_PREVIOUS] = fields["forward"]
    # One bound method for the module's life: torch.compile takes a new one for new code.
    fields["forward"] = fields.setdefault(_FORWARD, MethodType(function, module))


def restore_forward(module: nn.Module) -> None:
    """Undo `replace_forward`, wherever it was done; what is not ours stays."""
    fields = module.__dict__
    if _FORWARD not in fields:
        return
    fields.pop(_PART, None)
    previous = fields.pop(_PREVIOUS, None)
    if fields.get("forward") is fields[_FORWARD]:
        del fields["forward"]
        if previous is not None:
            fields["forward"] = previous


def part_of(module: nn.Module) -> Part | None:
    """Return the part that a module computes with, resting or not: none when it is taken away."""
    return module.__dict__.get(_PART)


def call_previous(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Compute a module as it was before its forward was replaced."""
    previous = module.__dict__.get(_PREVIOUS)
    if previous is not None:
        return previous(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs)
