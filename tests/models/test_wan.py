"""Our Wan carries the published checkpoints' names and takes any size."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linvideo_core.flow import bind, bind_guided
from linvideo_core.kernels.reference import rotate
from linvideo_core.models.checkpoint import infer_config
from linvideo_core.models.wan import WanConfig, WanModel, rotary_embedding, timestep_embedding

PUBLISHED = {
    "1.3B": (WanConfig(), 1536, 8960, 30),
    "14B": (WanConfig(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824), 5120, 13824, 40),
}
Shapes = dict[str, tuple[int, ...]]


def published_shapes(dim: int, ffn_dim: int, num_layers: int) -> Shapes:
    """Return the names and shapes of a Wan 2.1 text-to-video checkpoint, spelled out."""
    linear = {
        "text_embedding.0": (dim, 4096),
        "text_embedding.2": (dim, dim),
        "time_embedding.0": (dim, 256),
        "time_embedding.2": (dim, dim),
        "time_projection.1": (6 * dim, dim),
        "patch_embedding": (dim, 16, 1, 2, 2),
        "head.head": (64, dim),
    }
    shapes: Shapes = {"head.modulation": (1, 2, dim)}
    for block in (f"blocks.{layer}" for layer in range(num_layers)):
        for attention in (f"{block}.self_attn", f"{block}.cross_attn"):
            linear |= {f"{attention}.{projection}": (dim, dim) for projection in "qkvo"}
            shapes |= {f"{attention}.norm_{side}.weight": (dim,) for side in "qk"}
        linear |= {f"{block}.ffn.0": (ffn_dim, dim), f"{block}.ffn.2": (dim, ffn_dim)}
        linear[f"{block}.norm3"] = (dim,)
        shapes[f"{block}.modulation"] = (1, 6, dim)
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


@pytest.mark.parametrize("size", PUBLISHED)
def test_names_and_shapes_are_the_published_ones_and_tell_the_architecture(size: str) -> None:
    config, *sizes = PUBLISHED[size]
    with torch.device("meta"):
        model = WanModel(config)
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == published_shapes(*sizes)
    assert infer_config(found) == config


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 3, 5), (3, 7, 9), (2, 6, 4)])
def test_a_size_that_the_patch_does_not_divide_is_padded_round_and_cropped(
    size: tuple[int, int, int], wan: WanModel, inputs: tuple[Tensor, ...]
) -> None:
    _, timesteps, prompt_embeds = inputs
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, *size, generator=generator)
    found = wan(latents, timesteps, prompt_embeds)
    padded = F.pad(latents, (0, size[2] % 2, 0, size[1] % 2, 0, 0), mode="circular")
    expected = wan(padded, timesteps, prompt_embeds)[..., : size[1], : size[2]]
    assert found.shape == latents.shape
    torch.testing.assert_close(found, expected)


def test_videos_of_a_batch_do_not_mix(wan: WanModel, inputs: tuple[Tensor, ...]) -> None:
    together = wan(*inputs)
    for i in range(2):
        alone = wan(*(x[i : i + 1] for x in inputs))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-5)


def test_every_block_and_the_head_are_given_rows_of_tokens(
    wan: WanModel, inputs: tuple[Tensor, ...]
) -> None:
    given = []
    for module in (*wan.blocks, wan.head):
        module.register_forward_pre_hook(lambda _, args: given.append(args[0].is_contiguous()))
    wan(*inputs)
    assert given == [True] * (len(wan.blocks) + 1)


def test_every_parameter_and_input_acts_on_the_velocity(
    wan: WanModel, inputs: tuple[Tensor, ...]
) -> None:
    latents, timesteps, prompt_embeds = inputs
    latents.requires_grad_(True)
    prompt_embeds.requires_grad_(True)
    wan(latents, timesteps, prompt_embeds).square().sum().backward()
    # A constant added to every key, or to the scores of a softmax, changes nothing.
    silent = ("cross_attn.k.bias",)
    for name, parameter in wan.named_parameters():
        assert parameter.grad is not None, name
        assert name.endswith(silent) or bool((parameter.grad != 0).any()), name
    assert bool((latents.grad != 0).all())
    assert bool((prompt_embeds.grad != 0).all())


def test_the_velocity_keeps_the_latents_dtype(wan: WanModel, inputs: tuple[Tensor, ...]) -> None:
    latents, timesteps, prompt_embeds = inputs
    assert wan(latents.bfloat16(), timesteps, prompt_embeds).dtype == torch.bfloat16
    assert wan.bfloat16()(latents, timesteps, prompt_embeds).dtype == torch.float32


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rotary_positions_are_relative_along_every_axis(axis: int) -> None:
    grid = [3, 5, 4]
    larger = list(grid)
    larger[axis] += 2
    wide = rotary_embedding(tuple(larger), 32, torch.device("cpu")).unflatten(1, larger)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 60, 2, 32, generator=generator)

    def logits(start: int) -> Tensor:
        rotary = wide.narrow(axis + 1, start, grid[axis]).flatten(1, 3)
        rotated = (rotate(x, rotary) for x in (query, key))
        return torch.einsum("blnd,bsnd->bnls", *rotated)

    torch.testing.assert_close(logits(2), logits(0), rtol=1e-4, atol=1e-4)


def test_rotary_distinguishes_every_position() -> None:
    rotary = rotary_embedding((3, 5, 4), 32, torch.device("cpu"))
    same = torch.ones(1, 60, 1, 32)
    rotated = rotate(same, rotary)[0, :, 0]
    distances = torch.cdist(rotated, rotated) + torch.eye(60)
    assert float(distances.min()) > 1e-2
    torch.testing.assert_close(rotated.norm(dim=1), same[0, :, 0].norm(dim=1))


def test_rotary_splits_a_head_of_128_into_44_42_and_42_channels() -> None:
    still = torch.tensor([1.0, 0.0])
    for axis, (first, last) in enumerate([(0, 22), (22, 43), (43, 64)]):
        grid = [1, 1, 1]
        grid[axis] = 2
        moved = rotary_embedding(tuple(grid), 128, torch.device("cpu"))[:, 1]
        turns = (moved != still[:, None]).any(dim=0).nonzero().squeeze(1)
        assert (int(turns[0]), int(turns[-1])) == (first, last - 1)
        assert float(moved[1, first]) == pytest.approx(torch.tensor(1.0).sin())


def test_timestep_embedding_is_cosines_then_sines() -> None:
    found = timestep_embedding(torch.tensor([0.0, 1000.0]), 256)
    torch.testing.assert_close(found[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    angles = 1000 * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    torch.testing.assert_close(found[1], torch.cat([angles.cos(), angles.sin()]).float())


def test_velocity_functions_speak_sigma_and_combine_both_branches(
    wan: WanModel, inputs: tuple[Tensor, ...]
) -> None:
    latents, timesteps, prompt_embeds = inputs
    negative = torch.zeros_like(prompt_embeds)
    found = bind(wan, prompt_embeds)(latents, timesteps / 1000)
    torch.testing.assert_close(found, wan(*inputs))
    guided = bind_guided(wan, prompt_embeds, negative, 3.0)(latents, timesteps / 1000)
    conditional, unconditional = wan(*inputs), wan(latents, timesteps, negative)
    torch.testing.assert_close(guided, 3 * conditional - 2 * unconditional, rtol=1e-4, atol=1e-4)


def test_guidance_one_computes_the_conditional_branch_alone(
    wan: WanModel, inputs: tuple[Tensor, ...]
) -> None:
    latents, timesteps, prompt_embeds = inputs
    batches: list[int] = []
    wan.patch_embedding.register_forward_hook(lambda *a: batches.append(len(a[2])))
    guided = bind_guided(wan, prompt_embeds, torch.zeros_like(prompt_embeds), 1.0)
    torch.testing.assert_close(guided(latents, timesteps / 1000), wan(*inputs), rtol=0, atol=0)
    assert batches == [2, 2]


@pytest.mark.parametrize(
    ("latents_shape", "embeds_shape", "words"),
    [
        ((2, 3, 2, 6, 4), (2, 5, 16), r"latents of shape \[2, 3, 2, 6, 4\]"),
        ((4, 2, 6, 4), (2, 5, 16), "latents of shape"),
        ((2, 4, 2, 6, 4), (2, 5, 17), "text encoder"),
        ((2, 4, 2, 6, 4), (5, 16), "text encoder"),
    ],
)
def test_inputs_that_do_not_fit_are_named(
    latents_shape: tuple[int, ...], embeds_shape: tuple[int, ...], words: str, wan: WanModel
) -> None:
    with pytest.raises(ValueError, match=words):
        wan(torch.zeros(latents_shape), torch.zeros(2), torch.zeros(embeds_shape))


@pytest.mark.parametrize(("dim", "num_heads"), [(100, 3), (9, 3)])
def test_heads_must_split_the_width_evenly(dim: int, num_heads: int) -> None:
    with pytest.raises(ValueError, match=f"dim {dim} does not split"):
        WanConfig(dim=dim, num_heads=num_heads)
