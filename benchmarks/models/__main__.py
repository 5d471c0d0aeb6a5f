"""`python -m benchmarks.models`, see `cli`."""

from linvideo_core.run.launch import launch

launch(__package__)
