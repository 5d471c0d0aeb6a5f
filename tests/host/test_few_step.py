"""Few-step sampling.

"Headless" is our core without ComfyUI's model, sampler or patching.
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy_extras import nodes_custom_sampler
from linvideo_pack.linvideo_core import artifact, flow
from linvideo_pack.linvideo_core.artifact import Artifact
from linvideo_pack.linvideo_core.demo.codec import LATENT_SHAPE
from linvideo_pack.linvideo_core.evaluate.lora_file import add_changes, find_changes, load_lora
from linvideo_pack.linvideo_core.flow import bind_guided, sample_few_step
from linvideo_pack.nodes import model_folder
from linvideo_pack.nodes.few_step import LinVideoFewStepSampler, LinVideoFewStepSigmas
from linvideo_pack.nodes.patching.apply import linearize
from safetensors.torch import save_file
from stage import assert_close, collect_warnings, complaint, device, load_headless, lora, merge_lora
from stage import demo as _demo
from stage import shipped as _shipped
from stage import with_lora as with_lora_by_comfyui
from torch import Tensor, nn

_SEED = 7


@functools.cache
def _distilled() -> Artifact:
    """The shipped file of four steps."""
    return artifact.load(model_folder.find_file(model_folder.SHIPPED_FEW_STEP))


@functools.cache
def _latent() -> dict[str, Tensor]:
    """Latents of the demo's own size: in fewer, noise added at each step amplifies rounding."""
    return {"samples": torch.zeros(1, *LATENT_SHAPE)}


def _sample(model: Any, steps: int, **settings: Any) -> Tensor:
    positive, latent = _demo()[1], _latent()
    settings = {"cfg": 1.0, "seed": _SEED} | settings
    (sampled,) = LinVideoFewStepSampler.execute(
        model=model, positive=positive, latent_image=latent, steps=steps, **settings
    ).result
    return sampled["samples"]


def _sample_advanced(model: Any, sigmas: Tensor, sampler: Any) -> Tensor:
    """Sample with ComfyUI's own nodes."""
    positive, latent = _demo()[1], _latent()
    (noise,) = nodes_custom_sampler.RandomNoise.execute(_SEED).result
    (guider,) = nodes_custom_sampler.BasicGuider.execute(model, positive).result
    parts = (noise, guider, sampler, sigmas, latent)
    sampled, _ = nodes_custom_sampler.SamplerCustomAdvanced.execute(*parts).result
    return sampled["samples"]


def _noise() -> Tensor:
    return comfy.sample.prepare_noise(_latent()["samples"], _SEED)


def _renoise(seed: int = _SEED) -> torch.Generator:
    """Return what draws the noise that ComfyUI's lcm adds: where it computes, on a CPU the next."""
    return torch.Generator(device()).manual_seed(seed + (device().type == "cpu"))


def _sample_headless(model: nn.Module, sigmas: Tensor) -> Tensor:
    """Sample a model of our core where ComfyUI computes, without guidance."""
    prompt = _demo()[1][0][0].to(device())
    velocity_fn = bind_guided(model, prompt, prompt, 1.0)
    noise = _noise().to(device())
    return sample_few_step(velocity_fn, noise, sigmas, generator=_renoise()).cpu()


def test_comfyuis_lcm_and_our_sampler_agree_on_the_same_model_and_noise() -> None:
    model, sigmas = _demo()[0], flow.make_sigmas(4, 5.0)

    def ours(
        denoise: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool
    ) -> Tensor:
        def velocity_fn(latents: Tensor, sigma: Tensor) -> Tensor:
            x0 = denoise(latents, sigma, **extra_args)
            return (latents - x0) / flow.expand(sigma, latents)

        return sample_few_step(velocity_fn, x, sigmas, generator=_renoise(extra_args["seed"]))

    theirs = _sample_advanced(model, sigmas, comfy.samplers.ksampler("lcm"))
    latents = _sample_advanced(model, sigmas, comfy.samplers.KSAMPLER(ours))
    difference = float((latents - theirs).norm() / theirs.norm())
    print(f"relative difference {difference:.1e}")
    assert difference <= 1e-6


def test_the_node_gives_the_latents_of_the_headless_core() -> None:
    model = load_headless().to(device())
    with artifact.apply(_distilled(), model):
        expected = _sample_headless(model, torch.tensor(_distilled().header.sigmas))
    assert_close(_sample(linearize(_demo()[0], _distilled()), 0), expected)


