"""Linear attention with the Hedgehog map in plain PyTorch: the definition of correctness.

Two matrix products, O(L); state and normaliser are accumulated in fp32 whatever the inputs are.
"""

import torch
from torch import Tensor


def hedgehog(x: Tensor, feature_map: Tensor) -> Tensor:
    """Map x [B, L, N, D] to positive features [B, L, N, M] fp32 (LinVideo eq. 4).

    `phi(x) = softmax(x W) ++ softmax(-x W)` with W = feature_map [N, D, M/2]; the softmax runs
    over the feature axis and the usual 1/sqrt(D) is part of W.
    """
    projected = torch.einsum("blnd,ndm->blnm", x.float(), feature_map.float())
    return torch.cat([projected.softmax(dim=-1), (-projected).softmax(dim=-1)], dim=-1)


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, query_map: Tensor, key_map: Tensor
) -> Tensor:
    """Non-causal linear attention, [B, L, N, D] -> [B, L, N, D] in value's dtype (LinVideo eq. 3).

    `o_i = phi(q_i) (sum_j phi(k_j)^T v_j) / (phi(q_i) sum_j phi(k_j))`.
    """
    with torch.autocast(query.device.type, enabled=False):
        query_features = hedgehog(query, query_map)
        key_features = hedgehog(key, key_map)
        # Averages over tokens, not sums: the quotient is the same and long videos cannot overflow.
        state = torch.einsum("blnm,blnd->bnmd", key_features, value.float()) / key.shape[1]
        normaliser = key_features.mean(dim=1)
        numerator = torch.einsum("blnm,bnmd->blnd", query_features, state)
        denominator = torch.einsum("blnm,bnm->bln", query_features, normaliser)
        return (numerator / denominator.unsqueeze(-1)).to(value.dtype)
