"""LinVideo Linearize between ComfyUI's other model nodes, before it and after it."""

import dataclasses
import functools
import inspect
import unittest
from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention
import comfy.ldm.wan.model
import comfy.model_management
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import torch
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from linvideo_pack.linvideo_core.artifact import Artifact
from linvideo_pack.linvideo_core.flow import make_sigmas
from linvideo_pack.linvideo_core.models.config import LinearForm
from linvideo_pack.nodes import demo as demo_nodes
from linvideo_pack.nodes.patching.apply import linearize
from linvideo_pack.nodes.softmax_backend import LinVideoSoftmaxBackend
from stage import (
    GUIDANCE,
    NUM_TOKENS,
    SHIFT,
    STEPS,
    assert_close,
    bind_headless,
    complaint,
    demo,
    device,
    in_form,
    is_streaming,
    load_headless,
    make_noise,
    merge_lora,
    sample,
    sample_headless,
    shipped,
    short_demo,
    short_file,
    tolerance_of,
    with_lora,
    without_dynamic_memory,
)
from torch import Tensor
from torch._dynamo.utils import counters
from variants import build, make_artifact, random_tensor

_LAYERS = range(10)


def _linearized(model: Any = None) -> Any:
    return linearize(model or demo()[0], shipped())


@functools.cache
def _expected() -> Tensor:
    return sample_headless([bind_headless(load_headless(), shipped())] * STEPS)


@functools.cache
def _maps_in(*layers: int) -> Artifact:
    """The shipped file's maps in other layers, without weight changes."""
    maps = shipped().linear[1]
    header = dataclasses.replace(
        shipped().header,
        linear_layers=layers,
        site_names=tuple(f"blocks.{i}.self_attn" for i in layers),
        parameters="feature_maps",
        lora_rank=0,
    )
    return Artifact(header=header, linear=dict.fromkeys(layers, maps))


def _assert_in_both_orders(node: Callable[[Any], Any], expected: Tensor) -> None:
    """Fail unless a model node gives what is expected before ours and after it."""
    for patcher in (_linearized(node(demo()[0])), node(_linearized())):
        assert_close(sample(patcher), expected)


def test_a_lora_merged_or_bypassed_by_comfyui_is_the_lora_of_merged_weights() -> None:
    model = merge_lora(load_headless())
    expected = sample_headless([bind_headless(model, shipped())] * STEPS)
    before = sample(demo()[0])
    for is_bypassed in (False, True):
        _assert_in_both_orders(functools.partial(with_lora, is_bypassed=is_bypassed), expected)
        assert torch.equal(sample(demo()[0]), before)


def _counting(calls: set[tuple[str, int]]) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kind = "self" if key.shape[1] == NUM_TOKENS else "cross"
        calls.add((kind, kwargs["transformer_options"]["block_index"]))
        return comfy.ldm.modules.attention.attention_basic(query, key, *args, **kwargs)

    return attend


def test_an_attention_backend_serves_every_layer_but_ours() -> None:
    """`set_model_optimized_attention` is all that core's Model Attention Backend does."""
    calls: set[tuple[str, int]] = set()

    def choose_backend(model: Any) -> Any:
        model = model.clone()
        if hasattr(model, "set_model_optimized_attention"):
            model.set_model_optimized_attention(_counting(calls))
        else:  # ComfyUI < 0.32: nodes assign the slot themselves
            backend = _counting(calls)
            options = model.model_options["transformer_options"]
            options["optimized_attention_override"] = lambda _, *args, **kws: backend(*args, **kws)
        return model

    _assert_in_both_orders(choose_backend, _expected())
    softmax = set(_LAYERS) - set(shipped().header.linear_layers)
    assert calls == {("self", i) for i in softmax} | {("cross", i) for i in _LAYERS}


def _with_softmax(backend: str, model: Any) -> Any:
    return LinVideoSoftmaxBackend.execute(model, {"backend": backend}).result[0]


def test_the_softmax_backend_computes_every_self_attention_but_ours() -> None:
    """A kernel that is not there, or not in this dtype, no linear layer and no prompt asks for."""
    dtype = demo()[0].model.get_dtype_inference()
    linear = linearize(demo()[0], _maps_in(*_LAYERS))
    for backend, kernel in {"FlashAttention": "flash", "cuDNN": "cudnn"}.items():
        choose = functools.partial(_with_softmax, backend)
        is_half, is_cpu = dtype != torch.float32, device().type == "cpu"
        if is_half or (is_cpu and kernel == "flash"):
            _assert_in_both_orders(choose, _expected())
            continue
        refused = complaint(ValueError, sample, choose(_linearized()))
        what = f"{kernel} attention cannot compute float32 with head dim 128 on {device()};"
        assert what in refused, refused
        assert torch.equal(sample(choose(linear)), sample(linear))


def test_the_fastest_exact_kernel_changes_nothing_but_rounding() -> None:
    _assert_in_both_orders(functools.partial(_with_softmax, "auto"), _expected())


def test_a_backend_chosen_last_wins_over_one_chosen_before_ours() -> None:
    """As without LinVideo: core replaces the slot, and ours never occupies it."""
    first, last = set(), set()
    model = demo()[0].clone()
    options = model.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda _, *args, **kws: _counting(first)(*args, **kws)
    linearized = _linearized(model)
    assert_close(sample(linearized), _expected())
    assert first
    first.clear()
    options = linearized.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda _, *args, **kws: _counting(last)(*args, **kws)
    assert_close(sample(linearized), _expected())
    assert last and not first


