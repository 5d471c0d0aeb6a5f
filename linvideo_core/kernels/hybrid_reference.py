"""Softmax within a tile and linear attention in one layer, in plain PyTorch: the definition.

With A_i = sum exp(q_i k_j / sqrt(D)) over the keys of the query's own tile, and F_i that sum over
all others, softmax attention is a mixture of the two, each query with a share of its own:

    o_i = s_i local_i + (1 - s_i) far_i        s_i = A_i / (A_i + F_i) = sigmoid(log A_i - log F_i)

local_i, the softmax of the tile, and log A_i are exact. Linear attention stands for far_i, and an
estimate for log F_i, the attention mass. With T the tokens of a whole tile, n_i the keys outside,
mu and S the mean and covariance of all keys, and N heads, it is one of two:

    "query"      log F_i = 3 - 4 b - g . q_i + log T
    "moments"    log F_i = log n_i + a + b q_i . mu / sqrt(D) + c q_i' S q_i / (2 D)

"moments" is exact for Gaussian keys with a = 0, b = c = 1. What is learned of them: mass_bias [N]
and mass_gate [N, D], b and g of "query"; mass_moments [3, N], (a, b, c) of "moments".

PyTorch's kernels of softmax attention compute s_i local_i, in value's dtype: a tile has one key
more, whose value is 0, and each query's score to it is log F_i, so that it is weighed as all other
keys would be. All else is computed in fp32 at least, and the gradient reaches every tensor; it
has none itself. Where PyTorch has no such kernel, as for bf16 on NVIDIA's cards before the RTX 30
series or on Apple's, scores of tiles are in memory. In fp16 log F_i is at most 32752 / sqrt(D).
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import (
    attend_features,
    by_head,
    chunk_size,
    chunks,
    sum_features,
    to_features,
    widen,
    widen_dtype,
)
from .tiles import TileIndex, Tiles

# Kernels multiply scores and subtract them: in between, too, they must stay finite.
_MOST_SCORE = 2.0**100


def weight_shapes(
    attention_mass: str, num_heads: int | str, head_dim: int | str
) -> dict[str, list[int | str]]:
    """Return the shapes of what a hybrid layer learns besides its feature maps, by name.

    attention_mass: "query" or "moments", see above; raises ValueError for another.
    """
    N, D = num_heads, head_dim
    shapes = {
        "query": {"mass_bias": [N], "mass_gate": [N, D]},
        "moments": {"mass_moments": [3, N]},
    }
    if attention_mass not in shapes:
        raise ValueError(
            f"attention_mass {attention_mass!r} given; one of {', '.join(shapes)} is needed"
        )
    return shapes[attention_mass]


def initial_weights(attention_mass: str, num_heads: int, head_dim: int) -> dict[str, Tensor]:
    """Return the weights of `weight_shapes` as they start.

    mass_bias and mass_gate: 0. mass_moments: 0, 1, 1/2. Keys are not Gaussian: with tiles of
    1 x 4 x 4 the layers of the embedded model start .49 off softmax so, with c = 1 .55.
    """
    shapes = weight_shapes(attention_mass, num_heads, head_dim)
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    if attention_mass == "moments":
        weights["mass_moments"] += torch.tensor([[0.0], [1.0], [0.5]])
    return weights


def hybrid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    weights: Mapping[str, Tensor],
    tiles: Tiles,
    attention_mass: str,
) -> Tensor:
    """Return `s local + (1 - s) far` [B, L, N, D] in value's dtype, see above.

    query, key, value: [B, L, N, D], after qk-norm and RoPE, L the tokens of `tiles`.
    query_map, key_map: [N, D, M/2]; weights: by the names of `weight_shapes`.

    Raises ValueError where the tokens are not those of the tiles.
    """
    tiles.check_tokens(query, key, value)
    L = query.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        # Here, not in each chunk: the chunks' gradients are summed in this dtype.
        query_map, key_map = widen(query_map), widen(key_map)
        # Means, not sums: long videos cannot overflow.
        state, total = (x / L for x in sum_features(key_map, key, value))
        level, slope, spread = estimate_mass(weights, attention_mass, tiles, key, find_moments)
        level, slope = level.unsqueeze(1), slope.unsqueeze(2)

        def attend(is_token: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # The tiles' queries, one after another.
            rows = widen(q.flatten(2, 3))
            slopes = slope if spread is None else slope + rows @ spread
            log_far = (level + (rows * slopes).sum(dim=-1)).unflatten(2, q.shape[2:4])
            num_outside = (L - is_token.sum(dim=1)).unsqueeze(-1)
            if spread is not None:
                log_far = log_far + num_outside.to(log_far).log()
            # Where no key lies outside, all is the tile's.
            log_far = torch.where(num_outside > 0, log_far, -math.inf)
            near, far_share = softmax_beside(is_token, q, k, v, log_far)
            far = attend_features(to_features(rows @ query_map, is_joint=False), state, total)
            return torch.addcmul(near, far_share, far.view_as(near)).to(value.dtype)

        width = 2 * query_map.shape[2]
        return _in_tiles(attend, tiles.index(query.device), query, key, value, width)


def estimate_mass(
    weights: Mapping[str, Tensor],
    attention_mass: str,
    tiles: Tiles,
    key: Tensor,
    moments_of: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return level [N], slope [B, N, D] and, of "moments", spread [B, N, D, D], fp32 at least.

    `log F_i = level + slope . q_i`, and with a spread `+ q_i' spread q_i + log n_i`.
    key: [B, L, N, D]; moments_of: returns its mean and covariance, as `find_moments` does.
    """
    B, _, N, D = key.shape
    if attention_mass == "query":
        level = 3 + math.log(tiles.num_slots) - 4 * widen(weights["mass_bias"])
        return level, -widen(weights["mass_gate"]).expand(B, N, D), None
    level, mean_scale, variance_scale = widen(weights["mass_moments"])
    mean, covariance = moments_of(key)
    slope = mean_scale.unsqueeze(-1) * mean / D**0.5
    return level, slope, variance_scale[:, None, None] * covariance / (2 * D)


