"""What ComfyUI's code of each model family needs, a file each, listed here."""

from . import minimax_h3, wan
from .host_family import HostFamily

__all__ = ["HostFamily", "host_family"]


def host_family(name: str) -> HostFamily:
    """Return the host's side of a family of `linvideo_core.models.families`."""
    return {family.name: family for family in (wan.FAMILY, minimax_h3.FAMILY)}[name]
