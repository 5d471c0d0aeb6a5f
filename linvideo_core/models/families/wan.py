"""Wan 2.1 and 2.2: self-attention at `blocks.<i>.self_attn`, heads of 128."""

import re

from ..attention_sites import AttentionSite, ModelFamily, Shapes

_QUERY = re.compile(r"blocks\.(\d+)\.self_attn\.q\.weight")
_HEAD_DIM = 128


def find_sites(shapes: Shapes) -> list[AttentionSite]:
    """Return the self-attention sites of a Wan model, recognised by `self_attn.norm_q`."""
    sites = []
    for name, shape in shapes.items():
        match = _QUERY.fullmatch(name)
        if not match or len(shape) != 2 or shape[0] % _HEAD_DIM:
            continue
        layer = int(match[1])
        if f"blocks.{layer}.self_attn.norm_q.weight" in shapes:
            site_name = f"blocks.{layer}.self_attn"
            sites.append(AttentionSite(layer, site_name, shape[0] // _HEAD_DIM, _HEAD_DIM))
    return sorted(sites, key=lambda site: site.layer)


FAMILY = ModelFamily(
    name="wan",
    find_sites=find_sites,
    trainable_prefix="blocks.",
    feed_forward=".ffn.0.weight",
    sketched=("q", "v"),
    prompts="text_embedding.0.weight",
)
