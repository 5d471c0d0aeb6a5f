"""The fused hybrid kernel: the reference's output and log-sum-exp, wherever it runs.

Without a GPU it runs in Triton's interpreter, which rounds to bf16 towards zero.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

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


@pytest.mark.gpu
def test_it_is_the_reference_at_a_real_tile() -> None:
    tiles = Tiles(grid=(7, 30, 20), tile=(3, 15, 13), shift=(1, 7, 6), before=9, after=100)
    assert_is_the_reference(*make_inputs(tiles, torch.bfloat16, "cuda", D=128, M=128), tiles)
