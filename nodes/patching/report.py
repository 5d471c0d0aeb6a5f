"""What LinVideo Linearize says under itself, when it has run and whenever its model is sampled."""

import functools
import logging
import sys
from collections.abc import Sequence
from typing import Any

from comfy_execution.utils import get_executing_context

_AS_MADE = "sampled as the file was made"

logger = logging.getLogger(__name__)


class Report:
    """The lines under one node of a graph.

    What its model is sampled with is found later, while other nodes run; a graph may sample it
    several times, and all that was found in one run of the graph is shown.
    """

    def __init__(self, lines: Sequence[str], node_id: str | None) -> None:
        """lines: what is known when the node runs; node_id: None where nothing shows them."""
        self._lines = tuple(lines)
        self._node_id = node_id
        self._prompt_id: str | None = None
        self._sampled: dict[str, None] = {}

    @property
    def text(self) -> str:
        """Return what the node says now, a line each."""
        # Sentences, because ComfyUI's newer design shows the lines as one.
        lines = [*self._lines, *self._sampled]
        return "\n".join(f"{line[:1].upper()}{line[1:]}." for line in lines)

    def show(self) -> None:
        """Show what the node says."""
        show_words(self.text, self._node_id)

    def add_sampling(self, differences: Sequence[str], *, is_known: bool) -> None:
        """Show how a sampling differs from how the file wants to be used.

        is_known: the file says how; if nothing differs, that is shown, too.
        """
        context = get_executing_context()
        prompt_id = None if context is None else context.prompt_id
        if prompt_id != self._prompt_id or prompt_id is None:
            self._prompt_id, self._sampled = prompt_id, {}
        found = dict.fromkeys(f"sampled: {each}" for each in differences)
        for line in found:
            _log_once(line)
        self._sampled.pop(_AS_MADE, None)
        self._sampled |= found
        if is_known and not self._sampled:
            self._sampled[_AS_MADE] = None
        self.show()


def show_words(text: str, node_id: str | None) -> None:
    """Show lines under a node, in place of those before; nothing where nothing shows them."""
    server = _find_server()
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id, server.client_id)


def _find_server() -> Any:
    # Looked up, not imported: ComfyUI's models also run, and are measured, without its server.
    module = sys.modules.get("server")
    return getattr(getattr(module, "PromptServer", None), "instance", None)


@functools.cache
def _log_once(line: str) -> None:
    logger.info("LinVideo: %s", line)
