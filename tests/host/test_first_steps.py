"""The first steps that the original model takes.

Expected latents come from the headless core: the teacher's velocity in the kept steps, the
linearized model's in the others.
"""

import contextlib
import dataclasses
import inspect
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from linvideo_pack.linvideo_core.artifact import ArtifactError
from linvideo_pack.nodes.linearize import APPLY, LinVideoLinearize
from linvideo_pack.nodes.model_folder import SHIPPED
from linvideo_pack.nodes.patching.apply import linearize
from stage import (
    STEPS,
    assert_close,
    bind_headless,
    complaint,
    demo,
    fused_in_fp16,
    load_headless,
    merge_lora,
    own_folders,
    sample,
    sample_headless,
    shipped,
    short_demo,
    short_file,
    with_lora,
    without_dynamic_memory,
)
from torch import Tensor
from torch._dynamo.utils import counters


def _keep(num_steps: int, model: Any = None) -> Any:
    return linearize(model or demo()[0], shipped(), keep_first_steps=num_steps)


def _expected(num_kept: int, steps: int = STEPS) -> Tensor:
    teacher = bind_headless(load_headless())
    student = bind_headless(load_headless(), shipped())
    return sample_headless([teacher] * num_kept + [student] * (steps - num_kept))


def test_the_kept_steps_are_the_original_models() -> None:
    for num_kept in (1, 3):
        assert_close(sample(_keep(num_kept)), _expected(num_kept))


def test_what_newer_comfyui_fuses_keeps_the_same_steps() -> None:
    with fused_in_fp16():
        assert_close(sample(_keep(2)), _expected(2))


def test_all_steps_kept_or_none_give_the_bits_of_either_model() -> None:
    expected = sample(demo()[0])
    for num_kept in (STEPS, 1000):
        assert torch.equal(sample(_keep(num_kept)), expected)
    assert torch.equal(sample(_keep(0)), sample(linearize(demo()[0], shipped())))


def test_the_node_takes_the_number_of_steps() -> None:
    mode = {"mode": APPLY, "file": SHIPPED, "strength": 1.0, "keep_first_steps": 2}
    with own_folders():
        linear = LinVideoLinearize.execute(demo()[0], mode).result[0]
    assert_close(sample(linear), _expected(2))


def test_clones_keep_the_same_steps_and_the_model_that_came_in_none() -> None:
    before = sample(demo()[0])
    kept = _keep(2)
    expected = sample(kept)
    assert torch.equal(sample(kept.clone()), expected)
    assert torch.equal(sample(demo()[0]), before)
    if "force_deepcopy" in inspect.signature(kept.clone).parameters:
        assert_close(sample(kept.clone(force_deepcopy=True)), expected)


def test_a_sampler_that_calls_the_model_twice_a_step_keeps_by_noise_level() -> None:
    """Heun's last call of the kept steps is at the first noise level of the linear ones."""
    levels = {"linear": set(), "original": set()}
    kept = _keep(2)
    parts = kept.get_additional_models_with_key("linvideo")[0].model

    def look(executor: Any, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kind = "original" if parts.layers[0].is_resting else "linear"
        levels[kind].add(round(float(sigma.max()), 4))
        return executor(x, sigma, *args, **kwargs)

    kept.add_wrapper_with_key("apply_model", "look", look)
    for sampler in ("heun", "dpmpp_2s_ancestral", "lcm"):
        levels["linear"].clear(), levels["original"].clear()
        sample(kept, sampler=sampler)
        assert levels["linear"] and levels["original"], sampler
        assert max(levels["linear"]) <= 0.75 < min(levels["original"]), (sampler, levels)


def test_a_lora_of_the_user_works_in_every_step() -> None:
    teacher = bind_headless(merge_lora(load_headless()))
    student = bind_headless(merge_lora(load_headless()), shipped())
    expected = sample_headless([teacher, student, student, student])
    for is_bypassed in (False, True):
        before = with_lora(demo()[0], is_bypassed=is_bypassed)
        assert_close(sample(_keep(1, before)), expected)
        assert_close(sample(with_lora(_keep(1), is_bypassed=is_bypassed)), expected)


def test_a_cache_may_reuse_the_kept_steps() -> None:
    """The whole call that a cache must begin with may be the original model's."""
    ran = []
    kept = EasyCacheNode.execute(_keep(4), 3.0, 0.1, 1.0, False).result[0]
    block = demo()[0].model.diffusion_model.blocks[1]
    look = block.self_attn.register_forward_hook(
        lambda *_: ran.append(kept.get_additional_models()[0].model.layers[0].is_resting)
    )
    try:
        assert sample(kept, steps=8).isfinite().all()
    finally:
        look.remove()
    assert True in ran and len(ran) < 8, ran


def test_compiled_it_keeps_the_same_steps_and_compiles_once() -> None:
    """With the guards that ComfyUI's own compile node keeps; a graph for each kind of step."""
    kept = linearize(short_demo(), short_file(), keep_first_steps=1)
    expected = sample(kept, steps=2)
    compiled = without_dynamic_memory(kept)
    settings = {"options": {"guard_filter_fn": skip_torch_compile_dict}, "fullgraph": True}
    linear, softmax = 1, 2
    assert short_file().header.linear_layers == (linear,)
    keys = [f"diffusion_model.blocks.{layer}" for layer in (linear, softmax)]
    set_torch_compile_wrapper(compiled, "aot_eager", keys=keys, **settings)
    for _ in range(2):
        assert_close(sample(compiled, steps=2), expected)
        assert counters["stats"]["unique_graphs"] == 4
    assert torch.equal(sample(kept, steps=2), expected)


def test_a_file_of_whole_weights_cannot_rest() -> None:
    header = dataclasses.replace(shipped().header, parameters="full", lora_rank=0)
    deltas = {"blocks.2.ffn.0.bias": torch.ones(512)}
    whole = dataclasses.replace(shipped(), header=header, deltas=deltas, low_rank={})
    message = complaint(ArtifactError, linearize, demo()[0], whole, keep_first_steps=1)
    assert "keep_first_steps" in message


def test_an_error_or_interruption_in_a_kept_step_leaves_the_next_run_right() -> None:
    kept = _keep(2)
    expected = sample(kept)

    def fail(*_: Any, **__: Any) -> None:
        raise comfy.model_management.InterruptProcessingException

    failing = kept.clone()
    failing.add_wrapper_with_key("diffusion_model", "fail", fail)
    with contextlib.suppress(comfy.model_management.InterruptProcessingException):
        sample(failing)
        raise AssertionError("nothing was interrupted")
    assert torch.equal(sample(kept), expected)
    assert_close(sample(linearize(demo()[0], shipped())), _expected(0))
