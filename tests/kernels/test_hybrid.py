"""Softmax within tiles beside linear attention: the reference against dense sums in fp64."""

import itertools
import math
import shutil

import pytest
import torch
from torch import Tensor

from linvideo_core.kernels import ATTENTION_MASSES, reference
from linvideo_core.kernels.hybrid_reference import hybrid_attention, initial_weights
from linvideo_core.kernels.tiles import Tiles
from tests.allocations import peak_bytes

# Odd sizes, ragged tiles, tokens beside the video's, one tile for all, one token a tile.
TILINGS = [
    Tiles(grid=(3, 5, 4), tile=(1, 2, 3)),
    Tiles(grid=(3, 5, 4), tile=(2, 2, 2)),
    Tiles(grid=(2, 3, 5), tile=(1, 2, 2), before=3, after=6),
    Tiles(grid=(2, 3, 3), tile=(9, 9, 9)),
    Tiles(grid=(1, 3, 1), tile=(1, 1, 1), after=2),
    Tiles(grid=(2, 3, 2), tile=(1, 3, 2), before=20),
]
# Relative error of the whole tensor against fp64, by the inputs' dtype.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}
# What tells the mass is few numbers, whose gradient sums what softmax's kernels round to bf16.
MASS_TOLERANCE = {**TOLERANCE, torch.bfloat16: 1.5e-2}
ids = {"ids": lambda x: str(x).replace(" ", "")}


