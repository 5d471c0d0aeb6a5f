"""fit() on a small least-squares task: its laws, and what it survives."""

import dataclasses
import itertools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from linvideo_core.run.config import parse
from linvideo_core.run.context import Run
from linvideo_core.training.checkpoint import CHECKPOINT_NAME, finished_steps
from linvideo_core.training.config import TrainingConfig
from linvideo_core.training.trainer import ParameterGroup, Task, fit, learning_rate_share, seed_step
from tests.conftest import Recorder

ROOT = Path(__file__).parents[2]
SIZE = 7
SETTINGS = TrainingConfig(
    steps=20,
    batch_size=4,
    learning_rate=0.05,
    warmup_steps=3,
    clip_norm=100.0,
    checkpoint_every=4,
    log_every=1,
)


class Stopped(Exception):
    """Stands for the end of the process."""


class LeastSquares(Task):
    """Find the weights behind noisy observations; counts its steps as state."""

    def __init__(self, config: TrainingConfig) -> None:
        generator = torch.Generator().manual_seed(11)
        self.config = config
        self.truth = torch.randn(SIZE, generator=generator)
        self.inputs = torch.randn(100, SIZE, generator=generator)
        self.weight = nn.Parameter(torch.zeros(SIZE))
        self.bias = nn.Parameter(torch.zeros(()))
        self.num_steps = 0
        self.history: list[Tensor] = []
        self.before_loss: Callable[[int], None] = lambda step: None
        self.scale = 1.0

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup({"weight": self.weight}, self.config.learning_rate),
            ParameterGroup({"bias": self.bias}, self.config.map_learning_rate),
        ]

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        self.before_loss(step)
        rows = torch.randint(100, (self.config.batch_size,), generator=generator)
        x = self.inputs[rows]
        loss = self.scale * (x @ self.weight + self.bias - x @ self.truth - 1).square().mean()
        return loss, {"rows": rows}

    def after_step(self, step: int) -> None:
        self.num_steps += 1
        self.history.append(self.weight.detach().clone())

    def state(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps}

    def load_state(self, state: dict[str, Any]) -> None:
        self.num_steps = state["num_steps"]


def train(folder: Path, *, prepare: Callable = lambda task: None, **options: Any) -> LeastSquares:
    config = dataclasses.replace(SETTINGS, **options)
    task = LeastSquares(config)
    prepare(task)
    fit(task, config, Run(folder=folder, seed=3))
    return task


