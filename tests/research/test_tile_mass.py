"""How much attention tiles hold: the meter against cases that are known, and the command."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from linvideo_core.kernels.tiles import Tiles
from research import tile_mass
from research.tile_mass import MassMeter, describe, list_tiles

GRID = (4, 6, 5)
TILES = [Tiles(grid=GRID, tile=tile) for tile in ((1, 6, 5), (4, 2, 2), (4, 6, 5))]
NUM_TOKENS = 4 * 6 * 5


def look(query: Tensor, key: Tensor, value: Tensor, tiles: list[Tiles] = TILES) -> MassMeter:
    meter = MassMeter(tiles, num_layers=2, num_heads=3, num_queries=NUM_TOKENS, seed=0)
    for layer in range(2):
        meter.look(layer, query, key, value)
    return meter


def tokens() -> Tensor:
    return torch.randn(2, NUM_TOKENS, 3, 8, generator=torch.Generator().manual_seed(0))


def chosen(number: int) -> Tensor:
    return torch.full((2, 3), number)


def test_even_attention_lies_in_a_tile_by_its_share_and_its_means_are_exact() -> None:
    meter = look(torch.zeros(2, NUM_TOKENS, 3, 8), tokens(), tokens())
    for number, tiles in enumerate(TILES):
        assert meter.masses()[number].allclose(torch.tensor(tiles.share).double(), rtol=1e-5)
        assert meter.error(chosen(number)) < 1e-5


def test_attention_to_ones_own_frame_lies_in_a_tile_of_a_frame() -> None:
    frame = torch.arange(NUM_TOKENS) // 30
    own = 40 * torch.nn.functional.one_hot(frame, 8).float()
    own = own.view(1, NUM_TOKENS, 1, 8).expand(2, -1, 3, -1)
    meter = look(own, own, tokens())
    assert meter.masses()[0].min() > 0.999 and meter.masses()[1].max() < 0.2
    assert meter.error(chosen(0)) < 1e-3 < 0.3 < meter.error(chosen(1))


def test_one_tile_holds_all_and_leaves_no_error() -> None:
    meter = look(tokens(), tokens().flip(1), tokens())
    assert meter.masses()[2].allclose(torch.ones(()).double(), rtol=1e-5)
    assert meter.error(chosen(2)) < 1e-5


def test_the_best_of_each_layer_holds_no_less_than_any_tile() -> None:
    meter = look(tokens(), tokens(), tokens(), TILES[:2])
    rows, layers = describe("x", TILES[:2], meter)
    masses = {row["tile"]: row["mass"] for row in rows}
    assert [*masses] == ["1x6x5", "4x2x2", "best of each layer", "best of each head"]
    assert masses["best of each head"] >= masses["best of each layer"] >= masses["1x6x5"]
    assert masses["best of each layer"] >= masses["4x2x2"]
    assert [row["layer"] for row in layers] == [0, 1]


@pytest.mark.parametrize("grid", [(16, 16, 16), (7, 8, 8), (21, 30, 52), (1, 5, 7)])
def test_tiles_reach_from_one_frame_to_all_and_hold_about_the_share(
    grid: tuple[int, int, int],
) -> None:
    tiles = list_tiles(grid, 1 / 16)
    assert (tiles[0].tile[0], tiles[-1].tile[0]) == (1, grid[0])
    assert len({each.tile for each in tiles}) == len(tiles)
    assert all(1 / 32 < each.share < 1 / 8 for each in tiles)


def test_the_command_writes_a_part_for_each_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--num-samples", "2", "--sampler-steps", "1", "--device", "cpu"]
    for name in ("", "again"):
        named = ["--name", name] if name else []
        tile_mass.main([*flags, *named, "--out", str(tmp_path)])
    record = json.loads((tmp_path / "tile_mass.json").read_text())
    parts = record["details"]["parts"]
    assert [*parts] == ["embedded", "again"] and len(parts["again"]["layers"]) == 10
    assert "best of each head" in capsys.readouterr().out
