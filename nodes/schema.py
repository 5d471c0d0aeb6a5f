"""What the nodes' schemas share: a category, socket types, how an input is written."""

from typing import Any

from comfy_api.latest import io

LinVideo = io.Custom("LINVIDEO")
"""The socket type of a loaded LINVIDEO file, a `linvideo_core.artifact.Artifact`."""

TransferSettings = io.Custom("LINVIDEO_SETTINGS")
"""The socket type of a transfer's settings, a dict of them by name."""


def make_schema(**settings: Any) -> io.Schema:
    """Return the schema of a node in LinVideo's category."""
    return io.Schema(category="LinVideo", **settings)


def make_input(kind: Any, name: str, settings: dict[str, Any], tooltip: str) -> io.Input:
    """Return an input of a kind, such as `io.Int`; settings: further arguments of its `Input`."""
    return kind.Input(name, **settings, tooltip=tooltip)