def softmax_beside(
    is_token: Tensor, query: Tensor, key: Tensor, value: Tensor, log_far: Tensor
) -> tuple[Tensor, Tensor]:
    """Return s local [B, N, k, T, D] and 1 - s [B, N, k, T, 1] of some tiles, fp32 at least.

    is_token: [k, T], of the keys; query, key, value: [B, N, k, T, D]; log_far: log F [B, N, k, T].

    A tile has one key more, of value 0, to which each query's score is log F. Queries and keys have
    channels more for that: log F in value's dtype, the rest of it, and what keeps empty slots out.
    A channel of the values is 1 in the tile, and sums up to s. One that is 1 beyond it would sum up
    to nearly 1 where s is small, and bf16 would round off much of its gradient.
    """
    dtype, (T, D) = value.dtype, query.shape[-2:]
    coarse, rest, empty = range(D, D + 3)
    # Kernels want channels in eights.
    more = -(-(D + 3) // 8) * 8 - D
    most = min(torch.finfo(dtype).max / 2, _MOST_SCORE)
    score = (log_far * D**0.5).clamp(-most, most)
    rounded = score.detach().to(dtype)
    query = F.pad(query.to(dtype), (0, more))
    query[..., coarse], query[..., rest], query[..., empty] = rounded, score - rounded, 1
    key, value = (F.pad(x.to(dtype), (0, more, 0, 1)) for x in (key, value))
    key[..., T, coarse : rest + 1] = 1
    key[..., :T, empty] = torch.where(is_token, 0.0, -most)
    value[..., :T, D] = 1
    tensors = (x.flatten(0, 1) for x in (query, key, value))
    found = F.scaled_dot_product_attention(*tensors, scale=D**-0.5)
    found = widen(found.unflatten(0, log_far.shape[:2]))
    return found[..., :D], 1 - found[..., D : D + 1]


def find_moments(key: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [B, N, D] and covariance [B, N, D, D] of keys [B, L, N, D], fp32 at least."""
    mean = key.mean(dim=1, keepdim=True, dtype=widen_dtype(key.dtype))
    centred = (part - mean for (part,) in chunks(key.shape[-1], key))
    sums = sum(x.mT @ x for x in map(by_head, centred))
    return mean.squeeze(1), sums / key.shape[1]


def _in_tiles(
    attend: Callable[..., Tensor],
    index: TileIndex,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
) -> Tensor:
    """Compute something of each query with its tile, in chunks of tiles where no gradient is.

    attend: (is_token [k, T]; queries, keys and values [B, N, k, T, D] of some tiles) -> a result
        [B, N, k, T, D], in value's dtype.
    query, key, value: [B, L, N, D]; width: of `chunk_size`. Returns the results as [B, L, N, D].
    """
    B, _, N, D = query.shape
    num_tiles, T = index.tokens.shape
    if torch.is_grad_enabled():
        # At once: the gradient of each part alone would be as large as all tokens.
        tensors = (_take(x, index.tokens) for x in (query, key, value))
        found = attend(index.is_token, *tensors).permute(0, 2, 3, 1, 4)
    else:
        # Nothing but the result is in memory as a whole.
        found = value.new_empty(B, num_tiles, T, N, D)
        size = max(1, chunk_size(width, query) // T)
        parts = (x.split(size) for x in (index.is_token, index.tokens))
        for part, is_token, tokens in zip(found.split(size, dim=1), *parts, strict=True):
            tensors = (_take(x, tokens) for x in (query, key, value))
            part.copy_(attend(is_token, *tensors).permute(0, 2, 3, 1, 4))
    return found.flatten(1, 2).index_select(1, index.places)


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    """Return x [B, L, N, D] in tiles of tokens [k, T], as [B, N, k, T, D].

    The gradient of a selection so made takes a GPU no sorting.
    """
    return x.transpose(1, 2).index_select(2, tokens.flatten()).unflatten(2, tokens.shape)
