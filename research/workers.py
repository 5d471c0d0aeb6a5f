"""Processes that work for a command, each on one device, and keep what they have imported."""

import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
import queue
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch


class Worker:
    """A process of one device that calls functions, one at a time.

    It ends with the process that made it, after the call that it is in.
    """

    def __init__(self, card: str, num_threads: int) -> None:
        """card: such as "cuda:1"; num_threads: of PyTorch on the CPU."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, card, num_threads))
        # Ctrl+C is the command's, which ends its processes: they begin by ignoring it.
        usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, usual)
        theirs.close()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return what a function of a module returns, called there.

        Raises what the function raises, and ChildProcessError where the process ends before.
        """
        try:
            self._pipe.send((function, args))
            found, error = self._pipe.recv()
        except (EOFError, OSError):
            raise ChildProcessError(
                "a process ended before its work was done; repeat the command to continue"
            ) from None
        if error is not None:
            raise error
        return found

    def close(self) -> None:
        """Let the process end."""
        self._pipe.close()


def _serve(pipe: Connection, card: str, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    if card.startswith("cuda"):
        torch.cuda.set_device(card)
    with contextlib.suppress(EOFError):
        while True:
            function, args = pipe.recv()
            try:
                outcome = function(*args), None
            except (Exception, SystemExit) as error:
                # Where it was is lost on the way; of an error that speaks for itself nobody asks.
                if not isinstance(error, ValueError | RuntimeError | OSError | SystemExit):
                    traceback.print_exc()
                outcome = None, error
            pipe.send(outcome)


@contextlib.contextmanager
def started(cards: Sequence[str]) -> Iterator[list[Worker]]:
    """Start a worker a card, several of one where it is named again; end them in the end.

    Left early, by an error or an interruption, they are ended in the midst of their work.
    """
    num_threads = max(1, torch.get_num_threads() // len(cards))
    workers = [Worker(card, num_threads) for card in cards]
    try:
        yield workers
    except BaseException:
        for worker in workers:
            worker.process.terminate()
        raise
    finally:
        for worker in workers:
            worker.close()
        for worker in workers:
            worker.process.join()


@contextlib.contextmanager
def pool(cards: Sequence[str], jobs: int) -> Iterator[Callable[..., concurrent.futures.Future]]:
    """Start so many processes over all cards; yield what calls a function in one that is free.

    The function gets the process's card after its own arguments; its future has what `Worker.call`
    returns or raises. Wait for all futures in the context: left by an error or an interruption, the
    processes are ended in the midst of their work.
    """
    places = [*itertools.islice(itertools.cycle(cards), jobs)]
    free: queue.SimpleQueue[tuple[Worker, str]] = queue.SimpleQueue()

    def call(function: Callable[..., Any], *args: Any) -> Any:
        worker, card = free.get()
        try:
            return worker.call(function, *args, card)
        finally:
            free.put((worker, card))

    with concurrent.futures.ThreadPoolExecutor(jobs) as threads, started(places) as workers:
        for each in zip(workers, places, strict=True):
            free.put(each)
        yield functools.partial(threads.submit, call)
