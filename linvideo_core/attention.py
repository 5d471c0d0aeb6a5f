"""Attention modules that take the place of one another: softmax, Hedgehog linear, their mixture.

All map `query, key, value [B, L, N, D] -> [B, L, N, D]`, after qk-norm and RoPE.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import linear_attention


class SoftmaxAttention(nn.Module):
    """Quadratic attention through PyTorch's fused kernels."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend over all keys, scaled by 1/sqrt(D)."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


class LinearAttention(nn.Module):
    """Linear attention with a learnable Hedgehog map for queries and one for keys, per head."""

    def __init__(self, num_heads: int, head_dim: int, feature_dim: int) -> None:
        """feature_dim is M, even: the map W of each side is [num_heads, head_dim, M/2]."""
        super().__init__()
        if feature_dim < 2 or feature_dim % 2:
            raise ValueError(f"feature_dim {feature_dim} given; an even number >= 2 is needed")
        self.query_map = nn.Parameter(torch.empty(num_heads, head_dim, feature_dim // 2))
        self.key_map = nn.Parameter(torch.empty(num_heads, head_dim, feature_dim // 2))
        self.init_weights()

    @property
    def feature_dim(self) -> int:
        """M, the number of features of a query or key."""
        return 2 * self.query_map.shape[-1]

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Start both sides from one orthogonal map, so that phi(q) phi(k) grows with q k.

        A quarter power of D on each side folds the 1/sqrt(D) of softmax attention into W.
        """
        N, D, half = self.query_map.shape
        size = max(D, half)
        for head in range(N):
            gaussian = torch.randn(size, size, generator=generator)
            orthogonal = torch.linalg.qr(gaussian).Q[:D, :half] * D**-0.25
            for feature_map in (self.query_map, self.key_map):
                feature_map.data[head] = orthogonal

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend in O(L)."""
        return linear_attention(query, key, value, self.query_map, self.key_map)


class MixedAttention(nn.Module):
    """`r softmax + (1 - r) linear`, with the learnable layer score r (LinVideo eq. 5).

    r = 1 is softmax, r = 0 is linear. Selection hardens a layer by setting `choice`, after which
    only the chosen branch is computed.
    """

    def __init__(self, linear: LinearAttention, layer_score: float) -> None:
        super().__init__()
        self.linear = linear
        self.softmax = SoftmaxAttention()
        self.layer_score = nn.Parameter(torch.tensor(float(layer_score)))
        self.choice: str | None = None

    def harden(self, choice: str) -> None:
        """Compute only "linear" or only "softmax" from now on."""
        if choice not in ("linear", "softmax"):
            raise ValueError(f"choice {choice!r} given; 'linear' or 'softmax' is expected")
        self.choice = choice

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Mix both branches, or compute the chosen one."""
        if self.choice == "linear":
            return self.linear(query, key, value)
        softmax = self.softmax(query, key, value)
        if self.choice == "softmax":
            return softmax
        linear = self.linear(query, key, value)
        return torch.lerp(linear, softmax, self.layer_score.to(softmax.dtype))
