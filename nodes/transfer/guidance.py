"""How the graph samples the model that a transfer makes: the guidance to learn with.

The node runs before the sampler, so this is read from the graph itself: from the node's MODEL
output along the inputs called `model`, to the first node that has a `cfg`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_MODEL_OUTPUT = 0
_MOST_NODES = 100


def find_guidance(prompt: Mapping[str, Any] | None, node_id: str | None) -> float | None:
    """Return the cfg of the sampler that a node's MODEL goes to, None where it cannot be told.

    prompt: the graph in ComfyUI's API format. A cfg that another node computes is not known
    beforehand, nor one of several samplers that differ.
    """
    found = {
        float(node["inputs"]["cfg"])
        for node in _followers(prompt or {}, str(node_id))
        if isinstance(node["inputs"].get("cfg"), int | float)
    }
    return found.pop() if len(found) == 1 else None


def _followers(prompt: Mapping[str, Any], node_id: str) -> Iterator[Mapping[str, Any]]:
    """Give every node that a node's MODEL reaches, through other nodes that pass models on."""
    reached, waiting = {node_id}, [[node_id, _MODEL_OUTPUT]]
    while waiting and len(reached) < _MOST_NODES:
        source = waiting.pop()
        for other_id, node in prompt.items():
            takes_model = node.get("inputs", {}).get("model") == source
            takes_guider = node.get("inputs", {}).get("guider") == source
            if (takes_model or takes_guider) and other_id not in reached:
                reached.add(other_id)
                waiting.append([other_id, 0])
                yield node
