"""Laws of the embedded demo: clips, codec, prompts, judge, Frechet distance, stored files."""

import pytest
import torch

from linvideo_core.demo import DIRECTIONS, FRAME_SIZE, NUM_FRAMES, weights_path
from linvideo_core.demo.classifier import load_judge
from linvideo_core.demo.codec import LATENT_SHAPE, decode_latents, encode_frames
from linvideo_core.demo.prompts import (
    NUM_TOKENS,
    TEXT_DIM,
    all_prompts,
    encode_prompts,
    make_prompt,
    parse_prompt,
)
from research.demo_model.digits import (
    MAX_SPEED,
    MIN_SPEED,
    DigitClips,
    DigitImages,
    augment_clips,
    load_digit_images,
    sample_clips,
)
from research.demo_model.sampling import measure_clips

SIZE_LIMITS = {"prompts": 250_000, "judge": 500_000, "model": 12_000_000}
SIZE_LIMITS |= {"linearized": 4_000_000, "distilled": 4_000_000}


def make_source(seed: int = 0) -> DigitImages:
    """Random 8 x 8 images, so that most laws need no scikit-learn."""
    images = torch.rand(32, 8, 8, generator=torch.Generator().manual_seed(seed))
    return DigitImages(images, torch.arange(32) % 10)


def make_clips(batch_size: int, seed: int = 0) -> DigitClips:
    return sample_clips(make_source(), batch_size, generator=torch.Generator().manual_seed(seed))


def centroids(frames: torch.Tensor) -> torch.Tensor:
    """Return the centre of brightness (x, y) of frames [B, F, H, W] as [B, F, 2], pixels."""
    place = torch.arange(FRAME_SIZE) + 0.5
    mass = frames.sum(dim=(2, 3))
    x = (frames.sum(dim=2) * place).sum(dim=-1) / mass
    y = (frames.sum(dim=3) * place).sum(dim=-1) / mass
    return torch.stack([x, y], dim=-1)


def test_a_clip_moves_straight_in_its_named_direction_at_its_speed() -> None:
    frames, _, directions = make_clips(200)
    centre = centroids(frames)
    units = torch.tensor(list(DIRECTIONS.values()))[directions]
    velocity = (centre[:, -1] - centre[:, 0]) / (NUM_FRAMES - 1)
    speed = (velocity * units).sum(dim=-1)
    assert set(directions.tolist()) == set(range(8))
    assert speed.min() > MIN_SPEED - 0.01 and speed.max() < MAX_SPEED + 0.01
    assert (velocity - speed[:, None] * units).abs().max() < 0.01
    # Drawing 8 pixels as 10 moves a centre by up to 0.15 pixels with its place between pixels.
    time = torch.arange(NUM_FRAMES)[:, None]
    assert (centre - (centre[:, :1] + time * velocity[:, None])).abs().max() < 0.3


def test_a_clip_stays_inside_the_canvas() -> None:
    frames = make_clips(200).frames
    assert frames.shape == (200, NUM_FRAMES, FRAME_SIZE, FRAME_SIZE)
    assert frames.min() >= 0 and frames.max() <= 1
    mass = frames.sum(dim=(2, 3))
    # A digit cut off by the border would lose brightness over time, a pixel's width a tenth.
    torch.testing.assert_close(mass, mass[:, :1].expand_as(mass), rtol=0.04, atol=0)


