"""Tests in a real ComfyUI: how they are collected, what they need started, where they run.

A test file that imports `linvideo_pack`, the pack as ComfyUI loads it, or `stage` runs inside a
process of ComfyUI by its own interpreter, which has no pytest: its tests are plain functions that
raise `unittest.SkipTest` to skip. One with an argument is run once for each key of the file's table
`CASES`. One process serves all such files.
"""

import ast
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.host.process import Host, HostError, find_host
from tests.host.recording import pytest_addoption, pytest_configure
from tests.host.saved_workflows import TRY_IT, make_prompt, read
from tests.host.server import Server, run_server

__all__ = ["Host", "pytest_addoption", "pytest_configure"]

HOST = pytest.StashKey[Host | HostError]()
SERVER = pytest.StashKey[Server | HostError]()
STARTS = ("test_comfyui_starts", "test_its_server_starts")
"""The tests that fail where ComfyUI, or its server, cannot start; others are skipped then."""


class InsideFile(pytest.File):
    """A file of tests that run inside ComfyUI."""

    def collect(self) -> Iterator["InsideTest"]:
        """Yield its tests; the file is read, not imported."""
        cases: list[str] = []
        for node in ast.parse(self.path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CASES":
                cases = [key.value for key in node.value.keys]
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for case in cases if node.args.args else [None]:
                    name = node.name if case is None else f"{node.name}[{case}]"
                    settings = {"line": node.lineno, "test": node.name, "case": case}
                    yield InsideTest.from_parent(self, name=name, **settings)


class InsideTest(pytest.Item):
    """A test function that runs inside ComfyUI."""

    def __init__(self, *, line: int, test: str, case: str | None, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.line, self.test, self.case = line, test, case
        self.add_marker("host")

    def runtest(self) -> None:
        """Let ComfyUI's process run it."""
        answer = self.config.stash[HOST].ask(file=str(self.path), test=self.test, case=self.case)
        self.add_report_section("call", "stdout", answer["printed"])
        if answer["outcome"] == "failed":
            pytest.fail(answer["words"], pytrace=False)
        if answer["outcome"] == "skipped":
            pytest.skip(answer["words"])

    def reportinfo(self) -> tuple[Path, int, str]:
        """Return where it is and what it is called."""
        return self.path, self.line - 1, self.name


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> Any:
    """Collect a file whose tests run inside ComfyUI without importing it."""
    for node in ast.parse(module_path.read_text(encoding="utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(name.partition(".")[0] in ("linvideo_pack", "stage") for name in names):
            return InsideFile.from_parent(parent, path=module_path)
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start what a test needs before its fixtures are made."""
    fixtures = getattr(item, "fixturenames", ())
    if isinstance(item, InsideTest) or "host" in fixtures:
        require(item, HOST, start_host, STARTS[0])
    if "server" in fixtures:
        require(item, SERVER, start_server, STARTS[1])


def require(
    item: pytest.Item,
    key: pytest.StashKey,
    start: Callable[[pytest.Config], Any],
    starting_test: str,
) -> None:
    """Start something once; where that fails, one test fails and the others are skipped.

    starting_test: the one that fails, if it runs; else the first that needs it.
    """
    stash = item.config.stash
    if key not in stash:
        try:
            stash[key] = start(item.config)
        except HostError as error:
            stash[key] = error
    if not isinstance(error := stash[key], HostError):
        return
    if error.is_missing:
        pytest.skip(str(error))
    is_told = error.is_told or any(each.name == starting_test for each in item.session.items)
    if is_told and item.name != starting_test:
        pytest.skip(f"ComfyUI could not start: see {starting_test}")
    error.is_told = True
    pytest.fail(str(error), pytrace=False)


def start_host(config: pytest.Config) -> Host:
    host = find_host()
    config.add_cleanup(host.stop)
    return host


def start_server(config: pytest.Config) -> Server:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(run_server(config.stash[HOST], folder))
        server.queue_first(make_prompt(read(TRY_IT), server.ask("/object_info")))
        config.add_cleanup(stack.pop_all().close)
    return server


@pytest.fixture(scope="session")
def host(request: pytest.FixtureRequest) -> Host:
    """The real ComfyUI, and a process of it."""
    return request.config.stash[HOST]


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest, host: Host) -> Server:
    """The server that tests share, with a damaged file among its models."""
    return request.config.stash[SERVER]
