"""Image-to-video: every prompt's videos start from its own image, in both guidance branches."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from linvideo_core import artifact
from linvideo_core.flow import bind_guided
from linvideo_core.models.attention_sites import shapes_of
from linvideo_core.models.checkpoint import load_wan
from linvideo_core.models.experts import SIDES
from linvideo_core.models.image_condition import CLIP_TOKENS, ImageCondition, with_numbers
from linvideo_core.models.wan import WanModel
from linvideo_core.run.config import override
from linvideo_core.teacher.teacher import load_teacher, open_teacher
from linvideo_core.transfer import command as transfer
from linvideo_core.transfer.config import TransferConfig
from linvideo_core.transfer.experts import EXPERT_NAMES
from tests.conftest import make_wan, small_transfer

IMAGE_DIM = 24
KINDS = {"Wan 2.1": IMAGE_DIM, "Wan 2.2": 0}
Inputs = tuple[Tensor, Tensor, Tensor]


def make_image_model(image_dim: int) -> WanModel:
    torch.manual_seed(1)
    config = dataclasses.replace(make_wan().config, in_channels=12, image_dim=image_dim)
    model = WanModel(config)
    model.init_weights()
    nn.init.normal_(model.head.head.weight, std=0.1)
    return model


def make_images(count: int, image_dim: int, size: tuple[int, ...] = (2, 4, 4)) -> ImageCondition:
    generator = torch.Generator().manual_seed(count)
    latents = torch.randn(count, 8, *size, generator=generator)
    clip_embeds = torch.randn(count, CLIP_TOKENS, max(1, image_dim), generator=generator)
    return ImageCondition(latents, clip_embeds if image_dim else None)


def as_tensors(images: ImageCondition) -> dict[str, Tensor]:
    named = {"condition_latents": images.latents, "clip_embeds": images.clip_embeds}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


@pytest.fixture
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4, 2, 4, 4, generator=generator)
    return latents, torch.tensor([810.0, 120.0]), torch.randn(2, 5, 16, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_prompts_image_is_known_again_by_its_number_in_any_dtype(dtype: torch.dtype) -> None:
    numbers = torch.tensor([0, 1, 255, 256, 257, 2049, 40_000])
    prompt_embeds = torch.randn(len(numbers), 3, 16).to(dtype)
    images = ImageCondition(torch.arange(40_001).view(-1, 1, 1, 1, 1))
    found, latents, _ = images.pick(with_numbers(prompt_embeds, numbers))
    assert torch.equal(found, prompt_embeds) and torch.equal(latents.flatten(), numbers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_several_images_is_each_image_alone(kind: str, inputs: Inputs) -> None:
    model, images = make_image_model(KINDS[kind]), make_images(3, KINDS[kind])
    latents, timesteps, prompt_embeds = inputs
    model.condition = images
    picks = torch.tensor([2, 0])
    found = model(latents, timesteps, with_numbers(prompt_embeds, picks))
    for row, pick in enumerate(picks.tolist()):
        clip_embeds = images.clip_embeds
        alone = None if clip_embeds is None else clip_embeds[pick : pick + 1]
        model.condition = ImageCondition(images.latents[pick : pick + 1], alone)
        expected = model(*(x[row : row + 1] for x in inputs))
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-5)
    assert (found[:1] - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_an_image_model_acts_on_the_velocity(kind: str, inputs: Inputs) -> None:
    model = make_image_model(KINDS[kind])
    model.condition = make_images(1, KINDS[kind])
    model(*inputs).square().sum().backward()
    names = dict(model.named_parameters())
    assert ("img_emb.proj.4.weight" in names) == (kind == "Wan 2.1")
    for name, parameter in names.items():
        # A constant added to every key changes nothing.
        is_silent = name.endswith(("cross_attn.k.bias", "cross_attn.k_img.bias"))
        assert is_silent or bool((parameter.grad != 0).any()), name


def test_an_image_model_without_an_image_is_named(inputs: Inputs) -> None:
    with pytest.raises(ValueError, match="no condition; it needs an image"):
        make_image_model(0)(*inputs)


def image_transfer(
    folder: Path, model: WanModel, images: ImageCondition | None, **changes: Any
) -> TransferConfig:
    """Return a transfer of seconds of an image-to-video model, with images for three prompts."""
    path = folder / "wan.safetensors"
    save_file(model.state_dict(), path)
    config = small_transfer(path, **changes)
    prompts = load_file(config.teacher.prompts)
    save_file(prompts | (as_tensors(images) if images else {}), config.teacher.prompts)
    return config


@pytest.mark.parametrize(
    ("kind", "count", "states"),
    [("Wan 2.1", 3, "stored"), ("Wan 2.2", 1, "stored"), ("Wan 2.2", 3, "pool")],
)
def test_a_transfer_makes_a_file_of_an_image_model(
    kind: str, count: int, states: str, tmp_path: Path
) -> None:
    images = make_images(count, KINDS[kind])
    sources = {"states": states, "levels": "even"}
    config = image_transfer(tmp_path, make_image_model(KINDS[kind]), images, **sources)
    made = artifact.load(transfer.run(config))
    assert (config.out / "evaluation.json").exists()
    model = load_wan(config.teacher.model)
    assert artifact.check(made, shapes_of(model))
    assert made.header.usage.num_frames == 5


def test_both_experts_are_given_the_images(tmp_path: Path) -> None:
    sizes = {"sampler_steps": 8, "states_per_trajectory": 4, "boundary": 0.8, "evaluate_samples": 0}
    config = image_transfer(tmp_path, make_image_model(0), make_images(3, 0), **sizes)
    save_file(load_file(config.teacher.model), tmp_path / "low.safetensors")
    transfer.run(override(config, {"low_noise_model": tmp_path / "low.safetensors"}))
    made = [artifact.load(config.out / name).header for name in EXPERT_NAMES.values()]
    assert [header.provenance["expert"] for header in made] == [*SIDES]


@pytest.mark.parametrize("kind", KINDS)
def test_both_guidance_branches_of_a_prompt_have_its_image(
    kind: str, inputs: Inputs, tmp_path: Path
) -> None:
    images = make_images(3, KINDS[kind])
    config = image_transfer(tmp_path, make_image_model(KINDS[kind]), images)
    teacher = load_teacher(config.teacher)
    latents, timesteps, _ = inputs
    prompts = teacher.prompt_embeds[torch.tensor([1, 2])]
    negatives = teacher.negatives_for(prompts)
    several = torch.stack([torch.zeros_like(negatives[0]), teacher.negative_embeds])
    second = dataclasses.replace(teacher, all_negatives=several)
    assert torch.equal(second.negatives_for(prompts, torch.tensor([1, 1])), negatives)
    found = bind_guided(teacher.model, prompts, negatives, 0.0)(latents, timesteps / 1000)
    for row, prompt in enumerate((1, 2)):
        clip_embeds = images.clip_embeds
        alone = None if clip_embeds is None else clip_embeds[prompt : prompt + 1]
        teacher.model.condition = ImageCondition(images.latents[prompt : prompt + 1], alone)
        negative = teacher.negative_embeds[None, :-1]
        expected = teacher.model(latents[row : row + 1], timesteps[row : row + 1], negative)
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(IndexError):
        load_teacher(config.teacher).model(
            latents, timesteps, teacher.negative_embeds.expand_as(prompts)
        )


def test_samples_of_other_images_are_others(tmp_path: Path) -> None:
    model, images = make_image_model(0), make_images(1, 0)
    described = [
        load_teacher(image_transfer(tmp_path, model, each).teacher).describe()
        for each in (images, images, ImageCondition(images.latents + 1))
    ]
    assert described[0] == described[1] != described[2]


REFUSED = {
    "no image": (IMAGE_DIM, None, r"is image-to-video and takes condition_latents \[8, 2, 4, 4\] "),
    "no CLIP embeddings": (IMAGE_DIM, make_images(1, 0), r"clip_embeds \[257, 24\] at this size"),
    "CLIP embeddings for Wan 2.2": (0, make_images(1, 8), r"clip_embeds \[257, 8\]: give --prom"),
    "another size": (0, make_images(1, 0, (2, 4, 6)), r"holds condition_latents \[8, 2, 4, 6\]"),
    "another length": (0, make_images(1, 0, (3, 4, 4)), r"holds condition_latents \[8, 3, 4, 4\]"),
    "an image for some prompts": (0, make_images(2, 0), "with N 1 or 3, the number of prompts"),
    "no video": (0, ImageCondition(torch.zeros(1, 8, 4, 4)), r"torch.float32 \[1, 8, 4, 4\] and"),
    "no number": (0, ImageCondition(torch.full((1, 8, 2, 4, 4), torch.nan)), "finite numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_images_that_do_not_fit_are_refused_by_headers(case: str, tmp_path: Path) -> None:
    image_dim, images, words = REFUSED[case]
    config = image_transfer(tmp_path, make_image_model(image_dim), images)
    with pytest.raises(ValueError, match=words) as caught:
        open_teacher(config.teacher)
    assert "\n" not in str(caught.value)


def test_images_of_one_size_are_no_use_at_others(tmp_path: Path) -> None:
    config = image_transfer(tmp_path, make_image_model(0), make_images(1, 0))
    with pytest.raises(ValueError, match=r"--more-sizes was given with .* images of one size"):
        open_teacher(config.teacher, [{"width": 64, "height": 32, "num_frames": 5}])


def test_a_text_to_video_model_takes_no_image(wan: WanModel, tmp_path: Path) -> None:
    config = image_transfer(tmp_path, wan, make_images(1, 0))
    with pytest.raises(ValueError, match="is text-to-video and takes no image at this size"):
        open_teacher(config.teacher)
    assert open_teacher(override(config.teacher, {"model": None, "prompts": None})).is_demo
