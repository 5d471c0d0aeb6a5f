"""Two processes train as one does; they stop, fail and continue together, on CPUs and on GPUs."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import process_group_program as program
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from linvideo_core.run.errors import SettingError
from linvideo_core.run.process_group import SINGLE_PROCESS, ProcessGroup
from linvideo_core.training.checkpoint import find_checkpoint
from linvideo_core.training.fsdp import init_process_group

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
PROGRAM = "tests/process_group_program.py"
TIMEOUT_SECONDS = 300

# What `parallel` promises for the same global batch: of each metric, and of each tensor the norm
# of the difference in norms of what training changed. A hundredth of its elements is left out:
# where a gradient is nothing but rounding, as that of a bias which softmax does not see, Adam takes
# whole steps in whatever direction a processor rounds.
METRIC_TOLERANCE = 1e-4
WEIGHT_TOLERANCE = 2e-3

SCENARIOS = (
    "transfer",
    "transfer_pool",
    "transfer_all_weights",
    "transfer_by_ranking",
    "transfer_rounded",
    "distil",
    "distil_one_video_each",
)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def start_ranks(folder: Path, scenario: str) -> list[subprocess.Popen]:
    """Start both processes of a scenario as torchrun does, without its watch over them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
    return [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(folder), scenario],
            cwd=ROOT,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", **address),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@dataclasses.dataclass
class Killed:
    """A transfer of two processes on CPUs after one of them was killed: what the other did."""

    folder: Path
    code: int
    errors: str


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """Kill a process as soon as there is a checkpoint."""
    folder = tmp_path_factory.mktemp("killed")
    first, second = start_ranks(folder, "transfer_long")
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while find_checkpoint(folder / "transfer_long/training") is None:
        assert first.poll() is None and second.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    _, errors = first.communicate(timeout=TIMEOUT_SECONDS)
    assert not (folder / "transfer_long/student.safetensors").exists()
    return Killed(folder / "transfer_long", first.returncode, errors)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """What both process groups compute on; of GPUs each process has one of its own."""
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return request.param


