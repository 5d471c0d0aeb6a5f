"""Dataclasses become flags, JSON and presets."""

import dataclasses
import json
import logging
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from linvideo_core.run import limits
from linvideo_core.run.config import (
    Settings,
    option,
    override,
    parse,
    run_command,
    to_flags,
    to_json,
)
from linvideo_core.run.errors import SettingError, flag_of
from linvideo_core.transfer import cli as transfer
from linvideo_core.transfer import pipeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine(Settings):
    """Settings of a room."""

    num_cylinders: int = option(4, "how many", limits.COUNT)
    power: float = option(1.5, "how strong, 100 % of it", limits.POSITIVE)
    kind: str = option("diesel", "which", choices=("diesel", "petrol"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Car(Settings):
    """Settings of a command, which nests those of a room."""

    engine: Engine = dataclasses.field(default_factory=Engine)
    out: Path = option(Path("here"), "where")
    manual: Path | None = option(None, "a book")
    is_fast: bool = option(False, "whether")
    has_roof: bool = option(True, "cover")
    share: float = option(0.5, "part", limits.FRACTION)


PRESETS: dict[str, dict[str, Any]] = {
    "city": {},
    "race": {"num_cylinders": 12, "is_fast": True, "share": 1.0},
}


def read(*argv: str) -> Car:
    return parse(Car, argv, description="Drive.", presets=PRESETS)


RACE = Car(engine=Engine(num_cylinders=12), is_fast=True, share=1.0)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("", Car()),
        ("--preset city", Car()),
        ("--preset race", RACE),
        ("--power 2e-1 --kind petrol", Car(engine=Engine(power=0.2, kind="petrol"))),
        ("--out there --manual book.txt", Car(out=Path("there"), manual=Path("book.txt"))),
        ("--share 1 --preset race --is-fast false", dataclasses.replace(RACE, is_fast=False)),
        ("--is-fast", Car(is_fast=True)),
        ("--is-fast --share 0", Car(is_fast=True, share=0.0)),
        ("--is-fast true", Car(is_fast=True)),
        ("--has-roof FALSE", Car(has_roof=False)),
        ("--has-roof=false", Car(has_roof=False)),
    ],
)
def test_flags_reach_fields_at_any_depth_and_refine_the_preset(argv: str, expected: Car) -> None:
    assert read(*argv.split()) == expected


def test_a_command_may_have_no_presets() -> None:
    assert parse(Car, ["--share", "0"], description="Drive.") == Car(share=0.0)


