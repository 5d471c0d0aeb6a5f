"""Our Wan carries the published checkpoints' names, takes any size, and refuses other files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from linvideo_core.flow import bind, bind_guided
from linvideo_core.kernels.reference import rotate
from linvideo_core.models.checkpoint import infer_config, load_wan
from linvideo_core.models.wan import WanConfig, WanModel, rotary_embedding, timestep_embedding

PUBLISHED = {
    "1.3B": (WanConfig(), 1536, 8960, 30),
    "14B": (WanConfig(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824), 5120, 13824, 40),
}
Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def published_shapes(dim: int, ffn_dim: int, num_layers: int) -> Shapes:
    """Return the names and shapes of a Wan 2.1 text-to-video checkpoint, spelled out."""
    shapes: Shapes = {
        "patch_embedding.weight": (dim, 16, 1, 2, 2),
        "patch_embedding.bias": (dim,),
        "text_embedding.0.weight": (dim, 4096),
        "text_embedding.0.bias": (dim,),
        "text_embedding.2.weight": (dim, dim),
        "text_embedding.2.bias": (dim,),
        "time_embedding.0.weight": (dim, 256),
        "time_embedding.0.bias": (dim,),
        "time_embedding.2.weight": (dim, dim),
        "time_embedding.2.bias": (dim,),
        "time_projection.1.weight": (6 * dim, dim),
        "time_projection.1.bias": (6 * dim,),
        "head.head.weight": (64, dim),
        "head.head.bias": (64,),
        "head.modulation": (1, 2, dim),
    }
    for layer in range(num_layers):
        block = f"blocks.{layer}"
        for attention in ("self_attn", "cross_attn"):
            for projection in "qkvo":
                shapes[f"{block}.{attention}.{projection}.weight"] = (dim, dim)
                shapes[f"{block}.{attention}.{projection}.bias"] = (dim,)
            shapes[f"{block}.{attention}.norm_q.weight"] = (dim,)
            shapes[f"{block}.{attention}.norm_k.weight"] = (dim,)
        shapes[f"{block}.norm3.weight"] = (dim,)
        shapes[f"{block}.norm3.bias"] = (dim,)
        shapes[f"{block}.ffn.0.weight"] = (ffn_dim, dim)
        shapes[f"{block}.ffn.0.bias"] = (ffn_dim,)
        shapes[f"{block}.ffn.2.weight"] = (dim, ffn_dim)
        shapes[f"{block}.ffn.2.bias"] = (dim,)
        shapes[f"{block}.modulation"] = (1, 6, dim)
    return shapes


@pytest.mark.parametrize("size", PUBLISHED)
def test_names_and_shapes_are_those_of_the_published_checkpoint(size: str) -> None:
    config, *sizes = PUBLISHED[size]
    with torch.device("meta"):
        model = WanModel(config)
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == published_shapes(*sizes)


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_architecture_is_read_off_the_shapes(size: str) -> None:
    config, *sizes = PUBLISHED[size]
    assert infer_config(published_shapes(*sizes)) == config


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_file_loads_with_or_without_the_repackaged_prefix(
    prefix: str, wan: WanModel, inputs: tuple[Tensor, ...], tmp_path: Path
) -> None:
    path = tmp_path / "wan.safetensors"
    tensors = {prefix + name: tensor for name, tensor in wan.state_dict().items()}
    if prefix:
        tensors["first_stage_model.decoder.bias"] = torch.zeros(3)
    save_file(tensors, path)
    loaded = load_wan(path)
    assert loaded.config == wan.config
    torch.testing.assert_close(loaded(*inputs), wan(*inputs), rtol=0, atol=0)


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


def test_a_velocity_function_speaks_sigma_and_the_model_timesteps(
    wan: WanModel, inputs: tuple[Tensor, ...]
) -> None:
    latents, _, prompt_embeds = inputs
    found = bind(wan, prompt_embeds)(latents, torch.tensor([0.81, 0.12]))
    torch.testing.assert_close(found, wan(latents, torch.tensor([810.0, 120.0]), prompt_embeds))


def test_guidance_combines_both_branches(wan: WanModel, inputs: tuple[Tensor, ...]) -> None:
    latents, timesteps, prompt_embeds = inputs
    negative = torch.zeros_like(prompt_embeds)
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


def _save(path: Path, change: Callable[[Tensors], object], wan: WanModel) -> None:
    tensors = {name: tensor.clone() for name, tensor in wan.state_dict().items()}
    change(tensors)
    save_file(tensors, path)


CHANGES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "2.1 image-to-video": (
        lambda t: t.update({"img_emb.proj.0.bias": torch.zeros(3)}),
        "image-to-video",
    ),
    "2.2 image-to-video": (
        lambda t: t.update({"patch_embedding.weight": torch.zeros(128, 9, 1, 2, 2)}),
        "image-to-video",
    ),
    "VACE": (lambda t: t.update({"vace_blocks.0.bias": torch.zeros(3)}), "VACE"),
    "a missing tensor": (lambda t: t.pop("blocks.1.ffn.0.bias"), "blocks.1.ffn.0.bias"),
    "a missing layer": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("blocks.1.")],
        "blocks.1.",
    ),
    "an extra tensor": (lambda t: t.update(other=torch.zeros(3)), "other"),
    "a shape of another width": (
        lambda t: t.update({"blocks.2.ffn.2.bias": torch.zeros(7)}),
        "blocks.2.ffn.2.bias",
    ),
    "no patch embedding": (lambda t: t.pop("patch_embedding.weight"), "not a Wan"),
    "a flat patch embedding": (
        lambda t: t.update({"patch_embedding.weight": torch.zeros(128, 4)}),
        "not a Wan",
    ),
    "a head without shape": (
        lambda t: t.update({"head.head.weight": torch.zeros(())}),
        "not a Wan",
    ),
    "layers without numbers": (
        lambda t: t.update({"blocks.x.bias": torch.zeros(3)}),
        "not a Wan",
    ),
    "a narrow model": (
        lambda t: t.update({"patch_embedding.weight": torch.zeros(64, 4, 1, 2, 2)}),
        "not a Wan",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_model_is_refused_in_one_sentence(name: str, wan: WanModel, tmp_path: Path) -> None:
    change, words = CHANGES[name]
    path = tmp_path / "other.safetensors"
    _save(path, change, wan)
    with pytest.raises(ValueError, match=words) as caught:
        load_wan(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a model",
        b"\xff" * 200,
        (2**40).to_bytes(8, "little") + b"{}",
        len(b"{}").to_bytes(8, "little") + b"{}",
        len(b"[1]").to_bytes(8, "little") + b"[1]",
        b"PK\x03\x04" + b"\0" * 100,
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.safetensors") as caught:
        load_wan(path)
    assert "\n" not in str(caught.value)


def test_a_cut_file_is_refused_in_one_sentence(wan: WanModel, tmp_path: Path) -> None:
    path = tmp_path / "wan.safetensors"
    _save(path, lambda tensors: None, wan)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    assert json.loads(whole[8:header])
    for size in (4, 8, header // 2, header, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a readable safetensors file") as caught:
            load_wan(path)
        assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_wan(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="without a safetensors checkpoint"):
        load_wan(tmp_path)


def test_half_precision_files_load_in_the_dtype_that_is_asked_for(
    wan: WanModel, tmp_path: Path
) -> None:
    path = tmp_path / "wan.safetensors"
    save_file({n: t.half() for n, t in wan.state_dict().items()}, path)
    assert {p.dtype for p in load_wan(path).parameters()} == {torch.float32}
    assert {p.dtype for p in load_wan(path, frozen="bf16").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("dim", "num_heads"), [(100, 3), (9, 3)])
def test_heads_must_split_the_width_evenly(dim: int, num_heads: int) -> None:
    with pytest.raises(ValueError, match=f"dim {dim} does not split"):
        WanConfig(dim=dim, num_heads=num_heads)
