"""Processes that work for a command pass on what happens, and end with it."""

import os
import threading
import time

import pytest

from research import workers


def test_a_process_passes_errors_on_and_says_when_it_ends() -> None:
    with workers.started(["cpu"]) as [worker]:
        assert worker.call(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            worker.call(divmod, 7, 0)
        with pytest.raises(ChildProcessError, match="ended before its work was done"):
            worker.call(os._exit, 1)


def test_processes_end_in_the_midst_of_their_work_when_the_command_does() -> None:
    with pytest.raises(KeyboardInterrupt), workers.started(["cpu"]) as [worker]:
        thread = threading.Thread(target=lambda: ended.append(_call(worker, time.sleep, 300)))
        ended: list[Exception] = []
        thread.start()
        raise KeyboardInterrupt
    thread.join()
    assert not worker.process.is_alive() and isinstance(ended[0], ChildProcessError)


def _call(worker: workers.Worker, *work: object) -> Exception | None:
    try:
        worker.call(*work)
    except ChildProcessError as error:
        return error
    return None
