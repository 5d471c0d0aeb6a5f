"""The command linearizes a tiny Wan, compares what it saved, and never does a thing twice."""

import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from linvideo_core.transfer import cli as transfer
from tests.conftest import make_teacher, make_wan, save_inputs

SIZES = "--num-frames 9 --height 16 --width 32 --num-trajectories 4 --sampler-steps 4 --device cpu"
LENGTHS = "--states-per-trajectory 2 --shard-size 2 --warm-start-steps 2 --batch-size 2 --target 1"
EVIDENCE = {
    "layer_scores.png",
    "losses.png",
    "samples.png",
    "samples.gif",
    "velocity_error.png",
    "evaluation.json",
}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return flags that name a tiny model and its prompts, and make everything short."""
    files = save_inputs(make_teacher(make_wan()), tmp_path_factory.mktemp("model"))
    files = [str(word) for pair in files.items() for word in pair]
    return [*files, *SIZES.split(), *LENGTHS.split(), "--steps", "6", "--log-every", "1"]


@pytest.fixture(scope="module")
def finished(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folder of a finished transfer."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    transfer.main([*flags, "--evaluate-samples", "3", "--out", str(out)])
    return out


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}


def test_a_run_ends_with_its_evidence(finished: Path) -> None:
    assert {"linearized.safetensors", "config.json", *EVIDENCE} == times(finished).keys()
    result = json.loads((finished / "evaluation.json").read_text(encoding="utf-8"))
    assert result["settings"]["num_samples"] == 3 and result["settings"]["steps"] == 4
    rows = [(row["model"], row["linear_layers"], row["layers"]) for row in result["rows"]]
    assert rows == [("teacher", 0, 3), ("swapped", 1, 3), ("student", 1, 3)]


def test_a_finished_run_repeated_does_nothing_and_says_so(
    finished: Path,
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = times(finished)
    with caplog.at_level(logging.INFO):
        transfer.main([*flags, "--evaluate-samples", "3", "--out", str(finished)])
    assert times(finished) == before
    assert "is finished" in caplog.text
    shown = capsys.readouterr().out
    assert "1 of 3 layers are linear" in shown and "student" in shown
    assert all(name in shown for name in {"linearized.safetensors", *EVIDENCE})


def test_more_samples_repeat_the_comparison_alone(finished: Path, flags: list[str]) -> None:
    before = times(finished)
    transfer.main([*flags, "--evaluate-samples", "4", "--out", str(finished)])
    after = times(finished)
    assert after["linearized.safetensors"] == before["linearized.safetensors"]
    assert after["evaluation.json"] != before["evaluation.json"]


def test_the_comparison_can_be_left_out(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    transfer.main([*flags, "--evaluate-samples", "0", "--out", str(out)])
    pictures = {"layer_scores.png", "losses.png"}
    assert times(out).keys() == {"linearized.safetensors", "config.json", *pictures}
    assert "samples.png" not in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_an_interrupted_run_says_how_to_continue(flags: list[str], tmp_path: Path) -> None:
    # A shell ignores SIGINT for what it starts in the background, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = tmp_path / "out"
    endless = ["--steps", "1000000", "--checkpoint-every", "2", "--out", str(out)]
    with subprocess.Popen(
        [sys.executable, "-m", "linvideo_core.transfer", *flags, *endless],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not (out / "training" / "checkpoint.safetensors").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    last = errors.splitlines()[-1]
    assert last == "interrupted; the same command continues from the last checkpoint"
    assert "Traceback" not in errors
