"""Flags, presets and JSON agree with the dataclass; a mistake is one sentence."""

import dataclasses
import shlex
from pathlib import Path

import pytest

from linvideo_core.run.config import option, parse, positive, to_flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class InnerConfig:
    """Nested settings."""

    steps: int = option(10, "optimiser steps, 100% of them")
    kind: str = option("a", "which", choices=("a", "b"))

    def __post_init__(self) -> None:
        positive(self, "steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OuterConfig:
    """Settings of a command."""

    inner: InnerConfig = dataclasses.field(default_factory=InnerConfig)
    rate: float = option(0.5, "a rate")
    record: bool = option(False, "write it down")
    keep: bool = option(True, "keep it")
    model: Path | None = option(None, "a file")


PRESETS = {"small": {}, "large": {"steps": 99, "record": True}}


def read(*arguments: str) -> OuterConfig:
    return parse(OuterConfig, arguments, description="A command.", presets=PRESETS)


def test_without_flags_the_first_preset_is_used() -> None:
    assert read() == OuterConfig()


def test_flags_refine_the_preset_at_any_depth() -> None:
    config = read("--preset", "large", "--kind", "b", "--model", "x y")
    expected = InnerConfig(steps=99, kind="b")
    assert config == OuterConfig(inner=expected, record=True, model=Path("x y"))


@pytest.mark.parametrize(
    ("arguments", "record"),
    [
        (["--record"], True),
        (["--record", "--steps", "3"], True),
        (["--record", "true"], True),
        (["--record", "FALSE"], False),
        (["--record=false"], False),
        (["--preset", "large", "--record", "false"], False),
    ],
)
def test_a_boolean_flag_stands_alone_or_takes_true_or_false(
    arguments: list[str], record: bool
) -> None:
    assert read(*arguments).record is record


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "many"], "--steps many given; a whole number is needed"),
        (["--steps", "1.5"], "--steps 1.5 given; a whole number is needed"),
        (["--steps", "0"], "--steps 0 given; a number greater than 0 is needed"),
        (["--rate", "nan"], "--rate nan given; a number is needed"),
        (["--rate", ""], "--rate '' given; a number is needed"),
        (["--kind", "c"], "--kind c given; one of a, b is needed"),
        (["--preset", "huge"], "--preset huge given; one of small, large is needed"),
        (
            ["--record", "maybe"],
            "--record maybe given; true or false (or the flag alone) is needed",
        ),
        (["--steps"], "--steps given without a value; see --help"),
        (["--model="], "--model '' given; a path is needed"),
        (["--step", "3"], "--step given, which is not a flag of this command; did you mean"),
        (["--zzz=3"], "--zzz given, which is not a flag of this command; see --help"),
        (["extra"], "'extra' given, which belongs to no flag"),
    ],
)
def test_a_mistake_is_one_sentence_with_flag_value_and_expectation(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        read(*arguments)
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert message.startswith(f"error: {sentence}") and len(message.splitlines()) == 1


def test_help_shows_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert "--steps N optimiser steps, 100% of them (default: 10)" in shown
    assert "--kind a|b which (default: a)" in shown
    assert "--keep [true|false] keep it (default: true)" in shown
    assert "--preset small|large" in shown


def test_flags_of_a_config_give_it_back() -> None:
    config = OuterConfig(
        inner=InnerConfig(steps=3), rate=0.25, record=True, keep=False, model=Path("a b")
    )
    flags = to_flags(config)
    assert "--record --keep false" in flags and "--kind" not in flags
    assert read(*shlex.split(flags)) == config
    assert to_flags(OuterConfig()) == "" == to_flags(OuterConfig(rate=1.0), without=["rate"])
