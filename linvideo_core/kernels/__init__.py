"""The one door to linear attention: validates, then dispatches to an implementation.

Implementations never import each other; `reference` defines correctness.
"""

from torch import Tensor

from . import reference


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, query_map: Tensor, key_map: Tensor
) -> Tensor:
    """Non-causal linear attention with the Hedgehog map (LinVideo eq. 3 and 4).

    query, key, value: [B, L, N, D], roped and normed as softmax attention takes them; key and
        value may have another L than query.
    query_map, key_map: [N, D, M/2], the learnable W of each side.

    Returns [B, L, N, D] in value's dtype.
    Raises ValueError naming the shape that does not fit.
    """
    _check(query, key, value, query_map, key_map)
    return reference.linear_attention(query, key, value, query_map, key_map)


def _check(query: Tensor, key: Tensor, value: Tensor, query_map: Tensor, key_map: Tensor) -> None:
    if query.ndim != 4:
        raise ValueError(f"query has shape {list(query.shape)}; [B, L, N, D] is expected")
    B, _, N, D = query.shape
    for name, tensor in (("key", key), ("value", value)):
        if tensor.ndim != 4 or tensor.shape[0] != B or tensor.shape[2:] != (N, D):
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; [{B}, L, {N}, {D}] is expected, as query's"
            )
    if key.shape[1] != value.shape[1]:
        raise ValueError(
            f"key has {key.shape[1]} tokens and value {value.shape[1]}; as many of each"
        )
    for name, tensor in (("query_map", query_map), ("key_map", key_map)):
        if tensor.ndim != 3 or tensor.shape[:2] != (N, D):
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; [{N}, {D}, M/2] is expected: the feature "
                "maps must come from a file for this model"
            )
    if query_map.shape != key_map.shape:
        raise ValueError(
            f"query_map {list(query_map.shape)} and key_map {list(key_map.shape)} must be alike"
        )
    devices = {t.device for t in (query, key, value, query_map, key_map)}
    if len(devices) > 1:
        raise ValueError(f"tensors lie on several devices: {sorted(map(str, devices))}; use one")
