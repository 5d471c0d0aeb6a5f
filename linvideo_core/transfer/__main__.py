"""`python -m linvideo_core.transfer`, see `cli`."""

from ..run.config import launch

launch(__package__)
