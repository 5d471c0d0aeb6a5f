"""Models for headless use; inside ComfyUI the host's own models are used instead."""
