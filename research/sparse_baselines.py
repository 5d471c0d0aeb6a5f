"""Two published sparse layers that ours are compared with, in plain PyTorch: PISA and SLA.

Both cut the tokens into blocks that follow one another. For each block of queries they choose the
blocks of keys that are attended to exactly, by scores of the blocks' means; they differ in what
stands for the others. Here blocks are of 16 tokens, as for Sol-Attn in this study and not the 64 of
real sizes. A density of k of K blocks is `max(1, round(density K))` of them, as Sol-Attn's is.

It is quality that these measure, so they hold all L x L scores, in fp32 at least. Below s_ij is
q_i . k_j / sqrt(D), and a bar over a block's index b its mean over the keys of that block:
s_ib = q_i . mean(k_j) / sqrt(D).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linvideo_core.kernels.reference import hedgehog, widen
from linvideo_core.kernels.tiles import TokenGrid
from linvideo_core.models.attention import LinearAttention

BLOCK = 16
"""Tokens of a block; the last one may be shorter."""

# Of the blocks, those that SLA leaves out: the paper's k_l.
_NEGLIGIBLE = 0.1
# Added to the deviation of a block's covariance before its logarithm, as PISA's code does.
_LEAST_DEVIATION = 1e-5
# Weights that add up to less have no mean; there are none where no block is marginal.
_LEAST_SUM = 2.0**-100


class PiecewiseAttention(nn.Module):
    """PISA, Piecewise Sparse Attention (arXiv 2602.01077), without training."""

    def __init__(self, density: float, *, is_blockwise: bool = False) -> None:
        super().__init__()
        self.density, self.is_blockwise = density, is_blockwise

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, grid: TokenGrid | None = None
    ) -> Tensor:
        """Attend over all keys; query, key, value and the result are [B, L, N, D]."""
        return piecewise_attention(query, key, value, self.density, is_blockwise=self.is_blockwise)


def piecewise_attention(
    query: Tensor, key: Tensor, value: Tensor, density: float, *, is_blockwise: bool = False
) -> Tensor:
    """Attend exactly to the best key blocks, and to all others by their Taylor expansion (PISA).

    A key of a block b that is not chosen has, with `exp(s_ij) ~ exp(s_ib) (1 + s_ij - s_ib)`,

        numerator    exp(s_ib) sum_j v_j + exp(s_ib) q_i' H_b / sqrt(D)
        denominator  exp(s_ib) n_b           H_b = sum_j (k_j - mean(k)) v_j', D x D

    as the first order of the denominator adds up to 0; the paper has no second one. It replaces
    each H_b by a mean over all blocks, those that are exact, too, so that one matrix is read
    ("hybrid order"): the numerator's second term is the mass of all that is not exact times
    `q_i' sum_b H_b / (L sqrt(D))`. Blocks are chosen by `s_ab + log |H_b - mean(H)|`, a and b
    blocks: where one mean is a poor stand-in, a block is rather exact ("covariance-aware").

    All that is theirs; their code takes |H_b|, the norm of Frobenius, where the paper has the
    distance to the mean, which in that norm is taken here. Ours is how the terms are computed: with
    all scores at hand, q_i' H_b / sqrt(D) is `sum_j (s_ij - s_ib) v_j`.

    query, key, value: [B, L, N, D]; at density 1 all blocks are exact.
    is_blockwise: each block has its own H_b, the paper's first order without the shortcut.

    Returns [B, L, N, D] in value's dtype.
    """
    num_tokens = query.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = (widen(x).transpose(1, 2) for x in (query, key, value))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        means = _average(scores)
        routes = _pool_queries(means) + _log_deviation(k, v).unsqueeze(2)
        num_exact = count_exact(density, routes.shape[-1])
        is_exact = _spread_pairs(_rank(routes) < num_exact, num_tokens)
        centre = _spread(means, num_tokens)
        logits = torch.where(is_exact, scores, centre)
        weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
        far = weights.masked_fill(is_exact, 0)
        mass = far if is_blockwise else far.mean(dim=-1, keepdim=True)
        numerator = (weights + mass * (scores - centre)) @ v
        out = numerator / weights.sum(dim=-1, keepdim=True)
        return out.transpose(1, 2).to(value.dtype)


class SparseLinearAttention(nn.Module):
    """SLA, Sparse-Linear Attention (arXiv 2509.24006), as the paper defines it.

    `o_i = sparse_i + linear_i P`: the softmax over the keys of critical blocks alone, which have
    the highest scores s_ab of block means; and linear attention over those of marginal blocks,
    which are all but them and the tenth of the lowest scores. P starts at 0, and softmax over few
    blocks is what the layer starts as. No gradient passes through the choice.

    The paper's features are softmax(x), without weights, and its P is one for all heads. Here
    P is one a head, and features are the student's, `softmax(x W) ++ softmax(-x W)` with learnable
    W: rows of a study then differ in how both kinds of attention are put together alone. Today the
    authors' code lets linear attention see all keys and leaves none out.

    query_map, key_map: [N, D, M/2], a linear layer's own; projection: [N, D, D], P.
    """

    def __init__(self, linear: LinearAttention, density: float) -> None:
        super().__init__()
        self.query_map, self.key_map = linear.query_map, linear.key_map
        N, D, _ = linear.query_map.shape
        self.projection = nn.Parameter(torch.zeros(N, D, D, device=linear.query_map.device))
        self.density = density

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, grid: TokenGrid | None = None
    ) -> Tensor:
        """Attend; query, key, value and the result are [B, L, N, D]."""
        with torch.autocast(query.device.type, enabled=False):
            q, k, v = (widen(x).transpose(1, 2) for x in (query, key, value))
            scores = q @ k.mT / q.shape[-1] ** 0.5
            is_critical, is_marginal = self._classify(scores.detach())
            sparse = scores.masked_fill(~is_critical, -torch.inf).softmax(dim=-1) @ v
            pairs = (query, self.query_map), (key, self.key_map)
            query_features, key_features = (hedgehog(*pair).transpose(1, 2) for pair in pairs)
            similarity = (query_features @ key_features.mT) * is_marginal
            total = similarity.sum(dim=-1, keepdim=True).clamp_min(_LEAST_SUM)
            linear = similarity @ v / total
            out = sparse + linear @ self.projection.to(linear)
            return out.transpose(1, 2).to(value.dtype)

    def _classify(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return which keys [B, N, L, L] a query sees by softmax, and which by linear attention."""
        ranks = _rank(_pool_queries(_average(scores)))
        num_blocks = ranks.shape[-1]
        num_critical = count_exact(self.density, num_blocks)
        is_critical = ranks < num_critical
        is_kept = ranks < max(num_critical, num_blocks - round(_NEGLIGIBLE * num_blocks))
        num_tokens = scores.shape[-1]
        is_marginal = _spread_pairs(is_kept & ~is_critical, num_tokens)
        return _spread_pairs(is_critical, num_tokens), is_marginal


