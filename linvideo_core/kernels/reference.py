"""The kernels in plain PyTorch: their definitions, and linear attention in chunks.

`linear_attention` and `norm_rotary` define correctness. `forward` and `backward` compute linear
attention and its gradients over chunks of tokens, so that memory stays small however long the video
is; `triton_kernels` derives the formulas. All of it accumulates in fp32 at least.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# Features of a chunk, in all heads and videos: 8 MB in fp32, which stay in a CPU's cache. What is
# not a CPU has more, to be busy while the CPU starts its next call.
_MAX_CHUNK_FEATURES = 2**21
_GPU_FACTOR = 4

# Weights that add up to less have no mean; their inverse may be multiplied by any value.
LEAST_WEIGHT = 2.0**-100


def hedgehog(x: Tensor, feature_map: Tensor, *, is_joint: bool = False) -> Tensor:
    """Map x [B, L, N, D] to positive features [B, L, N, M], fp32 at least (LinVideo eq. 4).

    `phi(x) = softmax(x W) ++ softmax(-x W)` with W = feature_map [N, D, M/2]; the softmax runs
    over the feature axis and the usual 1/sqrt(D) is part of W. If joint, `softmax(x W ++ -x W)`:
    one softmax over all M, so that one side may outweigh the other.
    """
    return to_features(torch.einsum("blnd,ndm->blnm", widen(x), widen(feature_map)), is_joint)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    *,
    is_joint: bool = False,
) -> Tensor:
    """Non-causal linear attention, [B, L, N, D] -> [B, L, N, D] in value's dtype (LinVideo eq. 3).

    `o_i = phi(q_i) (sum_j phi(k_j)^T v_j) / (phi(q_i) sum_j phi(k_j))`; differentiable.
    """
    with torch.autocast(query.device.type, enabled=False):
        query_features = hedgehog(query, query_map, is_joint=is_joint)
        key_features = hedgehog(key, key_map, is_joint=is_joint)
        # Averages over tokens, not sums: the quotient is the same and long videos cannot overflow.
        state = torch.einsum("blnm,blnd->bnmd", key_features, widen(value)) / value.shape[1]
        numerator = torch.einsum("blnm,bnmd->blnd", query_features, state)
        denominator = torch.einsum("blnm,bnm->bln", query_features, key_features.mean(dim=1))
        return (numerator / denominator.unsqueeze(-1)).to(value.dtype)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    *,
    is_joint: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output [B, L, N, D], means [B, N, M, D] and normaliser [B, N, M], without a graph."""
    with torch.autocast(query.device.type, enabled=False):
        state, total = sum_features(key_map, key, value, is_joint=is_joint)
        means, normaliser = _divide(state, total), total / key.shape[1]
        terms = normaliser.unsqueeze(-1) * means
        # Chunks are written in place: joined in the end they would be in memory twice.
        out = torch.empty_like(query, dtype=value.dtype)
        for q, part in chunks(2 * query_map.shape[2], query, out):
            features = to_features(by_head(q) @ widen(query_map), is_joint)
            part.copy_(attend_features(features, terms, normaliser).transpose(1, 2))
        return out, means, normaliser


def sum_features(
    feature_map: Tensor, key: Tensor, value: Tensor, *, is_joint: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the sums over tokens of phi(k) v' [B, N, M, D] and of phi(k) [B, N, M].

    feature_map: [N, D, M/2]; key and value: [B, L, N, D].
    """
    state = total = torch.zeros((), device=key.device)
    for k, v in chunks(2 * feature_map.shape[2], key, value):
        features = to_features(by_head(k) @ widen(feature_map), is_joint)
        state = state + features.mT @ by_head(v)
        total = total + features.sum(dim=2)
    return state, total


def attend_features(features: Tensor, state: Tensor, total: Tensor) -> Tensor:
    """Return linear attention [B, N, L, D] of queries' features [B, N, L, M].

    state, total: as `sum_features` returns them, or both times the same number.
    """
    return features @ state / (features @ total.unsqueeze(-1)).clamp_min(LEAST_WEIGHT)


def backward(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    means: Tensor,
    normaliser: Tensor,
    *,
    needs_map_gradients: bool,
    is_joint: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and both maps; the maps' are 0 if unwanted.

    upstream: [B, L, N, D], the output's gradient; means and normaliser as `forward` gave them.
    """
    with torch.autocast(query.device.type, enabled=False):
        state = total = torch.zeros((), device=key.device)
        dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))
        dquery_map, dkey_map = (torch.zeros_like(widen(x)) for x in (query_map, key_map))
        for q, do, out in chunks(2 * query_map.shape[2], query, upstream, dq):
            features = hedgehog(q, query_map, is_joint=is_joint)
            weights = _weigh(features, normaliser)
            slope = torch.einsum("blnd,bnmd->blnm", widen(do), means)
            along = (weights * slope).sum(dim=-1, keepdim=True)
            state = state + torch.einsum("blnm,blnd->bnmd", weights, widen(do))
            total = total + (weights * along).sum(dim=1)
            slope = weights * (slope - along)
            projected = _to_projection(features, slope, is_joint)
            out.copy_(_pull_back(q, query_map, projected, dquery_map, needs_map_gradients))
        count = normaliser * key.shape[1]
        state, total = _divide(state, count), _divide(total.unsqueeze(-1), count).squeeze(-1)
        for k, v, key_out, value_out in chunks(2 * key_map.shape[2], key, value, dk, dv):
            features = hedgehog(k, key_map, is_joint=is_joint)
            value_out.copy_(torch.einsum("blnm,bnmd->blnd", features, state))
            slope = torch.einsum("blnd,bnmd->blnm", widen(v), state) - total.unsqueeze(1)
            slope = features * slope
            projected = _to_projection(features, slope, is_joint)
            key_out.copy_(_pull_back(k, key_map, projected, dkey_map, needs_map_gradients))
        return dq, dk, dv, dquery_map, dkey_map