def read_checkpoint(folder: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return a checkpoint's header and the bytes of its tensors; the header's order is free."""
    with safe_open(folder / "checkpoint.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}
        return file.metadata(), tensors


def stop_at(moment: int) -> Callable[[LeastSquares], None]:
    """Return a preparation with which the task ends the process at a step."""

    def stop(step: int) -> None:
        if step == moment:
            raise Stopped

    return lambda task: setattr(task, "before_loss", stop)


def spoil_at(moment: int) -> Callable[[LeastSquares], None]:
    """Return a preparation with which the loss is NaN from a step on."""
    return lambda task: setattr(
        task, "before_loss", lambda step: setattr(task, "scale", math.nan if step >= moment else 1)
    )


def test_training_finds_the_answer(tmp_path: Path) -> None:
    task = train(tmp_path, steps=200, learning_rate=0.1, map_learning_rate=0.1, log_every=50)
    torch.testing.assert_close(task.weight.detach(), task.truth, rtol=0, atol=0.02)


@pytest.mark.parametrize("moments", [(0,), (3,), (4,), (7, 9), (19,), (1, 2, 5, 13)])
def test_an_interrupted_run_equals_an_unbroken_one_bit_for_bit(
    moments: tuple[int, ...], tmp_path: Path
) -> None:
    unbroken = train(tmp_path / "unbroken")
    for moment in moments:
        with pytest.raises(Stopped):
            train(tmp_path / "broken", prepare=stop_at(moment))
    broken = train(tmp_path / "broken")
    assert torch.equal(broken.weight, unbroken.weight)
    assert torch.equal(broken.bias, unbroken.bias)
    assert broken.num_steps == unbroken.num_steps == 20
    left, right = (tmp_path / folder for folder in ("broken", "unbroken"))
    assert read_checkpoint(left) == read_checkpoint(right)
    assert (left / "metrics.jsonl").read_bytes() == (right / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("moment", [0, 1, 6, 19, 20])
def test_an_interruption_keeps_every_finished_step_and_the_resumed_run_equals_an_unbroken_one(
    moment: int, tmp_path: Path
) -> None:
    unbroken = train(tmp_path / "unbroken")
    recorder = Recorder(stop_at=("training", moment))
    broken = Run(folder=tmp_path / "broken", seed=3, callbacks=recorder)
    with pytest.raises(KeyboardInterrupt):
        fit(LeastSquares(SETTINGS), SETTINGS, broken)
    assert [done for _, done in recorder.seen] == [0, *range(1, moment + 1)]
    assert recorder.totals == {"training": 20}
    if moment:
        assert read_checkpoint(tmp_path / "broken")[0]["step"] == str(moment)
    resumed = train(tmp_path / "broken")
    assert torch.equal(resumed.weight, unbroken.weight)
    assert read_checkpoint(tmp_path / "broken") == read_checkpoint(tmp_path / "unbroken")


def test_a_step_stopped_while_it_changes_the_weights_is_dropped(tmp_path: Path) -> None:
    unbroken = train(tmp_path / "unbroken")

    def stop(step: int) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", prepare=lambda task: setattr(task, "after_step", stop))
    assert read_checkpoint(tmp_path / "broken")[0]["step"] == "4"
    assert torch.equal(train(tmp_path / "broken").weight, unbroken.weight)


def test_an_interruption_after_the_weights_were_lost_leaves_the_last_good_checkpoint(
    tmp_path: Path,
) -> None:
    config = dataclasses.replace(SETTINGS, log_every=100)
    task = LeastSquares(config)
    spoil_at(6)(task)
    run = Run(folder=tmp_path, seed=3, callbacks=Recorder(stop_at=("training", 7)))
    with pytest.raises(KeyboardInterrupt):
        fit(task, config, run)
    assert read_checkpoint(tmp_path)[0]["step"] == "4"


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    first = train(tmp_path)
    written = read_checkpoint(tmp_path)
    again = train(tmp_path, prepare=stop_at(20))
    assert torch.equal(again.weight, first.weight)
    assert again.history == []
    assert read_checkpoint(tmp_path) == written


def test_a_row_cut_off_by_the_end_of_the_process_is_dropped(tmp_path: Path) -> None:
    train(tmp_path / "unbroken")
    with pytest.raises(Stopped):
        train(tmp_path / "broken", prepare=stop_at(10))
    path = tmp_path / "broken" / "metrics.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 10, "lo')
    train(tmp_path / "broken")
    assert path.read_bytes() == (tmp_path / "unbroken" / "metrics.jsonl").read_bytes()


def test_metrics_of_a_run_without_checkpoint_are_started_anew(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(tmp_path, prepare=stop_at(2))
    train(tmp_path)
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(20))


def test_each_step_draws_from_its_own_seed() -> None:
    draws = [
        torch.rand(4, generator=seed_step(seed, step)).tolist()
        for seed in (0, 1)
        for step in range(63)
    ]
    assert len({tuple(draw) for draw in draws}) == len(draws)
    assert draws[5] == torch.rand(4, generator=seed_step(0, 5)).tolist()


@pytest.mark.parametrize("ema_decay", [0.6, 0.0])
def test_the_result_is_the_average_of_the_weights(ema_decay: float, tmp_path: Path) -> None:
    task = train(tmp_path, ema_decay=ema_decay)
    expected = torch.zeros(SIZE)
    for step, weight in enumerate(task.history):
        # The average forgets its start quickly: its decay grows with the steps that it has seen.
        decay = min(ema_decay, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(task.weight.detach(), expected)
    assert torch.equal(task.weight, task.history[-1]) == (not ema_decay)


@pytest.mark.parametrize("clip_norm", [1e-3, 0.5, 1e6])
def test_gradients_are_scaled_down_to_the_clip_norm_and_never_up(
    clip_norm: float, tmp_path: Path
) -> None:
    train(tmp_path, steps=1, clip_norm=clip_norm)
    tensors = load_file(tmp_path / "checkpoint.safetensors")
    # Adam's first moment after one step is a tenth of the gradient that it was given.
    moments = [tensors[f"adam/exp_avg/{name}"].flatten() for name in ("weight", "bias")]
    given = 10 * float(torch.cat(moments).norm())
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert given == pytest.approx(min(clip_norm, row["gradient_norm"]), rel=1e-4)


def test_the_learning_rate_warms_up_linearly_and_falls_as_a_cosine() -> None:
    config = TrainingConfig(steps=110, warmup_steps=10)
    shares = [learning_rate_share(step, config) for step in range(111)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert shares[10] == 1
    assert shares[35] == pytest.approx(0.5 * (1 + math.sqrt(0.5)))
    assert shares[60] == pytest.approx(0.5)
    assert shares[110] == pytest.approx(0)
    assert all(a > b for a, b in itertools.pairwise(shares[10:]))


@pytest.mark.parametrize(("steps", "warmup_steps"), [(1, 0), (1, 20), (5, 5), (3, 0)])
def test_every_step_of_the_shortest_runs_moves(steps: int, warmup_steps: int) -> None:
    config = TrainingConfig(steps=steps, warmup_steps=warmup_steps)
    assert all(0 < learning_rate_share(step, config) <= 1 for step in range(steps))


def test_each_group_moves_at_its_own_rate(tmp_path: Path) -> None:
    # Adam's first step is the learning rate, whatever the gradient is.
    task = train(
        tmp_path, steps=1, warmup_steps=0, ema_decay=0.0, learning_rate=0.03, map_learning_rate=0.2
    )
    torch.testing.assert_close(task.weight.detach().abs(), torch.full((SIZE,), 0.03))
    torch.testing.assert_close(task.bias.detach().abs(), torch.tensor(0.2))


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    large = train(tmp_path / "large", batch_size=8, accumulation=1)
    parts = train(tmp_path / "parts", batch_size=2, accumulation=4)
    torch.testing.assert_close(parts.weight, large.weight, rtol=1e-4, atol=1e-6)
    losses = [
        [json.loads(row)["loss"] for row in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("large", "parts")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("log_every", [1, 5, 100])
def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_good_checkpoint(
    log_every: int, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="the last good checkpoint is") as caught:
        train(tmp_path, prepare=spoil_at(9), log_every=log_every)
    assert "\n" not in str(caught.value)
    assert "--learning-rate" in str(caught.value)
    if log_every == 1:
        assert "the loss became nan at step 9" in str(caught.value)
    for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        assert all(math.isfinite(row[name]) for name in ("loss", "gradient_norm"))
    kept = load_file(tmp_path / "checkpoint.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.values())
    healed = train(tmp_path, log_every=log_every)
    assert torch.equal(healed.weight, train(tmp_path / "other", log_every=log_every).weight)


@pytest.mark.parametrize("damage", ["empty", "junk", "cut", "foreign", "no header"])
def test_a_damaged_checkpoint_is_named_in_one_sentence(damage: str, tmp_path: Path) -> None:
    train(tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    whole, expected = path.read_bytes(), read_checkpoint(tmp_path)
    foreign = {"x": torch.zeros(2)}
    if damage == "foreign":
        save_file(foreign, path, {"step": "3", "state": "{}"})
    elif damage == "no header":
        save_file(foreign, path)
    else:
        path.write_bytes({"empty": b"", "junk": b"junk" * 50, "cut": whole[:-9]}[damage])
    with pytest.raises(ValueError, match="cannot be continued from") as caught:
        train(tmp_path)
    assert str(path) in str(caught.value)
    assert "delete it" in str(caught.value)
    assert "\n" not in str(caught.value)
    path.unlink()
    train(tmp_path)
    assert read_checkpoint(tmp_path) == expected


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize("gone", ["run", "run/training"])
def test_a_folder_that_is_deleted_meanwhile_is_named_in_one_sentence(
    gone: str, log_every: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run" / "training"

    def delete(step: int) -> None:
        if step == 6:
            shutil.rmtree(tmp_path / gone)

    with pytest.raises(ValueError) as caught:
        train(
            folder, prepare=lambda task: setattr(task, "before_loss", delete), log_every=log_every
        )
    assert str(caught.value) == (
        f"{tmp_path / gone} was deleted while this run wrote into it; start again with the same "
        "settings"
    )
    assert not caplog.records and not folder.exists()
    train(folder, log_every=log_every)
    assert finished_steps(folder) == SETTINGS.steps


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import test_trainer as tests
folder = Path(sys.argv[1])

def fill(step):
    if step == 10:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))

try:
    tests.train(folder, prepare=lambda task: setattr(task, "before_loss", fill), log_every=100)
except OSError as error:
    print(error)
"""


def test_a_full_disk_loses_no_earlier_checkpoint(tmp_path: Path) -> None:
    unbroken = train(tmp_path / "unbroken", log_every=100)
    with pytest.raises(Stopped):
        train(tmp_path / "eight", prepare=stop_at(8), log_every=100)
    program = FULL_DISK.format(root=str(ROOT), tests=str(ROOT / "tests" / "training"))
    finished = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "full")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "checkpoint.safetensors" in finished.stdout
    assert "could not" in finished.stdout
    assert finished.stdout.count("\n") == 1
    assert read_checkpoint(tmp_path / "full") == read_checkpoint(tmp_path / "eight")
    names = sorted(path.name for path in (tmp_path / "full").iterdir())
    assert names == ["checkpoint.safetensors", "metrics.jsonl"]
    assert torch.equal(train(tmp_path / "full", log_every=100).weight, unbroken.weight)


