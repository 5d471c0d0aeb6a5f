"""The model families that LinVideo knows: a file each, listed here."""

from ..attention_sites import AttentionSite, ModelFamily, Shapes
from . import minimax_h3, wan

FAMILIES = (wan.FAMILY, minimax_h3.FAMILY)


def identify(shapes: Shapes) -> tuple[ModelFamily, list[AttentionSite]]:
    """Return the family of a model and its sites.

    Raises ValueError when no known family has its layers there.
    """
    for family in FAMILIES:
        if sites := family.find_sites(shapes):
            return family, sites
    known = ", ".join(family.name for family in FAMILIES)
    raise ValueError(f"this model has no self-attention layers of a known family (known: {known})")
