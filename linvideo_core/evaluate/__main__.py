"""`python -m linvideo_core.evaluate`, see `cli`."""

from ..run.config import launch

launch(__package__)
