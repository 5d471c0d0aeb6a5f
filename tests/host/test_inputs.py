"""What a node's inputs take: no number beyond its limits, and no choice that there is not."""

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from comfy_api.latest import io
from linvideo_pack.nodes import NODES
from linvideo_pack.nodes.demo import LinVideoDemoDecode
from stage import complaint, own_folders


def _nodes() -> Iterator[Any]:
    for file, names in NODES.items():
        module = importlib.import_module(f"linvideo_pack.nodes.{file}")
        yield from (getattr(module, name) for name in names)


def _numbers(inputs: list[io.Input]) -> Iterator[tuple[Any, Any]]:
    """Yield every number among inputs, and what makes a node's arguments of a value for it."""
    for each in inputs:
        if isinstance(each, io.Int.Input | io.Float.Input):
            yield each, lambda value, name=each.id: {name: value}
        for option in getattr(each, "options", None) or []:
            if not isinstance(option, io.DynamicCombo.Option):
                continue
            for inner, fill in _numbers(option.inputs):
                chosen = {each.id: option.key}
                yield (
                    inner,
                    lambda value, name=each.id, chosen=chosen, fill=fill: {
                        name: {**chosen, **fill(value)}
                    },
                )


def test_every_number_of_every_node_is_within_its_declared_limits() -> None:
    walked = set()
    with own_folders():
        for node in _nodes():
            for number, fill in _numbers(node.define_schema().inputs):
                walked.add(number.id)
                _check_number(node, number, fill)
    assert walked >= {"strength", "keep_first_steps", "density", "cfg", "seed", "steps", "upscale"}


def _check_number(node: Any, number: Any, fill: Callable[[Any], dict[str, Any]]) -> None:
    is_whole = isinstance(number, io.Int.Input)
    step = 1 if is_whole else 0.01
    beyond = [number.min - step, number.max + step]
    others = [10**400, True, "many", *([1.5] if is_whole else [])]
    for value in [math.nan, math.inf, -math.inf, *beyond, *others]:
        message = complaint(ValueError, node.execute, **fill(value))
        assert message.startswith(f"{number.id} "), message
        assert "given; a" in message and message.endswith(" is needed"), message


def test_a_choice_that_there_is_not_is_answered_with_those_that_are() -> None:
    with own_folders():
        schemas = [(node, node.define_schema().inputs) for node in _nodes()]
        choices = [
            (node, each)
            for node, inputs in schemas
            for each in inputs
            if isinstance(each, io.DynamicCombo.Input)
        ]
        assert [each.id for _, each in choices] == ["mode", "backend"]
        for node, each in choices:
            for given in ({}, {each.id: None}, {each.id: {each.id: "nope"}}):
                message = complaint(ValueError, node.execute, model=None, **given)
                assert all(repr(option.key) in message for option in each.options), message
                assert ("'nope'" in message) == any(given.values()), message


def test_what_other_nodes_give_for_a_number_is_taken() -> None:
    for upscale in (np.int64(2), np.float32(2), 2.0):
        samples = {"samples": np.zeros((1, 4))}
        message = complaint(ValueError, LinVideoDemoDecode.execute, samples, upscale)
        assert "latents of shape" in message, message
