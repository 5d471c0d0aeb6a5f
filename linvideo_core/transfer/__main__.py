"""`python -m linvideo_core.transfer`, see `cli`."""

from ..run.launch import launch

launch(__package__)
