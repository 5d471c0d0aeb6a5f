"""Every command, killed at random moments and repeated, ends in the file of an unbroken one.

The last time it is asked to stop as a container is, with ten seconds to go. `LINVIDEO_KILLS=20`
kills as often. tests/training/test_fsdp.py kills and stops one process of two,
tests/prompts/test_text_encoder.py a transfer while it encodes prompts, and tests/host/test_kills.py
a ComfyUI server in the middle of a transfer.
"""

import contextlib
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from linvideo_core import artifact
from linvideo_core.artifact import Artifact
from linvideo_core.run.files import find_below
from linvideo_core.teacher.teacher import Teacher
from tests.conftest import make_wan, save_inputs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="Windows kills in another way"),
]

ROOT = Path(__file__).parents[1]
NUM_KILLS = int(os.environ.get("LINVIDEO_KILLS", 1))
GRACE_SECONDS, TIMEOUT_SECONDS = 10, 300
COMMON = (
    "--num-frames 5 --height 64 --width 48 --states-per-trajectory 2 --sampler-steps 4 "
    "--num-trajectories 4 --shard-size 2 --steps 10 --batch-size 2 --warmup-steps 2 --device cpu "
    "--precision fp32 --checkpoint-every 2 --log-every 1 --evaluate-samples 0"
)
OWN = "--model {model} --prompts {prompts}"
TRANSFER = (
    f"linvideo_core.transfer {COMMON} --target 1 --warm-start-steps 4 --states stored "
    "--objective adm"
)
TORCHRUN = "torch.distributed.run --standalone --nproc-per-node 2 -m"
COMMANDS = {
    "transfer": TRANSFER,
    "two experts": f"{TRANSFER} --low-noise-model {{low}}",
    "torchrun": f"{TORCHRUN} {TRANSFER}",
    "ablation": f"research.ablations --tables best --seeds 1 --steps 4 --device cpu --flags "
    f"'{TRANSFER.partition(' ')[2]} {OWN} --evaluate-samples 2'",
    "distill": f"linvideo_core.distill {COMMON} --artifact {{artifact}} --num-steps 2",
    "evaluate": "linvideo_core.evaluate --artifact {artifact} --num-samples 2 --num-frames 5 "
    "--height 64 --width 48 --sampler-steps 2 --device cpu --precision fp32",
}
COMMANDS = {
    name: command if OWN in command else f"{command} {OWN}" for name, command in COMMANDS.items()
}
HYBRID = (
    "research.hybrid --forms linear --seeds 1 --jobs 2 --steps 100000 --device cpu --flags "
    "'--batch-size 2 --warm-start-steps 2 --num-trajectories 2 --shard-size 2 --sampler-steps 2 "
    "--states-per-trajectory 2 --evaluate-samples 4 --checkpoint-every 2'"
)
MOST_CHANGES = {"evaluate": 6, "ablation": 90}
"""Of the folders, before a command is stopped; 40 of others."""


@pytest.fixture
def paths(teacher: Teacher, linearized: Artifact, tmp_path: Path) -> dict[str, Path]:
    """A model, its prompts, the other expert, and a linearized file."""
    found = save_inputs(teacher, tmp_path)
    low, made = tmp_path / "low.safetensors", tmp_path / "made.safetensors"
    save_file(make_wan(seed=2).state_dict(), low)
    artifact.save(linearized, made)
    named = {"model": found["--model"], "prompts": found["--prompts"]}
    return {**named, "low": low, "artifact": made}


