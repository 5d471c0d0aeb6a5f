"""Make chosen layers linear: `python -m linvideo_core.transfer`."""