def count_exact(density: float, num_blocks: int) -> int:
    """Return how many of the blocks a density is."""
    return min(num_blocks, max(1, round(density * num_blocks)))


def _average(x: Tensor) -> Tensor:
    """Return the means of blocks: [..., L] to [..., K]."""
    block = torch.arange(x.shape[-1], device=x.device) // BLOCK
    is_of = (block[:, None] == block[::BLOCK]).to(x)
    return x @ (is_of / is_of.sum(dim=0))


def _pool_queries(means: Tensor) -> Tensor:
    """Return the mean over each block of queries [B, N, K, K] of s_ib [B, N, L, K]."""
    return _average(means.mT).mT


def _rank(routes: Tensor) -> Tensor:
    """Return the place of each key block in its row by falling score, from 0; same shape."""
    return routes.argsort(dim=-1, descending=True).argsort(dim=-1)


def _spread(blocks: Tensor, num_tokens: int) -> Tensor:
    """Give each token what its block has: [..., K] to [..., L]."""
    return blocks.repeat_interleave(BLOCK, dim=-1)[..., :num_tokens]


def _spread_pairs(blocks: Tensor, num_tokens: int) -> Tensor:
    """Give each query and key what their blocks have: [B, N, K, K] to [B, N, L, L]."""
    return _spread(_spread(blocks, num_tokens).mT, num_tokens).mT


def _log_deviation(key: Tensor, value: Tensor) -> Tensor:
    """Return `log |H_b - mean(H)|` [B, N, K] of key and value [B, N, L, D]; see above."""
    num_tokens = key.shape[2]
    means = _average(key.mT)
    centred = key - _spread(means, num_tokens).mT
    # Tokens that the last block lacks are 0 and add nothing.
    centred, values = (
        F.pad(x, (0, 0, 0, -num_tokens % BLOCK)).unflatten(2, (-1, BLOCK)) for x in (centred, value)
    )
    covariance = centred.mT @ values
    deviation = covariance - covariance.mean(dim=2, keepdim=True)
    return (deviation.flatten(-2).norm(dim=-1) + _LEAST_DEVIATION).log()
