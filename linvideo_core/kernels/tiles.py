"""Three-dimensional tiles of a video's tokens: which token lies in which tile, as arithmetic.

Along an axis of n positions, tiles of t positions begin at i t, for i from 0 to ceil(n / t) - 1;
the last may be cut off. A tile has as many slots as a whole one has tokens, frame by frame and row
by row: slots beyond the grid are empty.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Size = tuple[int, int, int]
"""Of a grid or a tile: frames, height, width."""


class TokenGrid(NamedTuple):
    """Where a video's tokens lie in a sequence: frame by frame, row by row, in one piece.

    size: (frames, height, width) in tokens.
    before, after: tokens before and after them; None, of one of both: whatever else there is.
    """

    size: Size
    before: int | None = 0
    after: int | None = 0

    def tiles(self, tile: Size, num_tokens: int) -> "Tiles":
        """Return the tiles of a sequence of so many tokens; a tile's 0 is all of that axis.

        Raises ValueError where the sequence is too short for the video.
        """
        others = num_tokens - math.prod(self.size)
        before = others - self.after if self.before is None else self.before
        after = others - before if self.after is None else self.after
        whole = tuple(t or n for t, n in zip(tile, self.size, strict=True))
        return Tiles(grid=self.size, tile=whole, before=before, after=after)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tiles over `grid` tokens of a video, which lie frame by frame and row by row.

    grid, tile: (frames, height, width) in tokens, of any size; a tile is cut to the grid.
    before, after: tokens that lie before and after the video's, such as those of references or
        text. In their order they make up tiles of their own, as large as the video's.

    Raises ValueError for sizes that are not positive and for counts below 0.
    """

    grid: Size
    tile: Size
    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        given = f"grid {self.grid}, tile {self.tile}"
        if any(len(size) != 3 for size in (self.grid, self.tile)):
            raise ValueError(f"{given} given; each has three numbers: frames, height, width")
        if min(*self.grid, *self.tile) < 1 or min(self.before, self.after) < 0:
            raise ValueError(
                f"{given}, {self.before} tokens before and {self.after} after given; sizes of at "
                "least 1 are needed, numbers of tokens of at least 0"
            )
        object.__setattr__(self, "tile", tuple(map(min, self.tile, self.grid)))

    @property
    def numbers(self) -> list[int]:
        """All fields in their order as a flat list, which `from_numbers` takes."""
        return [*self.grid, *self.tile, self.before, self.after]

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> "Tiles":
        """Return the tiles of which these are `numbers`."""
        grid, tile, (before, after) = tuple(numbers[:3]), tuple(numbers[3:6]), numbers[6:]
        return cls(grid=grid, tile=tile, before=before, after=after)

    @property
    def counts(self) -> Size:
        """Tiles along each axis of the grid."""
        return tuple(-(-n // t) for n, t in zip(self.grid, self.tile, strict=True))

    @property
    def num_tokens(self) -> int:
        """L, all tokens, the video's and others."""
        return math.prod(self.grid) + self.before + self.after

    @property
    def num_slots(self) -> int:
        """T, the tokens of a whole tile."""
        return math.prod(self.tile)

    @property
    def num_tiles(self) -> int:
        """K, the tiles of the video, then those of other tokens."""
        return math.prod(self.counts) + -(-(self.before + self.after) // self.num_slots)

    @property
    def share(self) -> float:
        """The pairs of tokens that share a tile, over all L^2 pairs."""
        axes = zip(self.grid, self.tile, strict=True)
        others = _count_pairs(self.before + self.after, self.num_slots)
        return (math.prod(_count_pairs(*axis) for axis in axes) + others) / self.num_tokens**2

    def check_tokens(self, *tensors: Tensor) -> None:
        """Raise ValueError where query, key and value [B, L, N, D] are not of these tokens."""
        if any(x.shape[1] != self.num_tokens for x in tensors):
            lengths = ", ".join(str(x.shape[1]) for x in tensors)
            raise ValueError(
                f"query, key and value of {lengths} tokens given; the tiles have {self.num_tokens}"
            )

    def token_at(self, tile: Tensor, slot: Tensor) -> Tensor:
        """Return the token in a slot of a tile, -1 where the slot is empty.

        tile: int64 in [0, K); slot: int64 in [0, T); of shapes that broadcast to the result's.
        """
        (F, H, W), (f, h, w), (_, rows, columns) = self.grid, self.tile, self.counts
        axes = (
            (tile // (rows * columns), slot // (h * w), F, f),
            (tile // columns % rows, slot // w % h, H, h),
            (tile % columns, slot % w, W, w),
        )
        token, is_inside = 0, True
        for i, inner, n, t in axes:
            position = i * t + inner
            token = token * n + position
            is_inside = is_inside & (position < n)
        # The others, as if the video were not between them.
        other = (tile - math.prod(self.counts)) * self.num_slots + slot
        is_other = (other >= 0) & (other < self.before + self.after)
        other = torch.where(other < self.before, other, other + F * H * W)
        video = torch.where(is_inside & (tile < math.prod(self.counts)), token + self.before, -1)
        return torch.where(is_other, other, video)

    def place_of(self, token: Tensor) -> Tensor:
        """Return in which slot tokens int64 in [0, L) lie, counted through all tiles, T each."""
        (F, H, W), (f, h, w), (_, rows, columns) = self.grid, self.tile, self.counts
        video = token - self.before
        y, x = video // W % H, video % W
        frame = video // (H * W)
        tile = (frame // f * rows + y // h) * columns + x // w
        slot = (frame % f * h + y % h) * w + x % w
        other = torch.where(video < 0, token, token - F * H * W)
        other = other + math.prod(self.counts) * self.num_slots
        is_video = (video >= 0) & (video < F * H * W)
        return torch.where(is_video, tile * self.num_slots + slot, other)

    def index(self, device: torch.device | str) -> "TileIndex":
        """Return which token lies where, as tensors on a device."""
        tile = torch.arange(self.num_tiles, device=device).unsqueeze(1)
        found = self.token_at(tile, torch.arange(self.num_slots, device=device))
        is_token = found >= 0
        places = self.place_of(torch.arange(self.num_tokens, device=device))
        # Inductor finds no bounds by itself where tokens lie before the video's, and fails.
        places = places.clamp(0, self.num_tiles * self.num_slots - 1)
        return TileIndex(torch.where(is_token, found, found[:, :1]), is_token, places)


@dataclasses.dataclass(frozen=True)
class TileIndex:
    """Which token lies in which slot, and back.

    tokens: [K, T] int64, the token of every slot; an empty slot has the first of its tile.
    is_token: [K, T] bool, whether a slot is not empty.
    places: [L] int64, of every token its slot, counted through all tiles.
    """

    tokens: Tensor
    is_token: Tensor
    places: Tensor


def _count_pairs(length: int, tile: int) -> int:
    """Return how many pairs of positions along an axis share a tile."""
    return length // tile * tile**2 + (length % tile) ** 2
