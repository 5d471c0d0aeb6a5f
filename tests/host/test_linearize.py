"""The nodes inside ComfyUI's process; one process answers all laws of `laws_of_linearize`."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.host

LAWS_FILE = Path(__file__).parent / "laws_of_linearize.py"
LAWS = [
    node.name
    for node in ast.parse(LAWS_FILE.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
]


@pytest.fixture(scope="module")
def outcomes(host: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What became of each law."""
    results = tmp_path_factory.mktemp("laws") / "outcomes.json"
    host.examine(LAWS_FILE, results)
    return json.loads(results.read_text())


@pytest.mark.parametrize("law", LAWS)
def test_inside_comfyui(law: str, outcomes: dict[str, str]) -> None:
    if outcomes[law]:
        pytest.fail(outcomes[law], pytrace=False)


def test_every_law_was_examined(outcomes: dict[str, str]) -> None:
    assert list(outcomes) == LAWS
