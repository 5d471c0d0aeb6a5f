"""The pack's workflows: which there are, and each as ComfyUI's browser queues it."""

import json
from collections.abc import Iterator
from typing import Any

from tests.host.process import PACK

FILES = {file.stem: file for file in sorted((PACK / "workflows").glob("*.json"))}
NAMES = {
    "0 Faster Wan 2.1, no file": "wan_2.1_no_file",
    "1 Try it (no download)": "demo",
    "2 Video in 4 steps (no download)": "few_step",
    "3 Make a file (no download)": "demo_transfer",
    "4 Make a file for Wan 2.1": "wan_transfer",
    "5 Wan 2.1 made linear": "wan_2.1",
    "6 Wan 2.1 with LoRA and backend": "lora_and_backend",
    "7 Wan 2.2 with two experts": "wan_2.2_two_experts",
}
"""Each workflow as the template browser names it, and as records do."""
TRY_IT = "1 Try it (no download)"
NOTES = ("MarkdownNote",)
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")

Nodes = dict[str, dict[str, Any]]


def read(name: str) -> dict[str, Any]:
    return json.loads(FILES[name].read_text(encoding="utf-8"))


def read_note(name: str) -> str:
    first, *_ = (node for node in read(name)["nodes"] if node["type"] in NOTES)
    return first["widgets_values"][0]


def read_inputs(
    described: dict[str, Any], values: Iterator[Any], links: dict[str, list[Any]], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield a node's inputs by name, its widgets' values in ComfyUI's order, what is linked."""
    for group in ("required", "optional"):
        for name, (kind, *rest) in described.get(group, {}).items():
            key, options = prefix + name, rest[0] if rest else {}
            if isinstance(kind, list) or kind in WIDGETS:
                # Of widgets that a node has got since, the browser takes the first value.
                choices = options.get("options", kind if isinstance(kind, list) else ())
                value = next(values, options.get("default", next(iter(choices), None)))
                value = value["key"] if isinstance(value, dict) else value
                yield key, value
                if options.get("control_after_generate"):
                    assert next(values) in ("fixed", "increment", "decrement", "randomize")
                if kind == "COMFY_DYNAMICCOMBO_V3":
                    (chosen,) = (o for o in options["options"] if o["key"] == value)
                    yield from read_inputs(chosen["inputs"], values, links, f"{key}.")
            if key in links:
                yield key, links.pop(key)


def make_prompt(workflow: dict[str, Any], described: dict[str, Any]) -> Nodes:
    """Return a saved workflow in the format that is queued, as the browser makes it.

    Every link and, in LinVideo's nodes, every value must belong to an input of today's nodes.
    """
    origins = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        assert node["mode"] == 0, f"node {node['id']} is muted or bypassed"
        values = iter(node.get("widgets_values", []))
        links = {slot["name"]: origins[slot["link"]] for slot in node["inputs"] if slot.get("link")}
        inputs = dict(read_inputs(described[node["type"]]["input"], values, links))
        assert not links, f"{node['type']} has no inputs {list(links)}"
        if node["type"].startswith("LinVideo"):
            assert list(values) == []
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
