"""MiniMax-H3's blocks and attention so that a gradient passes through them.

ComfyUI's own write into tensors that a backward pass needs, and turn queries and keys by an
operator that has none. Here the same is computed from the same weights without either, and before
a training it is seen to be the same.
"""

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor, nn

from ....linvideo_core.models.attention import SoftmaxAttention

Segments = Sequence[tuple[int, int, int]]
"""The sequence in pieces, in order: first token, end, and the row of the modulation."""


_MAX_DIFFERENCE = 1e-2


def prepare_for_training(diffusion_model: nn.Module) -> None:
    """Give each block of a twin, which nothing else uses, a forward that can be differentiated.

    Raises ValueError, in one sentence, where this ComfyUI computes its blocks in another way.
    """
    _check_agreement(diffusion_model.blocks[0])
    for block in diffusion_model.blocks:
        block.__dict__["forward"] = MethodType(_run_block, block)


def run_attention(
    attention: nn.Module,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    rope_freqs: Tensor | None = None,
    *,
    transformer_options: Any = None,
    in_training: bool = False,
) -> Tensor | None:
    """Return what the attention's own forward gives for tokens x [L, C]; see `HostFamily`.

    rope_freqs: [1, L, 1, R, 2, 2], rotations of the first R and the next R numbers of a head.
    in_training: where it is not, None, which leaves all to the class's own forward.
    """
    if not in_training or rope_freqs is None:
        return None
    shape = (3, attention.heads, attention.head_dim)
    query, key, value = attention.qkv_proj(x).unflatten(-1, shape).unsqueeze(0).unbind(2)
    # The first column of a rotation is (cos, sin).
    cos, sin = rope_freqs[..., 0].float().unbind(-1)
    query = _norm_and_rotate(query, attention.q_norm, cos, sin)
    key = _norm_and_rotate(key, attention.k_norm, cos, sin)
    # A copy: what the three share need not wait for the backward pass.
    attended = attend(query, key, value.contiguous())
    return attention.out_proj(attended[0].flatten(1))


def _norm_and_rotate(x: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor) -> Tensor:
    """Norm each head of x [1, L, N, D] and turn its first 2 R numbers, in fp32.

    cos, sin: [1, L, 1, R].
    """
    normed = F.rms_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.eps)
    R = cos.shape[-1]
    first, second, rest = normed.split([R, R, normed.shape[-1] - 2 * R], dim=-1)
    turned = (first * cos - second * sin, first * sin + second * cos, rest)
    return torch.cat(turned, dim=-1).to(x.dtype)


def _run_block(
    self: nn.Module,
    x: Tensor,
    t_emb: Tensor,
    mod_segments: Segments,
    rope_freqs: Tensor,
    transformer_options: Any = None,
) -> Tensor:
    """Return a block's output for tokens x [L, C]; called as its class's own forward is."""
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = self.adaln_proj(t_emb)
    options = {"transformer_options": transformer_options}
    h = _modulate(self.norm1(x), shift, scale, mod_segments)
    x = _add_gated(x, gate, self.attn(h, rope_freqs=rope_freqs, **options), mod_segments)
    h = _modulate(self.norm2(x), ffn_shift, ffn_scale, mod_segments)
    return _add_gated(x, ffn_gate, self.mlp(h), mod_segments)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, segments: Segments) -> Tensor:
    """Return `(1 + scale) x + shift` of tokens [L, C], each with its segment's row."""
    shift, scale = shift.to(x.dtype), 1 + scale.to(x.dtype)
    parts = zip(_split(x, segments), segments, strict=True)
    return torch.cat([part * scale[row] + shift[row] for part, (_, _, row) in parts])


def _add_gated(x: Tensor, gate: Tensor, change: Tensor, segments: Segments) -> Tensor:
    """Return `x + gate change` of tokens [L, C], each with its segment's row."""
    gate = gate.to(x.dtype)
    parts = zip(_split(x, segments), _split(change, segments), segments, strict=True)
    return torch.cat([torch.addcmul(old, new, gate[row]) for old, new, (_, _, row) in parts])


def _split(x: Tensor, segments: Segments) -> tuple[Tensor, ...]:
    return x.split([end - start for start, end, _ in segments])


@torch.no_grad()
def _check_agreement(block: nn.Module) -> None:
    """Compare a block's own forward with ours, on a few random tokens."""
    x, t_emb, rotations = _draw_call(block)
    segments = [(0, 2, 0), (2, 6, 2)]
    # The backend that the user chose may be a rough one.
    options = {"optimized_attention_override": _attend_exactly}
    own = type(block).forward(block, x.clone(), t_emb, segments, rotations, options)
    attended = run_attention(block.attn, SoftmaxAttention(), x, rotations, in_training=True)
    own_attended = block.attn(x.clone(), rope_freqs=rotations, transformer_options=options)
    ours = _run_block(block, x, t_emb, segments, rotations, options)
    for found, expected in ((ours, own), (attended, own_attended)):
        if not (found - expected).norm() <= _MAX_DIFFERENCE * expected.norm():
            raise ValueError(
                "this ComfyUI computes MiniMax-H3 in a way that LinVideo does not know, so that no "
                "transfer can run on it: update LinVideo, or apply a saved file"
            )


def _draw_call(block: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Return six tokens, one time's embedding and rotations of a quarter of a head's numbers."""
    generator, like = torch.Generator().manual_seed(0), block.norm1.weight
    num_pairs = block.attn.head_dim // 8

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(like)

    cos, sin = draw(6, num_pairs).cos(), draw(6, num_pairs).sin()
    rotations = torch.stack([cos, -sin, sin, cos], dim=-1).view(1, 6, 1, num_pairs, 2, 2)
    return draw(6, *like.shape), draw(1, block.adaln_proj.linear.in_features), rotations


def _attend_exactly(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    return attention_pytorch(*args, **kwargs)
