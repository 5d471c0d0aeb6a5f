"""The laws of the nodes, `laws_of_<teacher>.py`; one process of ComfyUI answers a file's laws."""

import ast
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.host

FILES = {
    file.stem.removeprefix("laws_of_"): file
    for file in sorted(Path(__file__).parent.glob("laws_of_*.py"))
}
LAWS = {
    teacher: [
        node.name
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    for teacher, file in FILES.items()
}

Examine = Callable[[str], dict[str, dict[str, str]]]


@pytest.fixture(scope="module")
def examine(
    request: pytest.FixtureRequest, host: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Examine]:
    """Return what became of each law of a teacher.

    All teachers that were asked for are examined from the first question on, side by side: each
    keeps one core busy, and of many cores it has four.
    """

    def run(teacher: str, results: Path) -> dict[str, dict[str, str]]:
        host.examine(FILES[teacher], results)
        return json.loads(results.read_text())

    asked = [item for item in request.session.items if item.path == request.path]
    subjects = dict.fromkeys(item.callspec.params["teacher"] for item in asked)
    with ThreadPoolExecutor(max_workers=max(2, (os.cpu_count() or 2) // 4)) as pool:
        outcomes = {
            teacher: pool.submit(run, teacher, tmp_path_factory.mktemp(teacher) / "outcomes.json")
            for teacher in subjects
        }
        yield lambda teacher: outcomes[teacher].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    ("teacher", "law"), [(teacher, law) for teacher, laws in LAWS.items() for law in laws]
)
def test_inside_comfyui(teacher: str, law: str, examine: Examine) -> None:
    outcome = examine(teacher)[law]
    if "failed" in outcome:
        pytest.fail(outcome["failed"], pytrace=False)
    if "skipped" in outcome:
        pytest.skip(outcome["skipped"])


@pytest.mark.parametrize("teacher", LAWS)
def test_every_law_was_examined(teacher: str, examine: Examine) -> None:
    assert list(examine(teacher)) == LAWS[teacher]