def _in_windows(model: Any) -> Any:
    """Let a model see 3 latent frames at a time, no frame twice."""
    execute = ContextWindowsManualNode.execute
    settings = {"causal_window_fix": False}
    settings = {k: v for k, v in settings.items() if k in inspect.signature(execute).parameters}
    return execute(model, 3, 0, "standard_static", 1, False, "flat", 2, False, **settings).result[0]


def test_context_windows_are_linear_each_by_itself() -> None:
    noise = make_noise(6)
    teacher = bind_headless(load_headless())
    hybrid = in_form(shipped(), LinearForm(tile="2x3x3"))
    for made, num_kept, patchers in (
        (shipped(), 0, (_linearized(_in_windows(demo()[0])), _in_windows(_linearized()))),
        (shipped(), 2, (_in_windows(linearize(demo()[0], shipped(), keep_first_steps=2)),)),
        (hybrid, 2, (_in_windows(linearize(demo()[0], hybrid, keep_first_steps=2)),)),
    ):
        student = bind_headless(load_headless(), made)
        velocities = [teacher] * num_kept + [student] * (STEPS - num_kept)
        halves = [sample_headless(velocities, noise=half) for half in noise.split(3, dim=2)]
        for patcher in patchers:
            assert_close(sample(patcher, noise=noise), torch.cat(halves, dim=2))


def test_blocks_compiled_in_place_compile_once() -> None:
    """As packs did before ComfyUI had a compile node: an object patch for each block."""
    if is_streaming():
        raise unittest.SkipTest("--novram brings weights to compiled blocks in ComfyUI's own ways")
    kept = linearize(short_demo(), short_file(), keep_first_steps=1)
    expected = sample(kept)
    compiled = _compile_in_place(without_dynamic_memory(kept), 1, 2)
    before = counters["stats"]["unique_graphs"]
    assert_close(sample(compiled), expected)
    num_graphs = counters["stats"]["unique_graphs"]
    assert_close(sample(compiled), expected)
    assert counters["stats"]["unique_graphs"] == num_graphs == before + 4
    assert not counters["graph_break"], counters["graph_break"]


def test_blocks_compiled_in_place_never_lose_weight_changes_unheard() -> None:
    model = without_dynamic_memory(demo()[0])
    compiled = _compile_in_place(_linearized(model), 1)
    assert "TorchCompileModel" in complaint(RuntimeError, sample, compiled)
    # Applied anew while such a model is loaded, it finds every weight.
    comfy.model_management.load_models_gpu([_compile_in_place(model, 1)])
    assert_close(sample(_linearized(model)), _expected(), tolerance_of(model))


def _compile_in_place(model: Any, *layers: int) -> Any:
    model = model.clone()
    for layer in layers:
        name = f"diffusion_model.blocks.{layer}"
        block = torch.compile(model.get_model_object(name), backend="aot_eager")
        model.add_object_patch(name, block)
    return model


def _sample_in_two(high: Any, low: Any) -> Tensor:
    """Sample half of the steps with each model, as Wan 2.2's two experts are."""
    _, positive, negative, _ = demo()
    sigmas = torch.as_tensor(make_sigmas(STEPS, SHIFT))
    latents = torch.zeros_like(make_noise())
    for model, part in ((high, sigmas[:3]), (low, sigmas[2:])):
        noise = make_noise() if model is high else torch.zeros_like(latents)
        sampler = comfy.samplers.sampler_object("euler")
        latents = comfy.sample.sample_custom(
            model, noise, GUIDANCE, sampler, part, positive, negative, latents, disable_pbar=True
        )
    return latents


def test_two_experts_have_a_file_each() -> None:
    first = bind_headless(load_headless(), shipped())
    second = bind_headless(load_headless(), _maps_in(0, 7))
    expected = sample_headless([first, first, second, second])
    for other in (demo()[0], demo_nodes.load_demo_model()):
        high, low = linearize(demo()[0], shipped()), linearize(other, _maps_in(0, 7))
        assert_close(_sample_in_two(high, low), expected)


def test_vace_with_a_lora_is_vace_of_merged_weights() -> None:
    sizes = {"dim": 128, "ffn_dim": 256, "num_heads": 1, "num_layers": 4}
    config = {**sizes, "vace_layers": 2, "vace_in_dim": 96}
    vace, merged = (build("comfy.ldm.wan.model", "VaceWanModel", config) for _ in range(2))
    file, lora = make_artifact(vace), {}
    for name in ("blocks.0.self_attn.q", "vace_blocks.1.self_attn.v", "blocks.3.ffn.0"):
        weight = merged.model.diffusion_model.get_parameter(f"{name}.weight")
        up, down = 0.1 * random_tensor(len(weight), 4), 0.1 * random_tensor(4, 128, seed=2)
        lora |= {f"diffusion_model.{name}.lora_up.weight": up}
        lora |= {f"diffusion_model.{name}.lora_down.weight": down}
        weight.data += (0.7 * up @ down).to(weight)

    def with_its_lora(model: Any) -> Any:
        return comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0)[0]

    expected = sample(linearize(merged, file))
    assert not torch.allclose(sample(linearize(vace, file)), expected, atol=1e-3)
    for patcher in (with_its_lora(linearize(vace, file)), linearize(with_its_lora(vace), file)):
        assert_close(sample(patcher), expected)
