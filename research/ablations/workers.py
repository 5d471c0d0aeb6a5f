"""Worker processes that share the devices: each prepares once, then does one job after another.

A model of a few million parameters keeps a GPU waiting for its launches, so several processes
train side by side, spread over the GPUs that are there. A job that fails, or a process that dies,
costs that job alone.
"""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Event
from typing import Any

import torch

from linvideo_core.run.progress import Progress

logger = logging.getLogger(__name__)

_Prepare = Callable[..., Callable[[Any], Any]]


class Stopped(BaseException):
    """Ends a job between two of its steps; no Exception, so that nothing takes it for a failure."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """What came of a job that failed: why, and whether it would fail again."""

    sentence: str
    is_final: bool


@dataclasses.dataclass(eq=False)
class _Worker:
    number: int
    process: multiprocessing.process.BaseProcess
    connection: Connection
    is_ready: bool = False
    job: Any = None


class Workers(contextlib.AbstractContextManager):
    """Up to `count` processes; a context manager that stops them."""

    def __init__(self, prepare: _Prepare, *arguments: Any, count: int) -> None:
        """prepare: called in each process with `arguments` and a `progress`; returns its worker.

        `progress` raises `Stopped` once the workers are to stop. A worker takes a job and returns
        its result; its ValueError is an answer, any other error ends its process.
        """
        self._context = multiprocessing.get_context("spawn")
        self._prepare, self._arguments, self._count = prepare, arguments, count
        self._stop = self._context.Event()
        self._workers: list[_Worker] = []

    def run(
        self, jobs: Sequence[Any], *, until: float = float("inf")
    ) -> Iterator[tuple[Any, Any | Failure]]:
        """Yield each job with its result or `Failure`, as they are done.

        until: `time.monotonic()` from which no job starts and those under way are stopped.

        Raises ValueError where a process could not prepare itself.
        """
        waiting = deque(jobs)
        while True:
            if time.monotonic() >= until:
                waiting.clear()
                self._stop.set()
            num_free = sum(worker.job is None for worker in self._workers)
            for _ in range(min(self._count - len(self._workers), len(waiting) - num_free)):
                self._start()
            for worker in self._workers:
                if worker.is_ready and worker.job is None and waiting:
                    worker.job = waiting.popleft()
                    worker.connection.send(worker.job)
            busy = [w for w in self._workers if w.job is not None or (waiting and not w.is_ready)]
            if not busy:
                return
            left = None if self._stop.is_set() else min(until - time.monotonic(), 3600.0)
            for connection in wait([w.connection for w in busy], left):
                worker = next(w for w in busy if w.connection is connection)
                yield from self._hear(worker)

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        # One thread each: the processes are the parallelism.
        os.environ["OMP_NUM_THREADS"] = "1"
        # One that takes a dead one's place takes its GPU too.
        number = min(set(range(self._count)) - {worker.number for worker in self._workers})
        arguments = (number, theirs, self._stop, self._prepare, self._arguments)
        process = self._context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        self._workers.append(_Worker(number, process, ours))

    def _hear(self, worker: _Worker) -> Iterator[tuple[Any, Any | Failure]]:
        try:
            kind, value = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            kind, value = "died", f"its process ended with exit code {worker.process.exitcode}"
        job, worker.job = worker.job, None
        if kind in ("died", "failed"):
            self._workers.remove(worker)
            worker.connection.close()
            if not worker.is_ready:
                raise ValueError(f"a worker process could not start: {value}")
            yield job, Failure(value, is_final=False)
        elif kind == "ready":
            worker.is_ready = True
        elif kind == "refused":
            yield job, Failure(value, is_final=True)
        elif kind == "done":
            yield job, value

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(60)
            worker.process.kill()


def _serve(
    number: int,
    connection: Connection,
    stop: Event,
    prepare: _Prepare,
    arguments: tuple[Any, ...],
) -> None:
    """Be a worker process: prepare, then answer jobs until the other side is gone."""
    # Ctrl-C reaches the whole group; the parent hears it and says when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        # What "cuda" means in this process.
        torch.cuda.set_device(number % torch.cuda.device_count())
    with contextlib.suppress(EOFError, OSError, Stopped):
        try:
            work = prepare(*arguments, _stoppable(stop))
        except Exception as error:
            connection.send(("failed", _one_line(error)))
            return
        connection.send(("ready", None))
        while True:
            job = connection.recv()
            try:
                connection.send(("done", work(job)))
            except Stopped:
                connection.send(("stopped", None))
            except ValueError as error:
                connection.send(("refused", str(error)))
            except Exception as error:
                # A CUDA error leaves nothing to build on: a new process takes the next job.
                traceback.print_exc()
                connection.send(("failed", _one_line(error)))
                return


def _stoppable(stop: Event) -> Progress:
    parent = os.getppid()

    def progress(stage: str, done: int, total: int, **metrics: float) -> None:
        if stop.is_set() or os.getppid() != parent:
            raise Stopped

    return progress


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