@pytest.fixture(scope="module")
def folder(
    device: str, killed: Killed, one_thread: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with what one process and two made of the same trainings, under `one` and `two`.

    `two/one_to_two` was begun by one process and finished by two, `one/two_to_one` the reverse;
    what the two wrote last on stderr is in `two/errors`.
    """
    folder = tmp_path_factory.mktemp("processes")
    one, two = folder / "one", folder / "two"
    program.stop_transfer(two / "one_to_two", SINGLE_PROCESS, device)
    jobs = [
        *SCENARIOS,
        "share_one_copy",
        f"stop_transfer={one / 'two_to_one'}",
        "transfer_pool=one_to_two",
        *([f"transfer_long={killed.folder}"] if device == "cpu" else []),
        "refuse",
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [sys.executable, *launcher, PROGRAM, str(two), ",".join(jobs), device],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert finished.returncode != 0
    (two / "errors").write_text(finished.stderr)
    for name in SCENARIOS:
        program.SCENARIOS[name](one / name, SINGLE_PROCESS, device)
    (one / "two_to_one" / "before").write_text(find_checkpoint(one / "two_to_one/training").name)
    program.transfer_pool(one / "two_to_one", SINGLE_PROCESS, device)
    return folder


def errors_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_what_all_processes_refuse_is_said_once(folder: Path) -> None:
    text = (folder / "two" / "errors").read_text()
    said = errors_in(text)
    assert len(said) == 1 and "--batch-size 3 cannot be shared evenly by 2 processes" in said[0], (
        text
    )
    assert not (folder / "two" / "refuse").exists()


def test_after_a_process_is_killed_the_other_says_so_and_the_same_command_continues(
    device: str, killed: Killed, folder: Path
) -> None:
    said = errors_in(killed.errors)
    assert killed.code == 2 and "Traceback" not in killed.errors
    assert len(said) == 1 and "the same command continues from the last checkpoint" in said[0]
    if device == "cpu":
        program.transfer_long(folder / "one" / "transfer_long", SINGLE_PROCESS)
        assert distance(killed.folder, folder / "one" / "transfer_long") < WEIGHT_TOLERANCE


def read(folder: Path) -> dict[str, Tensor]:
    """Return what a training made: the student's whole weights, or a distilled file."""
    path = folder / "student.safetensors"
    return load_file(path if path.exists() else folder / "distilled.safetensors")


def distance(found: Path, expected: Path) -> float:
    """Return how far two trainings' results lie apart, in norms of what training changed.

    Of each tensor the hundredth of the elements that differ most is left out.
    """
    one, two = read(expected), read(found)
    assert one.keys() == two.keys()
    teacher = expected / "teacher.safetensors"
    before = load_file(teacher) if teacher.exists() else {}
    shares = [0.0]
    for name, tensor in one.items():
        tensor = tensor.float()
        # Adapters start at zero or at a known draw: their own norm is that of their change.
        change = (tensor - before[name].float() if name in before else tensor).norm()
        differences = (two[name].float() - tensor).abs().flatten().sort().values
        difference = differences[: len(differences) - len(differences) // 100].norm()
        assert change or not difference, name
        shares.append((difference / change.clamp_min(1e-12)).item())
    return max(shares)


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_the_same_global_batch_as_one(name: str, folder: Path) -> None:
    one, two = folder / "one" / name, folder / "two" / name
    assert distance(two, one) < WEIGHT_TOLERANCE
    for stage in ("warm_start", "training"):
        path = one / stage / "metrics.jsonl"
        if stage == "warm_start" and not path.exists():
            continue
        rows, found = (
            [json.loads(line) for line in text.splitlines()]
            for text in (path.read_text(), (two / stage / "metrics.jsonl").read_text())
        )
        assert len(rows) == len(found) > 1
        for row, other in zip(rows, found, strict=True):
            assert row.keys() == other.keys()
            for key in row:
                expected = torch.tensor(row[key], dtype=torch.float64)
                difference = (torch.tensor(other[key], dtype=torch.float64) - expected).abs()
                assert (difference <= METRIC_TOLERANCE * expected.abs() + 1e-7).all(), key


def test_training_moved_something(folder: Path) -> None:
    for name in SCENARIOS[:2]:
        weights = read(folder / "one" / name)
        teacher = load_file(folder / "one" / name / "teacher.safetensors")
        changed = [n for n in weights if n not in teacher or not weights[n].equal(teacher[n])]
        assert len(changed) > 10


def test_two_processes_sample_the_same_trajectories_bit_for_bit(folder: Path) -> None:
    root = folder / "one"
    names = [path.relative_to(root) for path in root.glob("teacher/*/*.safetensors")]
    assert len(names) >= 3
    for name in names:
        one, two = (load_file(folder / processes / name) for processes in ("one", "two"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_each_process_holds_its_part_of_the_one_copy_of_the_weights(
    folder: Path,
) -> None:
    whole, frozen_weights = json.loads(
        (folder / "two" / "share_one_copy" / "shares.json").read_text()
    )
    # What has one row, such as the maps of one head, is the first process's.
    assert 0.5 <= frozen_weights / whole < 0.55


def test_the_teacher_comes_out_of_the_shards_as_it_went_in(folder: Path) -> None:
    teacher = program.make_frozen_teacher().model.state_dict()
    for name in SCENARIOS[:3]:
        found = load_file(folder / "two" / name / "teacher.safetensors")
        assert all(torch.equal(found[key], teacher[key]) for key in teacher)


@pytest.mark.parametrize(
    ("way", "checkpoint"),
    [("one/two_to_one", "checkpoint.safetensors"), ("two/one_to_two", "checkpoint-00000006")],
)
def test_a_training_continues_on_another_number_of_processes(
    way: str, checkpoint: str, folder: Path
) -> None:
    assert distance(folder / way, folder / "one" / "transfer_pool") < WEIGHT_TOLERANCE
    rows = (folder / way / "training" / "metrics.jsonl").read_text().splitlines()
    steps = program.TRANSFER.training.steps
    assert [json.loads(row)["step"] for row in rows] == list(range(steps))
    # The checkpoint in the other form is gone.
    names = {path.name for path in (folder / way / "training").iterdir()}
    assert names == {checkpoint, "metrics.jsonl"}


def test_one_process_asked_to_stop_stops_both_after_the_same_step_and_keeps_it(
    folder: Path,
) -> None:
    kept = (folder / "one" / "two_to_one" / "before").read_text()
    assert kept == f"checkpoint-{program.STOP_AT:08d}"


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a missing shard": lambda path: max(path.glob("*.safetensors")).unlink(),
    "a cut shard": lambda path: os.truncate(max(path.glob("*.safetensors")), 900),
    "a flipped byte": lambda path: flip_a_byte(max(path.glob("*.safetensors"))),
    "no state": lambda path: (path / "state.json").write_text("{}"),
    "a state that is none": lambda path: (path / "state.json").write_text("[]"),
    "another state": lambda path: (path / "state.json").write_text(
        (path / "state.json").read_text().replace('"step": "', '"step": "1')
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_shards_are_named_in_one_sentence_or_those_before_them_taken(
    damage: str, folder: Path, device: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = folder / "two" / "transfer"
    out = tmp_path / "out"
    shutil.copytree(source.parent / "teacher", tmp_path / "teacher")
    for name in ("warm_start", "training"):
        shutil.copytree(source / name, out / name)
    checkpoint = find_checkpoint(out / "training")
    assert len(list(checkpoint.glob("*.safetensors"))) == 2
    shutil.copytree(checkpoint, checkpoint.with_name("checkpoint_before_6"))
    DAMAGE[damage](checkpoint)
    with caplog.at_level("WARNING"):
        program.transfer(out, SINGLE_PROCESS, device)
    assert f"{checkpoint} is damaged" in caplog.text and "of step 6" in caplog.text
    DAMAGE[damage](find_checkpoint(out / "training"))
    with pytest.raises(ValueError, match="cannot be continued from") as caught:
        program.transfer(out, SINGLE_PROCESS, device)
    assert str(checkpoint) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert init_process_group() is SINGLE_PROCESS
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("size", "rows"), [(1, 5), (2, 5), (3, 7), (4, 2)])
def test_shares_are_disjoint_and_make_up_the_whole_batch(size: int, rows: int) -> None:
    class Member(ProcessGroup):
        def __init__(self, rank: int) -> None:
            self.rank, self.size = rank, size

    parts = [Member(rank).share(torch.arange(rows)) for rank in range(size)]
    assert sorted(torch.cat(parts).tolist()) == list(range(rows))
    Member(0).check_batch(2 * size)
    if size > 1:
        with pytest.raises(SettingError, match=f"evenly by {size} processes: a new run takes a"):
            Member(0).check_batch(size + 1)


def test_a_batch_that_cannot_be_shared_says_how_many_processes_continue_it() -> None:
    class Trio(ProcessGroup):
        size = 3

    for batch_size, able in ((1, "1"), (2, "1 or 2"), (8, "1 or 2 or 4 or 8")):
        with pytest.raises(SettingError, match=f"is continued by {able} of them"):
            Trio().check_batch(batch_size)
