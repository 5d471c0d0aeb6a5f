"""Nodes that stand in for what is not measured: text encoders, decoders, published checkpoints."""


async def comfy_entrypoint() -> "Benchmarks":  # noqa: F821
    """Return the extension; ComfyUI calls it."""
    from .nodes import Benchmarks

    return Benchmarks()
