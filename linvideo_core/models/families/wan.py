"""Wan 2.1 and 2.2: self-attention at `blocks.<i>.self_attn`, heads of 128."""

from ..attention_sites import AttentionSite, ModelFamily, Shapes, match_sites

_HEAD_DIM = 128


def find_sites(shapes: Shapes) -> list[AttentionSite]:
    """Return the self-attention sites of a Wan model, recognised by `self_attn.norm_q`."""

    def measure(name: str) -> tuple[int, int] | None:
        query = shapes.get(f"{name}.q.weight", ())
        if len(query) != 2 or query[0] % _HEAD_DIM or f"{name}.norm_q.weight" not in shapes:
            return None
        return query[0] // _HEAD_DIM, _HEAD_DIM

    return match_sites(shapes, r"blocks\.(\d+)\.self_attn", measure)


FAMILY = ModelFamily(
    name="wan",
    find_sites=find_sites,
    trainable_prefix="blocks.",
    feed_forward=".ffn.0.weight",
    sketched=("q", "v"),
    prompts="text_embedding.0.weight",
)