def norm_rotary(x: Tensor, weight: Tensor, rotary: Tensor, num_heads: int, eps: float) -> Tensor:
    """Return x [B, L, N D] normed over its width and rotated, [B, L, N, D]; differentiable."""
    normed = F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    return rotate(rearrange(normed, "b l (n d) -> b l n d", n=num_heads), rotary)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of x [B, L, N, D] by `rotary` [2, L, D/2], cos and sin."""
    cos, sin = rotary[:, None, :, None].unbind(0)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def widen(x: Tensor) -> Tensor:
    """Return x in the dtype that it is computed in, see `widen_dtype`."""
    return x.to(widen_dtype(x.dtype))


def widen_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which tensors of a dtype are computed: fp32, or fp64 for itself."""
    return torch.promote_types(dtype, torch.float32)


def chunks(width: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Split tensors [B, L, N, ...] into chunks of tokens, for so many numbers a token and head."""
    size = chunk_size(width, tensors[0])
    return list(zip(*(x.split(size, dim=1) for x in tensors), strict=True))


def chunk_size(width: int, x: Tensor) -> int:
    """Return how many tokens of x [B, L, N, D] make a chunk; width: as `chunks` takes it."""
    B, _, N, _ = x.shape
    limit = _MAX_CHUNK_FEATURES * (1 if x.device.type == "cpu" else _GPU_FACTOR)
    return max(1, limit // (B * N * width))


def by_head(x: Tensor) -> Tensor:
    """Return x [B, L, N, D] as [B, N, L, D], widened: one copy, and products need no other."""
    return widen(x.transpose(1, 2)).contiguous()


def to_features(projected: Tensor, is_joint: bool) -> Tensor:
    """Return the features [..., M] of x W [..., M/2]; see `hedgehog`."""
    if is_joint:
        return torch.cat([projected, -projected], dim=-1).softmax(dim=-1)
    return torch.cat([projected.softmax(dim=-1), (-projected).softmax(dim=-1)], dim=-1)


def _divide(state: Tensor, count: Tensor) -> Tensor:
    """Divide by the sum of a feature; one that no key has weighs nothing, but stays finite."""
    return state / count.clamp_min(torch.finfo(count.dtype).tiny).unsqueeze(-1)


def _weigh(features: Tensor, normaliser: Tensor) -> Tensor:
    """Return features times the normaliser, scaled to add up to 1."""
    weights = features * normaliser.unsqueeze(1)
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(LEAST_WEIGHT)


def _to_projection(features: Tensor, slope: Tensor, is_joint: bool) -> Tensor:
    """Return the gradient of x W from the slope, features times their gradient."""
    sides = zip(features.chunk(2, -1), slope.chunk(2, -1), strict=True)
    total = slope.sum(dim=-1, keepdim=True)
    plus, minus = (
        part - half * (total if is_joint else part.sum(dim=-1, keepdim=True))
        for half, part in sides
    )
    return plus - minus


def _pull_back(
    x: Tensor,
    feature_map: Tensor,
    projected: Tensor,
    map_gradient: Tensor,
    needs_map_gradient: bool,
) -> Tensor:
    """Return the gradient of x from that of x W; add the map's."""
    if needs_map_gradient:
        map_gradient += torch.einsum("blnd,blnm->ndm", widen(x), projected)
    return torch.einsum("blnm,ndm->blnd", projected, widen(feature_map))
