"""One run at a time works in a folder, and what a dead one has left goes."""

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from linvideo_core.run.errors import SettingError
from linvideo_core.run.files import find_below, sweep, write_text
from linvideo_core.run.lock import alone_in, locked

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from linvideo_core.run.files import replacing
from linvideo_core.run.lock import locked
with locked(Path(sys.argv[1])), replacing(Path(sys.argv[1]) / "large") as part:
    part.write_bytes(b"half")
    print("at work", flush=True)
    time.sleep(600)
"""


def parts(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.part")]


def test_a_folder_in_use_says_by_whom_and_is_free_when_that_one_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "at work\n"
        words = f"in use by process {process.pid} of .* since .*: wait for it or end it, or choose"
        for _ in range(2):
            with pytest.raises(SettingError, match=words), locked(tmp_path):
                pass
        assert len(parts(tmp_path)) == 1
    finally:
        process.kill()
        process.wait()
    assert len(parts(tmp_path)) == 1
    with locked(tmp_path):
        assert parts(tmp_path) == []
        assert f"process {os.getpid()} of" in (tmp_path / ".lock").read_text()


def test_a_folder_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    with locked(tmp_path):
        pass


def test_who_works_in_a_folder_is_waited_for_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ended, entered = [], threading.Event()

    def train() -> None:
        with locked(tmp_path):
            entered.set()
            time.sleep(0.5)
            ended.append(True)

    thread = threading.Thread(target=train)
    thread.start()
    entered.wait()
    with alone_in(tmp_path):
        assert ended
    thread.join()
    [told] = caplog.messages
    assert told.startswith(f"waiting: {tmp_path} is in use by process {os.getpid()} of")


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no file that is open")
def test_a_lock_that_its_holder_takes_away_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".lock"
    monkeypatch.setattr("fcntl.flock", lambda file, how: path.unlink())
    # As seen just before it went.
    monkeypatch.setattr(Path, "exists", lambda path: True)
    with pytest.raises(SettingError, match="in use by another process"), locked(tmp_path):
        pass


def test_what_others_may_still_be_writing_stays(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    old, new = (tmp_path / "deep" / f".linvideo-{name}.part" for name in ("old", "new"))
    for path in (old, new):
        path.mkdir()
        (path / "of the writer's own").touch()
    write_text(tmp_path / "mine.part", "not ours")
    os.utime(old, (0, time.time() - 2 * 3600))
    sweep(tmp_path)
    assert sorted(parts(tmp_path)) == [new.name, "mine.part"]
    (tmp_path / "deep" / ".lock").touch()
    sweep(tmp_path, is_alone=True)
    assert new.exists()
    (tmp_path / "deep" / ".lock").unlink()
    sweep(tmp_path, is_alone=True)
    assert parts(tmp_path) == ["mine.part"]


def test_what_is_taken_away_while_it_is_looked_through_is_passed_over(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "deep").mkdir(parents=True)
    found = find_below(tmp_path, "*")
    first = next(found)
    other = tmp_path / ("b" if first.name == "a" else "a")
    shutil.rmtree(other)
    assert sorted(found) == sorted([other, first / "deep"])


def test_a_folder_that_nothing_came_into_goes_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path / "runs" / "new"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "new"):
        (tmp_path / "new" / "result").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["result"]
