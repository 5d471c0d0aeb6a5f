"""`python -m linvideo_core.evaluate`, see `cli`."""

from ..run.launch import launch

launch(__package__)
