"""Softmax within a tile and linear attention in one layer, in plain PyTorch: the definition.

With A_i = sum exp(q_i k_j / sqrt(D)) over the keys of the query's own tile, and F_i that sum over
all others, softmax attention is a mixture of the two, each query with a share of its own:

    o_i = s_i local_i + (1 - s_i) far_i        s_i = A_i / (A_i + F_i) = sigmoid(log A_i - log F_i)

local_i, the softmax of the tile, and log A_i are exact. Linear attention stands for far_i, and an
estimate for log F_i; `HybridForm` says which. Tiles are computed in chunks, all in fp32 at least,
and the gradient reaches every tensor.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .reference import hedgehog, linear_terms, widen
from .tiles import TileIndex, Tiles

MASSES = ("query", "moments", "features")

# Scores of a chunk of tiles, in all heads and videos: 64 MB in fp32.
_MAX_CHUNK_SCORES = 2**24
# Weights that add up to less have no mean; their inverse may be multiplied by any value.
_LEAST_SUM = 2.0**-100
# The share of a sum below which a difference from it is nothing but rounding, in its eps.
_ROUNDING = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridForm:
    """What stands for the keys outside of a tile.

    mass: the estimate of log F_i, "attention mass". With T the tokens of a whole tile and n_i the
        keys outside,
        "query": `3 - 4 b - g . q_i + log T`;
        "moments": `log n_i + a + b q_i . mu / sqrt(D) + c q_i' S q_i / (2 D)`, mu and S the mean
        and covariance of all keys: exact for jointly Gaussian ones with a = 0, b = c = 1;
        "features": `log sum_j phi(q_i) . phi(k_j) / M - 4 b` of `positive_features`, whose linear
        attention so keeps its own magnitude.
    is_far_only: the tile's own terms are subtracted from linear attention: no key counts twice.
    has_covariance: far_i has `c C q_i / sqrt(D)` added, C the covariance of values and keys: with
        the values' mean, which untrained maps come to, exact for jointly Gaussian ones.
    """

    mass: str = "query"
    is_far_only: bool = False
    has_covariance: bool = False

    def __post_init__(self) -> None:
        if self.mass not in MASSES:
            raise ValueError(f"mass {self.mass!r} given; one of {', '.join(MASSES)} is needed")


def weight_shapes(
    form: HybridForm, num_heads: int | str, head_dim: int | str
) -> dict[str, list[int | str]]:
    """Return the shapes of what a layer of this form learns besides its feature maps, by name.

    mass_bias [N], b of "query" and "features"; mass_gate [N, D], g of "query"; mass_moments [3, N],
    (a, b, c) of "moments"; covariance_scale [N], c of the covariance.
    """
    N, D = num_heads, head_dim
    shapes = {"mass_moments": [3, N]} if form.mass == "moments" else {"mass_bias": [N]}
    if form.mass == "query":
        shapes["mass_gate"] = [N, D]
    if form.has_covariance:
        shapes["covariance_scale"] = [N]
    return shapes


def initial_weights(form: HybridForm, num_heads: int, head_dim: int) -> dict[str, Tensor]:
    """Return the weights of `weight_shapes` as they start.

    mass_bias and mass_gate: 0. mass_moments: 0, 1, 1/2. covariance_scale: 1/2. Keys are not jointly
    Gaussian: with tiles of 1 x 4 x 4 the layers of the embedded model start .45 off softmax so,
    with 1 for both halves .64, without the covariance .49.
    """
    shapes = weight_shapes(form, num_heads, head_dim)
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    if form.mass == "moments":
        weights["mass_moments"] += torch.tensor([[0.0], [1.0], [0.5]])
    if form.has_covariance:
        weights["covariance_scale"] += 0.5
    return weights


def hybrid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    weights: Mapping[str, Tensor],
    tiles: Tiles,
    form: HybridForm,
) -> Tensor:
    """Return `s local + (1 - s) far` [B, L, N, D] in value's dtype, see above.

    query, key, value: [B, L, N, D], after qk-norm and RoPE, L the tokens of `tiles`.
    query_map, key_map: [N, D, M/2]; weights: by the names of `initial_weights`.

    Raises ValueError where the tokens are not those of the tiles.
    """
    L = tiles.num_tokens
    tiles.check_tokens(query, key, value)
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = map(widen, (query, key, value))
        maps = widen(query_map), widen(key_map)
        index = tiles.index(q.device)
        local, log_local = local_softmax(q, k, v, index)
        far, log_features = _attend_far(q, k, v, maps, index, form)
        num_outside = (L - index.is_token.sum(dim=1))[index.places // tiles.num_slots]
        log_outside = num_outside.to(q).log().unsqueeze(-1)
        if form.has_covariance:
            scale = weights["covariance_scale"].to(q) / (q.shape[3] ** 0.5)
            far = far + scale.unsqueeze(-1) * torch.einsum("blnd,bnde->blne", q, _covary(k, v))
        if form.mass == "query":
            log_far = 3 + math.log(tiles.num_slots) - _bias(q, weights)
            log_far = log_far - torch.einsum("blnd,nd->bln", q, weights["mass_gate"].to(q))
        elif form.mass == "moments":
            log_far = _log_mass(q, k, weights["mass_moments"].to(q)) + log_outside
        else:
            log_far = log_features - _bias(q, weights)
        # Where no key lies outside, all is the tile's.
        log_far = torch.where(num_outside[:, None] > 0, log_far, -math.inf)
        share = torch.sigmoid(log_local - log_far).unsqueeze(-1)
        return (share * local + (1 - share) * far).to(value.dtype)


def local_softmax(
    query: Tensor, key: Tensor, value: Tensor, index: TileIndex
) -> tuple[Tensor, Tensor]:
    """Return the softmax of each token's tile [B, L, N, D] and log A [B, L, N].

    query, key, value: [B, L, N, D]; scores are scaled by 1 / sqrt(D).
    """

    def attend(is_token: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.einsum("bksnd,bktnd->bksnt", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~is_token[:, None, None, :], -math.inf)
        log_sum = scores.logsumexp(dim=-1)
        weights = (scores - log_sum.unsqueeze(-1)).exp()
        return torch.einsum("bksnt,bktnd->bksnd", weights, v), log_sum

    return _in_tiles(attend, index, query, key, value)


def local_linear(
    query_features: Tensor, key_features: Tensor, value: Tensor, index: TileIndex
) -> tuple[Tensor, Tensor]:
    """Return `reference.linear_terms` of each token's tile alone, as parts of those of all tokens.

    query_features, key_features: [B, L, N, M]; value: [B, L, N, D].
    """
    L = value.shape[1]

    def attend(is_token: Tensor, a: Tensor, b: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        similarity = torch.einsum("bksnm,bktnm->bksnt", a, b) / L
        similarity = similarity * is_token[:, None, None, :]
        return torch.einsum("bksnt,bktnd->bksnd", similarity, v), similarity.sum(dim=-1)

    return _in_tiles(attend, index, query_features, key_features, value)


def positive_features(x: Tensor, feature_map: Tensor) -> tuple[Tensor, Tensor]:
    """Return features [B, L, N, M] and l [B, L, N]: phi(x) is features times exp(l).

    `phi(x) = exp(x W - h) ++ exp(-x W - h)`, h = |x|^2 / (2 sqrt(D)), W = feature_map [N, D, M/2]:
    the hyperbolic positive features of Performer (arXiv 2009.14794). For W from a normal
    distribution of variance 1 / sqrt(D), phi(q) . phi(k) / M is exp(q k / sqrt(D)) on average. The
    largest feature of each token is 1, so that none overflows.
    """
    projected = torch.einsum("blnd,ndm->blnm", x, feature_map)
    highest = projected.abs().amax(dim=-1)
    features = (torch.cat([projected, -projected], dim=-1) - highest.unsqueeze(-1)).exp()
    return features, highest - x.square().sum(dim=-1) / (2 * x.shape[-1] ** 0.5)


def _attend_far(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    maps: tuple[Tensor, Tensor],
    index: TileIndex,
    form: HybridForm,
) -> tuple[Tensor, Tensor]:
    """Return linear attention [B, L, N, D] and log of the sum of its weights over M [B, L, N].

    The second says something of "features" alone: those of Hedgehog have no magnitude.
    """
    log_size = torch.zeros((), device=query.device)
    if form.mass == "features":
        query_features, log_query = positive_features(query, maps[0])
        key_features, log_key = positive_features(key, maps[1])
        # Keys are weighed against one another: by the largest, so that none overflows.
        highest = log_key.detach().amax(dim=1, keepdim=True)
        key_features = key_features * (log_key - highest).exp().unsqueeze(-1)
        log_size = log_query + highest + math.log(key.shape[1] / key_features.shape[-1])
    else:
        query_features, key_features = hedgehog(query, maps[0]), hedgehog(key, maps[1])
    numerator, denominator = linear_terms(query_features, key_features, value)
    least = _LEAST_SUM
    if form.is_far_only:
        own = local_linear(query_features, key_features, value, index)
        least = least + _ROUNDING * torch.finfo(query.dtype).eps * denominator.detach()
        numerator, denominator = numerator - own[0], denominator - own[1]
    denominator = torch.maximum(denominator, torch.as_tensor(least).to(denominator))
    return numerator / denominator.unsqueeze(-1), denominator.log() + log_size


def _covary(key: Tensor, value: Tensor) -> Tensor:
    """Return the covariance of keys and values over tokens, [B, N, D, D]."""
    centred = key - key.mean(dim=1, keepdim=True)
    return torch.einsum("blnd,blne->bnde", centred, value) / key.shape[1]


def _log_mass(query: Tensor, key: Tensor, moments: Tensor) -> Tensor:
    """Return `a + b q . mu / sqrt(D) + c q' S q / (2 D)` [B, L, N]; moments: [3, N], a, b, c."""
    D = query.shape[-1]
    level, mean_scale, variance_scale = moments
    mean = torch.einsum("blnd,bnd->bln", query, key.mean(dim=1)) / D**0.5
    spread = torch.einsum("blnd,bnde->blne", query, _covary(key, key))
    variance = torch.einsum("blnd,blnd->bln", spread, query) / D
    return level + mean_scale * mean + variance_scale * variance / 2


def _bias(query: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    return 4 * weights["mass_bias"].to(query)


def _in_tiles(
    attend: Callable[..., tuple[Tensor, ...]], index: TileIndex, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Compute something of each tile, in chunks, and put it back where the tokens lie.

    attend: (is_token [k, T], each tensor in tiles [B, k, T, N, ...]) -> results [B, k, T, N, ...].
    tensors: [B, L, N, ...]. Returns the results as [B, L, N, ...].
    """
    B, _, N, *_ = tensors[0].shape
    T = index.tokens.shape[1]
    size = max(1, _MAX_CHUNK_SCORES // (B * N * T * T))
    chunks = zip(index.tokens.split(size), index.is_token.split(size), strict=True)
    found = [attend(valid, *(_take(x, tokens) for x in tensors)) for tokens, valid in chunks]
    results = (torch.cat(parts, dim=1).flatten(1, 2) for parts in zip(*found, strict=True))
    return tuple(_take(x, index.places) for x in results)


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    """Return x[:, tokens], whose gradient so takes a GPU no sorting."""
    return x.index_select(1, tokens.flatten()).unflatten(1, tokens.shape)
