"""Hostile names, queued in a real server: each stays in its folder or is refused in a sentence.

`LINVIDEO_NAMES=10000` tries so many, and writes their part of results/hostile.json.
"""

import json
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.record import RESULTS_FOLDER
from research.hostile.cli import make_row, record
from tests.host.server import Server
from tests.host.test_server import make_load, make_node

pytestmark = [pytest.mark.host, pytest.mark.slow]

FEW, AT_ONCE = 200, 100
MOST_CHARACTERS = 20_000
PIECES = [*"/\\.:~% \n\0a", "..", "../", "//", "\\\\", "con", "nul", "C:", ".safetensors", "/tmp"]
PIECES += ["\udcff", "\u202e", "é", "x" * 90, "模" * 30, "a/b", "mine"]


def list_files(folder: Path) -> set[Path]:
    """Return the server's files but its previews and its log."""
    found = {path for path in folder.rglob("*") if path.is_file()}
    return {p for p in found if folder / "temp" not in p.parents and p.name != "log.txt"}


def draw_name(generator: random.Random) -> str:
    return "".join(generator.choices(PIECES, k=generator.randint(1, 6)))


def run_all(server: Server, names: list[str]) -> list[dict]:
    """Save under every name; return what became of each."""
    ids = []
    for name in names:
        save = make_node("LinVideoSave", linvideo=["load", 0], filename=name, overwrite=True)
        ids.append(
            server.ask("/prompt", {"prompt": {"load": make_load(), "save": save}})["prompt_id"]
        )
    while any(server.ask("/queue").values()):
        time.sleep(0.1)
    found = [server.ask(f"/history/{each}")[each]["status"] for each in ids]
    server.read("/history", {"clear": True})
    return found


def test_no_name_leaves_its_folder_or_ends_in_more_than_a_sentence(server: Server) -> None:
    generator = random.Random(0)
    names = [draw_name(generator) for _ in range(int(os.environ.get("LINVIDEO_NAMES", FEW)))]
    folder = server.folder / "models" / "linvideo"
    before = list_files(server.folder)
    num_saved = 0
    for first in range(0, len(names), AT_ONCE):
        batch = names[first : first + AT_ONCE]
        for name, status in zip(batch, run_all(server, batch), strict=True):
            if status["status_str"] == "success":
                num_saved += 1
                continue
            (error,) = [told for kind, told in status["messages"] if kind == "execution_error"]
            assert error["exception_type"] == "linvideo_core.artifact.ArtifactError", name
            message = error["exception_message"].strip()
            assert "filename" in message and message.isprintable(), name
            # ComfyUI shows the inputs of what failed: their tensors are not among it.
            assert len(json.dumps(error)) < MOST_CHARACTERS, name
    assert 0 < num_saved < len(names)
    made = list_files(server.folder) - before
    assert made and all(folder in path.parents for path in made)
    for path in made:
        path.unlink()
    if "LINVIDEO_NAMES" in os.environ:
        command = f"LINVIDEO_NAMES={len(names)} python -m pytest tests/host/test_names.py"
        counts = Counter(refused=len(names) - num_saved, accepted_benign=num_saved)
        record(RESULTS_FOLDER, "names", command, [make_row("names", "name over HTTP", counts)])
