"""`python -m linvideo_core.distill`, see `cli`."""

from ..run.config import launch

launch(__package__)
