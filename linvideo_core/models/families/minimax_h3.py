"""MiniMax-H3: text, audio and video in one packed sequence; self-attention at `blocks.<i>.attn`.

Its text refiner (`token_refiner.blocks.<i>.attn`) has layers of the same kind that see text alone:
they are no sites.
"""

import re

from ..attention_sites import AttentionSite, ModelFamily, Shapes

_QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv_proj\.weight")
_STREAMS = ("video_patch_proj.weight", "audio_patch_proj.weight")


def find_sites(shapes: Shapes) -> list[AttentionSite]:
    """Return the self-attention sites of an H3 model, recognised by its two streams' doors."""
    if not all(name in shapes for name in _STREAMS):
        return []
    sites = []
    for name, shape in shapes.items():
        match = _QKV.fullmatch(name)
        norm = shapes.get(f"blocks.{match[1]}.attn.q_norm.weight") if match else None
        if not norm or len(shape) != 2 or shape[0] % (3 * norm[0]):
            continue
        layer, head_dim = int(match[1]), norm[0]
        num_heads = shape[0] // (3 * head_dim)
        sites.append(AttentionSite(layer, f"blocks.{layer}.attn", num_heads, head_dim))
    return sorted(sites, key=lambda site: site.layer)


FAMILY = ModelFamily(
    name="minimax_h3",
    find_sites=find_sites,
    trainable_prefix="blocks.",
    feed_forward=".mlp.fc1.weight",
    sketched=("qkv_proj",),
    # A modulation follows from the noise level alone, and may come as a table with few columns.
    frozen_parts=(".adaln_proj.",),
)