def find_tiles(tiles: Tiles) -> list[object]:
    """Return the tile of every token, as its definition has it, token by token."""
    F, H, W = tiles.grid

    f, h, w = map(min, tiles.tile, tiles.grid)
    T = f * h * w
    others = [("other", i // T) for i in range(tiles.before + tiles.after)]
    video = [
        (t // f, y // h, x // w) for t, y, x in itertools.product(range(F), range(H), range(W))
    ]
    return [*others[: tiles.before], *video, *others[tiles.before :]]


def make_inputs(
    tiles: Tiles, attention_mass: str, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Tensor]:
    """Return tokens of two heads, both maps and moved weights, batch 2."""
    generator = torch.Generator().manual_seed(0)
    N, D, half = 2, 8, 6

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {name: normal(2, tiles.num_tokens, N, D) for name in ("query", "key", "value")}
    inputs |= {name: normal(N, D, half) / D**0.5 for name in ("query_map", "key_map")}
    for name, start in initial_weights(attention_mass, N, D).items():
        inputs[name] = start + 0.3 * normal(*start.shape)
    return {name: x.to(device, dtype).requires_grad_(True) for name, x in inputs.items()}


def features(x: Tensor, feature_map: Tensor) -> Tensor:
    """Return the features [B, N, L, M] of x [B, L, N, D]."""
    projected = torch.einsum("blnd,ndm->bnlm", x, feature_map)
    return torch.cat([p.softmax(dim=-1) for p in (projected, -projected)], dim=-1)


def define(inputs: dict[str, Tensor], tiles: Tiles, attention_mass: str) -> Tensor:
    """Return the hybrid layer by its formulas over all L x L pairs, [B, L, N, D]."""
    q, k, v = (inputs[name].transpose(1, 2) for name in ("query", "key", "value"))
    L, D = q.shape[2:]
    tile = find_tiles(tiles)
    is_own = torch.tensor([[a == b for b in tile] for a in tile])
    scores = q @ k.transpose(2, 3) / D**0.5
    own_scores = scores.masked_fill(~is_own, -math.inf)
    local, log_local = own_scores.softmax(dim=-1) @ v, own_scores.logsumexp(dim=-1)
    a, b = (features(inputs[s], inputs[f"{s}_map"]) for s in ("query", "key"))
    similarity = a @ b.transpose(2, 3)
    far = similarity @ v / similarity.sum(dim=-1, keepdim=True)
    num_outside = (~is_own).sum(dim=1).double()
    if attention_mass == "query":
        T = math.prod(map(min, tiles.tile, tiles.grid))
        log_far = 3 - 4 * inputs["mass_bias"][:, None] + math.log(T)
        log_far = log_far - (q * inputs["mass_gate"][:, None]).sum(-1)
    else:
        level, mean, variance = inputs["mass_moments"].unsqueeze(-1)
        keys = k - k.mean(dim=2, keepdim=True)
        covariance = keys.transpose(2, 3) @ keys / L
        spread = ((q @ covariance) * q).sum(-1) / D
        log_far = level + mean * (q @ k.mean(dim=2).unsqueeze(-1)).squeeze(-1) / D**0.5
        log_far = log_far + variance * spread / 2 + num_outside.log()
    share = (log_local - torch.where(num_outside > 0, log_far, -math.inf)).sigmoid().unsqueeze(-1)
    return (share * local + (1 - share) * far).transpose(1, 2)


def attend(inputs: dict[str, Tensor], tiles: Tiles, attention_mass: str) -> Tensor:
    names = ("query", "key", "value", "query_map", "key_map")
    weights = {name: x for name, x in inputs.items() if name not in names}
    return hybrid_attention(*(inputs[name] for name in names), weights, tiles, attention_mass)


def error(found: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """Return the norm of the difference over the norm of what is expected, or over `scale`."""
    difference = (found.detach().double().cpu() - expected.detach()).norm()
    return float(difference) / max(float(expected.detach().norm()), scale)


def assert_is_the_definition(
    tiles: Tiles, attention_mass: str, dtype: torch.dtype, device: str = "cpu"
) -> None:
    inputs = make_inputs(tiles, attention_mass, dtype, device)
    exact = {name: x.detach().double().cpu().requires_grad_(True) for name, x in inputs.items()}
    expected = define(exact, tiles, attention_mass)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    wanted = torch.autograd.grad(expected, [*exact.values()], upstream.double(), allow_unused=True)
    found = attend(inputs, tiles, attention_mass)
    gradients = torch.autograd.grad(found, [*inputs.values()], upstream.to(device))
    assert found.dtype == dtype
    assert error(found, expected) < TOLERANCE[dtype]
    # Where all keys are one tile's, what estimates the others has no gradient and no scale.
    scale = max(float(x.norm()) for x in wanted if x is not None) * 1e-2
    for name, gradient, x in zip(inputs, gradients, wanted, strict=True):
        most = (MASS_TOLERANCE if name.startswith("mass") else TOLERANCE)[dtype]
        assert error(gradient, torch.zeros(()) if x is None else x, scale) < most, name


@pytest.mark.parametrize("attention_mass", ATTENTION_MASSES)
@pytest.mark.parametrize("tiles", TILINGS, **ids)
def test_it_is_the_definition_in_value_and_gradient(tiles: Tiles, attention_mass: str) -> None:
    assert_is_the_definition(tiles, attention_mass, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention_mass", ATTENTION_MASSES)
def test_narrower_tokens_give_what_their_dtype_can_hold(
    attention_mass: str, dtype: torch.dtype, device: str
) -> None:
    assert_is_the_definition(TILINGS[2], attention_mass, dtype, device)


def test_gradients_of_narrow_maps_are_summed_over_chunks_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = make_inputs(TILINGS[2], "query", torch.bfloat16)

    def differentiate() -> Tensor:
        found = attend(inputs, TILINGS[2], "query").float().square().sum()
        return torch.autograd.grad(found, inputs["key_map"])[0]

    at_once = differentiate()
    monkeypatch.setattr(reference, "_MAX_CHUNK_FEATURES", 1)
    assert error(differentiate(), at_once) < 4e-3


@pytest.mark.parametrize("size", [1, 2 * 2 * 8 * 4 * 3])
def test_chunks_of_any_size_change_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(TILINGS[2], "moments", torch.float64)
    expected = define(inputs, TILINGS[2], "moments")
    monkeypatch.setattr(reference, "_MAX_CHUNK_FEATURES", size)
    assert_is_the_definition(TILINGS[2], "moments", torch.float64)
    with torch.no_grad():
        assert error(attend(inputs, TILINGS[2], "moments"), expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("attention_mass", ATTENTION_MASSES)
@pytest.mark.parametrize("tiles", TILINGS, **ids)
def test_without_a_gradient_it_gives_the_same(tiles: Tiles, attention_mass: str) -> None:
    inputs = make_inputs(tiles, attention_mass, torch.float64)
    expected = attend(inputs, tiles, attention_mass)
    with torch.no_grad():
        torch.testing.assert_close(attend(inputs, tiles, attention_mass), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_high_scores_are_weighed_finer_than_their_dtype(dtype: torch.dtype) -> None:
    """At 100, bf16 has steps of a half: they would change a share by more than a tenth."""
    tiles = TILINGS[2]
    inputs = make_inputs(tiles, "query", dtype)
    with torch.no_grad():
        # q k / sqrt(D) is 100 for all, and log F about log A, which is 101.4 in a whole tile.
        for name in ("query", "key"):
            inputs[name].fill_((100 / 8**0.5) ** 0.5)
        inputs["mass_gate"].zero_()
        inputs["mass_bias"].copy_(torch.tensor([-24.6, -24.4]))
    exact = {name: x.detach().double().requires_grad_(True) for name, x in inputs.items()}
    expected = define(exact, tiles, "query")
    assert error(attend(inputs, tiles, "query"), expected) < TOLERANCE[dtype]


def test_in_bf16_the_mass_learns_where_tiles_have_little_of_it() -> None:
    tiles = Tiles(grid=(8, 32, 32), tile=(1, 2, 2))
    names = ("query", "key", "value", "query_map", "key_map")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 1, tiles.num_tokens, 1, 64, generator=generator)
    maps = torch.randn(2, 1, 64, 8, generator=generator) / 8
    inputs = dict(zip(names, (*tokens.bfloat16(), *maps.bfloat16()), strict=True))
    start = initial_weights("moments", 1, 64)["mass_moments"]

    def differentiate(dtype: torch.dtype) -> Tensor:
        mass = start.to(dtype).requires_grad_()
        narrow = {name: x.to(dtype) for name, x in inputs.items()}
        found = attend({**narrow, "mass_moments": mass}, tiles, "moments")
        return torch.autograd.grad(1000 * found.double().square().mean(), mass)[0]

    found, exact = differentiate(torch.bfloat16), differentiate(torch.float64)
    assert error(found, exact) < TOLERANCE[torch.bfloat16]


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler, which Inductor calls")
def test_inductor_compiles_it_with_tokens_beside_the_video() -> None:
    inputs = make_inputs(TILINGS[2], "moments", torch.float32)
    with torch.no_grad():
        found = torch.compile(attend, fullgraph=True)(inputs, TILINGS[2], "moments")
        torch.testing.assert_close(found, attend(inputs, TILINGS[2], "moments"))


@pytest.mark.parametrize("tile", [(1, 4, 4), (8, 16, 16)])
def test_without_a_gradient_little_but_the_result_is_in_memory(
    tile: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = Tiles(grid=(8, 16, 16), tile=tile)
    monkeypatch.setattr(reference, "_MAX_CHUNK_FEATURES", 2**14)
    query, key, value = torch.randn(3, 1, tiles.num_tokens, 4, 64).unbind()
    weights = initial_weights("query", 4, 64)
    maps = torch.randn(2, 4, 64, 32).unbind()
    with torch.no_grad():
        peak = peak_bytes(
            lambda: hybrid_attention(query, key, value, *maps, weights, tiles, "query")
        )
    # The result in tiles and in its place; of one large tile also what softmax takes and gives.
    copies = 2 if tiles.num_tiles > 1 else 9
    assert peak < (copies + 1) * query.nbytes


@pytest.mark.parametrize("attention_mass", ATTENTION_MASSES)
def test_one_tile_for_all_is_softmax_attention(attention_mass: str) -> None:
    tiles = TILINGS[3]
    inputs = make_inputs(tiles, attention_mass, torch.float64)
    by_head = (inputs[name].transpose(1, 2) for name in ("query", "key", "value"))
    expected = torch.nn.functional.scaled_dot_product_attention(*by_head).transpose(1, 2)
    torch.testing.assert_close(attend(inputs, tiles, attention_mass), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("attention_mass", ATTENTION_MASSES)
def test_sharp_scores_and_maps_stay_finite_in_value_and_gradient(
    attention_mass: str, dtype: torch.dtype
) -> None:
    inputs = make_inputs(TILINGS[1], attention_mass, dtype)
    with torch.no_grad():
        for name, x in inputs.items():
            x.mul_(30 if name in ("query", "key", "query_map", "key_map") else 1)
    found = attend(inputs, TILINGS[1], attention_mass)
    gradients = torch.autograd.grad(found.sum(), [*inputs.values()])
    assert all(bool(x.isfinite().all()) for x in (found, *gradients))


@pytest.mark.parametrize("tiles", TILINGS, **ids)
def test_every_token_has_one_slot_of_its_own_tile(tiles: Tiles) -> None:
    index, expected = tiles.index("cpu"), find_tiles(tiles)
    assert index.tokens.shape == (tiles.num_tiles, tiles.num_slots)
    members = [
        tokens[valid].tolist() for tokens, valid in zip(index.tokens, index.is_token, strict=True)
    ]
    assert sorted(itertools.chain(*members)) == list(range(tiles.num_tokens))
    assert all(members) and len(members) == len(set(expected))
    assert all(len({expected[token] for token in each}) == 1 for each in members)
    torch.testing.assert_close(
        index.tokens.flatten()[index.places], torch.arange(tiles.num_tokens), rtol=0, atol=0
    )
    pairs = sum(a == b for a in expected for b in expected)
    assert tiles.share == pytest.approx(pairs / tiles.num_tokens**2)


def test_a_tile_of_a_real_size_holds_what_lies_near_its_tokens() -> None:
    """Wan at 480p, where no axis but one is a multiple of the tile."""
    tiles = Tiles(grid=(21, 30, 52), tile=(4, 8, 20))
    assert tiles.counts == (6, 4, 3)
    index = tiles.index("cpu")
    position = torch.stack(torch.unravel_index(torch.arange(tiles.num_tokens), tiles.grid), dim=1)
    inside = position[index.tokens]
    span = inside.amax(dim=1) - inside.amin(dim=1)
    assert span.amax(dim=0).tolist() == [3, 7, 19]
    assert 0.01 < tiles.share < 4 * 8 * 20 / tiles.num_tokens


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tile": (0, 1, 1)}, "sizes of at least 1"),
        ({"tile": (2, 2)}, "three numbers"),
        ({"grid": (1, 0, 1)}, "sizes of at least 1"),
        ({"after": -1}, "-1 after given"),
    ],
)
def test_sizes_that_are_none_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Tiles(**{"grid": (2, 2, 2), "tile": (1, 1, 1), **settings})


def test_other_tokens_than_the_tiles_are_refused() -> None:
    inputs = make_inputs(TILINGS[0], "query", torch.float32)
    with pytest.raises(ValueError, match="60, 60, 60 tokens given; the tiles have 39"):
        attend(inputs, TILINGS[2], "query")
