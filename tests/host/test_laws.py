"""The laws of the nodes, `laws_of_<subject>.py`; one process of ComfyUI answers a file's laws."""

import ast
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.host

FILES = {
    file.stem.removeprefix("laws_of_"): file
    for file in sorted(Path(__file__).parent.glob("laws_of_*.py"))
}
LAWS = {
    subject: [
        node.name
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    for subject, file in FILES.items()
}

Examine = Callable[[str], dict[str, dict[str, str]]]


@pytest.fixture(scope="module")
def examine(host: Any, tmp_path_factory: pytest.TempPathFactory) -> Examine:
    """Return what became of each law of a subject; its process runs at the first question."""

    @functools.cache
    def run(subject: str) -> dict[str, dict[str, str]]:
        results = tmp_path_factory.mktemp(subject) / "outcomes.json"
        host.examine(FILES[subject], results)
        return json.loads(results.read_text())

    return run


@pytest.mark.parametrize(
    ("subject", "law"), [(subject, law) for subject, laws in LAWS.items() for law in laws]
)
def test_inside_comfyui(subject: str, law: str, examine: Examine) -> None:
    outcome = examine(subject)[law]
    if "failed" in outcome:
        pytest.fail(outcome["failed"], pytrace=False)
    if "skipped" in outcome:
        pytest.skip(outcome["skipped"])


@pytest.mark.parametrize("subject", LAWS)
def test_every_law_was_examined(subject: str, examine: Examine) -> None:
    assert list(examine(subject)) == LAWS[subject]
