"""What a transfer is set to by the model, the quality and the card."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.models.sizes import SIZES
from linvideo_core.kernels.tiles import Size
from linvideo_core.models.config import LinearForm
from linvideo_core.run.config import override
from linvideo_core.run.errors import SettingError
from linvideo_core.transfer import recipe
from linvideo_core.transfer.config import QUALITIES, TransferConfig
from linvideo_core.transfer.preflight import check_tile
from linvideo_core.transfer.recipe import find_settings
from tests.conftest import assert_fitted, open_headers


def settings_of(monkeypatch: pytest.MonkeyPatch, name: str, **given: Any) -> dict[str, Any]:
    """Return the settings of a Wan of a published size, of which there are headers alone."""
    open_headers(monkeypatch, name)
    return find_settings("demo", {"model": Path("wan"), **given})


# Measured: 1.3B trains in 17.5 GB with two videos a step, 14B with 32 blocks offloaded in 30.9 GB
# (docs/home.md).
@pytest.mark.parametrize(
    ("name", "given", "batch_size", "accumulation", "offload_blocks"),
    [
        ("1.3b-480p", {"card": 16}, 1, 2, 0),
        ("1.3b-480p", {"card": 24}, 2, 1, 0),
        ("1.3b-480p", {"card": 24, "quality": "best"}, 2, 2, 0),
        ("1.3b-480p", {"card": 24, "batch_size": 1, "quality": "best"}, 1, 4, 0),
        ("14b-480p", {"card": 24, "num_frames": 33}, 1, 2, 36),
        ("14b-480p", {"card": 48}, 1, 2, 28),
        ("14b-480p", {"card": 48, "compile": True}, 1, 2, 0),
        ("14b-480p", {"card": 80, "num_frames": 33, "quality": "best"}, 2, 2, 0),
        ("1.3b-480p", {"card": 24, "accumulation": 4}, 1, 2, 0),
        ("14b-480p", {"card": 80}, 1, 2, 0),
        ("14b-480p", {"card": 24}, 1, 2, 40),
        # One whole expert waits in CPU memory as it is.
        ("14b-480p", {"card": 48, "low_noise_model": Path("low")}, 1, 2, 0),
    ],
)
def test_a_card_decides_batch_and_offloading(
    name: str,
    given: dict[str, Any],
    batch_size: int,
    accumulation: int,
    offload_blocks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = settings_of(monkeypatch, name, device="cuda", **given)
    assert_fitted(found, batch_size, accumulation, offload_blocks)
    assert found["target"] == len(SIZES[name].layers)


def test_processes_share_the_samples_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    found = settings_of(monkeypatch, "14b-480p", device="cuda", card=80)
    assert (found["batch_size"], found["accumulation"]) == (8, 1)
    assert "offload_blocks" not in found


def test_a_run_keeps_its_batch_on_another_card(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = {"device": "cuda", "out": tmp_path}
    assert settings_of(monkeypatch, "1.3b-480p", card=24, **given)["batch_size"] == 2
    training = {"batch_size": 1, "accumulation": 2, "activation_checkpointing": False}
    recorded = {"training": training, "teacher": {"frozen_weights": {"frozen": "fp32"}}}
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    found = settings_of(monkeypatch, "1.3b-480p", card=24, **given)
    assert (found["batch_size"], found["accumulation"]) == (1, 2)
    assert (found["frozen"], found["activation_checkpointing"]) == ("fp32", False)
    # Of another quality, which another error names.
    best = settings_of(monkeypatch, "1.3b-480p", card=24, quality="best", **given)
    assert best["batch_size"] * best["accumulation"] == 4


@pytest.mark.parametrize(("card", "is_warned"), [(24, True), (48, False)])
def test_a_card_that_is_expected_to_be_too_small_is_said(
    card: int, is_warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings_of(monkeypatch, "14b-480p", device="cuda", card=card)
    assert ("more than a card of 24 GB has" in caplog.text) == is_warned


def test_whole_weights_are_trained_in_fp32_on_any_card(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"device": "cuda", "card": 80, "parameters": "full"}
    assert not {"frozen", "offload_blocks"} & set(settings_of(monkeypatch, "1.3b-480p", **given))


def test_a_cpu_keeps_the_weights_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    found = settings_of(monkeypatch, "1.3b-480p", device="cpu")
    assert not {"frozen", "activation_checkpointing", "offload_blocks"} & set(found)
    assert found["steps"] == 3000 and found["learning_rate"] == 1e-4


@pytest.mark.parametrize(("size", "tile"), [((480, 832), "6x8x13"), ((720, 1280), "6x12x20")])
def test_layers_of_a_model_of_ones_own_are_hybrid_unless_a_part_goes_without_tiles(
    size: tuple[int, int], tile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = dict(zip(("height", "width"), size, strict=True))

    def tile_of(**more: Any) -> str | None:
        given = {"device": "cpu", **sides, **more}
        found = settings_of(monkeypatch, "1.3b-480p", **given) | {"model": Path("wan")}
        return override(TransferConfig(), {**found, **given}).student.form.tile

    assert tile_of() == tile_of(map_sharing="shared", attention_mass="moments") == tile
    assert tile_of(tile="3x15x14") == "3x15x14"
    assert tile_of(window=0, output_gate=False, feature_map="hedgehog") == tile
    for without in (
        {"tile": "none"},
        {"window": 32},
        {"output_gate": True},
        {"feature_map": "hedgehog_joint"},
    ):
        assert tile_of(**without) is None, without
    assert "tile" not in find_settings("demo", {})


@pytest.mark.parametrize("lacks", ["Triton", "a card of these years"])
def test_hybrid_layers_in_plain_pytorch_are_given_more_of_a_card(
    lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batch_of(**given: Any) -> int:
        return settings_of(monkeypatch, "1.3b-480p", card=24, **given)["batch_size"]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if lacks == "Triton":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        pytest.importorskip("triton")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    assert (batch_of(), batch_of(tile="none")) == (1, 2)


@pytest.mark.parametrize(
    ("grids", "tile"),
    [
        ([(21, 30, 52), (6, 8, 13)], "2x2x4"),
        ([(21, 30, 52), (1, 45, 80)], "1x8x13"),
        ([(21, 30, 52), (1, 1, 1)], "none"),
    ],
)
def test_a_tile_is_a_part_of_the_smallest_video(grids: list[Size], tile: str) -> None:
    assert recipe.tile_for(grids, {}) == tile
    for grid in grids:
        check_tile(LinearForm(tile=tile), [grid])


@pytest.mark.parametrize("is_embedded", [True, False])
def test_a_better_quality_learns_longer_from_more_videos(is_embedded: bool) -> None:
    found = [
        recipe.settings_for(quality, is_embedded=is_embedded, num_layers=30)
        for quality in QUALITIES
    ]
    for key in ("steps", "num_trajectories"):
        assert sorted({each[key] for each in found}) == [each[key] for each in found]


def test_a_model_of_ones_own_learns_from_a_pool_unless_stored_videos_are_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def states_of(**given: Any) -> str:
        return settings_of(monkeypatch, "1.3b-480p", device="cpu", **given)["states"]

    assert states_of() == "pool"
    assert states_of(choice="sensitivity") == states_of(low_noise_model=Path("low")) == "stored"
    # Of the embedded model, where it is asked for.
    assert find_settings("demo", {"states": "pool"})["levels"] == "even"


@pytest.mark.parametrize(
    ("model", "given", "refused"),
    [
        (
            "1.3b-480p",
            {"num_trajectories": 8},
            "--num-trajectories 8 given, which is for --states s",
        ),
        ("1.3b-480p", {"num_trajectories": 8, "states": "stored"}, ""),
        ("1.3b-480p", {"num_trajectories": 8, "choice": "sensitivity"}, ""),
        (
            "1.3b-480p",
            {"pool_videos": 8, "states": "stored"},
            "--pool-videos 8 given, which is for",
        ),
        ("1.3b-480p", {"pool_videos": 8, "low_noise_model": Path("low")}, "--pool-videos 8 given"),
        ("1.3b-480p", {"pool_videos": 8}, ""),
        (
            None,
            {"pool_videos": 8},
            "--pool-videos 8 given.* --states is stored here: give --states p",
        ),
        (None, {"pool_videos": 8, "states": "pool"}, ""),
        (None, {"num_trajectories": 8, "states": "pool"}, "--num-trajectories 8 given"),
        (None, {"num_trajectories": 8}, ""),
        (None, {"anchor_share": 0.25}, "--anchor-share 0.25 given, which is for --objective adm"),
        (None, {"max_jump": 3}, "--max-jump 3 given, which is for --objective adm"),
        (None, {"max_jump": 3, "objective": "adm"}, ""),
        (
            "1.3b-480p",
            {"max_jump": 3, "objective": "adm"},
            "--max-jump 3 given, which is for --states stored",
        ),
    ],
)
def test_what_is_for_other_states_or_another_objective_is_refused(
    model: str | None, given: dict[str, Any], refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find() -> dict[str, Any]:
        if model is None:
            return find_settings("demo", given)
        return settings_of(monkeypatch, model, device="cpu", **given)

    if not refused:
        assert find()
        return
    with pytest.raises(SettingError, match=refused):
        find()


def test_a_preset_of_the_embedded_model_is_refused_for_another() -> None:
    with pytest.raises(SettingError, match=r"--preset gpu given.*give --quality"):
        find_settings("gpu", {"model": Path("wan")})
