"""The command as a user runs it: killed and repeated, asked for a plan, given bad arguments."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from linvideo_core.models.wan import WanConfig, WanModel
from linvideo_core.run.config import to_json
from linvideo_core.run.memory import free_bytes
from linvideo_core.teacher.config import TeacherConfig
from linvideo_core.teacher.teacher import Teacher, open_teacher
from linvideo_core.transfer import cli
from linvideo_core.transfer import command as transfer
from tests.conftest import Recorder, save_inputs, small_transfer

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "linvideo_core.transfer"]
TEXT_DIM = 64
NUM_LAYERS = 3
TIMEOUT_SECONDS = 120


def write_prompts(path: Path, *, width: int = TEXT_DIM) -> None:
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(4, 5, width, generator=generator)
    save_file({"prompt_embeds": embeds[:3], "negative_embeds": embeds[3].clone()}, path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Wan, prompt embeddings, and files that are neither."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    config = WanConfig(
        dim=128,
        num_heads=1,
        num_layers=NUM_LAYERS,
        ffn_dim=64,
        text_dim=TEXT_DIM,
        freq_dim=32,
        in_channels=4,
        out_channels=4,
    )
    model = WanModel(config)
    model.init_weights()
    nn.init.normal_(model.head.head.weight, std=0.1)
    save_file(model.state_dict(), folder / "wan.safetensors")
    wide = WanModel(dataclasses.replace(config, in_channels=48, out_channels=48))
    save_file(wide.state_dict(), folder / "wan_5b.safetensors")
    write_prompts(folder / "prompts.safetensors")
    write_prompts(folder / "wide.safetensors", width=TEXT_DIM + 1)
    save_file({"prompt_embeds": torch.zeros(3, 5, TEXT_DIM)}, folder / "half.safetensors")
    rounded = {n: t.to(torch.float8_e4m3fn) for n, t in model.state_dict().items()}
    save_file(rounded, folder / "fp8.safetensors")
    save_file(model.state_dict(), folder / "wan-00001-of-00003.safetensors")
    (folder / "empty.txt").write_text("\n \n")
    (folder / "words.txt").write_text("a dog runs\n")
    (folder / "text.safetensors").write_text("a letter, not a model\n" * 20)
    return folder


def arguments(files: Path, **changes: object) -> list[str]:
    """Return the flags of a transfer of seconds, with some replaced or left out (None).

    Nothing is left to "auto", whose decision would be logged.
    """
    flags = {
        "model": files / "wan.safetensors",
        "prompts": files / "prompts.safetensors",
        "out": "new",
        "num_frames": 5,
        "height": 64,
        "width": 48,
        "num_trajectories": 12,
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


def finish(argv: list[str]) -> None:
    process = start(argv)
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, errors


def kill_when(argv: list[str], is_time: Callable[[], bool]) -> None:
    """Start the command and end it without warning once the run folder shows the moment."""
    process = start(argv)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while not is_time():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, "the moment never came"
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL, "the command had ended already"


def num_rows(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_a_transfer_killed_at_any_stage_ends_as_an_unbroken_one_bit_for_bit(
    files: Path, one_thread: None, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    shards, training = tmp_path / "teacher", out / "training"
    warm_start = out / "warm_start"
    moments: dict[str, Callable[[], bool]] = {
        "sampling": lambda: len(list(shards.glob("*/video-*"))) >= 2,
        "warm start": lambda: num_rows(warm_start / "metrics.jsonl") >= 8,
        "before the choice": lambda: num_rows(training / "metrics.jsonl") >= 5,
        "after the choice": lambda: num_rows(training / "metrics.jsonl") >= 14,
    }
    argv = arguments(files, out=out, evaluate_samples=0)
    for is_time in moments.values():
        kill_when(argv, is_time)
        assert not (out / "linearized.safetensors").exists()
    finish(argv)

    unbroken = tmp_path / "apart" / "unbroken"
    cli.main(arguments(files, out=unbroken, evaluate_samples=0))
    expected = load_file(unbroken / "linearized.safetensors")
    found = load_file(out / "linearized.safetensors")
    assert found.keys() == expected.keys()
    assert expected
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for stage in ("warm_start", "training"):
        left, right = (folder / stage / "metrics.jsonl" for folder in (out, unbroken))
        assert left.read_bytes() == right.read_bytes()

    # Repeated where it is done, moved elsewhere or not, the command writes the same again.
    moved = tmp_path / "moved"
    shutil.move(out, moved)
    cli.main(arguments(files, out=moved, evaluate_samples=0))
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

    with pytest.raises(ValueError, match="beside it, which uses the teacher's samples again"):
        transfer.run(small_transfer(model_path, out=out, batch_size=1))
    # How many are sampled together decides nothing.
    transfer.run(small_transfer(model_path, out=out, shard_size=1))


# Every case runs in a process of its own, forked where the imports are done. Its exit status is
# handed on at once: to clear away all that was imported takes a second a case.
FORKS = """
import json, os, sys
from pathlib import Path
from linvideo_core.run.config import run_command
from linvideo_core.transfer import cli, command

