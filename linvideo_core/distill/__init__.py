"""Distil a linearized model to few steps: `python -m linvideo_core.distill`."""
