"""`python -m linvideo_core.distill`, see `cli`."""

from ..run.launch import launch

launch(__package__)
