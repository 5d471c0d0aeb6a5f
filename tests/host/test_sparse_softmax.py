"""LinVideo Softmax Backend's sparse attention: in which layers and steps, beside which nodes."""

import functools
import unittest
from types import SimpleNamespace
from typing import Any

import comfy.nested_tensor
import test_sparse_attention as core_node
import torch
from linvideo_pack.linvideo_core.kernels.softmax import why_not_sparse
from linvideo_pack.nodes.patching.apply import linearize
from linvideo_pack.nodes.patching.families.minimax_h3 import find_sinks
from linvideo_pack.nodes.patching.injection import KEY
from linvideo_pack.nodes.softmax_backend import SPARSE, LinVideoSoftmaxBackend
from stage import assert_close, complaint, demo, device, needs_cpu, sample, shipped
from torch import Tensor
from variants import build, make_artifact, minimax_h3, random_tensor

_LAYERS = range(10)
_USUAL = {"density": 0.1, "start_percent": 0.0, "end_percent": 1.0, "dense_layers": ""}


def _is_there() -> None:
    needs_cpu("fp32 has no sparse kernel on a GPU")
    if reason := why_not_sparse(device(), 128, torch.float32):
        raise unittest.SkipTest(f"needs sparse attention: {reason}")


def _sparse(model: Any, **settings: Any) -> Any:
    backend = {"backend": SPARSE, **_USUAL, **settings}
    return LinVideoSoftmaxBackend.execute(model, backend).result[0]


def _list(layers: Any) -> str:
    return ", ".join(map(str, layers))


def _linearized(model: Any) -> Any:
    return linearize(model, shipped())


def test_it_serves_the_layers_that_are_left_softmax_and_all_where_there_is_no_file() -> None:
    _is_there()
    plain, linear = sample(demo()[0]), sample(_linearized(demo()[0]))
    assert_close(sample(_sparse(demo()[0], density=1.0)), plain)
    assert "0 to 9" in complaint(ValueError, _sparse, demo()[0], dense_layers="8-10")
    assert torch.equal(sample(_sparse(demo()[0], dense_layers=_list(_LAYERS))), plain)
    chosen = shipped().header.linear_layers
    softmax = [layer for layer in _LAYERS if layer not in chosen]
    for dense_layers, is_changed in ((chosen, True), (softmax, False)):
        choose = functools.partial(_sparse, dense_layers=_list(dense_layers))
        before = sample(_linearized(choose(demo()[0])))
        assert torch.equal(sample(choose(_linearized(demo()[0]))), before)
        assert torch.equal(before, linear) != is_changed
        assert not torch.equal(sample(choose(demo()[0])), plain)


def test_it_begins_and_ends_where_it_is_told() -> None:
    _is_there()

    def watch(model: Any) -> list[Tensor]:
        seen: list[Tensor] = []
        sample(model, steps=8, on_step=lambda step, denoised, *_: seen.append(denoised.clone()))
        return seen

    plain = watch(demo()[0])
    for start, end, first in ((0.0, 1.0, 0), (0.5, 1.0, 4), (0.0, 0.01, 0), (0.99, 1.0, 8)):
        found = watch(_sparse(demo()[0], start_percent=start, end_percent=end))
        alike = [torch.equal(a, b) for a, b in zip(found, plain, strict=True)]
        assert alike == [True] * first + [False] * (8 - first), (start, end, alike)
    late = _linearized(_sparse(demo()[0], start_percent=0.5))
    watch(late)
    assert "sparse attention, 10%" in late.get_attachment(KEY).times[0]


def test_what_it_cannot_do_is_refused_in_a_sentence() -> None:
    model = demo()[0]
    if device().type == "cpu" and (reason := why_not_sparse(device(), 128, torch.float32)):
        refused = complaint(ValueError, _sparse, model)
        assert reason in refused and "comfy-kitchen>=0.2.40" in refused, refused
    for settings, words in (
        ({"density": 0.0}, "density 0.0 given"),
        ({"density": 1.5}, "density 1.5 given"),
        ({"start_percent": 0.5, "end_percent": 0.5}, "start_percent 0.5 and end_percent 0.5"),
        ({"dense_layers": "first"}, "dense_layers 'first' given"),
        ({"dense_layers": "5-3"}, "dense_layers '5-3' given"),
        ({"dense_layers": "0-99999999999"}, "dense_layers '0-99999999999' given"),
    ):
        assert words in complaint(ValueError, _sparse, model, **settings)


def test_minimax_h3_keeps_what_is_not_video_exact_as_comfyuis_node_does() -> None:
    _is_there()
    streams = [random_tensor(1, 24, 7, 16, 16), random_tensor(1, 32, 2, 100)]
    noise, patcher = comfy.nested_tensor.NestedTensor(streams), minimax_h3()[0]
    draw = functools.partial(core_node._sample, noise=noise, width=40)
    if core_node.code is None:
        assert "update ComfyUI to 0.35" in complaint(RuntimeError, draw, _sparse(patcher))
        return
    plain = draw(patcher)
    assert core_node._difference(draw(_sparse(patcher, density=1.0)), plain) < 1e-4
    sparse = draw(_sparse(patcher))
    assert core_node._difference(sparse, plain) > 1e-4
    file = make_artifact(patcher)
    both = draw(_sparse(linearize(patcher, file)))
    assert all(map(torch.equal, draw(linearize(_sparse(patcher), file)), both))
    patch = core_node.code.SparseAttnPatch(*[None] * 7, "exact_kv_and_rows", 0, False)
    for segments in (
        [(0, 70, "text"), (70, 300, "audio"), (300, 900, "video")],
        [(0, 70, "text"), (70, 900, "video")],
    ):
        layout = SimpleNamespace(segments=segments, seq_len=900)
        options = {"minimax_h3_layout": layout}
        sinks = find_sinks(options, 900)
        assert (sinks["sink_blocks"], sinks["sink_q"]) == patch.sinks(options, 900)


def test_comfyuis_own_node_before_or_after_it_gives_what_ours_gives() -> None:
    _is_there()
    if (code := core_node.code) is None:
        raise unittest.SkipTest("needs ComfyUI >= 0.35.0: Model Sparse Attention")
    patcher = build("comfy.ldm.wan.model", "WanModel", core_node._WAN)
    draw = functools.partial(core_node._sample, noise=random_tensor(1, 16, 3, 32, 32), width=4096)
    kept, code._ineligible = code._ineligible, lambda q, k, *_: None if q.shape == k.shape else "?"
    try:
        window = {"start_percent": 0.0, "end_percent": 1.0, "min_tokens": 0}
        selection = {"selection": "sla", "keep_percent": 30.0}
        put = functools.partial(code.BlockSparseAttention.execute, selection=selection, **window)
        theirs = draw(put(patcher).result[0])
        for model in (put(_sparse(patcher)).result[0], _sparse(put(patcher).result[0])):
            assert all(map(torch.equal, draw(model), theirs))
    finally:
        code._ineligible = kept
    ours, plain = draw(_sparse(patcher, density=0.3)), draw(patcher)
    # The node rounds queries, keys and values to bf16.
    assert core_node._difference(ours, theirs) < core_node._difference(ours, plain) / 10
