"""Attention modules that replace one another: softmax, Hedgehog linear, hybrid, and a mixture.

All map `query, key, value [B, L, N, D] -> [B, L, N, D]`, after qk-norm and RoPE, and are told where
the video's tokens lie in the sequence, which hybrid layers alone need to know.
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import hybrid_attention, linear_attention
from ..kernels.hybrid_reference import initial_weights, weight_shapes
from ..kernels.softmax import DENSITY, softmax_attention
from ..kernels.tiles import TokenGrid
from .config import LinearForm


class SoftmaxAttention(nn.Module):
    """Softmax attention over all tokens, by a kernel of `softmax_attention`."""

    def __init__(self, kernel: str = "default", density: float = DENSITY) -> None:
        super().__init__()
        self.kernel, self.density = kernel, density

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, grid: TokenGrid | None = None
    ) -> Tensor:
        """Attend over all keys, scaled by 1/sqrt(D): [B, L, N, D] to the same."""
        return softmax_attention(query, key, value, self.kernel, self.density)


def window_attention(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Softmax attention within consecutive blocks of `window` tokens, O(L window).

    query, key, value: [B, L, N, D], tokens frame by frame, row by row; the last block may be
        shorter.

    Raises ValueError where queries and keys are not the same tokens.
    """
    B, L, N, D = query.shape
    if key.shape[1] != L:
        raise ValueError(f"{L} queries and {key.shape[1]} keys given; a window needs as many")
    whole = L - L % window
    parts = []
    for start, end, size in ((0, whole, window), (whole, L, L - whole)):
        if end > start:
            blocks = (x[:, start:end].reshape(-1, size, N, D) for x in (query, key, value))
            query_blocks, key_blocks, value_blocks = (x.transpose(1, 2) for x in blocks)
            out = F.scaled_dot_product_attention(query_blocks, key_blocks, value_blocks)
            parts.append(out.transpose(1, 2).reshape(B, end - start, N, D))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def tensor_shapes(
    form: LinearForm, feature_dim: int, num_heads: int | str, head_dim: int | str
) -> dict[str, list[int | str]]:
    """Return the shapes of what a layer of a form learns, by name; see `attend_linearly`."""
    num_maps = 1 if form.map_sharing == "shared" else num_heads
    maps = [num_maps, head_dim, feature_dim // 2]
    shapes = {"query_map": maps, "key_map": maps}
    if form.output_gate:
        shapes["gate"] = [num_heads, head_dim]
    if form.window:
        shapes["window_mix"] = [num_heads]
    if form.tile:
        shapes |= weight_shapes(form.attention_mass, num_heads, head_dim)
    return shapes


def attend_linearly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Mapping[str, Tensor],
    *,
    form: LinearForm,
    grid: TokenGrid | None = None,
) -> Tensor:
    """Compute linear attention in a form, from its tensors by the names of `tensor_shapes`.

    query_map, key_map: [N, D, M/2], or [1, D, M/2] where heads share them.
    gate: [N, D]; each head's output is scaled by `2 sigmoid(gate . q)`, twice the head-wise output
        gate of Gated Attention (arXiv 2505.06708), so that 0 changes nothing.
    window_mix: [N]; the output lies `tanh(window_mix)` of the way from linear attention to the
        softmax of its window (the zero-initialised gate of Flamingo, arXiv 2204.14198).
    mass_bias, mass_gate, mass_moments: of a form with tiles, see `kernels.hybrid_reference`.
    grid: where the video's tokens lie, which a form with tiles needs.

    Returns [B, L, N, D] in value's dtype.
    Raises ValueError where a form with tiles is not told the grid, or one of other tokens.
    """
    maps = weights["query_map"], weights["key_map"]
    if form.map_sharing == "shared":
        maps = tuple(x.expand(query.shape[2], -1, -1) for x in maps)
    if form.tile:
        if grid is None:
            raise ValueError(
                f"a hybrid layer of tile {form.tile} was not told where the video's tokens lie in "
                "its sequence: use a file of linear layers with this model"
            )
        tiles = grid.tiles(form.tile_size, query.shape[1])
        return hybrid_attention(query, key, value, *maps, weights, tiles, form.attention_mass)
    out = linear_attention(query, key, value, *maps, feature_map=form.feature_map)
    if form.window:
        local = window_attention(query, key, value, form.window).to(out.dtype)
        out = torch.lerp(out, local, weights["window_mix"].tanh().to(out.dtype).unsqueeze(-1))
    if form.output_gate:
        opening = torch.einsum("blnd,nd->bln", query, weights["gate"].to(query.dtype))
        out = out * (2 * opening.sigmoid()).to(out.dtype).unsqueeze(-1)
    return out


