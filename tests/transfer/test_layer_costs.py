"""A target that is a speed-up: calls are measured, and the number of layers stays the run's own."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch

from linvideo_core import artifact
from linvideo_core.evaluate.card import CARD_NAME
from linvideo_core.models.experts import Experts
from linvideo_core.run.config import override
from linvideo_core.run.context import Run
from linvideo_core.run.errors import SettingError
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.transfer import cli
from linvideo_core.transfer import command as transfer
from linvideo_core.transfer.config import TransferConfig
from linvideo_core.transfer.layer_costs import COSTS_NAME, LayerCosts, find_costs, with_count
from tests.conftest import Recorder, make_wan, save_inputs, small_transfer

COSTS = LayerCosts(
    softmax=1.9, linear=0.7, softmax_layer=0.0418, linear_layer=0.0025, num_layers=30
)
# Of as many tokens that on any computer softmax takes longer than linear attention.
LARGE = {"height": 512, "width": 512, "evaluate_samples": 0, "warm_start_steps": 1}


@pytest.mark.parametrize(
    ("speedup", "count"),
    # A call of n linear layers takes 1.9 - 0.04 n.
    [(1.001, 1), (1.9 / 1.5, 10), (1.9 / 1.49, 11), (1.6, 18), (1.9 / 0.7, 30)],
)
def test_the_fewest_layers_that_reach_a_speedup_are_counted(speedup: float, count: int) -> None:
    assert COSTS.count_for(speedup) == count
    assert 1.9 / (1.9 - 0.04 * count) >= speedup * (1 - 1e-9)
    assert 1.9 / (1.9 - 0.04 * (count - 1)) < speedup


@pytest.mark.parametrize(("is_hybrid", "kind"), [(False, "linear"), (True, "hybrid")])
def test_a_sentence_says_how_many_layers_are_needed_and_why(is_hybrid: bool, kind: str) -> None:
    assert dataclasses.replace(COSTS, is_hybrid=is_hybrid).describe(1.6) == (
        f"the attention of a kept layer costs 41.8 ms, of a {kind} one 2.5 ms: 1.6x needs 18 of 30 "
        f"layers {kind}"
    )


@pytest.mark.parametrize(
    ("linear", "words"),
    [
        (0.7, "a call of the model is 2.71 times as fast here (the attention of a kept layer "
         "costs 41.8 ms, of a linear one 2.5 ms): give --target 2.71x or less, or a number"),
        (2.0, "is 0.95 times as fast here (the attention of a kept layer costs 41.8 ms, of a "
         "linear one 2.5 ms): give --target a number of layers"),
    ],
)  # fmt: skip
def test_a_speedup_that_all_layers_do_not_reach_is_refused_with_what_they_reach(
    linear: float, words: str
) -> None:
    with pytest.raises(SettingError) as caught:
        dataclasses.replace(COSTS, linear=linear).count_for(2.72)
    assert str(caught.value).startswith("--target 2.72x given, and with all 30 layers linear")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(SettingError, match=r"a number of layers, or --tile none$"):
        dataclasses.replace(COSTS, linear=linear, is_hybrid=True).count_for(2.72)


@pytest.fixture
def config(teacher: Teacher, tmp_path: Path) -> TransferConfig:
    model_path = save_inputs(teacher, tmp_path)["--model"]
    return small_transfer(model_path, target="1.02x", **LARGE)


def test_a_run_keeps_the_number_that_it_began_with_and_says_what_was_asked(
    config: TransferConfig,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        transfer.run(config, Recorder(stop_at=("sampling_teacher", 0)))
    path = config.out / COSTS_NAME
    measured = json.loads(path.read_text())
    assert measured["softmax"] > measured["linear"]
    assert measured["softmax_layer"] > measured["linear_layer"]
    # Measured again it would be one layer; half of what three save takes two.
    path.write_text(json.dumps({**measured, "softmax": 1.0, "linear": 0.9604}))
    header = artifact.load(transfer.run(config)).header
    assert len(header.linear_layers) == 2
    assert header.provenance["target"] == "1.02x beside softmax default"
    assert "target 1.02x beside softmax default" in (config.out / CARD_NAME).read_text()
    assert json.loads((config.out / "config.json").read_text())["selection"]["target"] == "1.02x"


def test_damaged_costs_are_named(config: TransferConfig) -> None:
    config.out.mkdir()
    for text in (
        "{",
        "[]",
        '{"softmax": 1.0}',
        json.dumps(dataclasses.asdict(COSTS) | {"linear": 0}),
    ):
        (config.out / COSTS_NAME).write_text(text)
        with pytest.raises(SettingError, match=r"layer_costs.json is damaged .*: delete that file"):
            transfer.run(config)
    assert not (config.out / "config.json").exists()


def test_the_model_is_left_as_it_was_and_sparse_layers_are_measured_as_such(
    teacher: Teacher, config: TransferConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    teacher = dataclasses.replace(teacher, latent_shape=(4, 1, 64, 64))
    softmax = dataclasses.replace(config.teacher.softmax, softmax_kernel="sparse", density=0.3)
    sparse = dataclasses.replace(
        config, teacher=dataclasses.replace(config.teacher, softmax=softmax)
    )
    ratios = []
    sol_attn = importlib.import_module("comfy_kitchen.backends.eager.sol_attn")
    attend = sol_attn.sol_attn
    monkeypatch.setattr(
        sol_attn, "sol_attn", lambda *a, **k: (ratios.append(k["topk_ratio"]), attend(*a, **k))[1]
    )
    found = find_costs(teacher, sparse, Run())
    # A call that is not timed and three that are, in three layers; none where all are linear.
    assert ratios == [0.3] * 12
    assert found.num_layers == 3 and with_count(sparse, found).selection.target in (1, 2, 3)
    assert before.keys() == teacher.model.state_dict().keys()
    assert all(torch.equal(x, before[name]) for name, x in teacher.model.state_dict().items())


def test_of_two_experts_one_is_measured_and_its_layers_are_called_what_they_are(
    teacher: Teacher, config: TransferConfig
) -> None:
    models = [make_wan(seed=seed).eval().requires_grad_(False) for seed in (1, 2)]
    pair = dataclasses.replace(teacher, model=Experts(*models, 0.8), latent_shape=(4, 2, 64, 64))
    # Of which kind is the faster one here depends on the computer: none is so much faster.
    asked = override(config, {"tile": "1x8x8", "target": "999x"})
    with pytest.raises(SettingError, match="999x given, and with all 3 layers hybrid a call"):
        find_costs(pair, asked, Run())


def test_sparse_layers_need_a_target_that_is_a_speedup(tmp_path: Path) -> None:
    flags = ["--softmax-kernel", "sparse"]
    assert cli.read([*flags, "--target", "1.5x"]).selection.speedup == 1.5
    with pytest.raises(SystemExit):
        cli.read([*flags, "--target", "5"])
