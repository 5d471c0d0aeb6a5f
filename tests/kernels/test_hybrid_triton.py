"""The fused hybrid kernels and their operator: the reference's value and gradient, everywhere.

Without a GPU they run in Triton's interpreter, which rounds to bf16 towards zero.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from linvideo_core import kernels
from linvideo_core.kernels import custom_ops
from linvideo_core.kernels.hybrid_reference import (
    HybridForm,
    hybrid_attention,
    initial_weights,
)
from linvideo_core.kernels.tiles import Tiles

pytest.importorskip("triton", minversion="3.3")
hybrid_triton = pytest.importorskip("linvideo_core.kernels.hybrid_triton")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not IS_INTERPRETED, reason="compiled for a GPU")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
# Relative error against fp64, by dtype.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2 if IS_INTERPRETED else 1e-2}
TOLERANCE[torch.float16] = TOLERANCE[torch.bfloat16]
FORM = HybridForm(mass="query")
# Odd sizes; ragged and shifted tiles, whose first slots are empty; several blocks of queries and
# keys a tile; tokens beside the video's, in several tiles; one tile for all; one token a tile.
TILINGS = [
    Tiles(grid=(3, 5, 4), tile=(1, 2, 3)),
    Tiles(grid=(5, 6, 7), tile=(3, 4, 4), shift=(1, 2, 2), before=3, after=60),
    Tiles(grid=(3, 9, 11), tile=(3, 9, 7), shift=(0, 0, 6)),
    Tiles(grid=(2, 3, 3), tile=(9, 9, 9), shift=(1, 1, 1)),
    Tiles(grid=(1, 3, 1), tile=(1, 1, 1), after=2),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernel runs."""
    return request.param


@pytest.fixture(autouse=True)
def _poison_what_is_never_written() -> Iterator[None]:
    """Fill new tensors with NaN, so that an element that the kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(
    tiles: Tiles, dtype: torch.dtype, device: str, *, D: int = 64, M: int = 64
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return query, key, value of two heads, both maps, and moved weights, batch 2."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = [normal(2, tiles.num_tokens, 2, D).to(dtype) for _ in range(3)]
    tensors += [normal(2, D, M // 2) / D**0.5 for _ in range(2)]
    start = initial_weights(FORM, 2, D).items()
    weights = {name: (x + 0.3 * normal(*x.shape)).to(device) for name, x in start}
    return [x.to(device) for x in tensors], weights


def error(found: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """Return the norm of the difference over the norm of what is expected, or over `scale`."""
    difference = float((found.double() - expected.detach()).norm())
    return difference / max(float(expected.detach().norm()), scale)


NAMES = ("query", "key", "value", "query_map", "key_map", "mass_bias", "mass_gate")


def assert_is_the_reference(inputs: list[Tensor], weights: dict[str, Tensor], tiles: Tiles) -> None:
    exact = [x.detach().double().requires_grad_() for x in (*inputs, *weights.values())]
    moved = dict(zip(weights, exact[5:], strict=True))
    expected = hybrid_attention(*exact[:5], moved, tiles, FORM)
    found = hybrid_triton.forward(*inputs, *weights.values(), tiles)
    dtype = inputs[2].dtype
    assert found[0].dtype == dtype and found[0].shape == expected.shape
    assert error(found[0], expected) < TOLERANCE[dtype]
    generator = torch.Generator().manual_seed(9)
    upstream = torch.randn(expected.shape, generator=generator).to(found[0])
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    arguments = (upstream, *inputs, *weights.values(), *found, tiles)
    gradients = hybrid_triton.backward(*arguments, needs_map_gradients=True)
    # Where all keys are one tile's, what estimates the others has no gradient.
    scale = 1e-3 * max(float(x.norm()) for x in wanted)
    for name, x, y, z in zip(NAMES, gradients, wanted, (*inputs, *weights.values()), strict=True):
        assert (x.dtype, x.shape) == (z.dtype, z.shape)
        assert error(x, y, scale) < TOLERANCE[dtype], name


# With one token a tile gradients are small differences from the output, which bf16 rounds.
@pytest.mark.parametrize(
    ("tiles", "dtype"),
    [(tiles, torch.float32) for tiles in TILINGS] + [(t, torch.bfloat16) for t in TILINGS[:-1]],
    ids=str,
)
def test_it_is_the_reference_over_any_tiles(tiles: Tiles, dtype: torch.dtype, device: str) -> None:
    assert_is_the_reference(*make_inputs(tiles, dtype, device), tiles)


@pytest.mark.parametrize(
    ("D", "M", "dtype"),
    [
        (64, 128, torch.float32),
        (128, 128, torch.bfloat16),
        (128, 128, torch.float16),
        (128, 256, torch.bfloat16),
    ],
)
def test_it_is_the_reference_of_all_widths(D: int, M: int, dtype: torch.dtype, device: str) -> None:
    assert_is_the_reference(*make_inputs(TILINGS[0], dtype, device, D=D, M=M), TILINGS[0])


def test_tokens_are_read_where_they_lie(device: str) -> None:
    inputs, weights = make_inputs(TILINGS[0], torch.float32, device)

    def compute(upstream: Tensor, *tokens: Tensor) -> list[Tensor]:
        tensors = (*tokens, *inputs[3:], *weights.values())
        found = hybrid_triton.forward(*tensors, TILINGS[0])
        settings = {"needs_map_gradients": False}
        return [
            *found,
            *hybrid_triton.backward(upstream, *tensors, *found, TILINGS[0], **settings),
        ]

    tokens = [inputs[0].flip(1), *inputs[:3]]
    expected = compute(*tokens)
    # One projection for all, then heads before tokens.
    packed = torch.stack(tokens, dim=2).unbind(2)
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tokens]
    for views in (packed, by_head):
        for x, y in zip(compute(*views), expected, strict=True):
            assert torch.equal(x, y)


def test_sharp_scores_neither_overflow_nor_vanish(device: str) -> None:
    inputs, weights = make_inputs(TILINGS[1], torch.float32, device)
    sharp = [30 * x if i < 2 else x for i, x in enumerate(inputs)]
    expected = hybrid_attention(*sharp, weights, TILINGS[1], FORM)
    found, *_ = hybrid_triton.forward(*sharp, *weights.values(), TILINGS[1])
    assert error(found, expected) < 1e-4


def make_leaves(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return all that the operator learns from, over `TILINGS[0]`."""
    inputs, weights = make_inputs(TILINGS[0], dtype, device)
    return [x.requires_grad_() for x in (*inputs, *weights.values())]


