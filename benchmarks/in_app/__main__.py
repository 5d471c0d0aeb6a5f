"""`python -m benchmarks.in_app`, see `cli`."""

from linvideo_core.run.launch import launch

launch(__package__)