class LinearAttention(nn.Module):
    """Linear attention with a learnable Hedgehog map for queries and one for keys.

    In a form with tiles it is hybrid: softmax within each tile, linear beyond.
    """

    def __init__(
        self, num_heads: int, head_dim: int, feature_dim: int, form: LinearForm | None = None
    ) -> None:
        """feature_dim is M, even; see `tensor_shapes` for what the layer learns."""
        super().__init__()
        if feature_dim < 2 or feature_dim % 2:
            raise ValueError(f"feature_dim {feature_dim} given; an even number >= 2 is needed")
        self.form = form or LinearForm()
        for name, shape in tensor_shapes(self.form, feature_dim, num_heads, head_dim).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        if self.form.tile:
            starts = initial_weights(self.form.attention_mass, num_heads, head_dim)
            self.load_state_dict(starts, strict=False)
        self.init_weights()

    @property
    def feature_dim(self) -> int:
        """M, the number of features of a query or key."""
        return 2 * self.query_map.shape[-1]

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Start both sides from one scaled orthogonal map, W W^T = (M / 2) / sqrt(D).

        Each of the M / 2 pairs of features then moves with q k as exp(q k / sqrt(D)) does in
        softmax attention. Gate and window stay at 0, where neither changes anything.
        """
        num_maps, D, half = self.query_map.shape
        size = max(D, half)
        for index in range(num_maps):
            gaussian = torch.randn(size, size, generator=generator)
            orthogonal = torch.linalg.qr(gaussian).Q[:D, :half] * half**0.5 * D**-0.25
            for feature_map in (self.query_map, self.key_map):
                feature_map.data[index] = orthogonal

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, grid: TokenGrid | None = None
    ) -> Tensor:
        """Attend in O(L): query [B, L, N, D], key and value [B, S, N, D] to [B, L, N, D]."""
        weights = dict(self.named_parameters())
        return attend_linearly(query, key, value, weights, form=self.form, grid=grid)


class MixedAttention(nn.Module):
    """`r softmax + (1 - r) linear`, with the learnable layer score r (LinVideo eq. 5).

    r = 1 is softmax, r = 0 is linear. Selection hardens a layer by setting `mode`, after which only
    the chosen branch is computed.

    mode: "mixed", "linear" or "softmax"; enabled: False computes softmax in any mode.
    """

    enabled = True

    def __init__(
        self, linear: LinearAttention, layer_score: float, softmax: nn.Module | None = None
    ) -> None:
        """softmax: the branch that stood there before; none: the default one."""
        super().__init__()
        self.linear = linear
        self.softmax = softmax or SoftmaxAttention()
        self.layer_score = nn.Parameter(torch.tensor(float(layer_score)))
        self.mode: Literal["mixed", "linear", "softmax"] = "mixed"

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, grid: TokenGrid | None = None
    ) -> Tensor:
        """Mix both branches, or compute the chosen one: [B, L, N, D] to the same."""
        if not self.enabled or self.mode == "softmax":
            return self.softmax(query, key, value)
        if self.mode == "linear":
            return self.linear(query, key, value, grid)
        softmax, linear = self.softmax(query, key, value), self.linear(query, key, value, grid)
        return torch.lerp(linear, softmax, self.layer_score.to(softmax.dtype))
