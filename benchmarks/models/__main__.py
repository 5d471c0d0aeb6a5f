"""`python -m benchmarks.models`, see `cli`."""

from linvideo_core.run.config import launch

launch(__package__)
