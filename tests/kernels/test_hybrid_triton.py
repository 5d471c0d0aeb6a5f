"""The fused hybrid kernels and their operator: the reference's value and gradient, everywhere.

Without a GPU they run in Triton's interpreter, which rounds to bf16 towards zero.
"""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from linvideo_core import kernels
from linvideo_core.kernels import ATTENTION_MASSES, custom_ops
from linvideo_core.kernels.hybrid_reference import hybrid_attention, initial_weights
from linvideo_core.kernels.tiles import Tiles
from tests.kernels.conftest import TOLERANCE

pytest.importorskip("triton", minversion="3.3")
pytestmark = pytest.mark.usefixtures("poisoned")
# Odd sizes; ragged tiles, some of whose blocks are empty; several blocks of queries and
# keys a tile; tokens beside the video's, in several tiles; one tile for all; one token a tile.
TILINGS = [
    Tiles(grid=(3, 5, 4), tile=(1, 2, 3)),
    Tiles(grid=(5, 6, 7), tile=(3, 4, 4), before=3, after=60),
    Tiles(grid=(3, 9, 11), tile=(3, 9, 7)),
    Tiles(grid=(2, 3, 3), tile=(9, 9, 9)),
    Tiles(grid=(1, 3, 1), tile=(1, 1, 1), after=2),
]


