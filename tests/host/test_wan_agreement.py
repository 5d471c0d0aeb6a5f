"""The headless Wan agrees with ComfyUI's own Wan: same file, same inputs, same velocity."""

import dataclasses
import tempfile
from pathlib import Path

import comfy.ldm.wan.model
import comfy.model_management
import comfy.sd
import torch
from linvideo_pack.linvideo_core.demo import weights_path
from linvideo_pack.linvideo_core.models.checkpoint import load_wan
from linvideo_pack.linvideo_core.models.image_condition import ImageCondition
from linvideo_pack.linvideo_core.models.wan import WanConfig, WanModel
from safetensors.torch import load_file, save_file
from stage import TOLERANCES, assert_close, device
from variants import random_tensor

_TWO_HEADS = WanConfig(dim=256, num_heads=2, num_layers=4, ffn_dim=704)
_DEMO_SHAPED = WanConfig(dim=128, num_heads=1, num_layers=10, ffn_dim=512)
_FIVE = dataclasses.replace(_TWO_HEADS, in_channels=48, out_channels=48)
_IMAGE_2_1 = dataclasses.replace(_TWO_HEADS, in_channels=36, image_dim=1280)
_IMAGE_2_2 = dataclasses.replace(_TWO_HEADS, in_channels=36)
_CASES = {
    "Wan 2.2 5B": (_FIVE, (2, 48, 3, 6, 8), 13),
    "image-to-video, Wan 2.1": (_IMAGE_2_1, (2, 16, 3, 6, 8), 13),
    "image-to-video, Wan 2.2": (_IMAGE_2_2, (2, 16, 3, 6, 8), 13),
    "two heads": (_TWO_HEADS, (2, 16, 5, 10, 14), 13),
    "two heads, sides that the patch does not divide": (_TWO_HEADS, (1, 16, 3, 7, 9), 63),
    "one head, ten layers": (_DEMO_SHAPED, (2, 16, 7, 6, 10), 8),
    "one head, one token": (_DEMO_SHAPED, (3, 16, 1, 2, 2), 1),
}
"""A model, the shape of its latents, and the number of its prompt's tokens."""


def _save_random(path: Path, config: WanConfig, *, seed: int, prefix: str = "") -> None:
    """Save a model of which every parameter, norms and modulations included, acts on the output."""
    model = WanModel(config)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        values = random_tensor(*parameter.shape, seed=1000 * seed + number)
        if name.endswith("modulation"):
            values = 0.3 * values
        elif parameter.ndim == 1:
            values = 0.2 * values + float("norm" in name and name.endswith("weight"))
        else:
            values = values / parameter[0].numel() ** 0.5
        parameter.data.copy_(values)
    save_file({prefix + name: x for name, x in model.state_dict().items()}, path)


def _compare(path: Path, shape: tuple[int, ...], num_tokens: int) -> None:
    """Compare the velocities, and the clean estimates where the patch divides the sides."""
    patcher = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
    comfy.model_management.load_models_gpu([patcher])
    theirs = patcher.model.diffusion_model
    assert type(theirs) is comfy.ldm.wan.model.WanModel
    assert len(theirs.state_dict()) == len(load_file(path))
    ours = load_wan(path, device=device())
    latents = random_tensor(*shape, seed=1).to(device())
    sigmas = torch.linspace(0.7317, 0.0413, len(latents), device=device())
    prompts = random_tensor(len(latents), num_tokens, ours.config.text_dim, seed=2).to(device())
    given, inputs = latents, {}
    if ours.config.condition_channels:
        images = random_tensor(1, ours.config.condition_channels, *shape[2:], seed=3)
        clip_embeds = random_tensor(1, 257, 1280, seed=4) if ours.config.image_dim else None
        ours.condition = ImageCondition(images, clip_embeds)
        inputs = {"c_concat": images.expand(len(latents), -1, -1, -1, -1).to(device())}
        given = torch.cat([latents, inputs["c_concat"]], dim=1)
        if clip_embeds is not None:
            inputs["clip_fea"] = clip_embeds.expand(len(latents), -1, -1).to(device())
    velocity = ours(latents, 1000 * sigmas, prompts)
    others = {"clip_fea": inputs["clip_fea"]} if "clip_fea" in inputs else {}
    expected = theirs(given, 1000 * sigmas, context=prompts, **others)
    expected = expected[..., : shape[-2], : shape[-1]]
    # Agreement on a vanishing or exploding output would say nothing.
    assert 0.05 < float(expected.std()) < 20
    assert_close(velocity, expected, TOLERANCES[torch.float32])
    if shape[-1] % 2 == 0:
        x0 = patcher.model.apply_model(latents, sigmas, c_crossattn=prompts, **inputs)
        found = latents - sigmas.view(-1, 1, 1, 1, 1) * velocity
        assert_close(found, x0, TOLERANCES[torch.float32])


def test_random_models_of_several_shapes_agree() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for seed, (name, (config, *inputs)) in enumerate(_CASES.items()):
            print(name)
            path = Path(folder) / f"{seed}.safetensors"
            _save_random(path, config, seed=seed)
            _compare(path, *inputs)


def test_names_with_comfyuis_prefix_are_read() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prefixed.safetensors"
        _save_random(path, _TWO_HEADS, seed=9, prefix="model.diffusion_model.")
        _compare(path, (1, 16, 2, 4, 6), 8)


def test_the_shipped_demo_agrees() -> None:
    _compare(weights_path("model.safetensors"), (2, 16, 7, 16, 16), 8)
