"""The teacher's middle layer describes videos, whatever the precision, and only while whole."""

import pytest
import torch
from torch import Tensor

from linvideo_core.evaluate.compare import swap
from linvideo_core.evaluate.metrics import frechet_distance_of
from linvideo_core.evaluate.sampler import FEATURE_SIGMA, teacher_features
from linvideo_core.flow import add_noise
from linvideo_core.models.attention_sites import attention_at, shapes_of
from linvideo_core.models.families import identify
from linvideo_core.models.velocity import TIMESTEP_SCALE
from linvideo_core.teacher.teacher import Teacher


def draw(teacher: Teacher, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *teacher.latent_shape, generator=generator)


def test_features_are_the_middle_layers_attention_averaged_over_tokens(teacher: Teacher) -> None:
    latents, noise = draw(teacher, 2, 0), draw(teacher, 2, 1)
    features = teacher_features(teacher.model, latents, noise, teacher.negative_embeds)
    _, sites = identify(shapes_of(teacher.model))
    seen: list[Tensor] = []
    middle = attention_at(teacher.model, sites[1])
    hook = middle.register_forward_hook(lambda module, args, output: seen.append(output))
    sigma = torch.full((2,), FEATURE_SIGMA)
    with torch.no_grad():
        embeds = teacher.negative_embeds.expand(2, -1, -1)
        teacher.model(add_noise(latents, noise, sigma), TIMESTEP_SCALE * sigma, embeds)
    hook.remove()
    _, tokens, heads, dim = seen[0].shape
    expected = torch.stack([clip.view(tokens, heads * dim).mean(dim=0) for clip in seen[0]])
    assert (heads, dim) == (sites[1].num_heads, sites[1].head_dim)
    torch.testing.assert_close(features, expected)
    assert not middle._forward_hooks


def test_bf16_changes_features_far_less_than_other_videos_do(teacher: Teacher) -> None:
    noise = draw(teacher, 6, 1)

    def describe(seed: int, precision: str) -> Tensor:
        latents = draw(teacher, 6, seed)
        embeds = teacher.negative_embeds
        return teacher_features(teacher.model, latents, noise, embeds, precision=precision)

    exact, rounded, other = describe(0, "fp32"), describe(0, "bf16"), describe(2, "fp32")
    assert rounded.dtype == torch.float32
    near, far = (frechet_distance_of(features, exact) for features in (rounded, other))
    assert near < 0.02 * far


def test_features_of_a_student_are_refused_and_no_hook_is_left(teacher: Teacher) -> None:
    latents = draw(teacher, 2, 0)
    with (
        swap(teacher.model, (0,), 128) as model,
        pytest.raises(ValueError, match="the model has linear layers"),
    ):
        teacher_features(model, latents, latents, teacher.negative_embeds)
    with pytest.raises(ValueError, match="this model takes"):
        teacher_features(teacher.model, latents[:, :1], latents[:, :1], teacher.negative_embeds)
    assert not any(module._forward_hooks for module in teacher.model.modules())