def make_inputs(
    tiles: Tiles,
    dtype: torch.dtype,
    device: str,
    attention_mass: str = "query",
    *,
    D: int = 64,
    M: int = 64,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return query, key, value of two heads, both maps, and moved weights, batch 2."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = [normal(2, tiles.num_tokens, 2, D).to(dtype) for _ in range(3)]
    tensors += [normal(2, D, M // 2) / D**0.5 for _ in range(2)]
    start = initial_weights(attention_mass, 2, D).items()
    weights = {name: (x + 0.3 * normal(*x.shape)).to(device) for name, x in start}
    return [x.to(device) for x in tensors], weights


def error(found: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """Return the norm of the difference over the norm of what is expected, or over `scale`."""
    difference = float((found.double() - expected.detach()).norm())
    return difference / max(float(expected.detach().norm()), scale)


def attend(
    *leaves: Tensor,
    tiles: Tiles = TILINGS[0],
    attention_mass: str = "query",
    backend: str = "triton",
) -> Tensor:
    """Return what the door gives for the tensors of `make_inputs`."""
    names = initial_weights(attention_mass, *leaves[3].shape[:2])
    weights = dict(zip(names, leaves[5:], strict=True))
    return kernels.hybrid_attention(*leaves[:5], weights, tiles, attention_mass, backend=backend)


def assert_is_the_reference(
    inputs: list[Tensor], weights: dict[str, Tensor], tiles: Tiles, attention_mass: str
) -> None:
    leaves = [x.requires_grad_() for x in (*inputs, *weights.values())]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    moved = dict(zip(weights, exact[5:], strict=True))
    expected = hybrid_attention(*exact[:5], moved, tiles, attention_mass)
    found = attend(*leaves, tiles=tiles, attention_mass=attention_mass)
    dtype = inputs[2].dtype
    assert found.dtype == dtype and found.shape == expected.shape
    assert error(found.detach(), expected) < TOLERANCE[dtype]
    generator = torch.Generator().manual_seed(9)
    upstream = torch.randn(expected.shape, generator=generator).to(found)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    gradients = torch.autograd.grad(found, leaves, upstream)
    # Where all keys are one tile's, what estimates the others has no gradient.
    scale = 1e-3 * max(float(x.norm()) for x in wanted)
    names = ("query", "key", "value", "query_map", "key_map", *weights)
    for name, x, y in zip(names, gradients, wanted, strict=True):
        assert error(x, y, scale) < TOLERANCE[dtype], name


# With one token a tile gradients are small differences from the output, which bf16 rounds.
@pytest.mark.parametrize(
    ("tiles", "dtype"),
    [(tiles, torch.float32) for tiles in TILINGS] + [(t, torch.bfloat16) for t in TILINGS[:-1]],
    ids=str,
)
@pytest.mark.parametrize("attention_mass", ATTENTION_MASSES)
def test_it_is_the_reference_over_any_tiles(
    tiles: Tiles, dtype: torch.dtype, attention_mass: str, device: str
) -> None:
    inputs = make_inputs(tiles, dtype, device, attention_mass)
    assert_is_the_reference(*inputs, tiles, attention_mass)


@pytest.mark.parametrize(
    ("D", "M", "dtype", "attention_mass"),
    [
        (64, 128, torch.float32, "query"),
        (128, 128, torch.bfloat16, "query"),
        (128, 128, torch.float16, "moments"),
        (128, 128, torch.bfloat16, "moments"),
    ],
)
def test_it_is_the_reference_of_all_widths(
    D: int, M: int, dtype: torch.dtype, attention_mass: str, device: str
) -> None:
    inputs = make_inputs(TILINGS[0], dtype, device, attention_mass, D=D, M=M)
    assert_is_the_reference(*inputs, TILINGS[0], attention_mass)


@pytest.mark.parametrize("D", [64, 128])
def test_moments_of_bf16_are_as_exact_as_fp32(D: int, device: str) -> None:
    (_, key, *_), _ = make_inputs(TILINGS[1], torch.bfloat16, device, D=D)
    mean, products = custom_ops.moments(key)
    exact = key.double()
    assert error(mean, exact.mean(dim=1)) < TOLERANCE[torch.float32]
    expected = torch.einsum("blnd,blne->bnde", exact, exact) / key.shape[1]
    assert error(products, expected) < TOLERANCE[torch.float32]


def test_sharp_scores_neither_overflow_nor_vanish(device: str) -> None:
    inputs, weights = make_inputs(TILINGS[1], torch.float32, device)
    sharp = [30 * x if i < 2 else x for i, x in enumerate(inputs)]
    expected = hybrid_attention(*sharp, weights, TILINGS[1], "query")
    assert error(attend(*sharp, *weights.values(), tiles=TILINGS[1]), expected) < 1e-4


def make_leaves(
    device: str, dtype: torch.dtype = torch.float32, attention_mass: str = "query"
) -> list[Tensor]:
    """Return all that the operator learns from, over `TILINGS[0]`."""
    inputs, weights = make_inputs(TILINGS[0], dtype, device, attention_mass)
    return [x.requires_grad_() for x in (*inputs, *weights.values())]


def gradients_of(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


@pytest.mark.parametrize("attention_mass", ATTENTION_MASSES)
def test_any_strides_and_frozen_maps_give_the_same(attention_mass: str, device: str) -> None:
    leaves = make_leaves(device, attention_mass=attention_mass)
    expected = gradients_of(attend(*leaves, attention_mass=attention_mass), leaves)
    # One projection for all, heads before tokens, and a last axis that is not contiguous.
    packed = torch.stack(leaves[:3], dim=2).unbind(2)
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in leaves[:3]]
    scattered = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in leaves[:3]]
    for views in (packed, by_head, scattered):
        assert torch.equal(attend(*views, *leaves[3:], attention_mass=attention_mass), expected[0])
    frozen = [x.detach() for x in leaves[3:5]]
    learning = [*leaves[:3], *leaves[5:]]
    found = gradients_of(
        attend(*scattered, *frozen, *leaves[5:], attention_mass=attention_mass), learning
    )
    for x, y in zip(found, [*expected[:4], *expected[6:]], strict=True):
        torch.testing.assert_close(x, y)


def test_the_operators_keep_pytorchs_contract(device: str) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    inputs, _ = make_inputs(TILINGS[0], torch.bfloat16, device)
    level, slope = torch.zeros(2, device=device), torch.zeros(2, 2, 64, device=device)
    spread = torch.eye(64, device=device).expand(2, 2, -1, -1)
    for last in (None, spread):
        tensors = [x.requires_grad_() for x in (*inputs, level, slope)]
        arguments = (*tensors, last, TILINGS[0].numbers)
        torch.library.opcheck(custom_ops.hybrid_attention, arguments, test_utils=checks)
    torch.library.opcheck(custom_ops.moments, (tensors[1],), test_utils=checks)


@pytest.mark.parametrize("attention_mass", ATTENTION_MASSES)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiled_or_recomputed_it_is_the_same(
    backend: str, attention_mass: str, device: str
) -> None:
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=frames, fullgraph=True, dynamic=False)
    leaves = make_leaves(device, attention_mass=attention_mass)
    settings = {"backend": backend, "attention_mass": attention_mass}
    expected = gradients_of(attend(*leaves, **settings), leaves)
    with torch.autocast(device, torch.bfloat16):
        recomputed = checkpoint(attend, *leaves, **settings, use_reentrant=False)
    for out in (compiled(*leaves, **settings), recomputed):
        for x, y in zip(gradients_of(out, leaves), expected, strict=True):
            torch.testing.assert_close(x, y)
    assert frames.frame_count == 1
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves, **settings), attend(*leaves, **settings))
    assert frames.frame_count == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_tried_once_and_found_right(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_tried", {})
    for _ in range(2):
        attend(*make_leaves(device, dtype))
    case = ("hybrid_query", 64, 64, dtype, "maps")
    assert [(key[1], reason) for key, reason in kernels._tried.items()] == [(case, "")]


def test_more_features_than_the_kernels_know_are_the_references(device: str) -> None:
    inputs, weights = make_inputs(TILINGS[0], torch.float32, device, D=128, M=256)
    expected = hybrid_attention(*inputs, weights, TILINGS[0], "query")
    assert torch.equal(attend(*inputs, *weights.values(), backend="auto"), expected)
    with pytest.raises(ValueError, match="of 128 features at most"):
        attend(*inputs, *weights.values())


def test_other_tokens_weights_and_masses_than_needed_are_refused() -> None:
    inputs, weights = make_inputs(TILINGS[0], torch.float32, "cpu")
    with pytest.raises(ValueError, match="60, 60, 60 tokens given; the tiles have 273"):
        kernels.hybrid_attention(*inputs, weights, TILINGS[1], "query")
    for wrong in ({"mass_bias": weights["mass_bias"]}, weights | {"mass_gate": torch.zeros(2)}):
        with pytest.raises(ValueError, match=r"mass_gate \[2, 64\] on cpu is needed"):
            kernels.hybrid_attention(*inputs, wrong, TILINGS[0], "query")
    with pytest.raises(ValueError, match="'guess' given; one of query, moments is needed"):
        kernels.hybrid_attention(*inputs, weights, TILINGS[0], "guess")


@pytest.mark.gpu
@pytest.mark.parametrize("attention_mass", ATTENTION_MASSES)
def test_a_cuda_graph_replays_it_with_its_gradients(attention_mass: str) -> None:
    leaves = make_leaves("cuda", torch.bfloat16, attention_mass)
    expected = gradients_of(attend(*leaves, attention_mass=attention_mass), leaves)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients_of(attend(*leaves, attention_mass=attention_mass), leaves)
    for x in found:
        x.zero_()
    graph.replay()
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("attention_mass", ATTENTION_MASSES)
def test_it_is_the_reference_at_a_real_tile(attention_mass: str) -> None:
    tiles = Tiles(grid=(7, 30, 20), tile=(3, 15, 13), before=9, after=100)
    inputs = make_inputs(tiles, torch.bfloat16, "cuda", attention_mass, D=128, M=128)
    assert_is_the_reference(*inputs, tiles, attention_mass)
