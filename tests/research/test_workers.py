"""Worker processes: a job that ends badly costs itself alone, and time that is up ends them all.

Every process imports this file, which therefore imports little.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

from research.ablations.workers import Failure, Workers


def make_worker(folder: str, progress: Any) -> Any:
    """Return a worker of words, some of which end badly."""

    def work(word: str) -> str:
        if word == "refused":
            raise ValueError("this cannot be")
        if word == "broken":
            raise RuntimeError("CUDA error")
        if word == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        for step in range(1000 if word == "long" else 1):
            progress("working", step, 1000)
            Path(folder, word).write_text(str(step))
            time.sleep(0.01)
        return word.upper()

    return work


def test_a_job_that_fails_costs_itself_alone(tmp_path: Path) -> None:
    words = ["one", "refused", "broken", "two", "killed", "three"]
    with Workers(make_worker, str(tmp_path), count=1) as workers:
        found = dict(workers.run(words))
    assert list(found) == words
    assert [found[word] for word in ("one", "two", "three")] == ["ONE", "TWO", "THREE"]
    assert found["refused"] == Failure("this cannot be", is_final=True)
    assert found["broken"] == Failure("RuntimeError: CUDA error", is_final=False)
    assert not found["killed"].is_final and "exit code -9" in found["killed"].sentence


def test_workers_stop_between_two_steps_when_time_is_up(tmp_path: Path) -> None:
    with Workers(make_worker, str(tmp_path), count=1) as workers:
        # Ready, and so the time limit meets the long job itself.
        assert list(workers.run(["one"])) == [("one", "ONE")]
        found = list(workers.run(["long", "two"], until=time.monotonic() + 0.5))
    assert found == []
    assert 0 < int((tmp_path / "long").read_text()) < 999
    assert not (tmp_path / "two").exists()
