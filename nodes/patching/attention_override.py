"""ComfyUI's call of its attention function, read into our layout and answered in its own."""

from collections.abc import Callable
from typing import Any

from einops import rearrange
from torch import Tensor


def answer(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Any = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **_: Any,
) -> Tensor:
    """Answer a call with `attend`, which maps [B, L, N, D] three times to [B, L, N, D].

    query, key, value: [B, L, N D], or [B, N, L, D] with skip_reshape, as the host calls it; the
        other arguments are the host's too, in its order.

    Returns [B, L, N D], or [B, N, L, D] with skip_output_reshape.
    Raises RuntimeError, in one sentence, for what linear attention over the whole sequence is not.
    """
    if mask is not None:
        raise RuntimeError("LinVideo's linear layers take no attention mask: remove the mask")
    num_dims = 4 if skip_reshape else 3
    if query.ndim != num_dims or not query.shape == key.shape == value.shape:
        raise RuntimeError(
            f"LinVideo cannot run this attention (query {list(query.shape)}, key "
            f"{list(key.shape)}): remove LinVideo Linearize, or the node that changes attention"
        )
    given = "b n l d" if skip_reshape else "b l (n d)"
    wanted = "b n l d" if skip_output_reshape else "b l (n d)"
    query, key, value = (rearrange(x, f"{given} -> b l n d", n=heads) for x in (query, key, value))
    return rearrange(attend(query, key, value), f"b l n d -> {wanted}")


def override_self_attention(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable:
    """Return an `optimized_attention_override` by which `attend` answers self-attention.

    Attention to a prompt, and what has a mask or a scale, stays with the host's own function.
    """

    def override(
        function: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        heads: int,
        mask: Any = None,
        *args: Any,
        **options: Any,
    ) -> Tensor:
        if mask is not None or "scale" in options or query.shape != key.shape:
            return function(query, key, value, heads, mask, *args, **options)
        return answer(attend, query, key, value, heads, mask, *args, **options)

    return override