def test_a_dry_run_prints_the_config_and_stops(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        read("--dry-run", "--preset", "race")
    assert caught.value.code == 0
    assert capsys.readouterr() == (to_json(read("--preset", "race")), "")


def test_help_shows_what_most_need_and_help_all_shows_every_setting(
    capsys: pytest.CaptureFixture,
) -> None:
    texts = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            parse(Car, [flag], description="Drive.", presets=PRESETS, shown=("out",))
        texts.append(capsys.readouterr().out)
    assert "--out" in texts[0] and "--power" not in texts[0]
    assert "--out" in texts[1] and "--power" in texts[1]


def test_settings_are_read_without_pytorch() -> None:
    program = """
import importlib, sys
for command in ("transfer", "distill", "evaluate"):
    try:
        importlib.import_module(f"linvideo_core.{command}.cli").main(["--dry-run"])
    except SystemExit as end:
        assert not end.code
    assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_only_the_first_of_many_processes_speaks(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as caught:
        read("--powr", "2")
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "")


def test_json_nests_as_the_dataclasses_do() -> None:
    tree = json.loads(to_json(Car(manual=Path("book.txt"))))
    assert tree == {
        "engine": {"num_cylinders": 4, "power": 1.5, "kind": "diesel"},
        "out": "here",
        "manual": "book.txt",
        "is_fast": False,
        "has_roof": True,
        "share": 0.5,
    }
    assert json.loads(to_json(Car()))["manual"] is None


def test_override_replaces_flat_names_and_checks_what_it_makes() -> None:
    car = Car()
    assert override(car, {"power": 3.0, "share": 0.1}) == Car(engine=Engine(power=3.0), share=0.1)
    assert car == Car()
    for value in (-1, float("nan")):
        with pytest.raises(SettingError, match=f"--power {value} given"):
            override(car, {"power": value})
    with pytest.raises(SettingError, match="--kind steam given; one of diesel, petrol is needed"):
        override(car, {"kind": "steam"})


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--num-cylinders 0", "--num-cylinders 0 given; a whole number from 1 to 1000000000"),
        ("--num-cylinders six", "--num-cylinders six given; a whole number is needed"),
        ("--num-cylinders 1.5", "--num-cylinders 1.5 given; a whole number is needed"),
        ("--power nan", "--power nan given; a number is needed"),
        ("--power ''", "--power '' given; a number is needed"),
        ("--power", "--power given without a value; see --help"),
        ("--share 1.01", "--share 1.01 given; a number from 0 to 1 is needed"),
        ("--kind steam", "--kind steam given; one of diesel, petrol is needed"),
        ("--preset moon", "--preset moon given; one of city, race is needed"),
        ("--is-fast yes", "--is-fast yes given; true or false (or the flag alone) is needed"),
        ("--manual=", "--manual '' given; a path, of names of at most 255 bytes, is needed"),
        ("--powr 3", "--powr given, which is not a flag of this command; did you mean --power?"),
        ("--zzz=3", "--zzz given, which is not a flag of this command; see --help"),
        ("stray", "'stray' given, which belongs to no flag"),
    ],
)
def test_a_mistake_is_one_sentence_with_flag_value_and_expectation(
    argv: str, sentence: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        read(*shlex.split(argv))
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {sentence}") and err.count("\n") == 1


def test_help_names_every_flag_with_its_text_and_default(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--num-cylinders N how many (default: 4)" in text
    assert "how strong, 100 % of it (default: 1.5)" in text
    assert "--kind diesel|petrol which (default: diesel)" in text
    assert "--manual PATH a book (default: none)" in text
    assert "--has-roof [true|false] cover (default: true)" in text
    assert "--preset city|race" in text


def test_flags_of_a_config_give_it_back() -> None:
    engine = Engine(num_cylinders=3)
    car = Car(engine=engine, share=0.25, is_fast=True, has_roof=False, manual=Path("a b"))
    flags = to_flags(car)
    assert "--is-fast --has-roof false" in flags and "--kind" not in flags
    assert read(*shlex.split(flags)) == car
    assert to_flags(Car()) == "" == to_flags(Car(share=1.0), without=["share"])


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError])
def test_what_a_user_can_put_right_ends_in_one_sentence(
    kind: type[Exception], capsys: pytest.CaptureFixture
) -> None:
    def main() -> None:
        raise kind("put it right")

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: put it right\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_a_second_interruption_does_not_break_what_the_first_began() -> None:
    program = """
import time
from linvideo_core.run.config import run_command

def main():
    try:
        print("runs", flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.5)
        print("kept", flush=True)

run_command(main)
"""
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", program], **pipes, text=True)
    assert process.stdout.readline() == "runs\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=10)
    assert (process.returncode, said.strip()) == (130, "kept") and "Traceback" not in errors


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_what_a_shell_lets_ignore_ctrl_c_goes_on_ignoring_it() -> None:
    program = """
import os, signal
from linvideo_core.run.config import run_command

run_command(lambda: os.kill(os.getpid(), signal.SIGINT))
print("done")
"""
    command = f"trap '' INT; exec {shlex.quote(sys.executable)} -c {shlex.quote(program)}"
    assert subprocess.check_output(["sh", "-c", command], text=True) == "done\n"


def test_a_fault_of_the_program_keeps_its_trace() -> None:
    def main() -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        run_command(main)
    assert logging.getLogger().handlers


def test_the_transfers_flags_are_unique_and_its_presets_name_nothing_else() -> None:
    # argparse refuses a flag that is there twice, and one that is not there.
    for preset in transfer.PRESETS.values():
        values = {"model": Path("wan.safetensors"), **preset}
        argv = [f"{flag_of(name)}={value}" for name, value in values.items()]
        found = parse(pipeline.TransferConfig, argv, description="A transfer.")
        assert found == override(pipeline.TransferConfig(), values)
