"""Experiments on crowd: arms are transfers, seeds are paired, and nothing is done twice."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from linvideo_core.evaluate.config import CompareConfig
from linvideo_core.models.wan import WanConfig, WanModel
from linvideo_core.run.callbacks import Callbacks
from linvideo_core.run.config import parse
from linvideo_core.run.config import to_flags as flags_of
from linvideo_core.run.errors import SettingError
from linvideo_core.run.files import write_tensors
from linvideo_core.run.lock import alone_in
from linvideo_core.transfer import cli as transfer_cli
from linvideo_core.transfer.config import ARTIFACT_NAME, WARM_START_NAME
from research.crowd import (
    arms,
    captions,
    experiments,
    forecast,
    judge,
    pace,
    summary,
    train,
    trainings,
)
from research.crowd.arms import SHORT, TABLES, Arm
from research.crowd.config import WHOLE
from research.crowd.study import (
    REFERENCES,
    ROWS_NAME,
    ExperimentsConfig,
    Missing,
    Rows,
    Study,
    do_arm,
    open_study,
)
from research.declared_runs import to_flags

TINY = WanConfig(
    dim=128, num_heads=1, num_layers=2, ffn_dim=64, text_dim=captions.TEXT_DIM, freq_dim=32
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExperimentsConfig:
    """A study of a tiny teacher and judge with random weights."""
    folder = tmp_path_factory.mktemp("crowd")
    torch.manual_seed(0)
    model = WanModel(TINY)
    model.init_weights()
    with torch.no_grad():
        # Its last layer starts at zero, and all videos would be their noise.
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    write_tensors(folder / "model.safetensors", train.narrow(model.state_dict()))
    write_tensors(folder / "judge.safetensors", judge.Judge((8, 8, 8)).state_dict())
    return ExperimentsConfig(
        comparison=CompareConfig(
            num_samples=4, seeds_per_prompt=2, sampler_steps=2, batch_size=4, shift=train.SHIFT
        ),
        tables="students",
        seeds=1,
        minutes_per_run=1e-4,
        pace_steps=2,
        num_prompts=4,
        flags="--batch-size 1 --accumulation 1 --warm-start-steps 1 --frozen fp32 "
        "--activation-checkpointing false --states-per-trajectory 2",
        model=folder / "model.safetensors",
        judge=folder / "judge.safetensors",
        out=folder / "study",
        device="cpu",
    )


def test_every_arm_is_a_transfer_that_the_command_line_takes(config: ExperimentsConfig) -> None:
    captions.write_both(captions.CaptionsConfig(num_prompts=4, out=config.out))
    made = Study(
        config=config,
        arms=arms.find_arms([*TABLES]),
        rows=Rows(config.out / "none.json"),
        paces={},
        num_layers=TINY.num_layers,
    )
    for (_, name), arm in made.arms.items():
        settings = made.settings_of(arm, 1)[arm.training]
        found = transfer_cli.read([*config.list_words(), *to_flags(settings)])
        assert found.selection.target == round(2 * arm.linear_share), name
        assert found.student.form.tile == arm.settings.get("tile"), name
        assert found.trajectories.sampler_steps == config.comparison.sampler_steps


def test_baselines_are_arms_of_the_same_table_that_have_none_less_often() -> None:
    for table in TABLES.values():
        for name, arm in table.items():
            if arm.baseline is not None:
                assert arm.baseline != name
                assert set(arm.num_frames) <= set(table[arm.baseline].num_frames)


def test_the_calls_that_the_command_names_take_as_long_as_it_says(tmp_path: Path) -> None:
    shared = re.search(r"(--compile .*?)\nand", experiments.__doc__, re.DOTALL)[1]
    calls = re.findall(r"^    (--tables .*?)  +(\d+)", experiments.__doc__, re.MULTILINE)
    rows, paces = Rows(tmp_path / "rows.json"), {}
    for call, seconds in calls:
        words = shlex.split(f"{shared} {call}".replace("\\\n", ""))
        config = parse(ExperimentsConfig, words, description="calls")
        made = Study(
            config=config,
            arms=arms.find_arms(config.chosen, config.chosen_arms),
            rows=rows,
            paces=paces,
            num_layers=12,
        )
        found = forecast.predict_seconds(forecast.count_work(made), made, 2, "cuda")
        assert found == pytest.approx(int(seconds), rel=0.05)
        paces |= dict.fromkeys(made.kinds(), 0.1)
        for each in made.missing():
            for num_frames in each.num_frames:
                rows.add({**each.row, "num_frames": num_frames})
                teacher = {"table": REFERENCES, "name": "teacher", "num_frames": num_frames}
                rows.add({**teacher, "seed": each.seed})


def test_who_makes_a_warm_start_goes_before_who_shares_it(config: ExperimentsConfig) -> None:
    made = Study(
        config=dataclasses.replace(config, seeds=2),
        arms=arms.find_arms([*TABLES]),
        rows=Rows(config.out / "none.json"),
        paces={},
        num_layers=12,
    )
    keys = [(each.seed, str(each.warm_start)) for each in made.missing()]
    num_makers = len(set(keys))
    assert len(set(keys[:num_makers])) == num_makers and len(keys) > 2 * num_makers
    assert [seed for seed, _ in keys] == sorted(seed for seed, _ in keys[:num_makers]) + sorted(
        seed for seed, _ in keys[num_makers:]
    )
    assert made.count_stored() == {0: 384, 1: 384}
    assert sorted(made.references()) == [(0, SHORT), (0, WHOLE), (1, SHORT), (1, WHOLE)]


def test_few_steps_of_all_kinds_are_trained_for_equal_time() -> None:
    for name, arm in TABLES["few_steps"].items():
        trained = arm.num_spans + (arm.distillation is not None)
        assert trained == (1 if name.startswith("undistilled") else 2)


def test_random_layers_follow_the_seed(config: ExperimentsConfig) -> None:
    made = Study(
        config=config, arms={}, rows=Rows(config.out / "none.json"), paces={}, num_layers=12
    )
    arm = TABLES["selection"]["random"]
    drawn = [made.settings_of(arm, seed)["transfer"]["layers"] for seed in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert all(len(set(layers.split(","))) == 6 for layers in drawn)


def test_the_time_of_a_step_is_its_kind_s_alone() -> None:
    table = TABLES["objectives"]
    kinds = {name: pace.find_kind("transfer", arm.settings) for name, arm in table.items()}
    assert kinds["stored_8"] == kinds["stored_384"] != kinds["adm_8"]
    assert len({kinds[name] for name in ("pool", "on_policy_half", "on_policy")}) == 3
    selection = TABLES["selection"]
    kinds = {name: pace.find_kind(arm.training, arm.settings) for name, arm in selection.items()}
    fixed = {kinds[name] for name in ("alternate", "random", "replace_one", "restore_one")}
    assert len(fixed) == 1 and len({kinds["learned"], kinds["from_ranking"], *fixed}) == 3
    # The slow first step, which compiles, does not count.
    assert pace.mean_seconds([9.0, 1.0, 1.0, 2.0, 1.0]) == pytest.approx((1 + 1 + 2 + 1) / 4)


@pytest.mark.parametrize("states", ["stored", "pool"])
def test_a_shared_warm_start_changes_no_result(
    states: str, config: ExperimentsConfig, tmp_path: Path
) -> None:
    captions.write_both(captions.CaptionsConfig(num_prompts=4, out=config.out))
    count = {"stored": "num_trajectories", "pool": "pool_videos"}[states]
    settings = {"states": states, count: 2, "target": 1, "num_frames": SHORT, "steps": 1}
    made = []
    for name, shared in (("own", None), ("first", tmp_path), ("second", tmp_path)):
        words = to_flags({**settings, "out": tmp_path / name, "device": "cpu"})
        read = transfer_cli.read([*config.list_words(), *words])
        trainings.transfer(read, Callbacks(), shared)
        made.append(load_file(tmp_path / name / ARTIFACT_NAME))
    for found in made[1:]:
        assert found.keys() == made[0].keys()
        assert all(tensor.equal(made[0][key]) for key, tensor in found.items())
    # It was done once: the others begin where it ended.
    metrics = [tmp_path / n / WARM_START_NAME / "metrics.jsonl" for n in (".", "first", "second")]
    assert len({path.read_text() for path in metrics}) == 1


STORED = {"states": "stored", "objective": "velocity", "num_trajectories": 2}
FEW = {"num_steps": 1, "num_trajectories": 2, "critic_steps": 1}


@pytest.mark.slow
def test_two_arms_of_two_seeds_are_compared_and_nothing_is_done_twice(
    config: ExperimentsConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    drawn = Arm(settings=STORED, is_random=True, num_frames=(SHORT,))
    few = Arm(
        settings=STORED, is_random=True, distillation=FEW, baseline="drawn", num_frames=(SHORT,)
    )
    monkeypatch.setitem(TABLES, "students", {"drawn": drawn, "few": few})
    experiments.run(config)
    said = capsys.readouterr().out
    assert "2 trainings of 0.0001 minutes are missing, and as many videos to sample as 5 of" in said
    both = dataclasses.replace(config, seeds=2, jobs=2)
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("row.json")}
    rows_path = config.out / ROWS_NAME
    experiments.run(both)
    rows = json.loads(rows_path.read_text())["rows"]
    keys = [(row["table"], row["name"], row["seed"]) for row in rows]
    assert len(keys) == len(set(keys)) == 8
    # As if it had been killed between a training and its row.
    rows_path.write_text(json.dumps({"rows": rows[:-1]}))
    trained = {path: path.stat().st_mtime_ns for path in config.out.rglob("row.json")}
    assert before.items() < trained.items()
    found = experiments.run(both)
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob("row.json")} == trained
    again = json.loads(rows_path.read_text())["rows"]
    assert again == rows
    row = found["students"][1]
    values = {(r["name"], r["seed"]): r["fidelity"] for r in rows if r["table"] == "students"}
    first, second = (values["few", seed] - values["drawn", seed] for seed in (0, 1))
    assert row["fidelity_difference"] == pytest.approx((first + second) / 2)
    assert row["fidelity_t"] == pytest.approx((first + second) / abs(first - second))
    assert row["floor"] > 0 and row["seconds_per_video"] > 0 and row["seeds"] == 2
    assert summary.count_tests(found["students"])["comparisons"] == 1
    monkeypatch.setattr(experiments, "RESULTS_FOLDER", tmp_path)
    experiments.main([*shlex.split(flags_of(both)), "--record"])
    record = json.loads((tmp_path / "crowd.json").read_text())
    # Of so few captions none may send a sprite behind the bar: then there is no recall.
    fields = {"unpaired_frechet", "floor", "position_error", "seconds_per_video", "seeds"}
    assert all(fields <= set(each) for each in record["rows"] if each["what"] == "students")
    assert [each["what"] for each in record["rows"]] == 2 * ["references"] + 2 * ["students"]
    parts = record["details"]["parts"]
    assert (
        len(parts["students"]["runs"]) == 4 and parts["students"]["note"] in capsys.readouterr().out
    )


def do_pool(config: ExperimentsConfig, num_frames: list[int]) -> list[dict[str, object]]:
    """Make an arm of seed 0 and return its rows at these sizes."""
    captions.write_both(captions.CaptionsConfig(num_prompts=4, out=config.out))
    settings = {"states": "pool", "pool_videos": 2, "target": 1, "num_frames": SHORT}
    missing = Missing(
        table="sizes",
        name="pool",
        seed=0,
        arm=Arm(settings=settings),
        trainings={"transfer": settings},
        num_frames=num_frames,
    )
    rows = do_arm(config, missing, {pace.find_kind("transfer", settings): 1.0}, "cpu")
    return [row for row in rows if row["table"] == "sizes"]


def test_measures_are_written_while_another_process_opens_the_seed(
    config: ExperimentsConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened = []

    def save(tensors: dict[str, torch.Tensor], path: Path, **how: object) -> None:
        measures = path.parents[1]
        if measures.name.startswith("student-"):
            with alone_in(measures.parent):
                opened.append(measures)
        save_file(tensors, path, **how)

    monkeypatch.setattr("linvideo_core.run.files.save_file", save)
    [row] = do_pool(dataclasses.replace(config, out=tmp_path), [SHORT])
    assert len(opened) == 1 and "error" not in row


def test_an_arm_that_cannot_be_measured_at_one_size_has_a_row_of_its_error_there_alone(
    config: ExperimentsConfig, tmp_path: Path
) -> None:
    taken = tmp_path / "evaluation" / f"frames-{WHOLE}"
    taken.parent.mkdir()
    taken.touch()
    failed, made = do_pool(dataclasses.replace(config, out=tmp_path), [WHOLE, SHORT])
    assert failed["num_frames"] == WHOLE and taken.name in failed["error"]
    assert made["num_frames"] == SHORT and made["fidelity"] > 0


@pytest.mark.slow
def test_an_arm_that_cannot_be_timed_has_a_row_of_its_error_and_the_others_are_made(
    config: ExperimentsConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn = Arm(settings=STORED, is_random=True, num_frames=(SHORT,))
    diverging = Arm(settings={**STORED, "learning_rate": 1e30}, num_frames=(SHORT,))
    monkeypatch.setitem(TABLES, "students", {"diverging": diverging, "drawn": drawn})
    config = dataclasses.replace(config, tables="students,selection", arms="diverging,drawn")
    config = dataclasses.replace(config, out=tmp_path)
    tables = experiments.run(config)
    # Of a table of which no arm was chosen nothing is said.
    assert [*tables] == ["references", "students"]
    rows = json.loads((tmp_path / ROWS_NAME).read_text())["rows"]
    found = {row["name"]: row.get("error") for row in rows if row["table"] == "students"}
    assert "became" in found["diverging"] and found["drawn"] is None


@pytest.mark.parametrize("name", [ROWS_NAME, "paces.json"])
@pytest.mark.parametrize("text", ["", "[]", '{"rows": [1]}', '{"a kind": -1}'])
def test_a_damaged_file_of_a_study_is_named(
    config: ExperimentsConfig, tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SettingError, match=f"{name} is damaged: delete it"):
        open_study(dataclasses.replace(config, out=tmp_path))


def make_rows(**values: list[float]) -> list[dict[str, object]]:
    """Return rows of the table `students`: name -> unpaired_frechet by seed."""
    return [
        {
            "table": "students",
            "name": name,
            "seed": seed,
            "num_frames": 61,
            "unpaired_frechet": value,
            "recall": 0.5,
        }
        for name, each in values.items()
        for seed, value in enumerate(each)
    ]


def test_tables_hold_means_and_paired_tests_of_known_values() -> None:
    rows = make_rows(velocity=[2.0, 3.0, 1.0, 4.0], on_policy=[1.0, 1.0, -2.0, 0.0])
    baseline, row = summary.tabulate(rows, "students")
    assert (baseline["seeds"], baseline["unpaired_frechet"]) == (4, 2.5)
    assert "baseline" not in baseline and row["baseline"] == "velocity"
    # Differences -1, -2, -3, -4.
    assert row["unpaired_frechet_difference"] == -2.5
    assert row["unpaired_frechet_t"] == pytest.approx(-3.872983, abs=1e-6)
    assert row["unpaired_frechet_p"] == 0.125
    assert (row["recall_difference"], row["recall_t"], row["recall_p"]) == (0.0, None, 1.0)
    assert summary.count_tests([baseline, row]) == {"measures": 2, "comparisons": 1, "tests": 2}
    said = summary.describe_tests([baseline, row])
    assert said.startswith("2 paired tests were looked at, 2 measures in 1 comparisons")
    shown = summary.show("students", [baseline, row], [])
    assert "-2.5 (-3.9, 0.125)" in shown and said in shown and "not run: critic" in shown


def test_a_seed_that_failed_is_counted_and_not_compared() -> None:
    rows = make_rows(velocity=[2.0, 3.0], on_policy=[1.0])
    failed = {"table": "students", "name": "on_policy", "seed": 1, "num_frames": 61}
    _, row = summary.tabulate([*rows, {**failed, "error": "the loss became nan"}], "students")
    assert (row["seeds"], row["failed"]) == (1, 1)
    assert (row["unpaired_frechet_difference"], row["unpaired_frechet_p"]) == (-1.0, 1.0)


def test_unknown_tables_and_arms_are_refused() -> None:
    with pytest.raises(SettingError, match="'dreams' is unknown"):
        ExperimentsConfig(tables="sizes,dreams")
    with pytest.raises(SettingError, match="'whole' is unknown; of"):
        ExperimentsConfig(tables="selection", arms="random,whole")
