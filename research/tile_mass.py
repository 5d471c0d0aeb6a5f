"""Which tile holds the most attention: `python -m research.tile_mass`.

    python -m research.tile_mass --num-samples 8 --record
    python -m research.tile_mass --model wan2.1_t2v_1.3B_bf16.safetensors \
        --prompts prompts.safetensors --share 0.02 --num-samples 2
While a model samples videos, its layers are asked how much of their attention lies within tiles of
the same share of the tokens and other shapes, from flat ones of one frame to ones of all frames: a
few random queries of every layer, in every step and branch of guidance, in the first step twice. No
training is needed, and it says beforehand what a `--tile` leaves to linear attention. Columns:
    mass   the share of a query's softmax attention that its own tile holds, mean over queries,
           heads, layers
    error  of a layer's output where the mean of the values beyond a tile stands for what attention
           beyond it gives, over the output's norm, mean over layers: less of it is left to learn
The last rows take of each layer, or of each head, the tile of the highest mass. A file has one tile
for all layers; these two rows say what more of them could give.
"""

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import RESULTS_FOLDER, check_parts, show_rows, write_part
from linvideo_core.evaluate.config import CompareConfig
from linvideo_core.evaluate.sampler import Evaluator
from linvideo_core.kernels.tiles import Size, Tiles
from linvideo_core.models.attention_sites import attention_at, shapes_of
from linvideo_core.models.families import identify
from linvideo_core.run.config import Settings, option, parse, run_command, to_flags
from linvideo_core.run.devices import device_option, resolve_device, resolve_precision
from linvideo_core.run.limits import COUNT, Limits
from linvideo_core.run.progress import TerminalCallbacks
from linvideo_core.teacher.config import TeacherConfig
from linvideo_core.teacher.teacher import load_teacher

_RECORD_NAME = "tile_mass.json"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileMassConfig(Settings):
    """What is sampled, and which tiles are looked at."""

    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    comparison: CompareConfig = dataclasses.field(
        default_factory=lambda: CompareConfig(num_samples=4, sampler_steps=20, batch_size=4)
    )
    share: float = option(
        1 / 16, "share of a video's tokens in a tile", Limits(low=0, without_low=True, high=0.5)
    )
    name: str = option("", "what the model is called in the record; none: as its file")
    num_queries: int = option(64, "queries of each layer and call that are looked at", COUNT)
    out: Path = option(Path("runs/tile_mass"), "folder of the record")
    record: bool = option(False, f"write results/{_RECORD_NAME}, not the one in --out")
    seed: int = option(0, "seed of noise, prompts and queries")
    device: str = device_option()

    @property
    def shown_name(self) -> str:
        """What the model is called."""
        return self.name or (self.teacher.model.stem if self.teacher.model else "embedded")

    @property
    def path(self) -> Path:
        """Where the table goes."""
        return (RESULTS_FOLDER if self.record else self.out) / _RECORD_NAME


def list_tiles(grid: Size, share: float) -> list[Tiles]:
    """Return tiles of a grid with about a share of its tokens: of 1, 2, 4, ... and all frames.

    Beside its frames a tile is about as high as wide; parts of an axis are about even.
    """
    num_frames, height, width = grid
    found = {}
    for wanted in (2**n for n in range(math.ceil(math.log2(num_frames)) + 1)):
        length = _split_evenly(num_frames, wanted)
        area = share * math.prod(grid) / length
        rows = _split_evenly(height, area**0.5)
        columns = _split_evenly(width, area / rows)
        found[length, rows, columns] = Tiles(grid=grid, tile=(length, rows, columns))
    return [*found.values()]


def _split_evenly(length: int, wanted: float) -> int:
    """Return the size of tiles that split an axis into even parts, near the wanted one."""
    return math.ceil(length / max(1, round(length / max(1, wanted))))


