"""The model families that LinVideo knows, a file each.

To add one, write a file beside `wan.py` (the example to follow) that makes a `ModelFamily`, and
list it in FAMILIES:

    def find_sites(shapes):     # parameter name -> shape, of any model
        ...                     # the self-attention layers, [] for a model of another family

    FAMILY = ModelFamily(name="wan", find_sites=find_sites, trainable_prefix="blocks.", ...)

That is all that the core needs: LINVIDEO files then fit the family, and are applied, compared and
trained by these names. How ComfyUI computes the layers is in `nodes/patching/families`.
"""

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
