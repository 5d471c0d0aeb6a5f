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
from linvideo_pack.nodes.patching.injection import KEY
from stage import (
    as_one_graph,
    collect_warnings,
    complaint,
    sample,
    short_demo,
    short_file,
    without_dynamic_memory,
)
from stage import demo as _demo
from stage import shipped as _shipped
from torch import Tensor

_STEPS = 3


@functools.cache
def _linearized() -> Any:
    return linearize(_demo()[0], _shipped())


def _sample(model: Any, steps: int = _STEPS) -> Tensor:
    return sample(model, steps=steps)


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


def test_blocks_that_another_pack_computes_or_runs_twice_are_noticed() -> None:
    expected = _sample(_linearized())
    first, second, *_, last = _layers()
    block = _blocks()[second]

    def skip(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x

    def twice(*args: Any, **kwargs: Any) -> Tensor:
        type(block).forward(block, *args, **kwargs)
        return type(block).forward(block, *args, **kwargs)

    for layers, forward, said in (
        ([first], skip, f"layer {first} was run 0 times"),
        ([last], skip, f"layer {last} was run 0 times"),
        (range(len(_blocks())), skip, "0 times"),
        ([second], twice, f"layer {second} was run 2 times"),
    ):
        with contextlib.ExitStack() as stack:
            for layer in layers:
                stack.enter_context(_block_forward(layer, forward))
            assert said in complaint(RuntimeError, _sample, _linearized())
    assert torch.equal(_sample(_linearized()), expected)


def test_layers_that_are_not_in_place_are_noticed() -> None:
    model = _linearized().clone()
    model.injections = {}
    assert "not in the model" in complaint(RuntimeError, _sample, model)


def _patched(replacement: Callable[[dict, dict], dict]) -> Any:
    patched = _linearized().clone()
    patched.set_model_patch_replace(replacement, "dit", "double_block", _layers()[0])
    return patched


def test_a_wrapped_block_stays_linear_and_a_skipped_one_is_said_at_every_sampling() -> None:
    expected = _sample(_linearized())
    with collect_warnings(".nodes.patching") as messages:
        wrapped = _patched(lambda args, extra: extra["original_block"](args))
        assert torch.equal(_sample(wrapped), expected) and not messages
        skipping = _patched(lambda args, _: args)
        for num_samplings in (1, 2):
            assert not torch.equal(_sample(skipping), expected)
            assert len(messages) == num_samplings, messages
            assert f"layers {_layers()[0]} were" in messages[-1], messages
    assert f"layers {_layers()[0]} were" in skipping.get_attachment(KEY).text


def test_the_last_blocks_may_be_reused_after_a_whole_call() -> None:
    layer, calls = _layers()[-1], []

    def reuse(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            return x
        return type(_blocks()[layer]).forward(_blocks()[layer], x, *args, **kwargs)

    with collect_warnings(".nodes.patching") as messages, _block_forward(layer, reuse):
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
        runs: list[int] = []
        hook = _blocks()[_layers()[0]].register_forward_hook(lambda *_, runs=runs: runs.append(1))
        try:
            assert _sample(model, steps=8).isfinite().all()
        finally:
            hook.remove()
        assert 0 < len(runs) < 8, runs


def test_skip_layer_guidance_before_or_after_skips_linear_layers() -> None:
    def guided(model: Any, layers: tuple[int, ...]) -> Any:
        settings = {"start_percent": 0.0, "end_percent": 1.0, "single_layers": ""}
        names = ", ".join(map(str, layers))
        node = SkipLayerGuidanceDiT.execute(model, 2.0, double_layers=names, **settings)
        return node.result[0]

    with collect_warnings(".nodes.patching") as messages:
        before = _sample(linearize(guided(_demo()[0], _layers()[:2]), _shipped()))
        assert torch.equal(_sample(guided(_linearized(), _layers()[:2])), before)
    assert len(messages) == 2, messages
    assert not torch.equal(before, _sample(_linearized()))


@as_one_graph
def test_compiled_as_one_graph_a_block_that_another_pack_computes_is_noticed() -> None:
    compiled = without_dynamic_memory(linearize(short_demo(), short_file()))
    set_torch_compile_wrapper(compiled, "aot_eager", fullgraph=True)
    with _block_forward(1, lambda x, *_, **__: x, compiled):
        assert "0 times" in complaint(RuntimeError, _sample, compiled)
