"""What the nodes' schemas share: a category, socket types, how an input is written and checked."""

import functools
import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from comfy_api.latest import io

from ..linvideo_core.run.errors import shown_value
from ..linvideo_core.run.limits import Limits

LinVideo = io.Custom("LINVIDEO")
"""The socket type of a loaded LINVIDEO file, a `linvideo_core.artifact.Artifact`."""

TransferSettings = io.Custom("LINVIDEO_SETTINGS")
"""The socket type of a transfer's settings, a dict of them by name."""


def make_schema(**settings: Any) -> io.Schema:
    """Return the schema of a node in LinVideo's category."""
    return io.Schema(category="LinVideo", **settings)


def make_input(kind: Any, name: str, settings: dict[str, Any], tooltip: str) -> io.Input:
    """Return an input of a kind, such as `io.Int`; settings: further arguments of its `Input`."""
    return kind.Input(name, **settings, tooltip=tooltip)


def checked(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """Let a node's `execute` refuse what its schema does not take; beneath `@classmethod`.

    ComfyUI itself compares only numbers that are written in the graph, and takes NaN for one. A
    dynamic choice that it does not know, as of another version's workflow, it leaves out: the
    parameter of one must have a default.

    The wrapped function raises ValueError, in one sentence.
    """
    names = list(inspect.signature(execute).parameters)[1:]

    @functools.wraps(execute)
    def run(cls: type[io.ComfyNode], *args: Any, **inputs: Any) -> io.NodeOutput:
        given = dict(zip(names, args, strict=False)) | inputs
        _check(cls.define_schema().inputs, given, _written(cls))
        return execute(cls, *args, **inputs)

    return run


def limits_of(number: io.Int.Input | io.Float.Input) -> Limits:
    """Return what a number's input takes: from its `min` to its `max`."""
    low, high = (int(x) if x == int(x) else x for x in (number.min, number.max))
    return Limits(low=low, high=high, is_whole=isinstance(number, io.Int.Input))


def _check(
    inputs: Sequence[io.Input], given: Mapping[str, Any], written: Mapping[str, Any]
) -> None:
    """Raise ValueError for a number or a choice that an input does not take.

    written: what the graph says of the node, where ComfyUI has left a choice out.
    """
    for each in inputs:
        value = given.get(each.id)
        if isinstance(each, io.DynamicCombo.Input):
            _check(_find_option(each, value, written.get(each.id)).inputs, value, {})
        elif isinstance(each, io.Int.Input | io.Float.Input) and value is not None:
            limits = limits_of(each)
            if not limits.takes(_plain(value, is_whole=limits.is_whole)):
                raise ValueError(f"{each.id} {shown_value(value)} given; {limits} is needed")


def _find_option(
    choice: io.DynamicCombo.Input, value: Mapping[str, Any] | None, written: Any
) -> io.DynamicCombo.Option:
    key = value.get(choice.id) if value else written
    for option in choice.options:
        if value and option.key == key:
            return option
    known = ", ".join(repr(option.key) for option in choice.options)
    given = f"no {choice.id} given"
    if key is not None:
        given = f"{choice.id} {shown_value(key, is_quoted=True)} given, which is not known here"
    raise ValueError(f"{given}; one of {known} is needed: choose it anew")


def _plain(value: Any, *, is_whole: bool) -> Any:
    """Return a number as Python's own: other nodes give NumPy's, or a whole one as 4.0."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        value = float(value)
        return int(value) if is_whole and value.is_integer() else value
    return value


def _written(cls: type[io.ComfyNode]) -> Mapping[str, Any]:
    """Return a node's inputs in the graph, as far as its hidden inputs tell them."""
    hidden = getattr(cls, "hidden", None)
    prompt = (hidden and hidden.prompt) or {}
    return prompt.get(str(hidden and hidden.unique_id), {}).get("inputs", {})
