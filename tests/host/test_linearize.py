"""Linearizing.

"Headless" is our core without ComfyUI's model, sampler or patching.
"""

import dataclasses
import functools
import gc
import operator
import shutil
import unittest
from typing import Any

import comfy.ldm.wan.model
import comfy.model_management
import comfy.ops
import comfy.sample
import comfy.sd
import latent_preview
import numpy as np
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import TorchCompileModel, skip_torch_compile_dict
from linvideo_pack.linvideo_core.artifact import Artifact, ArtifactError
from linvideo_pack.linvideo_core.demo import codec
from linvideo_pack.linvideo_core.demo.codec import LATENT_SHAPE
from linvideo_pack.linvideo_core.models.config import LinearForm
from linvideo_pack.nodes import demo, model_folder
from linvideo_pack.nodes.linearize import APPLY, LinVideoLinearize
from linvideo_pack.nodes.patching import injection
from linvideo_pack.nodes.patching.apply import linearize
from linvideo_pack.nodes.patching.injection import KEY
from stage import (
    STEPS,
    as_one_graph,
    assert_close,
    bind_headless,
    complaint,
    in_form,
    load_headless,
    make_noise,
    own_folders,
    relative_difference,
    sample,
    sample_again,
    sample_headless,
    short_demo,
    short_file,
    stream_weights,
    tolerance_of,
    without_dynamic_memory,
)
from stage import demo as _demo
from stage import shipped as _shipped
from torch import Tensor
from torch._dynamo.utils import counters


@functools.cache
def _other_file() -> Artifact:
    """An artifact of two layers that changes weights of every kind: matrix, bias, bare.

    The maps are the layers' own: those of other layers amplify the rounding of fp16.
    """
    generator = torch.Generator().manual_seed(8)
    shapes = {
        "blocks.2.self_attn.q.weight": (128, 128),
        "blocks.2.ffn.0.bias": (512,),
        "blocks.5.modulation": (1, 6, 128),
    }
    first = _shipped()
    layers = first.header.linear_layers[:2]
    header = dataclasses.replace(
        first.header,
        linear_layers=layers,
        site_names=tuple(f"blocks.{n}.self_attn" for n in layers),
        parameters="full",
        lora_rank=0,
    )
    deltas = {n: 0.02 * torch.randn(s, generator=generator) for n, s in shapes.items()}
    return Artifact(header=header, linear={n: first.linear[n] for n in layers}, deltas=deltas)


def _sample_headless(applied: Artifact | None = None, *, strength: float = 1.0) -> Tensor:
    return sample_headless([bind_headless(load_headless(), applied, strength=strength)] * STEPS)


@functools.cache
def _teacher_latents() -> Tensor:
    return sample_again(_demo()[0])


def _apply_file(name: str) -> Any:
    mode = {"mode": APPLY, "file": name, "strength": 1.0, "keep_first_steps": 0}
    with own_folders():
        return LinVideoLinearize.execute(_demo()[0], mode)


def _hooked(model: Any) -> list[str]:
    # A bypass LoRA of ComfyUI's leaves a layer its class's own forward.
    return [
        name
        for name, module in model.model.diffusion_model.named_modules()
        if getattr(module.forward, "__func__", None) is not type(module).forward
    ]


def test_the_latents_are_those_of_the_headless_core() -> None:
    """Of the teacher, of the shipped file by the node, of changed weights of every kind."""
    assert_close(_teacher_latents(), _sample_headless())
    latents = sample(_apply_file(model_folder.SHIPPED).result[0])
    assert_close(latents, _sample_headless(_shipped()))
    assert float((latents - _teacher_latents()).norm()) > 1
    for file, strength in ((_other_file(), 0.5), (_shipped(), 0.0)):
        linearized = linearize(_demo()[0], file, strength=strength)
        assert_close(sample(linearized), _sample_headless(file, strength=strength))


