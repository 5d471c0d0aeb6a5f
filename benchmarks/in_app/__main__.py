"""`python -m benchmarks.in_app`, see `cli`."""

from linvideo_core.run.config import launch

launch(__package__)
