"""Sample models on equal terms and measure them: `python -m linvideo_core.evaluate`."""
