"""ComfyUI's call of its attention function, read into our layout and answered in its own."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from comfy.ldm.modules.attention import attention_pytorch, optimized_attention
from einops import rearrange
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query, key and value, each [B, L, N, D] -> [B, L, N, D]."""


def answer(
    attend: Attend,
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
    """Answer a call of ComfyUI's attention function, whose arguments these are, with `attend`.

    query, key, value: [B, L, N D], or [B, N, L, D] with skip_reshape.

    Returns [B, L, N D], or [B, N, L, D] with skip_output_reshape.
    Raises RuntimeError for what linear attention over the whole sequence is not.
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


def run_answered(
    layer: nn.Module,
    attend: Attend,
    x: Tensor,
    *args: Any,
    transformer_options: dict[str, Any],
    **kwargs: Any,
) -> Tensor:
    """Run the forward of an attention layer's class, its one attention call answered by `attend`.

    Raises RuntimeError where that forward makes no such call, or several.
    """
    num_calls = 0

    def override(_: Any, *call_args: Any, **call_options: Any) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return answer(attend, *call_args, **call_options)

    options = {**transformer_options, "optimized_attention_override": override}
    output = type(layer).forward(layer, x, *args, transformer_options=options, **kwargs)
    if num_calls != 1:
        raise RuntimeError(
            f"a linear layer asked for attention {num_calls} times instead of once: this ComfyUI "
            "computes its model in a way that LinVideo does not know; update LinVideo"
        )
    return output


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of ComfyUI's attention function for self-attention, and what can answer it.

    query: [B, L, N D], or [B, N, L, D]; heads: N.
    options: the `transformer_options`.
    own: answers it as if LinVideo were not there.
    answer: answers it with an `Attend`.
    """

    query: Tensor
    heads: int
    options: Mapping[str, Any]
    own: Callable[[], Tensor]
    answer: Callable[[Attend], Tensor]


def override_self_attention(
    model: Any, serve: Callable[[Call], Tensor], kernel: str
) -> Callable[..., Tensor]:
    """Let `serve` answer the self-attention of a ModelPatcher; return its new override.

    Attention to a prompt, and what has a mask or a scale, stays what it was.

    kernel: what `name_kernel` calls it. While `is_resting` of the override is set, its kernel does
        not compute.
    """
    options = model.model_options.setdefault("transformer_options", {})
    previous = options.get("optimized_attention_override")

    def override(
        function: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        heads: int,
        mask: Any = None,
        *args: Any,
        **others: Any,
    ) -> Tensor:
        before = function if previous is None else functools.partial(previous, function)
        given = (query, key, value, heads, mask, *args)
        if mask is not None or "scale" in others or query.shape != key.shape:
            return before(*given, **others)
        call = Call(
            query,
            heads,
            others.get("transformer_options") or {},
            own=lambda: before(*given, **others),
            answer=lambda attend: answer(attend, *given, **others),
        )
        return serve(call)

    override.kernel, override.is_resting = kernel, False
    options["optimized_attention_override"] = override
    return override


def is_resting(transformer_options: Mapping[str, Any]) -> bool:
    """Say whether what answers attention calls leaves them as they were, in this call alone."""
    override = transformer_options.get("optimized_attention_override")
    return getattr(override, "is_resting", False)


PYTORCH = "ComfyUI's pytorch attention"
"""The kernel of softmax layers where nothing else was chosen."""


def name_kernel(layer: nn.Module, transformer_options: Mapping[str, Any]) -> str:
    """Say what answers the attention call of a layer that is not linear."""
    override = transformer_options.get("optimized_attention_override")
    if override is not None:
        return getattr(override, "kernel", "another node's attention")
    # A model's file may prefer a function, in ComfyUI from about 0.46.0.
    preferred = getattr(getattr(layer, "comfy_attention", None), "function", None)
    name = (preferred or optimized_attention).__name__
    return f"ComfyUI's {name.removeprefix('attention_')} attention"


def attend_as_pytorch(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Override the backend that the user chose, which may be rough or have no backward pass."""
    return attention_pytorch(*args, **kwargs)
