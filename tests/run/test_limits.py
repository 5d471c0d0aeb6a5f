"""What a number may be is said once, and every flag keeps to it before anything long begins."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from linvideo_core.artifact import ArtifactError, Usage
from linvideo_core.distill import cli as distill
from linvideo_core.distill import command as distill_command
from linvideo_core.evaluate import cli as evaluate
from linvideo_core.evaluate import command as evaluate_command
from linvideo_core.models.config import LinearForm, SoftmaxConfig
from linvideo_core.run import config as configs
from linvideo_core.run import limits
from linvideo_core.run.callbacks import Callbacks
from linvideo_core.run.config import override
from linvideo_core.run.errors import SettingError, flag_of
from linvideo_core.run.limits import Limits
from linvideo_core.teacher.config import TeacherConfig
from linvideo_core.teacher.teacher import open_teacher
from linvideo_core.transfer import cli as transfer
from linvideo_core.transfer import command as transfer_command

COMMANDS = {transfer: transfer_command, distill: distill_command, evaluate: evaluate_command}
DECLARED = {name: value for name, value in vars(limits).items() if isinstance(value, Limits)}
STRANGE = (True, False, None, "1", math.nan, math.inf, -math.inf, 1j, [1], 10**400)


def leaves(command: ModuleType) -> list[tuple[str, type, Limits | None]]:
    """Return name, type and limits of every setting of a command."""
    return [
        (field.name, kind, field.metadata["limits"])
        for _, field, kind, _ in configs._leaves(command.read([]))
    ]


NUMBERS = [
    (command, name, kind, found)
    for command in COMMANDS
    for name, kind, found in leaves(command)
    if kind in (int, float)
]


def outside(found: Limits) -> list[float]:
    """Return numbers just beyond limits, and far beyond."""
    beyond = [
        found.low - 1,
        found.high + 1 if found.is_whole else math.nextafter(found.high, math.inf),
    ]
    beyond += [found.low] if found.without_low else []
    beyond += [found.low + 1] if found.step > 1 else []
    far = [-(10**23), 10**23] if found.is_whole else [-1e300, 1e308]
    return [number for number in [*beyond, *far] if not (number == 0 and found.or_zero)]


@pytest.mark.parametrize("name", DECLARED)
def test_limits_take_their_ends_and_nothing_beyond_or_strange(name: str) -> None:
    found = DECLARED[name]
    assert found.takes(found.high) and found.takes(found.low) is not found.without_low
    assert not [value for value in (*outside(found), *STRANGE) if found.takes(value)]
    assert found.takes(1.0) is not found.is_whole


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (limits.COUNT, "a whole number from 1 to 1000000000"),
        (limits.FRACTION, "a number from 0 to 1"),
        (limits.SHIFT, "a number above 0 to 1000"),
        (limits.WINDOW, "0 or a whole number from 2 to 1048576"),
        (limits.FEATURE_DIM, "a multiple of 2 from 2 to 8192"),
    ],
)
def test_limits_say_what_they_take(found: Limits, words: str) -> None:
    assert str(found) == words


def refusal(command: ModuleType, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one sentence with which a command line is refused before anything is done."""
    with pytest.raises(SystemExit) as ended:
        command.read(argv)
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 300
    return err


@pytest.mark.parametrize(("command", "name", "kind", "found"), NUMBERS)
def test_every_number_has_limits_and_is_refused_beyond_them(
    command: ModuleType,
    name: str,
    kind: type,
    found: Limits | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert found is not None and found.is_whole is (kind is int)
    for value in (*outside(found), "nan", "inf", "1e400", "", "x" * 10_000, "9" * 5000):
        words = refusal(command, [f"{flag_of(name)}={value}"], capsys)
        assert words.startswith(f"error: {flag_of(name)} ") and " given" in words


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (transfer, "--window 2000000"),
        (transfer, "--window 1"),
        (transfer, "--feature-ratio 65"),
        (transfer, "--feature-ratio 3"),
        (transfer, "--weight-decay -1"),
        (transfer, f"--seed {2**63}"),
        (transfer, "--warmup-steps -5"),
        (distill, "--guidance-scale -1"),
        (transfer, "--selection-weight -1"),
        (transfer, "--learning-rate 1e308"),
        (transfer, f"--steps {10**23}"),
        (transfer, f"--layers 1,{'9' * 5000}"),
        (evaluate, f"--plain-steps {'9' * 5000}"),
        (evaluate, "--lora-sigmas 1,nan,0"),
        (transfer, "--density 0.1"),
        (distill, "--density 0.1"),
        (evaluate, "--density 0.5 --softmax-kernel flash"),
    ],
)
def test_what_was_refused_too_late_or_never_is_refused_at_once(
    command: ModuleType, flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(command, flags.split(), capsys).startswith(f"error: {flags.split()[0]} ")


@pytest.mark.parametrize("device", ["meta", "cpu:7", "cuda:99", "abacus"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_device_that_computes_nothing_is_refused(
    command: ModuleType, device: str, tmp_path: Path
) -> None:
    config = override(command.read([]), {"device": device, "out": tmp_path / "out"})
    with pytest.raises(SettingError, match=f"--device {device} given"):
        COMMANDS[command].run(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_softmax_kernel_that_cannot_run_here_is_refused_before_anything_begins(
    command: ModuleType, precision: str, tmp_path: Path
) -> None:
    class Never(Callbacks):
        def on_stage(self, stage: str, total: int, done: int = 0, detail: str = "") -> None:
            pytest.fail(f"{stage} began")

    given = {"softmax_kernel": "cudnn", "device": "cpu", "precision": precision}
    config = override(command.read([]), {**given, "out": tmp_path / "out"})
    with pytest.raises(SettingError, match=r"--softmax-kernel cudnn given, and .* on cpu; choose"):
        COMMANDS[command].run(config, Never())
    assert not [path for path in tmp_path.rglob("*") if path != config.out]


def test_a_kernel_that_can_run_is_taken() -> None:
    checkpoint = open_teacher(TeacherConfig(softmax=SoftmaxConfig(softmax_kernel="flash")))
    checkpoint.check_softmax("cpu", "fp32")


FILES: dict[str, Callable[[float], object]] = {
    name: lambda value, name=name: Usage(**{name: value})
    for name in ("width", "height", "num_frames", "guidance_scale", "shift", "steps")
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_takes_every_number_that_a_flag_takes(name: str) -> None:
    flag = {"steps": "sampler_steps"}.get(name, name)
    found = next(limit for _, each, _, limit in NUMBERS if each == flag)
    FILES[name](found.high)
    with pytest.raises(ArtifactError, match="is expected"):
        FILES[name](found.high + 1)


def test_a_config_made_anywhere_is_checked() -> None:
    for window in (1, 2.0, True, 2**20 + 1):
        with pytest.raises(SettingError, match="--window"):
            LinearForm(window=window)
    with pytest.raises(SettingError, match="one of hedgehog"):
        LinearForm(feature_map="gan")
