"""Sparse softmax attention: dense at density 1, differentiable on a CPU, refused in a sentence."""

import dataclasses
import importlib
import importlib.machinery
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from linvideo_core.kernels import softmax
from linvideo_core.kernels.softmax import (
    attend_in_parts,
    softmax_attention,
    sparse_attention,
    why_not_sparse,
)
from linvideo_core.models import config
from linvideo_core.models.attention import SoftmaxAttention
from linvideo_core.models.attention_sites import attention_at, shapes_of, softmax_by
from linvideo_core.models.families import identify
from linvideo_core.models.wan import WanConfig, WanModel
from linvideo_core.run.errors import SettingError

CPU = torch.device("cpu")


@pytest.fixture
def forget() -> Iterator[None]:
    """Look for comfy-kitchen anew in this test, and after it."""
    softmax._refuse_package.cache_clear()
    yield
    softmax._refuse_package.cache_clear()


@pytest.fixture
def kitchen() -> None:
    pytest.importorskip("comfy_kitchen")
    if reason := why_not_sparse(CPU, 128, torch.float32):
        pytest.skip(reason)


def make_triple(length: int, **settings: object) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, 3, 16, generator=generator).to(**settings) for _ in range(3)]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
def test_at_density_1_it_is_dense_in_value_and_gradient(kitchen: None, length: int) -> None:
    found = []
    for settings in ({}, {"kernel": "sparse", "density": 1}):
        triple = [x.requires_grad_() for x in make_triple(length)]
        output = softmax_attention(*triple, **settings)
        output.square().sum().backward()
        found.append([output, *(x.grad for x in triple)])
    for dense, sparse in zip(*found, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-5)


def test_more_blocks_are_nearer_to_dense_and_sinks_are_exact(kitchen: None) -> None:
    triple = make_triple(1000)
    dense = softmax_attention(*triple)
    errors = [
        (sparse_attention(*triple, density) - dense).norm().item() for density in (0.1, 0.3, 0.6, 1)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 < errors[-2]
    # Of queries of blocks 2 and 3 to all keys, then of all queries to all blocks of keys.
    found = sparse_attention(*triple, 0.1, sink_q=(2, 4))
    torch.testing.assert_close(found[:, 128:256], dense[:, 128:256], rtol=1e-4, atol=1e-5)
    found = sparse_attention(*triple, 0.1, sink_blocks=(0, 16))
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("min_blocks", "shapes"),
    # 200 tokens are 4 blocks of each of 7 heads.
    [(3072, [7] * 2), (29, [7] * 2), (12, [3, 4] * 2), (5, [2, 2, 3] * 2), (1, [1] * 14)],
)
def test_in_parts_attention_is_the_whole_and_no_part_is_smaller_than_asked_for(
    kitchen: None, min_blocks: int, shapes: list[int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    # Heads in front of tokens, as some models have them.
    triple = [torch.randn(2, 7, 200, 16, generator=generator).transpose(1, 2) for _ in range(3)]
    parts = []

    def attend(*part: Tensor) -> Tensor:
        parts.append([x.shape for x in part])
        return sparse_attention(*part, 0.3)

    found = attend_in_parts(attend, *triple, min_blocks=min_blocks)
    assert parts == [[torch.Size([1, 200, heads, 16])] * 3 for heads in shapes]
    torch.testing.assert_close(found, sparse_attention(*triple, 0.3))
    assert found.is_contiguous()


def test_what_is_one_part_is_attended_as_it_is() -> None:
    triple = [x[:1] for x in make_triple(65)]
    assert attend_in_parts(lambda *given: given, *triple) == (*triple,)


def test_sparse_layers_are_those_that_are_softmax_for_a_while(kitchen: None) -> None:
    wan = WanModel(WanConfig(dim=128, num_heads=1, num_layers=2, ffn_dim=64))
    _, sites = identify(shapes_of(wan))
    before = [attention_at(wan, site) for site in sites]
    other = nn.Identity()
    wan.blocks[0].self_attn.attention = other
    with softmax_by(wan, sites, "sparse", 0.3):
        assert attention_at(wan, sites[0]) is other
        kept = attention_at(wan, sites[1])
        assert isinstance(kept, SoftmaxAttention) and kept.density == 0.3
        triple = make_triple(1000)
        assert torch.equal(kept(*triple), sparse_attention(*triple, 0.3))
    assert [attention_at(wan, site) for site in sites] == [other, before[1]]


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1])
def test_a_density_that_is_no_share_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match=f"density {density} given; a share above 0"):
        sparse_attention(*make_triple(8), density)
    with pytest.raises(SettingError, match=f"density {density} given; a number above 0"):
        config.SoftmaxConfig(softmax_kernel="sparse", density=density)


def test_other_shapes_or_dtypes_of_keys_are_refused(kitchen: None) -> None:
    query, key, value = make_triple(65)
    with pytest.raises(ValueError, match="one shape and dtype"):
        sparse_attention(query, key[:, :64], value[:, :64])
    with pytest.raises(ValueError, match=r"one shape and dtype; .* float64, float32"):
        sparse_attention(query, key.double(), value)


def test_settings_name_every_kernel() -> None:
    assert tuple(softmax.SOFTMAX_KERNELS) == config.SOFTMAX_KERNELS
    (field,) = (f for f in dataclasses.fields(config.SoftmaxConfig) if f.name == "density")
    assert field.metadata["help"].endswith(f"none: {softmax.DENSITY}")
    with pytest.raises(SettingError, match="has no gradient to train with"):
        config.SoftmaxConfig(softmax_kernel="sparse").check_training()


@pytest.mark.parametrize(
    ("module", "words"),
    [(None, "comfy-kitchen is not installed"), (ModuleType("comfy_kitchen"), "is too old for it")],
)
def test_without_the_package_one_sentence_says_what_to_install(
    forget: None, monkeypatch: pytest.MonkeyPatch, module: ModuleType | None, words: str
) -> None:
    if module is not None:
        module.__spec__ = importlib.machinery.ModuleSpec("comfy_kitchen", None)
    monkeypatch.setitem(sys.modules, "comfy_kitchen", module)
    with pytest.raises(ValueError, match=rf"{words} \(pip install 'comfy-kitchen>=0\.2\.40'\)"):
        softmax_attention(*make_triple(8), "sparse")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [64, 1000, 4097])
def test_a_gpus_kernel_is_the_reference(kitchen: None, length: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    triple = [
        torch.randn(1, length, 2, 128, device="cuda", generator=generator).to(dtype)
        for _ in range(3)
    ]
    for density in (0.1, 1):
        found = sparse_attention(*triple, density)
        expected = sparse_attention(*(x.float() for x in triple), density, backend="reference")
        assert (found.float() - expected).norm() < 0.1 * expected.norm()
    for wrong, words in ((triple[0].float(), "not float32"), (triple[0][..., :64], "head dim 64")):
        with pytest.raises(ValueError, match=words):
            sparse_attention(wrong, wrong, wrong)
    # In parts, of samples and where it is long of heads; rounding may choose another block.
    many = [torch.randn(2, length, 100, 128, device="cuda", generator=generator).to(dtype)] * 3
    whole = importlib.import_module("comfy_kitchen").sol_attn(*many, topk_ratio=0.1).float()
    assert (sparse_attention(*many, 0.1).float() - whole).norm() < 0.01 * whole.norm()
    with pytest.raises(ValueError, match="no gradient on a GPU"):
        sparse_attention(triple[0].requires_grad_(), *triple[1:])