def test_a_few_step_lora_from_a_file_acts_as_in_the_headless_core() -> None:
    """Before LinVideo Linearize or after it, at the simple schedule's levels, without guidance."""
    path = Path(tempfile.mkdtemp()) / "lora.safetensors"
    save_file(lora(), path)
    model = load_headless().to(device())
    changes = find_changes(load_lora(path), model, strength=0.7)
    with add_changes(model, changes), artifact.apply(_shipped(), model):
        expected = _sample_headless(model, flow.make_sigmas(4, 3.0))
    plain = _sample(linearize(_demo()[0], _shipped()), 4)
    for patcher in (
        linearize(with_lora_by_comfyui(_demo()[0]), _shipped()),
        with_lora_by_comfyui(linearize(_demo()[0], _shipped())),
    ):
        assert_close(_sample(patcher, 4), expected)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_what_comfyui_leaves_out_of_a_lora_is_told_or_left_out_in_the_headless_core() -> None:
    """An image-to-video LoRA's image layers by both; a change of modulation by ComfyUI alone."""
    pair = {"lora_A.weight": (4, 128), "lora_B.weight": (128, 4)}
    layer = "diffusion_model.blocks.0.cross_attn.k_img"
    strangers = {f"{layer}.{name}": torch.ones(shape) for name, shape in pair.items()}
    modulation = {"diffusion_model.blocks.0.diff_m": torch.ones(1, 6, 128)}
    path = Path(tempfile.mkdtemp()) / "lora.safetensors"
    save_file({**lora(), **strangers, **modulation}, path)
    whole = comfy.utils.load_torch_file(str(path))
    found = comfy.sd.load_lora_for_models(_demo()[0], None, whole, 0.7, 0)[0]
    assert found.patches.keys() == with_lora_by_comfyui(_demo()[0]).patches.keys()
    save_file({**lora(), **strangers}, path)
    expected = load_headless()
    merge_lora(expected)
    model = load_headless()
    with collect_warnings() as messages:
        changes = find_changes(load_lora(path), model, strength=0.7)
    with add_changes(model, changes):
        for weight, other in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(weight, other, rtol=0, atol=1e-6)
    assert len(messages) == 1 and "1 of 4 layers" in messages[0]
    save_file(modulation, path)
    with collect_warnings() as messages:
        load_lora(path)
    assert len(messages) == 1 and "which ComfyUI leaves out" in messages[0]


def test_both_ways_give_the_same_latents() -> None:
    for model, steps in ((_demo()[0], 4), (linearize(_demo()[0], _distilled()), 0)):
        sigmas, sampler = LinVideoFewStepSigmas.execute(model, steps).result
        assert torch.equal(_sample_advanced(model, sigmas, sampler), _sample(model, steps))


def test_a_distilled_file_says_the_noise_levels() -> None:
    model = linearize(_demo()[0], _distilled())
    for source in (model, model.clone(), _distilled()):
        for steps in (0, 4):
            sigmas, _ = LinVideoFewStepSigmas.execute(source, steps).result
            assert sigmas.tolist() == list(_distilled().header.sigmas)
        message = complaint(ValueError, LinVideoFewStepSigmas.execute, source, 3)
        assert "distilled for 4" in message
    assert "distilled for 4" in complaint(ValueError, _sample, model, 3)


def test_any_other_model_takes_the_simple_schedule_of_its_own_shift() -> None:
    for model in (_demo()[0], linearize(_demo()[0], _shipped())):
        sigmas, _ = LinVideoFewStepSigmas.execute(model, 4).result
        torch.testing.assert_close(sigmas, flow.make_sigmas(4, 3.0), rtol=0, atol=1e-6)
        assert "set steps" in complaint(ValueError, LinVideoFewStepSigmas.execute, model, 0)
    assert "connect the MODEL" in complaint(
        ValueError, LinVideoFewStepSigmas.execute, _shipped(), 4
    )


def test_the_seed_decides_and_guidance_needs_a_negative_prompt() -> None:
    model, _, negative, _ = _demo()
    assert "negative" in complaint(ValueError, _sample, model, 2, cfg=2.0)
    plain = _sample(model, 2)
    assert torch.equal(_sample(model, 2, negative=negative), plain)
    assert not torch.equal(_sample(model, 2, negative=negative, cfg=2.0), plain)
    assert not torch.equal(_sample(model, 2, seed=_SEED + 1), plain)


def test_every_step_is_previewed_and_the_latents_that_came_in_stay() -> None:
    seen = []

    def on_progress(value: int, total: int, preview: Any, **_: Any) -> None:
        seen.append((value, total, preview[1].size))

    kept, args.preview_method = args.preview_method, LatentPreviewMethod.Latent2RGB
    comfy.utils.set_progress_bar_global_hook(on_progress)
    try:
        _sample(_demo()[0], 3)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        args.preview_method = kept
    assert seen == [(step, 3, (16, 16)) for step in (1, 2, 3)]
    assert not _latent()["samples"].any()
