"""A ComfyUI whose PyTorch is too old for the pack: it says so, and goes on without our nodes."""

import asyncio
import importlib.metadata
import logging
from pathlib import Path
from unittest import mock

import linvideo_pack

import nodes


def test_a_pytorch_that_is_too_old_is_a_sentence_in_the_log() -> None:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    folder, known = str(Path(linvideo_pack.__file__).parent), dict(nodes.NODE_CLASS_MAPPINGS)
    try:
        with mock.patch.object(importlib.metadata, "version", lambda _: "2.4.1"):
            is_loaded = asyncio.run(nodes.load_custom_node(folder))
    finally:
        logging.getLogger().removeHandler(handler)
    assert not is_loaded and known == nodes.NODE_CLASS_MAPPINGS
    (message,) = [line for line in said if "PyTorch" in line]
    assert message.endswith(
        "PyTorch 2.4.1 is installed; LinVideo needs 2.5 or newer: update PyTorch"
    )
    assert "Traceback" not in message