def test_the_model_that_came_in_gives_the_same_bits_ever_after() -> None:
    model, *_ = _demo()
    names = list(model.model.state_dict())
    before = _teacher_latents()
    first, second = linearize(model, _shipped()), linearize(model, _other_file())
    latents = [sample(linearized) for linearized in (first, second)]
    assert torch.equal(sample(model), before)
    assert torch.equal(sample(first), latents[0])
    assert torch.equal(sample(second), latents[1])
    assert torch.equal(sample(model.clone()), before)
    assert list(model.model.state_dict()) == names
    assert not _hooked(model)


def test_a_model_thrown_away_while_it_is_loaded_leaves_nothing() -> None:
    model, *_ = _demo()
    linearized = linearize(model, _shipped())
    comfy.model_management.load_models_gpu([linearized])
    assert _hooked(model)
    del linearized
    gc.collect()
    assert not _hooked(model)
    assert torch.equal(sample(model), _teacher_latents())


def test_a_clone_made_while_the_model_is_loaded_or_sampled_changes_nothing() -> None:
    linearized = linearize(_demo()[0], _shipped())
    expected = sample(linearized)
    comfy.model_management.load_models_gpu([linearized])
    clone = linearized.clone()  # ComfyUI says of it, too, that it is injected
    clone.add_patches({})
    assert torch.equal(sample(_demo()[0]), _teacher_latents())
    assert torch.equal(sample(clone), expected)
    assert torch.equal(sample(linearized, on_step=lambda *_: linearized.clone()), expected)


def test_a_copy_with_weights_of_its_own_samples_alike() -> None:
    linearized = linearize(_demo()[0], _shipped())
    copy = linearized.clone(force_deepcopy=True)
    assert copy.model is not linearized.model
    assert_close(sample(copy), sample(linearized))


def test_weights_that_are_streamed_give_the_same_latents() -> None:
    expected = sample(linearize(_demo()[0], _shipped()))
    linearized = without_dynamic_memory(linearize(_demo()[0], _shipped()))
    comfy.model_management.unload_all_models()
    stream_weights(linearized)
    latents = sample(linearized)
    assert linearized.model.model_lowvram
    comfy.model_management.unload_all_models()
    assert_close(latents, expected)


@as_one_graph
def test_compiled_as_one_graph_it_gives_the_same_latents_and_compiles_once() -> None:
    linearized = without_dynamic_memory(linearize(short_demo(), short_file()))
    set_torch_compile_wrapper(linearized, "aot_eager", fullgraph=True)
    _check_compiled(linearized)


@as_one_graph
def test_compiled_a_hybrid_layer_follows_a_video_that_is_turned() -> None:
    """With the guards of ComfyUI's compile node: as many tokens lie in another grid."""
    hybrid = in_form(short_file(), LinearForm(tile="1x2x3"))
    linearized = linearize(short_demo(), hybrid)
    compiled = without_dynamic_memory(linearized)
    settings = {"options": {"guard_filter_fn": skip_torch_compile_dict}, "fullgraph": True}
    set_torch_compile_wrapper(compiled, "aot_eager", **settings)
    wide = make_noise()[..., :8, :]
    wide = torch.cat([wide, wide.flip(-1)], dim=-1)
    for noise in (wide, wide.transpose(3, 4), wide):
        expected = sample(linearized, noise=noise, steps=2)
        assert_close(sample(compiled, noise=noise, steps=2), expected, tolerance_of(compiled))
    assert counters["stats"]["unique_graphs"] == 2


@as_one_graph
def test_comfyuis_compile_node_compiles_it_to_machine_code_once() -> None:
    """With the node's backend and its guards; queued again, nothing is compiled."""
    if not any(map(shutil.which, ("g++", "clang++", "cl"))):
        raise unittest.SkipTest("needs a C++ compiler, which inductor calls")
    linearized = linearize(short_demo(), short_file())
    _check_compiled(TorchCompileModel.execute(linearized, "inductor").result[0])


