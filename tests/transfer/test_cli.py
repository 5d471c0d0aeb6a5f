"""The command as a user runs it: killed and repeated, asked for a plan, given bad arguments.

It compares what it saved with the teacher, and never does a thing twice.
"""

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from linvideo_core import artifact
from linvideo_core.distill import cli as distill
from linvideo_core.models.wan import WanModel
from linvideo_core.run.config import run_command, to_json
from linvideo_core.run.errors import SettingError
from linvideo_core.run.memory import free_bytes
from linvideo_core.teacher.config import TeacherConfig
from linvideo_core.teacher.teacher import Teacher, open_teacher
from linvideo_core.transfer import cli
from linvideo_core.transfer import command as transfer
from tests.conftest import (
    TEXT_DIM,
    Recorder,
    make_teacher,
    make_wan,
    save_inputs,
    small_transfer,
)

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "linvideo_core.transfer"]
NUM_LAYERS = 3
TIMEOUT_SECONDS = 120


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Wan, prompt embeddings, and files that are neither."""
    folder = tmp_path_factory.mktemp("files")
    model = make_wan(num_layers=NUM_LAYERS)
    save_inputs(make_teacher(model), folder)
    weights = model.state_dict()
    wide = WanModel(dataclasses.replace(model.config, in_channels=48, out_channels=48))
    embeds = torch.zeros(3, 5, TEXT_DIM + 1)
    for name, tensors in {
        "wan_5b": wide.state_dict(),
        "wan-00001-of-00003": weights,
        "int8": {name: tensor.to(torch.int8) for name, tensor in weights.items()},
        "wide": {"prompt_embeds": embeds, "negative_embeds": embeds[0].clone()},
        "half": {"prompt_embeds": torch.zeros(3, 5, TEXT_DIM)},
    }.items():
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / "empty.txt").write_text("\n \n")
    (folder / "words.txt").write_text("a dog runs\n")
    (folder / "text.safetensors").write_text("a letter, not a model\n" * 20)
    return folder


def arguments(files: Path, **changes: object) -> list[str]:
    """Return the flags of a transfer of seconds, with some replaced or left out (None).

    Nothing is left to "auto", whose decision would be logged.
    """
    flags = {
        "model": files / "model.safetensors",
        "prompts": files / "prompts.safetensors",
        "out": "new",
        "num_frames": 5,
        "height": 64,
        "width": 48,
        "states_per_trajectory": 4,
        "sampler_steps": 8,
        "shard_size": 4,
        "target": 2,
        "warm_start_steps": 16,
        "steps": 24,
        "batch_size": 2,
        "warmup_steps": 4,
        "checkpoint_every": 3,
        "log_every": 1,
        "selection_share": 0.4,
        "tile": "none",
        "device": "cpu",
        "precision": "fp32",
        **changes,
    }
    return [
        text
        for name, value in flags.items()
        if value is not None
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]


def start(argv: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(is_time: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not is_time():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.002)


def kill_when(argv: list[str], is_time: Callable[[], bool]) -> None:
    """Start the command and end it without warning once the run folder shows the moment."""
    process = start(argv)
    try:
        wait_until(is_time, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL, "the command had ended already"


def num_rows(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("states", ["stored", "pool"])
def test_a_transfer_killed_at_any_stage_ends_as_an_unbroken_one_bit_for_bit(
    states: str, files: Path, one_thread: None, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    shards, training = tmp_path / "teacher", out / "training"
    warm_start = out / "warm_start"
    moments: dict[str, Callable[[], bool]] = {
        "sampling": lambda: len(list(shards.glob("*/video-*"))) >= 2,
        "warm start": lambda: num_rows(warm_start / "metrics.jsonl") >= 8,
        "training": lambda: num_rows(training / "metrics.jsonl") >= 14,
    }
    num_videos = {"pool": {"pool_videos": 8}, "stored": {"num_trajectories": 12}}[states]
    how = {"states": states, "levels": "even", "evaluate_samples": 0, **num_videos}
    if states == "pool":
        del moments["sampling"]
        how["more_sizes"] = "48x32x1,32x64x5"
    argv = arguments(files, out=out, **how)
    for is_time in moments.values():
        kill_when(argv, is_time)
        assert not (out / "linearized.safetensors").exists()
    cli.main(argv)

    unbroken = tmp_path / "apart" / "unbroken"
    cli.main(arguments(files, out=unbroken, **how))
    expected = load_file(unbroken / "linearized.safetensors")
    found = load_file(out / "linearized.safetensors")
    assert found.keys() == expected.keys()
    assert expected
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    sizes = artifact.load(out / "linearized.safetensors").header.usage.more_sizes
    assert sizes == (((48, 32, 1), (32, 64, 5)) if states == "pool" else None)
    for stage in ("warm_start", "training"):
        left, right = (folder / stage / "metrics.jsonl" for folder in (out, unbroken))
        assert left.read_bytes() == right.read_bytes()

    # Repeated where it is done, moved elsewhere or not, the command writes the same again.
    moved = tmp_path / "moved"
    shutil.move(out, moved)
    cli.main(arguments(files, out=moved, **how))
    for name, tensor in load_file(moved / "linearized.safetensors").items():
        assert torch.equal(expected[name], tensor), name


def test_another_run_with_other_training_settings_uses_the_samples_that_are_there(
    teacher: Teacher, tmp_path: Path
) -> None:
    model_path = save_inputs(teacher, tmp_path)["--model"]
    out = tmp_path / "runs" / "first"
    transfer.run(small_transfer(model_path, out=out))
    changes = {"batch_size": 1, "steps": 2, "lora_rank": 4, "learning_rate": 1e-4, "shard_size": 1}
    second = small_transfer(model_path, out=out.with_name("second"), **changes)
    recorder = Recorder()
    transfer.run(second, recorder)
    assert ("sampling_teacher", 2) in recorder.seen
    assert ("sampling_teacher", 0) not in recorder.seen
    assert {path.name for path in out.parent.iterdir()} == {"first", "second", "teacher"}

    with pytest.raises(ValueError, match="beside it, which uses the teacher's stored videos again"):
        transfer.run(small_transfer(model_path, out=out, batch_size=1))
    # How many are sampled together decides nothing.
    transfer.run(small_transfer(model_path, out=out, shard_size=1))


SIZES = ("num_frames", "height", "width")
EMBEDDED = dict.fromkeys(("model", "prompts", *SIZES))
BAD: dict[str, tuple[dict[str, object], str]] = {
    "a missing model": ({"model": "none.safetensors"}, "none.safetensors does not exist"),
    "no safetensors": ({"model": "text.safetensors"}, "text.safetensors"),
    "a model that is none": ({"model": "prompts.safetensors"}, "holds no Wan model"),
    "a folder of several files": ({"model": "."}, "give one of these files"),
    "an unknown choice": ({"choice": "best"}, "--choice best given"),
    "a speed-up out of reach": (
        {"target": "900x"},
        f"--target 900x given, and with all {NUM_LAYERS} layers linear a call of the model is ",
    ),
    "no prompts": ({"prompts": None}, "--prompts"),
    "a missing model without prompts": (
        {"model": "none.safetensors", "prompts": None},
        "none.safetensors does not exist",
    ),
    "prompts that are a folder": ({"prompts": "."}, "prompt file . is no file"),
    "missing prompts": ({"prompts": "none.safetensors"}, "none.safetensors does not exist"),
    "prompts that are none": ({"prompts": "text.safetensors"}, "text.safetensors"),
    "half the prompts": ({"prompts": "half.safetensors"}, "negative_embeds"),
    "embeddings of another width": ({"prompts": "wide.safetensors"}, f"width {TEXT_DIM + 1}"),
    "an empty prompt file": ({"prompts": "empty.txt"}, "holds no prompts; write one a line"),
    "prompts without an encoder": ({"prompts": "words.txt"}, "give --text-encoder the UMT5"),
    "embeddings and an encoder": ({"text_encoder": "umt5"}, "holds embeddings already"),
    "an encoder without a model": (
        {**EMBEDDED, "text_encoder": "umt5"},
        "--text-encoder, --tokenizer or --negative-prompt was given without --model",
    ),
    "a shard without the others": ({"model": "wan-00001-of-00003.safetensors"}, "are missing"),
    "a quantised model": ({"model": "int8.safetensors"}, "is stored in int8; give the fp16, bf16"),
    "a boundary beyond all noise": ({"boundary": 2}, "--boundary 2.0 given"),
    "too little memory": ({"batch_size": 10**9}, "lower --batch-size"),
    "too little memory for the embedded model": (
        {**EMBEDDED, "batch_size": 10**5},
        "lower --batch-size",
    ),
    "an unknown flag": ({"speed": 9}, "--speed"),
    "no steps": ({"steps": 0}, "--steps 0 given"),
    "steps in words": ({"steps": "many"}, "many"),
    "a height between patches": ({"height": 50}, "--height 50 given"),
    "a height between a 5B's patches": (
        {"model": "wan_5b.safetensors", "height": 48},
        "--height 48 given; wan_5b.safetensors needs a multiple of 32",
    ),
    "frames off the grid": ({"num_frames": 6}, "--num-frames 6 given"),
    "more sizes in other words": (
        {"states": "pool", "more_sizes": "480*832"},
        "--more-sizes 480*832 given; width x height x frames",
    ),
    "more sizes between patches": (
        {"states": "pool", "more_sizes": "32x32x5,32x50x5"},
        "--more-sizes: height 50 given; a multiple of 16",
    ),
    "more sizes between a 5B's patches": (
        {"model": "wan_5b.safetensors", "height": 64, "width": 64, "states": "pool"}
        | {"more_sizes": "48x64x5"},
        "--more-sizes: width 48 given; wan_5b.safetensors needs a multiple of 32",
    ),
    "a size twice": (
        {"states": "pool", "more_sizes": "64x32x5,64x32x5"},
        "--more-sizes 64x32x5 given, which is there already",
    ),
    "more sizes of stored videos": (
        {"states": "stored", "more_sizes": "64x32x5"},
        "it is for the pool of a --model of your own",
    ),
    "more sizes of the embedded model": (
        {**EMBEDDED, "states": "pool", "levels": "even", "more_sizes": "64x32x5"},
        "it is for the pool of a --model of your own",
    ),
    "frames of the embedded model": (
        {**EMBEDDED, "num_frames": 5},
        "--num-frames 5 is for a --model of your own, and none was given",
    ),
    "frames of the embedded model, as many as are usual": (
        {**EMBEDDED, "num_frames": 81},
        "--num-frames 81 is for a --model of your own",
    ),
    "a size of the embedded model": (
        {**EMBEDDED, "height": 64, "width": 48},
        "--height 64 --width 48 is for a --model of your own",
    ),
    "a card for the embedded model": (
        {**EMBEDDED, "card": 24},
        "--card 24 is for a --model of your own",
    ),
    "an unknown objective": ({"objective": "gan"}, "gan"),
    "a rank beyond the model": (
        {"parameters": "lora", "lora_rank": 999},
        "--lora-rank 999 exceeds",
    ),
    "an unknown device": (
        {"device": "abacus"},
        "--device abacus given, which PyTorch cannot use here; it has cpu",
    ),
    "a device that is not there": ({"device": "cuda"}, "--device cuda given"),
    "an out folder of another config": ({"out": "taken"}, "was made with --steps 7"),
    "an out that is a file": ({"out": "text.safetensors/run"}, "text.safetensors"),
    "an out of too long a name": ({"out": "x" * 300}, "of names of at most 255 bytes, is needed"),
    "a teacher folder that is a file": (
        {"teacher_folder": "words.txt"},
        "words.txt is a file and a folder is needed; choose another --teacher-folder",
    ),
}
if free_bytes("cpu") is None:
    for name in [name for name in BAD if name.startswith("too little memory")]:
        del BAD[name]
if torch.cuda.is_available():
    del BAD["a device that is not there"]


def run_in(
    folder: Path, argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> tuple[object, str, str]:
    """Run the command in a folder; return its exit code and what it wrote."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["transfer", *argv])
    with pytest.raises(SystemExit) as ended:
        run_command(cli.main)
    return (ended.value.code, *capsys.readouterr())


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_ends_in_one_sentence_and_leaves_no_run_folder(
    name: str,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(files)
    config = cli.read(arguments(Path("."), steps=7))
    (files / "taken").mkdir(exist_ok=True)
    (files / "taken" / "config.json").write_text(to_json(config))
    before = {*files.rglob("*")}
    changes, words = BAD[name]
    with caplog.at_level(logging.INFO):
        code, out, err = run_in(files, arguments(Path("."), **changes), monkeypatch, capsys)
    # A speed-up is measured before it is refused.
    said = [text for text in caplog.messages if not text.startswith("timing a few calls")]
    assert (code, out, said) == (2, "", [])
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    assert words in err
    assert {*files.rglob("*")} == before


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {"steps": 200, "batch_size": 6, "warmup_steps": 20}),
        (["--quality", "draft"], {"steps": 80, "batch_size": 6, "warmup_steps": 8}),
        (["--preset", "gpu"], {"steps": 2500, "batch_size": 256, "warmup_steps": 100}),
        (["--preset", "gpu", "--steps", "12"], {"steps": 12, "batch_size": 256, "warmup_steps": 1}),
    ],
)
def test_a_dry_run_prints_the_config_and_touches_nothing(
    argv: list[str],
    expected: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    code, out, err = run_in(tmp_path, ["--dry-run", *argv], monkeypatch, capsys)
    assert (code, err) == (0, "")
    found = json.loads(out)["training"]
    assert {name: found[name] for name in expected} == expected
    assert list(tmp_path.iterdir()) == []


def test_a_latent_of_a_5b_spans_twice_as_many_pixels(files: Path) -> None:
    size = {"num_frames": 5, "height": 64, "width": 96}
    for name, latent_shape in (("model", (4, 2, 8, 12)), ("wan_5b", (48, 2, 4, 6))):
        paths = {"model": files / f"{name}.safetensors", "prompts": files / "prompts.safetensors"}
        assert open_teacher(TeacherConfig(**paths, **size)).latent_shape == latent_shape


SHORT = {
    "states_per_trajectory": 2,
    "sampler_steps": 4,
    "shard_size": 2,
    "warm_start_steps": 2,
    "steps": 6,
    "target": 1,
}
EVIDENCE = {
    "layer_scores.png",
    "losses.png",
    "samples.png",
    "samples.gif",
    "velocity_error.png",
    "evaluation.json",
    "README.md",
}


@pytest.fixture(scope="module")
def finished(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folder of a finished transfer."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    cli.main(arguments(files, **SHORT, evaluate_samples=3, out=out))
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
    files: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = times(finished)
    with caplog.at_level(logging.INFO):
        cli.main(arguments(files, **SHORT, evaluate_samples=3, out=finished))
    assert times(finished) == before
    assert "is finished" in caplog.text
    shown = capsys.readouterr().out
    assert "1 of 3 layers are linear" in shown and "student" in shown
    assert all(name in shown for name in {"linearized.safetensors", *EVIDENCE})


def test_more_samples_repeat_the_comparison_alone(finished: Path, files: Path) -> None:
    before = times(finished)
    cli.main(arguments(files, **SHORT, evaluate_samples=4, out=finished))
    after = times(finished)
    assert after["linearized.safetensors"] == before["linearized.safetensors"]
    assert after["evaluation.json"] != before["evaluation.json"]


@pytest.mark.parametrize("size", [0, 4, 1000])
def test_a_damaged_result_says_what_brings_it_back(size: int, finished: Path, files: Path) -> None:
    path = finished / "linearized.safetensors"
    before, content = artifact.load(path), path.read_bytes()
    command = arguments(files, **SHORT, evaluate_samples=4, out=finished)
    path.write_bytes(content[:size])
    with pytest.raises(artifact.ArtifactError, match="delete it and repeat the run's command"):
        cli.main(command)
    path.unlink()
    cli.main(command)
    after = artifact.load(path)
    assert after.header == before.header
    torch.testing.assert_close(after.linear, before.linear, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("tile", "expected"), [("none", None), (None, "1x1x1"), ("1x2x2", "1x2x2")]
)
def test_the_comparison_can_be_left_out_and_layers_are_hybrid_unless_made_linear(
    tile: str | None,
    expected: str | None,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, kind = tmp_path / "out", "hybrid" if expected else "linear"
    cli.main(arguments(files, **SHORT, tile=tile, evaluate_samples=0, out=out))
    evidence = {"layer_scores.png", "losses.png", "README.md"}
    assert times(out).keys() == {"linearized.safetensors", "config.json", *evidence}
    shown = capsys.readouterr().out
    assert "samples.png" not in shown and f"1 of 3 layers are {kind}" in shown
    assert artifact.load(out / "linearized.safetensors").header.tile == expected


def test_a_tile_that_has_the_whole_video_is_refused(files: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="--tile 0x99x99 given, and a video is "):
        cli.main(arguments(files, **SHORT, tile="0x99x99", out=tmp_path / "out"))


@pytest.mark.parametrize("command", [cli, distill])
def test_help_says_whose_defaults_it_shows(
    command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.read(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "those of the embedded model; with --model they follow from the model" in shown
    assert "--vae PATH" in shown


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_continue(number: int, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    endless = {**SHORT, "steps": 10**6, "checkpoint_every": 2, "out": out}
    process = start(arguments(files, **endless))
    wait_until((out / "training" / "checkpoint.safetensors").exists, process)
    # A container's grace.
    process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    last = errors.splitlines()[-1]
    assert last == "interrupted; the same command continues from the last checkpoint"
    assert "Traceback" not in errors
