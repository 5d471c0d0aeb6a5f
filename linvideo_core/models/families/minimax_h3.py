"""MiniMax-H3: text, audio and video in one packed sequence; self-attention at `blocks.<i>.attn`.

Its text refiner (`token_refiner.blocks.<i>.attn`) has layers of the same kind that see text alone:
they are no sites.
"""

from ..attention_sites import AttentionSite, ModelFamily, Shapes, match_sites

_STREAMS = ("video_patch_proj.weight", "audio_patch_proj.weight")


def find_sites(shapes: Shapes) -> list[AttentionSite]:
    """Return the self-attention sites of an H3 model, recognised by what its two streams enter."""

    def measure(name: str) -> tuple[int, int] | None:
        qkv, norm = (shapes.get(f"{name}.{x}.weight", ()) for x in ("qkv_proj", "q_norm"))
        if not norm or len(qkv) != 2 or qkv[0] % (3 * norm[0]):
            return None
        return qkv[0] // (3 * norm[0]), norm[0]

    is_h3 = all(name in shapes for name in _STREAMS)
    return match_sites(shapes, r"blocks\.(\d+)\.attn", measure) if is_h3 else []


FAMILY = ModelFamily(
    name="minimax_h3",
    find_sites=find_sites,
    trainable_prefix="blocks.",
    feed_forward=".mlp.fc1.weight",
    sketched=("qkv_proj",),
    # A modulation follows from the noise level alone, and may come as a table with few columns.
    frozen_parts=(".adaln_proj.",),
)