for case in json.loads(Path(sys.argv[1]).read_text()):
    if not (child := os.fork()):
        for number, name in ((1, "out"), (2, "err")):
            opened = os.open(f"{case['answer']}.{name}", os.O_WRONLY | os.O_CREAT)
            os.dup2(opened, number)
        os.chdir(case["folder"])
        sys.argv[1:] = case["argv"]
        status = 0
        try:
            run_command(cli.main)
        except SystemExit as ended:
            status = ended.code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    Path(f"{case['answer']}.code").write_text(str(code))
"""

EMBEDDED = {"model": None, "prompts": None}
BAD: dict[str, tuple[dict[str, object], list[str], str]] = {
    "a missing model": ({"model": "none.safetensors"}, [], "none.safetensors does not exist"),
    "no safetensors": ({"model": "text.safetensors"}, [], "text.safetensors"),
    "a model that is none": ({"model": "prompts.safetensors"}, [], "holds no Wan model"),
    "a folder of several files": ({"model": "."}, [], "give one of these files"),
    "a target beyond the layers": ({"target": NUM_LAYERS + 1}, [], "--target 4 given"),
    "a layer beyond the model": ({"layers": "0,3"}, [], "--layers 0,3 given; the model has no"),
    "a list against the target": ({"layers": "1"}, [], "--target is 2; give --target 1"),
    "a list and a rule": ({"layers": "0,1", "choice": "alternate"}, [], "leave one of them out"),
    "an unknown choice": ({"choice": "best"}, [], "--choice best given"),
    "no target": ({"target": 0}, [], "--target 0 given"),
    "no prompts": ({"prompts": None}, [], "--prompts"),
    "missing prompts": ({"prompts": "none.safetensors"}, [], "none.safetensors does not exist"),
    "prompts that are none": ({"prompts": "text.safetensors"}, [], "text.safetensors"),
    "half the prompts": ({"prompts": "half.safetensors"}, [], "negative_embeds"),
    "embeddings of another width": ({"prompts": "wide.safetensors"}, [], "width 65"),
    "an empty prompt file": ({"prompts": "empty.txt"}, [], "holds no prompts; write one a line"),
    "prompts without an encoder": ({"prompts": "words.txt"}, [], "give --text-encoder the UMT5"),
    "embeddings and an encoder": ({"text_encoder": "umt5"}, [], "holds embeddings already"),
    "an encoder without a model": (
        {**EMBEDDED, "text_encoder": "umt5"},
        [],
        "--text-encoder, --tokenizer or --negative-prompt was given without --model",
    ),
    "a shard without the others": ({"model": "wan-00001-of-00003.safetensors"}, [], "are missing"),
    "a quantised model": ({"model": "fp8.safetensors"}, [], "F8_E4M3, a quantised model"),
    "a boundary beyond all noise": ({"boundary": 2}, [], "--boundary 2.0 given"),
    "too little memory": ({"batch_size": 10**9}, [], "lower --batch-size"),
    "too little memory for the embedded model": (
        {**EMBEDDED, "batch_size": 10**5},
        [],
        "lower --batch-size",
    ),
    "an unknown flag": ({}, ["--speed", "9"], "--speed"),
    "a stray word": ({}, ["faster"], "faster"),
    "no steps": ({"steps": 0}, [], "--steps 0 given"),
    "steps in words": ({"steps": "many"}, [], "many"),
    "a height between patches": ({"height": 50}, [], "--height 50 given"),
    "a height between a 5B's patches": (
        {"model": "wan_5b.safetensors", "height": 48},
        [],
        "--height 48 given; wan_5b.safetensors needs a multiple of 32",
    ),
    "frames off the grid": ({"num_frames": 6}, [], "--num-frames 6 given"),
    "an unknown objective": ({"objective": "gan"}, [], "gan"),
    "more states than steps": ({"states_per_trajectory": 99}, [], "--states-per-trajectory 99"),
    "a rank beyond the model": (
        {"parameters": "lora", "lora_rank": 999},
        [],
        "--lora-rank 999 exceeds",
    ),
    "an unknown device": ({"device": "abacus"}, [], "--device abacus given"),
    "a device that is not there": ({"device": "cuda"}, [], "--device cuda given"),
    "an out folder of another config": ({"out": "taken"}, [], "was made with --steps 7"),
    "an out that is a file": ({"out": "text.safetensors/run"}, [], "text.safetensors"),
}
if free_bytes("cpu") is None:
    for name in [name for name in BAD if name.startswith("too little memory")]:
        del BAD[name]
if torch.cuda.is_available():
    del BAD["a device that is not there"]


@pytest.fixture(scope="module")
def answers(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with code, out and err of every bad command line, and of some dry runs."""
    folder = tmp_path_factory.mktemp("answers")
    work = folder / "work"
    work.mkdir()
    for path in files.iterdir():
        (work / path.name).symlink_to(path)
    cases = [
        {
            "answer": str(folder / name),
            "folder": str(work),
            "argv": [*arguments(Path("."), **changes), *more],
        }
        for name, (changes, more, _) in BAD.items()
    ]
    empty = folder / "empty"
    empty.mkdir()
    for name, (argv, _) in DRY_RUNS.items():
        answer = str(folder / name)
        cases.append({"answer": answer, "folder": str(empty), "argv": ["--dry-run", *argv]})
    argv = arguments(Path("."), steps=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        config = cli.read(argv)
    (work / "taken").mkdir()
    (work / "taken" / "config.json").write_text(to_json(config))
    (folder / "cases.json").write_text(json.dumps(cases))
    subprocess.run(
        [sys.executable, "-c", FORKS, str(folder / "cases.json")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=TIMEOUT_SECONDS,
    )
    return folder


DRY_RUNS = {
    "defaults": ([], {"steps": 200, "batch_size": 6, "warmup_steps": 20}),
    "a quality": (["--quality", "draft"], {"steps": 80, "batch_size": 6, "warmup_steps": 8}),
    "the gpu preset": (["--preset", "gpu"], {"steps": 2500, "batch_size": 256}),
    "a preset with flags": (
        ["--preset", "gpu", "--steps", "12", "--out", "elsewhere"],
        {"steps": 12, "batch_size": 256, "warmup_steps": 1},
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_ends_in_one_sentence_and_exit_code_two(name: str, answers: Path) -> None:
    code, out, err = (
        (answers / f"{name}.{kind}").read_text(encoding="utf-8") for kind in ("code", "out", "err")
    )
    assert "Traceback" not in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert BAD[name][2] in err
    assert code == "2"
    assert out == ""


def test_a_latent_of_a_5b_spans_twice_as_many_pixels(files: Path) -> None:
    size = {"num_frames": 5, "height": 64, "width": 96}
    for name, latent_shape in (("wan", (4, 2, 8, 12)), ("wan_5b", (48, 2, 4, 6))):
        paths = {"model": files / f"{name}.safetensors", "prompts": files / "prompts.safetensors"}
        assert open_teacher(TeacherConfig(**paths, **size)).latent_shape == latent_shape


def test_a_refused_command_leaves_no_run_folder(answers: Path) -> None:
    assert not (answers / "work" / "new").exists()
    assert [path.name for path in (answers / "work" / "taken").iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_dry_run_prints_the_config_and_touches_nothing(name: str, answers: Path) -> None:
    code, out, err = ((answers / f"{name}.{kind}").read_text() for kind in ("code", "out", "err"))
    assert (code, err) == ("0", "")
    tree = json.loads(out)
    training = tree["training"]
    found = {key: training[key] for key in DRY_RUNS[name][1]}
    assert found == DRY_RUNS[name][1]
    assert list((answers / "empty").iterdir()) == []
