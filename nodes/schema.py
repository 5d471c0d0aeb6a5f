"""Node schemas that load in older ComfyUI versions too: the unknown is left out."""

import dataclasses
import inspect
from typing import Any

from comfy_api.latest import io

LinVideo = io.Custom("LINVIDEO")
"""The socket type of a loaded LINVIDEO file, a `linvideo_core.artifact.Artifact`."""

TransferSettings = io.Custom("LINVIDEO_SETTINGS")
"""The socket type of a transfer's settings, a dict of them by name."""


def make_schema(**settings: Any) -> io.Schema:
    """Return the schema of a node in LinVideo's category."""
    known = {field.name for field in dataclasses.fields(io.Schema)}
    settings = {"category": "LinVideo", **settings}
    return io.Schema(**{name: value for name, value in settings.items() if name in known})


def make_input(kind: Any, name: str, settings: dict[str, Any], tooltip: str) -> io.Input:
    """Return an input of a kind, such as `io.Int`; settings: further arguments of its `Input`."""
    known = inspect.signature(kind.Input.__init__).parameters
    settings = {key: value for key, value in settings.items() if key in known}
    return kind.Input(name, **settings, tooltip=tooltip)