def _check_compiled(compiled: Any) -> None:
    before = sample(short_demo(), steps=2)
    expected = sample(linearize(short_demo(), short_file()), steps=2)
    assert relative_difference(expected, before) > 0.01
    for _ in range(2):
        assert_close(sample(compiled, steps=2), expected, tolerance_of(compiled))
        assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"], counters["graph_break"]
    assert not compiled.get_attachment(KEY).times
    assert torch.equal(sample(short_demo(), steps=2), before)


def test_a_forward_patched_by_another_pack_comes_back() -> None:
    model, *_ = _demo()
    linearized = linearize(model, _shipped())
    attention = model.model.diffusion_model.blocks[_shipped().header.linear_layers[0]].self_attn
    calls = []

    def foreign(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return type(attention).forward(attention, *args, **kwargs)

    expected = sample(linearized)
    attention.forward = foreign
    try:
        assert torch.equal(sample(linearized), expected)
        assert not calls
        assert attention.forward is foreign
    finally:
        del attention.forward


def test_injecting_or_ejecting_twice_is_the_same_as_once() -> None:
    linearized = linearize(_demo()[0], _shipped())
    names = list(_shipped().header.site_names)
    layers = [linearized.model.diffusion_model.get_submodule(name) for name in names]
    forwards = []
    for change in (injection.inject, injection.inject, injection.eject, injection.eject) * 2:
        change(linearized)
        is_injected = change is injection.inject
        assert _hooked(linearized) == (names if is_injected else [])
        forwards += [[layer.forward for layer in layers]] if is_injected else []
    # torch.compile would take others for new code.
    assert all(all(map(operator.is_, forwards[0], others)) for others in forwards)


def test_the_feature_maps_are_loaded_with_the_model_and_are_no_part_of_it() -> None:
    linearized = linearize(_demo()[0], _shipped())
    comfy.model_management.load_models_gpu([linearized, *linearized.get_additional_models()])
    loaded = {type(each.model).__name__ for each in comfy.model_management.loaded_models()}
    assert "FeatureMaps" in loaded
    assert not any("map" in name for name in linearized.model.state_dict())


def test_what_does_not_fit_is_refused() -> None:
    linearized = linearize(_demo()[0], _shipped())
    for model in (linearized, linearized.clone()):
        assert "linearized already" in complaint(ArtifactError, linearize, model, _other_file())
    name = "wan, 30 layers, 12 heads of 128"
    header = dataclasses.replace(_shipped().header, fingerprint=name, num_layers=30)
    other = dataclasses.replace(_shipped(), header=header)
    message = complaint(ArtifactError, linearize, _demo()[0], other)
    assert "30 layers, 12 heads" in message and "10 layers, 1 heads" in message


def test_the_decoder_gives_frames_and_refuses_other_latents() -> None:
    samples = {"samples": torch.zeros(2, *LATENT_SHAPE)}
    (frames,) = demo.LinVideoDemoDecode.execute(samples, 8).result
    assert frames.shape == (2 * 28, 256, 256, 3) and frames.dtype == torch.float32
    image_latents = {"samples": torch.zeros(1, 4, 64, 64)}
    message = complaint(ValueError, demo.LinVideoDemoDecode.execute, image_latents, 8)
    assert "[1, 4, 64, 64]" in message


def test_the_sampler_previews_what_the_decoder_shows() -> None:
    latent_format = _demo()[0].model.latent_format
    factors = latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
    picture = latent_preview.Latent2RGBPreviewer(*factors).decode_latent_to_preview(_x0())
    frames = codec.decode_latents(_x0())[0, :4]  # one latent frame, one latent pixel is 2 x 2
    expected = torch.nn.functional.avg_pool2d(frames.mean(dim=0, keepdim=True), 2)[0]
    preview = torch.from_numpy(np.array(picture.convert("L"))) / 255
    assert float((preview - expected).abs().max()) < 0.01


def _x0() -> Tensor:
    """Latents of a clip: bright pixels, none beyond black or white."""
    generator = torch.Generator().manual_seed(2)
    return codec.encode_frames(torch.rand(1, 28, 32, 32, generator=generator))