def start(command: str, paths: Mapping[str, Path], out: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *shlex.split(command.format(**paths)), "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(command: str, paths: Mapping[str, Path], out: Path) -> None:
    process = start(command, paths, out)
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, errors


def state_of(folder: Path) -> list[tuple[str, int, int]]:
    """Return what lies in a folder, so that any change of it shows."""
    found = []
    # Files and folders go while they are listed.
    for place, _, names in os.walk(folder):
        for name in sorted(names):
            with contextlib.suppress(FileNotFoundError):
                stat = os.stat(os.path.join(place, name))
                found.append((os.path.join(place, name), stat.st_size, stat.st_mtime_ns))
    return found


def kill(process: subprocess.Popen) -> None:
    """Kill a process and all that it has started; torchrun's are no group of its own."""
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


def is_at_work(process: psutil.Process) -> bool:
    """Say whether a process computes, which multiprocessing's own tracker does not."""
    return process.is_running() and not any("resource_tracker" in x for x in process.cmdline())


def wait_for_training(process: subprocess.Popen, out: Path, name: str) -> Path:
    """Return a file or folder of this name that a training has below a folder, once it is there."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (found := [x for x in find_below(out, name) if x.parent.name == "training"]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return found[0]


def stop(process: subprocess.Popen, folder: Path, num_changes: int, number: int) -> str | None:
    """Send a signal once a folder has changed so often; return what the command last said.

    None: it had ended before.
    """
    before, deadline = state_of(folder), time.monotonic() + TIMEOUT_SECONDS
    while num_changes and process.poll() is None:
        assert time.monotonic() < deadline
        if (now := state_of(folder)) != before:
            before, num_changes = now, num_changes - 1
        time.sleep(0.001)
    if process.poll() is not None:
        assert process.returncode == 0, process.stderr.read()
        return None
    if number == signal.SIGKILL:
        kill(process)
    else:
        process.send_signal(number)
    return process.communicate(timeout=GRACE_SECONDS)[1]


def files_of(folder: Path) -> dict[str, tuple[dict[str, str], dict[str, bytes]]]:
    """Return each file's header, whose order is free, and the bytes of its tensors."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}
            found[str(path.relative_to(folder))] = (file.metadata(), tensors)
    return found


def assert_kills_change_nothing(
    command: str, paths: Mapping[str, Path], folder: Path, most_changes: int
) -> dict[str, tuple[dict[str, str], dict[str, bytes]]]:
    """Kill a command, stop it, let it end; return its files, which are those of an unbroken one.

    most_changes: of its folder and the teacher's beside it, before it is stopped.
    """
    draw, killed, unbroken = random.Random(command), folder / "k" / "out", folder / "u" / "out"
    run(command, paths, unbroken)
    for number in [signal.SIGKILL] * NUM_KILLS + [signal.SIGTERM]:
        process = start(command, paths, killed)
        words = stop(process, killed.parent, draw.randint(1, most_changes), number)
        # What torchrun itself says when it is stopped is its own.
        is_own = number == signal.SIGTERM and TORCHRUN not in command
        assert not is_own or "Traceback" not in (words or "")
    run(command, paths, killed)
    found = files_of(killed)
    assert found == files_of(unbroken)
    names = ({p.relative_to(place) for p in place.rglob("*")} for place in (killed, unbroken))
    assert next(names) == next(names)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_at_random_ends_in_the_same_file(
    name: str, paths: dict[str, Path], one_thread: None, tmp_path: Path
) -> None:
    most_changes = MOST_CHANGES.get(name, 40)
    found = assert_kills_change_nothing(COMMANDS[name], paths, tmp_path, most_changes)
    assert found or name == "evaluate"


def test_processes_end_with_the_torchrun_that_started_them(
    paths: dict[str, Path], one_thread: None, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(COMMANDS["torchrun"].replace("--steps 10", "--steps 100000"), paths, out)
    wait_for_training(process, out, "checkpoint*")
    started = psutil.Process(process.pid).children()
    process.kill()
    _, left = psutil.wait_procs(started, timeout=3 * GRACE_SECONDS)
    for each in left:
        each.kill()
    assert len(started) == 2 and left == []


@pytest.mark.parametrize(
    ("command", "numbers"),
    [
        (COMMANDS["ablation"].replace("--steps 4", "--steps 100000"), [signal.SIGTERM]),
        # As `timeout` sends it.
        (HYBRID, [signal.SIGINT, signal.SIGINT]),
    ],
    ids=["ablation", "hybrid"],
)
def test_a_command_that_is_asked_to_stop_stops_its_processes(
    command: str, numbers: list[int], paths: dict[str, Path], one_thread: None, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(command, paths, out)
    checkpoint = wait_for_training(process, out, "checkpoint.safetensors")
    started = [each for each in psutil.Process(process.pid).children() if is_at_work(each)]
    for number in numbers:
        process.send_signal(number)
    try:
        _, errors = process.communicate(timeout=GRACE_SECONDS)
    finally:
        if process.poll() is None:
            kill(process)
    assert process.returncode == 130 and "Traceback" not in errors
    assert started and not any(map(is_at_work, started))
    assert checkpoint.exists() and not list(out.rglob("linearized.safetensors"))
