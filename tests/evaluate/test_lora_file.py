"""A LoRA of others and a LINVIDEO file are added in the space of weights."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from linvideo_core import artifact
from linvideo_core.artifact import Artifact
from linvideo_core.evaluate.compare import FewStepLora, compare_few_step, find_students
from linvideo_core.evaluate.config import CompareConfig
from linvideo_core.evaluate.lora_file import LoraFile, add_changes, find_changes, load_lora
from linvideo_core.teacher.teacher import Teacher

RANK, ALPHA, STRENGTH = 3, 6.0, 0.7
LAYERS = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.2.ffn.0")
DIFFUSERS = ("blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.2.ffn.net.0.proj")
COMFYUI = tuple(f"diffusion_model.{name}" for name in LAYERS)


def with_lora(
    model: nn.Module, lora: LoraFile, *, strength: float = 1.0
) -> contextlib.AbstractContextManager[nn.Module]:
    return add_changes(model, find_changes(lora, model, strength=strength))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def halves(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return up and down of `LAYERS`."""
    generator = torch.Generator().manual_seed(0)
    return [
        tuple(0.05 * torch.randn(s, generator=generator) for s in ((rows, RANK), (RANK, columns)))
        for rows, columns in (model.get_parameter(f"{name}.weight").shape for name in LAYERS)
    ]


def save_lora(
    model: nn.Module,
    path: Path,
    names: tuple[str, ...] = COMFYUI,
    roles: tuple[str, str] = ("lora_up", "lora_down"),
    alpha: float | None = ALPHA,
) -> Path:
    tensors = {}
    for name, pair in zip(names, halves(model), strict=True):
        tensors |= {f"{name}.{role}.weight": x for role, x in zip(roles, pair, strict=True)}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


@pytest.fixture
def lora_path(teacher: Teacher, tmp_path: Path) -> Path:
    return save_lora(teacher.model, tmp_path / "lora.safetensors")


@pytest.fixture(autouse=True)
def _the_model_is_given_back(teacher: Teacher) -> Iterator[None]:
    before = weights_of(teacher.model)
    yield
    assert all(torch.equal(x, before[name]) for name, x in weights_of(teacher.model).items())


@pytest.mark.parametrize(
    ("names", "roles", "alpha"),
    [
        (COMFYUI, ("lora_up", "lora_down"), ALPHA),
        (COMFYUI, ("lora_B", "lora_A"), None),
        ([f"transformer.{n}" for n in DIFFUSERS], ("lora_B", "lora_A"), None),
        ([f"base_model.model.{n}" for n in LAYERS], ("lora_B.default", "lora_A.default"), ALPHA),
        ([f"lora_unet_{n.replace('.', '_')}" for n in LAYERS], ("lora_up", "lora_down"), ALPHA),
        (LAYERS, ("lora_up", "lora_down"), None),
    ],
)
@pytest.mark.parametrize("strength", [STRENGTH, 0.0])
def test_alpha_over_rank_times_up_down_is_added_under_any_naming(
    names: tuple[str, ...],
    roles: tuple[str, str],
    alpha: float | None,
    strength: float,
    teacher: Teacher,
    tmp_path: Path,
) -> None:
    model, expected = teacher.model, weights_of(teacher.model)
    path = save_lora(model, tmp_path / "x.safetensors", names, roles, alpha)
    for name, (up, down) in zip(LAYERS, halves(model), strict=True):
        expected[f"{name}.weight"] += strength * (1 if alpha is None else alpha / RANK) * up @ down
    with with_lora(model, load_lora(path), strength=strength):
        for name, found in weights_of(model).items():
            atol = 1e-6 if strength and name.removesuffix(".weight") in LAYERS else 0
            torch.testing.assert_close(found, expected[name], rtol=0, atol=atol)


