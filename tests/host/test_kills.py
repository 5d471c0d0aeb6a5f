"""A server that is killed in the middle of a transfer: queued again, it ends as an unbroken one.

`LINVIDEO_KILLS=10` kills it as often, at random moments; the last time it is sent SIGTERM.
"""

import random
import signal
import time
from pathlib import Path

import pytest

from linvideo_core.transfer.config import ARTIFACT_NAME
from tests.host.process import Host
from tests.host.server import Server, run_server
from tests.host.test_server import TRANSFER_SECONDS, make_transfer
from tests.test_kills import GRACE_SECONDS, NUM_KILLS, files_of, state_of

pytestmark = [pytest.mark.host, pytest.mark.slow]

NAME, MOST_CHANGES = "killed", 20
TRANSFER = make_transfer(
    name=NAME, prompts="a handwritten three moving left\na handwritten four moving up", steps=40
)


def made_by(server: Server) -> Path:
    return server.folder / "models" / "linvideo" / f"{NAME}.safetensors"


def wait_for_changes(server: Server, count: int) -> None:
    """Return once the output folder has changed so often, or the transfer has ended."""
    output, deadline = server.folder / "output", time.monotonic() + TRANSFER_SECONDS
    before = state_of(output)
    while count and not made_by(server).exists():
        assert server.process.poll() is None and time.monotonic() < deadline
        if (now := state_of(output)) != before:
            before, count = now, count - 1
        time.sleep(0.001)


def finish(server: Server) -> tuple[dict, list[str]]:
    """Queue the transfer to its end; return its run's files as `files_of`, and all their names."""
    answer = server.queue(TRANSFER, seconds=TRANSFER_SECONDS)
    assert answer["status"]["status_str"] == "success", answer["status"]
    run, made = server.folder / "output" / "linvideo" / NAME, made_by(server)
    try:
        names = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
        assert made.read_bytes() == (run / ARTIFACT_NAME).read_bytes()
        return files_of(run), names
    finally:
        made.unlink()


def test_a_transfer_whose_server_is_killed_ends_in_the_same_file_when_it_is_queued_again(
    host: Host, server: Server, tmp_path: Path
) -> None:
    draw, unbroken = random.Random(NAME), finish(server)
    for number in [signal.SIGKILL] * NUM_KILLS + [signal.SIGTERM]:
        with run_server(host, tmp_path) as killed:
            killed.ask("/prompt", {"prompt": TRANSFER})
            wait_for_changes(killed, draw.randint(1, MOST_CHANGES))
            killed.process.send_signal(number)
            killed.process.wait(GRACE_SECONDS)
    with run_server(host, tmp_path) as again:
        assert finish(again) == unbroken
