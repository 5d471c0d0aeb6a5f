"""What other nodes may do to a linearized model: never pass its layers over unheard."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from linvideo_pack.nodes.patching.apply import linearize
from linvideo_pack.nodes.patching.model_calls import _warn_of_skipped_blocks
from stage import (
    assert_close,
    collect_warnings,
    complaint,
    sample,
    short_demo,
    short_file,
    tolerance_of,
    without_dynamic_memory,
)
from stage import demo as _demo
from stage import shipped as _shipped
from torch import Tensor
from torch._dynamo.utils import counters

_STEPS = 3


@functools.cache
def _linearized() -> Any:
    return linearize(_demo()[0], _shipped())


def _sample(model: Any, steps: int = _STEPS) -> Tensor:
    return sample(model, steps=steps)


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect warnings: what was said once before is said again."""
    _warn_of_skipped_blocks.cache_clear()
    with collect_warnings(".nodes.patching.model_calls") as messages:
        yield messages


def _layers() -> tuple[int, ...]:
    return _shipped().header.linear_layers


def _blocks() -> Any:
    return _demo()[0].model.diffusion_model.blocks


@contextlib.contextmanager
def _block_forward(layer: int, forward: Callable[..., Tensor], model: Any = None) -> Iterator[None]:
    """Compute a block in another way, as packs do that bring a block's code of their own."""
    block = (model or _demo()[0]).model.diffusion_model.blocks[layer]
    block.forward = forward
    try:
        yield
    finally:
        del block.forward


def test_a_block_that_another_pack_computes_is_noticed() -> None:
    expected = _sample(_linearized())
    for layer in (_layers()[0], _layers()[-1]):
        with _block_forward(layer, lambda x, *_, **__: x):
            message = complaint(RuntimeError, _sample, _linearized())
        assert f"layer {layer} was run 0 times" in message
    assert torch.equal(_sample(_linearized()), expected)


def test_all_blocks_computed_by_another_pack_are_noticed() -> None:
    with contextlib.ExitStack() as stack:
        for layer in range(len(_blocks())):
            stack.enter_context(_block_forward(layer, lambda x, *_, **__: x))
        assert "0 times" in complaint(RuntimeError, _sample, _linearized())


def test_a_layer_that_runs_twice_in_a_call_is_noticed() -> None:
    block = _blocks()[_layers()[1]]

    def twice(*args: Any, **kwargs: Any) -> Tensor:
        type(block).forward(block, *args, **kwargs)
        return type(block).forward(block, *args, **kwargs)

    with _block_forward(_layers()[1], twice):
        assert "2 times" in complaint(RuntimeError, _sample, _linearized())


def test_layers_that_are_not_in_place_are_noticed() -> None:
    model = _linearized().clone()
    model.injections = {}
    assert "not in the model" in complaint(RuntimeError, _sample, model)


def _patched(replacement: Callable[[dict, dict], dict]) -> Any:
    patched = _linearized().clone()
    patched.set_model_patch_replace(replacement, "dit", "double_block", _layers()[0])
    return patched


def test_a_block_that_is_wrapped_stays_linear() -> None:
    with _warnings() as messages:
        wrapped = _patched(lambda args, extra: extra["original_block"](args))
        assert torch.equal(_sample(wrapped), _sample(_linearized()))
    assert not messages


def test_a_block_that_is_skipped_is_said_once() -> None:
    with _warnings() as messages:
        skipped = _patched(lambda args, _: args)
        assert not torch.equal(_sample(skipped), _sample(_linearized()))
    assert len(messages) == 1 and f"layers {_layers()[0]} were" in messages[0], messages


def test_the_last_blocks_may_be_reused_after_a_whole_call() -> None:
    layer, calls = _layers()[-1], []

    def reuse(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            return x
        return type(_blocks()[layer]).forward(_blocks()[layer], x, *args, **kwargs)

    with _warnings() as messages, _block_forward(layer, reuse):
        _sample(_linearized())
    assert len(calls) == _STEPS
    assert len(messages) == 1 and f"layers {layer} were" in messages[0], messages


def test_a_cache_may_reuse_a_call_but_not_begin_with_one() -> None:
    first: list[Tensor] = []

    def reuse(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not first:
            first.append(executor(*args, **kwargs))
        return first[0]

    caching = _linearized().clone()
    caching.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cache", reuse)
    assert not torch.equal(_sample(caching), _sample(_linearized()))
    assert "0 times" in complaint(RuntimeError, _sample, caching)


def test_easycache_before_or_after_reuses_calls() -> None:
    def cached(model: Any) -> Any:
        settings = {"start_percent": 0.1, "end_percent": 0.9, "verbose": False}
        return EasyCacheNode.execute(model, 2.0, **settings).result[0]

    for model in (linearize(cached(_demo()[0]), _shipped()), cached(_linearized())):
        with _runs_of_the_first_linear_layer() as runs:
            latents = _sample(model, steps=8)
        assert 0 < len(runs) < 8, runs
        assert latents.isfinite().all()


@contextlib.contextmanager
def _runs_of_the_first_linear_layer() -> Iterator[list[int]]:
    runs: list[int] = []
    hook = _blocks()[_layers()[0]].register_forward_hook(lambda *_: runs.append(1))
    try:
        yield runs
    finally:
        hook.remove()


def test_skip_layer_guidance_before_or_after_skips_linear_layers() -> None:
    def guided(model: Any, layers: tuple[int, ...]) -> Any:
        settings = {"start_percent": 0.0, "end_percent": 1.0, "single_layers": ""}
        names = ", ".join(map(str, layers))
        node = SkipLayerGuidanceDiT.execute(model, 2.0, double_layers=names, **settings)
        return node.result[0]

    with _warnings() as messages:
        before = _sample(linearize(guided(_demo()[0], _layers()[:2]), _shipped()))
        assert torch.equal(_sample(guided(_linearized(), _layers()[:2])), before)
    assert len(messages) == 1, messages
    assert not torch.equal(before, _sample(_linearized()))


def test_compiled_block_by_block_it_compiles_once() -> None:
    linearized = linearize(short_demo(), short_file())
    expected = _sample(linearized)
    compiled = without_dynamic_memory(linearized)
    keys = [f"diffusion_model.blocks.{i}" for i in range(3)]
    set_torch_compile_wrapper(compiled, "aot_eager", keys=keys)
    num_graphs = []
    for _ in range(2):
        assert_close(_sample(compiled), expected, tolerance_of(compiled))
        num_graphs.append(counters["stats"]["unique_graphs"])
    print(f"{num_graphs[0]} graphs of {len(keys)} blocks")
    assert num_graphs[0] == num_graphs[1] <= len(keys), num_graphs
    assert not counters["graph_break"], counters["graph_break"]


def test_compiled_as_one_graph_a_block_that_another_pack_computes_is_noticed() -> None:
    compiled = without_dynamic_memory(linearize(short_demo(), short_file()))
    set_torch_compile_wrapper(compiled, "aot_eager", fullgraph=True)
    with _block_forward(1, lambda x, *_, **__: x, compiled):
        assert "0 times" in complaint(RuntimeError, _sample, compiled)
