"""`python -m research.ablations`, see `cli`."""

from linvideo_core.run.launch import launch

launch(__package__)