def test_the_generator_alone_decides_the_clips() -> None:
    first, again, other = make_clips(5, seed=3), make_clips(5, seed=3), make_clips(5, seed=4)
    for left, right in zip(first, again, strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(first.frames, other.frames)


def test_augmented_clips_keep_shape_and_range() -> None:
    frames = make_clips(3).frames
    spoilt = augment_clips(frames, torch.Generator().manual_seed(0))
    assert spoilt.shape == frames.shape
    assert spoilt.min() >= 0 and spoilt.max() <= 1 and not torch.equal(spoilt, frames)


def test_the_codec_inverts_itself_and_clamps() -> None:
    frames = make_clips(3).frames
    latents = encode_frames(frames)
    assert latents.shape == (3, *LATENT_SHAPE)
    torch.testing.assert_close(decode_latents(latents), frames, rtol=0, atol=1e-6)
    wild = decode_latents(latents * 10)
    assert wild.min() >= 0 and wild.max() <= 1


def real_clips(split: str, count: int, seed: int) -> DigitClips:
    pytest.importorskip("sklearn", reason="the handwriting comes from scikit-learn")
    generator = torch.Generator().manual_seed(seed)
    return sample_clips(load_digit_images(split), count, generator=generator)


def test_latents_of_real_clips_have_zero_mean_and_half_unit_deviation() -> None:
    clips = real_clips("train", 512, seed=5)
    latents = encode_frames(clips.frames)
    assert abs(latents.mean()) < 0.05
    assert abs(latents.std() - 0.5) < 0.05


def test_held_out_handwriting_is_a_fifth_and_never_trained_on() -> None:
    pytest.importorskip("sklearn", reason="the handwriting comes from scikit-learn")
    train, held_out = load_digit_images("train"), load_digit_images("held-out")
    assert len(train.labels) + len(held_out.labels) == 1797
    assert 0.19 < len(held_out.labels) / 1797 < 0.21
    assert not {tuple(image) for image in train.images.flatten(1).tolist()} & {
        tuple(image) for image in held_out.images.flatten(1).tolist()
    }


def test_labels_survive_the_prompt() -> None:
    prompts = all_prompts()
    assert len(set(prompts)) == 80
    assert [parse_prompt(prompt) for prompt in prompts] == [(i // 8, i % 8) for i in range(80)]


def test_prompts_become_distinct_embeddings_whatever_the_batch() -> None:
    prompts = [*all_prompts(), ""]
    embeds = encode_prompts(prompts)
    assert embeds.shape == (81, NUM_TOKENS, TEXT_DIM) and embeds.dtype == torch.float32
    assert len(torch.unique(embeds.flatten(1), dim=0)) == 81
    assert torch.equal(encode_prompts(prompts[7:8])[0], embeds[7])
    assert abs(embeds.std() - 1) < 0.05


def test_prompts_are_read_without_case_and_punctuation_and_padded() -> None:
    empty, short = encode_prompts(["", "seven"])
    assert torch.equal(empty, empty[:1].expand_as(empty))
    assert torch.equal(short[1:], empty[1:]) and not torch.equal(short[0], empty[0])
    plain, fancy = encode_prompts([make_prompt(7, 4), "A handwritten seven, moving up-right."])
    assert torch.equal(plain, fancy)
    with pytest.raises(ValueError, match=r"'cat'.*seven.*up-right"):
        encode_prompts(["a handwritten cat"])


@pytest.mark.parametrize("prompt", ["", "seven", "moving up", "seven eight moving up"])
def test_a_prompt_without_one_digit_and_one_direction_has_no_labels(prompt: str) -> None:
    with pytest.raises(ValueError, match="one digit and one direction"):
        parse_prompt(prompt)


def test_the_shipped_judge_recognises_held_out_handwriting() -> None:
    measures = measure_clips(load_judge(), *real_clips("held-out", 300, seed=6))
    assert measures["digit_accuracy"] >= 0.95
    assert measures["motion_accuracy"] >= 0.98


def test_the_judge_tells_real_clips_from_frozen_reversed_and_empty_ones() -> None:
    judge, clips = load_judge(), real_clips("train", 200, seed=7)
    frames, labels = clips.frames, clips[1:]
    real = measure_clips(judge, frames, *labels)["frechet_distance"]
    frozen = measure_clips(judge, frames[:, :1].expand_as(frames), *labels)
    empty = measure_clips(judge, torch.zeros_like(frames), *labels)
    assert frozen["frechet_distance"] > 5 * real
    assert empty["frechet_distance"] > 5 * real
    assert measure_clips(judge, frames.flip(1), *labels)["motion_accuracy"] < 0.05


def test_stored_files_are_small() -> None:
    for name, limit in SIZE_LIMITS.items():
        assert weights_path(f"{name}.safetensors").stat().st_size <= limit