def test_whole_changes_reach_weights_biases_and_bare_parameters(
    teacher: Teacher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, before = teacher.model, weights_of(teacher.model)
    changes = {
        "blocks.0.norm3.weight": "blocks.0.norm3.diff",
        "blocks.1.ffn.2.bias": "blocks.1.ffn.2.diff_b",
        "blocks.2.modulation": "blocks.2.modulation.diff",
        "blocks.1.modulation": "blocks.1.diff_m",
        "head.modulation": "head.diff_m",
        "patch_embedding.weight": "patch_embedding.diff",
    }
    tensors = {
        f"diffusion_model.{key}": torch.full_like(before[name], 0.25)
        for name, key in changes.items()
    }
    save_file(tensors, tmp_path / "x.safetensors")
    with with_lora(model, load_lora(tmp_path / "x.safetensors"), strength=2.0):
        for name, found in weights_of(model).items():
            assert torch.equal(found, before[name] + 0.5 * (name in changes)), name
    (warning,) = caplog.messages
    assert "the modulation of 2 layers (diff_m), which ComfyUI leaves out" in warning


def test_the_lora_half_of_our_own_file_is_what_the_file_does_to_the_weights(
    teacher: Teacher, linearized: Artifact, tmp_path: Path
) -> None:
    path, model = tmp_path / "own.safetensors", teacher.model
    artifact.save(linearized, path, dtype=torch.float32)
    before = weights_of(model)
    with artifact.apply(artifact.load(path), model):
        expected = {name: x for name, x in weights_of(model).items() if name in before}
    with with_lora(model, load_lora(path)):
        found = weights_of(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    assert any(not torch.equal(found[name], x) for name, x in before.items())


def test_lora_and_linearized_file_come_in_any_order(
    teacher: Teacher, linearized: Artifact, lora_path: Path
) -> None:
    model, lora, before = teacher.model, load_lora(lora_path), weights_of(teacher.model)
    with artifact.apply(linearized, model), with_lora(model, lora):
        first = weights_of(model)
    with with_lora(model, lora), artifact.apply(linearized, model):
        second = weights_of(model)
    assert first.keys() == second.keys() and first.keys() > before.keys()
    for name, x in first.items():
        torch.testing.assert_close(second[name], x, rtol=0, atol=1e-6)


FFN = "blocks.0.ffn.0"


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({}, "holds no weight changes"),
        ({f"{FFN}.lora_up.weight": (4, 2)}, f"up torch.float32 .* for '{FFN}', where two matrices"),
        ({f"{FFN}.dora_scale": (4, 1)}, f"holds '{FFN}.dora_scale', which is not known"),
        ({"blocks.9.ffn.0.diff": (4, 4)}, "changes 1 of 1 layers that the model does not have"),
        ({"blocks.0.diff": (4, 4)}, "changes 1 of 1 layers that the model does not have"),
        (
            {"blocks.0.cross_attn.norm_k_img.diff": (4,), "img_emb.proj.0.diff_b": (4,)},
            "changes 2 of 2 layers that the model does not have, such as 'blocks.0.cross_attn.norm",
        ),
        ({f"{FFN}.diff": (4, 4)}, r"by \[4, 4\], but the model has one of \[96, 128\]"),
        ({"blocks.0.diff_m": (1, 6, 4)}, r"by \[1, 6, 4\], but the model has one of \[1, 6, "),
        (
            {f"{FFN}.lora_up.weight": (96, 2), f"{FFN}.lora_down.weight": (3, 128)},
            r"by \[96, 2\] and \[3, 128\]",
        ),
        ({f"{FFN}.lora_up.weight": (4,), f"{FFN}.lora_down.weight": (4,)}, "two matrices of rank"),
        ({f"{FFN}.lora_B.weight": (96, 0), f"{FFN}.lora_A.weight": (0, 128)}, "matrices of rank 1"),
        (
            {f"{FFN}.lora_B.weight": (9, 2), f"{FFN}.lora_A.weight": (2, 1), f"{FFN}.alpha": (2,)},
            r"alpha torch.float32 \[2\] .*at most a single number alpha",
        ),
        ({f"{FFN}.alpha": (1,)}, "two matrices"),
        (None, "is not a whole safetensors file"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_in_one_sentence(
    tensors: dict[str, tuple[int, ...]] | None, reason: str, teacher: Teacher, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    if tensors is None:
        path.write_bytes(b"no tensors")
    else:
        save_file({name: torch.ones(shape) for name, shape in tensors.items()}, path)
    with pytest.raises(ValueError, match=reason) as refused, contextlib.ExitStack() as stack:
        stack.enter_context(with_lora(teacher.model, load_lora(path)))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.int32, torch.float8_e4m3fn])
def test_a_lora_of_numbers_that_are_no_weights_is_refused(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    shapes = {f"{FFN}.lora_B.weight": (96, 2), f"{FFN}.lora_A.weight": (2, 128)}
    path = tmp_path / "x.safetensors"
    save_file({name: torch.ones(shape).to(dtype) for name, shape in shapes.items()}, path)
    with pytest.raises(ValueError, match="all finite fp16, bf16 or fp32: it is damaged"):
        load_lora(path)


def test_a_lora_is_refused_before_anything_is_sampled(
    teacher: Teacher, linearized: Artifact, lora_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_lora(tmp_path / "none.safetensors")
    save_file({f"{FFN}.diff": torch.ones(4, 4)}, tmp_path / "x.safetensors")
    settings = CompareConfig(num_samples=2, sampler_steps=1, batch_size=2)
    for path, strength, reason in (
        (tmp_path / "x.safetensors", 1.0, "choose a LoRA made for this model"),
        (lora_path, float("nan"), "a finite number is needed"),
    ):
        file, sigmas = load_lora(path), torch.tensor([1.0, 0.0])
        lora = FewStepLora(file=file, strength=strength, sigmas=sigmas)
        with pytest.raises(ValueError, match=reason):
            find_students(teacher.model, linearized, {}, settings, lora=lora)


def test_layers_that_the_model_lacks_are_left_out_with_one_warning(
    teacher: Teacher,
    linearized: Artifact,
    lora_path: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    strangers = {
        "blocks.9.self_attn.q.lora_up.weight": (4, 2),
        "blocks.9.self_attn.q.lora_down.weight": (2, 4),
        "blocks.0.cross_attn.k_img.lora_up.weight": (4, 2),
        "blocks.0.cross_attn.k_img.lora_down.weight": (2, 4),
        "blocks.0.cross_attn.k_img.diff_b": (4,),
        "blocks.0.cross_attn.norm_k_img.diff": (4,),
        # The layer is there, a modulation of it is not.
        "blocks.0.norm3.diff_m": (4,),
    }
    tensors = load_file(lora_path)
    tensors |= {f"diffusion_model.{name}": torch.ones(size) for name, size in strangers.items()}
    save_file(tensors, tmp_path / "more.safetensors")
    model, more = teacher.model, load_lora(tmp_path / "more.safetensors")
    with with_lora(model, load_lora(lora_path)):
        expected = weights_of(model)
    caplog.clear()
    # Once for both models.
    settings = CompareConfig(num_samples=2, sampler_steps=1, batch_size=2)
    lora = FewStepLora(file=more, strength=1.0, sigmas=torch.tensor([1.0, 0.0]))
    with caplog.at_level(logging.WARNING):
        students, _ = find_students(model, linearized, {}, settings, lora=lora)
        with students["teacher_lora_1"]:
            found = weights_of(model)
        with students["linearized_lora_1"]:
            pass
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    (warning,) = caplog.messages
    assert "changes 4 of 7 layers that the model does not have, such as" in warning
    assert "'diffusion_model.blocks.0.cross_attn.k_img'; they are left out" in warning


def test_a_few_step_lora_is_compared_on_teacher_and_linearized_model(
    teacher: Teacher, linearized: Artifact, lora_path: Path
) -> None:
    sigmas = torch.tensor([1.0, 0.9, 0.6, 0.0])
    lora = FewStepLora(file=load_lora(lora_path), strength=1.0, sigmas=sigmas)
    settings = CompareConfig(num_samples=3, sampler_steps=4, batch_size=3)
    rows = compare_few_step(teacher, linearized, {}, settings, lora=lora, seed=0).rows
    assert [(row["model"], row["steps"], row["linear_layers"]) for row in rows] == [
        ("teacher", 4, 0), ("linearized", 4, 2), ("teacher_lora_3", 3, 0),
        ("linearized_lora_3", 3, 2),
    ]  # fmt: skip
    assert len({row["distance_to_teacher"] for row in rows}) == 4