def flip(path: Path, offset: int) -> None:
    """Damage four bytes of a file, its length and header staying as they are."""
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    for i in range(header + offset, header + offset + 4):
        data[i] ^= 0x11
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unbroken = train(tmp_path / "unbroken")
    with pytest.raises(Stopped):
        train(tmp_path / "run", prepare=stop_at(13))
    (earlier,) = (tmp_path / "run").glob("checkpoint_before_*")
    flip(tmp_path / "run" / "checkpoint.safetensors", 16)
    with caplog.at_level("WARNING"):
        again = train(tmp_path / "run")
    step = earlier.name.rpartition("_")[2]
    assert "is damaged (it is not what was written)" in caplog.text
    assert f"of step {step}" in caplog.text and not earlier.exists()
    assert (tmp_path / "run" / "checkpoint.safetensors.damaged").exists()
    assert torch.equal(again.weight, unbroken.weight) and again.num_steps == SETTINGS.steps


@pytest.mark.parametrize("offset", range(0, 40, 4))
def test_no_flipped_byte_of_a_checkpoint_is_trained_on(offset: int, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(tmp_path, prepare=stop_at(2), checkpoint_every=1000)
    flip(tmp_path / "checkpoint.safetensors", offset)
    with pytest.raises(ValueError, match=r"not what was written.*delete it to start"):
        train(tmp_path)


IMPOSSIBLE = (
    "--steps=0 --batch-size=-1 --accumulation=0 --learning-rate=-1 --clip-norm=0 --ema-decay=1.5 "
    "--checkpoint-every=0 --log-every=0"
)


@pytest.mark.parametrize("flag", IMPOSSIBLE.split())
def test_impossible_settings_are_refused_by_flag(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(TrainingConfig, [flag], description="Train.")
    assert f"error: {flag.replace('=', ' ')}" in capsys.readouterr().err


def test_the_steps_that_are_kept_can_be_told_of_any_folder(tmp_path: Path) -> None:
    assert finished_steps(tmp_path / "none") == 0
    fit(LeastSquares(SETTINGS), SETTINGS, Run(folder=tmp_path))
    assert finished_steps(tmp_path) == SETTINGS.steps
    path = tmp_path / CHECKPOINT_NAME
    path.write_bytes(path.read_bytes()[:20])
    assert finished_steps(tmp_path) == 0


class InTurns(Task):
    """Two numbers that both want to be 1; the second has its turn at every third step."""

    def __init__(self) -> None:
        self.first, self.second = (nn.Parameter(torch.zeros(1)) for _ in range(2))
        self.weights = [torch.zeros(2)]

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup({"first": self.first}, 0.1, network="critic"),
            ParameterGroup({"second": self.second}, 0.1, every=3, network="generator"),
        ]

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        loss = (self.first - 1).square().sum()
        return (loss if step % 3 else loss + 100 * (self.second - 1).square().sum()), {}

    def after_step(self, step: int) -> None:
        self.weights.append(torch.cat([self.first, self.second]).detach())


def settings(steps: int) -> TrainingConfig:
    return TrainingConfig(steps=steps, checkpoint_every=2, log_every=1, warmup_steps=0)


def test_networks_move_in_their_turns_and_are_clipped_apart(tmp_path: Path) -> None:
    task = InTurns()
    fit(task, settings(4), Run(folder=tmp_path))
    moved = [(a != b).tolist() for a, b in itertools.pairwise(task.weights)]
    assert moved == [[True, True], [True, False], [True, False], [True, True]]
    rows = (tmp_path / "metrics.jsonl").read_text()
    assert "critic_gradient_norm" in rows and "generator_gradient_norm" in rows


class Finder:
    """Finds a fault in the row of step `at`, or nothing."""

    def __init__(self, at: int, delay: int) -> None:
        self.at = at
        self.delay = delay
        self.num_seen = 0

    def __call__(self, row: Mapping[str, Any]) -> str | None:
        self.num_seen += 1
        return "the videos became alike" if self.num_seen == self.at + 1 else None


@pytest.mark.parametrize(
    ("at", "delay", "kept"), [(6, 1, 4), (6, 2, 4), (6, 3, 2), (7, 1, 6), (7, 2, 4), (7, 5, 2)]
)
def test_a_fault_ends_training_at_the_last_checkpoint_from_before_it(
    at: int, delay: int, kept: int, tmp_path: Path
) -> None:
    """A checkpoint follows every second step; the fault began `delay - 1` rows earlier."""
    with pytest.raises(ValueError, match=f"the videos became alike at step {at}; the last good"):
        fit(InTurns(), settings(9), Run(folder=tmp_path), monitor=Finder(at, delay))
    found = load_file(tmp_path / "checkpoint.safetensors")
    other = Run(folder=tmp_path / "other", callbacks=Recorder(stop_at=("training", kept)))
    with pytest.raises(KeyboardInterrupt):
        fit(InTurns(), settings(9), other)
    stopped = load_file(tmp_path / "other" / "checkpoint.safetensors")
    assert found.keys() == stopped.keys()
    for name in found:
        torch.testing.assert_close(found[name], stopped[name], rtol=0, atol=0)


def test_a_fault_from_the_start_leaves_no_checkpoint_and_a_whole_run_leaves_one(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="no good checkpoint is there"):
        fit(InTurns(), settings(9), Run(folder=tmp_path), monitor=Finder(5, 6))
    assert not list(tmp_path.glob("*.safetensors"))
    fit(InTurns(), settings(9), Run(folder=tmp_path), monitor=Finder(10, 2))
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["checkpoint.safetensors"]