def attend(*leaves: Tensor, backend: str = "triton", form: HybridForm = FORM) -> Tensor:
    weights = dict(zip(NAMES[5:], leaves[5:], strict=True))
    return kernels.hybrid_attention(*leaves[:5], weights, TILINGS[0], form, backend=backend)


def gradients_of(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


def test_the_door_gives_the_references_gradient_to_all_that_learns(device: str) -> None:
    leaves = make_leaves(device)
    found = gradients_of(attend(*leaves), leaves)
    for x, y in zip(found, gradients_of(attend(*leaves, backend="reference"), leaves), strict=True):
        assert error(x, y) < 2e-5
    # A last axis that is not contiguous, and maps that do not learn.
    scattered = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in leaves[:3]]
    frozen = [x.detach() for x in leaves[3:5]]
    out = attend(*scattered, *frozen, *leaves[5:])
    assert torch.equal(out, found[0])
    learning = [*leaves[:3], *leaves[5:]]
    expected = [found[0], *found[1:4], *found[6:]]
    for x, y in zip(gradients_of(out, learning), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_the_operator_keeps_pytorchs_contract(device: str) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    inputs = (*make_leaves(device, torch.bfloat16), TILINGS[0].numbers)
    torch.library.opcheck(custom_ops.hybrid_attention, inputs, test_utils=checks)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiled_or_recomputed_it_is_the_same(backend: str, device: str) -> None:
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=frames, fullgraph=True, dynamic=False)
    leaves = make_leaves(device)
    expected = gradients_of(attend(*leaves, backend=backend), leaves)
    settings = {"backend": backend, "use_reentrant": False}
    with torch.autocast(device, torch.bfloat16):
        recomputed = checkpoint(attend, *leaves, **settings)
    for out in (compiled(*leaves, backend=backend), recomputed):
        for x, y in zip(gradients_of(out, leaves), expected, strict=True):
            torch.testing.assert_close(x, y)
    assert frames.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_tried_once_and_found_right(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_tried", {})
    for _ in range(2):
        attend(*make_leaves(device, dtype))
    case = ("hybrid_attention", 64, 64, dtype, "maps")
    assert [(key[1], reason) for key, reason in kernels._tried.items()] == [(case, "")]


@pytest.mark.parametrize(
    "form",
    [
        HybridForm(mass="query", is_far_only=True),
        HybridForm(mass="query", has_covariance=True),
        HybridForm(mass="features"),
    ],
    ids=str,
)
def test_a_form_that_the_kernels_do_not_know_is_the_references(
    form: HybridForm, device: str
) -> None:
    inputs, _ = make_inputs(TILINGS[0], torch.float32, device)
    weights = {name: x.to(device) for name, x in initial_weights(form, 2, 64).items()}
    expected = hybrid_attention(*inputs, weights, TILINGS[0], form)
    assert torch.equal(kernels.hybrid_attention(*inputs, weights, TILINGS[0], form), expected)
    with pytest.raises(ValueError, match="fused kernels know hybrid layers of mass 'query' alone"):
        kernels.hybrid_attention(*inputs, weights, TILINGS[0], form, backend="triton")


def test_other_tokens_and_weights_than_needed_are_refused() -> None:
    inputs, weights = make_inputs(TILINGS[0], torch.float32, "cpu")
    with pytest.raises(ValueError, match="60, 60, 60 tokens given; the tiles have 273"):
        kernels.hybrid_attention(*inputs, weights, TILINGS[1], FORM)
    for wrong in ({"mass_bias": weights["mass_bias"]}, weights | {"mass_gate": torch.zeros(2)}):
        with pytest.raises(ValueError, match=r"mass_gate \[2, 64\] on cpu is needed"):
            kernels.hybrid_attention(*inputs, wrong, TILINGS[0], FORM)


@pytest.mark.gpu
def test_a_cuda_graph_replays_it_with_its_gradients() -> None:
    leaves = make_leaves("cuda", torch.bfloat16)
    expected = gradients_of(attend(*leaves), leaves)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients_of(attend(*leaves), leaves)
    for x in found:
        x.zero_()
    graph.replay()
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
def test_it_is_the_reference_at_a_real_tile() -> None:
    tiles = Tiles(grid=(7, 30, 20), tile=(3, 15, 13), shift=(1, 7, 6), before=9, after=100)
    assert_is_the_reference(*make_inputs(tiles, torch.bfloat16, "cuda", D=128, M=128), tiles)