class MassMeter:
    """Measures what tiles hold of the softmax attention of a model's layers, as they are called."""

    def __init__(
        self, tiles: Sequence[Tiles], num_layers: int, num_heads: int, num_queries: int, seed: int
    ) -> None:
        self.num_queries = num_queries
        tokens = torch.arange(tiles[0].num_tokens)
        self.tile_of = torch.stack([each.place_of(tokens) // each.num_slots for each in tiles])
        self._generator = torch.Generator().manual_seed(seed)
        size = (len(tiles), num_layers, num_heads)
        self._mass, self._squared_error = torch.zeros(2, *size, dtype=torch.float64)
        self._squared_norm = torch.zeros(size[1:], dtype=torch.float64)
        self._num_queries = torch.zeros(num_layers, dtype=torch.float64)

    @torch.no_grad()
    def look(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Look at a call of a layer: query, key, value [B, L, N, D]."""
        B, L, _, D = query.shape
        picks = torch.randperm(L, generator=self._generator)[: self.num_queries]
        query = query[:, picks.to(query.device)]
        query, key, value = (x.float().transpose(1, 2) for x in (query, key, value))
        weights = (query @ key.mT / D**0.5).softmax(dim=-1)
        exact = weights @ value
        self._squared_norm[layer] += exact.square().sum(dim=(0, 2, 3)).double().cpu()
        self._num_queries[layer] += B * len(picks)
        for number, tile_of in enumerate(self.tile_of.to(query.device)):
            is_own = (tile_of[picks, None] == tile_of).float()
            within = weights * is_own
            mass = within.sum(dim=-1, keepdim=True)
            num_others = (L - is_own.sum(dim=1, keepdim=True)).clamp_min(1)
            others = (value.sum(dim=2, keepdim=True) - is_own @ value) / num_others
            found = within @ value + (1 - mass) * others
            self._mass[number, layer] += mass.sum(dim=(0, 2, 3)).double().cpu()
            error = (found - exact).square().sum(dim=(0, 2, 3))
            self._squared_error[number, layer] += error.double().cpu()

    def masses(self) -> Tensor:
        """Return the mean mass of every tile, layer and head."""
        return self._mass / self._num_queries.unsqueeze(-1)

    def error(self, chosen: Tensor) -> float:
        """Return the mean over layers of the relative error with tiles chosen [layers, heads]."""
        squared_error = self._squared_error.gather(0, chosen.unsqueeze(0)).squeeze(0)
        return (squared_error.sum(dim=1) / self._squared_norm.sum(dim=1)).sqrt().mean().item()


def measure(config: TileMassConfig, device: str) -> tuple[list[Row], list[Row]]:
    """Sample videos; return a row of each tile and of the best ones, and one of each layer."""
    teacher = load_teacher(config.teacher).to(device)
    model, settings = teacher.model, config.comparison
    sites = identify(shapes_of(model))[1]
    tiles = list_tiles(model.config.find_grid(teacher.latent_shape), config.share)
    meter = MassMeter(tiles, len(sites), sites[0].num_heads, config.num_queries, config.seed)
    precision = resolve_precision("auto", device)
    with TerminalCallbacks() as callbacks, contextlib.ExitStack() as stack:
        evaluator = Evaluator(
            teacher, settings, seed=config.seed, precision=precision, callbacks=callbacks
        )
        for site in sites:
            hook = functools.partial(_look, meter, site.layer)
            stack.callback(attention_at(model, site).register_forward_hook(hook).remove)
        evaluator.sample("teacher", model)
    return describe(config.shown_name, tiles, meter)


def _look(meter: MassMeter, layer: int, _: nn.Module, args: tuple[Any, ...], __: Tensor) -> None:
    query, key, value, *_ = args
    meter.look(layer, query, key, value)


def describe(name: str, tiles: Sequence[Tiles], meter: MassMeter) -> tuple[list[Row], list[Row]]:
    """Return a row of each tile and of the best ones, and one of each layer with its masses."""
    masses = meter.masses()
    by_layer = masses.mean(dim=2)
    shares = torch.tensor([each.share for each in tiles])
    names = ["x".join(map(str, each.tile)) for each in tiles]
    choices = {tile: torch.full(masses.shape[1:], i) for i, tile in enumerate(names)}
    choices["best of each layer"] = by_layer.argmax(dim=0).unsqueeze(1).expand(masses.shape[1:])
    choices["best of each head"] = masses.argmax(dim=0)
    rows = [
        {
            "what": name,
            "tile": tile,
            "share": shares[chosen].mean().item(),
            "mass": masses.gather(0, chosen.unsqueeze(0)).mean().item(),
            "error": meter.error(chosen),
        }
        for tile, chosen in choices.items()
    ]
    layers = [
        {"layer": layer, **dict(zip(names, found.tolist(), strict=True))}
        for layer, found in enumerate(by_layer.T)
    ]
    return rows, layers


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, sample, write and show the rows."""
    config = parse(TileMassConfig, argv, description=__doc__)
    device = resolve_device(config.device)
    check_parts(config.path, device)
    rows, layers = measure(config, device)
    write_part(
        config.path,
        config.shown_name,
        title="How much of the softmax attention lies within a tile, by its shape",
        command=f"python -m research.tile_mass {to_flags(config, without=('out', 'device'))}",
        rows=rows,
        device=device,
        details={"layers": layers},
    )
    sys.stdout.write(show_rows(rows))


if __name__ == "__main__":
    run_command(main)
