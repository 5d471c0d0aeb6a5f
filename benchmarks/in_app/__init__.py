"""Transfers in a real ComfyUI server: `python -m benchmarks.in_app`."""
