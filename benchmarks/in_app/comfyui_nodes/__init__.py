"""Nodes that stand in for what is not measured: text encoders, decoders, published checkpoints."""

import os
import sys

if "LINVIDEO_BENCHMARK_WITHOUT_TRITON" in os.environ:
    # As on a computer without it: nobody who asks from here on finds it.
    sys.modules["triton"] = None


async def comfy_entrypoint() -> "Benchmarks":  # noqa: F821
    """Return the extension; ComfyUI calls it."""
    from .nodes import Benchmarks

    return Benchmarks()
