"""Settings that cannot work, or contradict one another, are refused by their flags."""

import dataclasses

import pytest

from linvideo_core.teacher.config import TrajectoryConfig
from linvideo_core.transfer.config import (
    EvaluationConfig,
    ObjectiveConfig,
    SelectionConfig,
    SensitivityConfig,
    WarmStartConfig,
)
from linvideo_core.transfer.layer_selection import check_layers


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (TrajectoryConfig, "num_trajectories", 0),
        (TrajectoryConfig, "sampler_steps", 0),
        (TrajectoryConfig, "shard_size", -1),
        (TrajectoryConfig, "shift", 0.0),
        (TrajectoryConfig, "states_per_trajectory", 51),
        (WarmStartConfig, "warm_start_steps", -1),
        (WarmStartConfig, "warm_start_learning_rate", 0.0),
        (SelectionConfig, "target", 0),
        (SelectionConfig, "selection_share", 1.5),
        (SelectionConfig, "layer_score_learning_rate", 0.0),
        (SensitivityConfig, "sensitivity_videos", 0),
        (ObjectiveConfig, "max_jump", 0),
        (ObjectiveConfig, "prompt_dropout", 1.1),
        (ObjectiveConfig, "anchor_share", -0.1),
        (EvaluationConfig, "evaluate_samples", 1),
        (EvaluationConfig, "evaluate_samples", -2),
    ],
)
def test_impossible_settings_are_refused_by_flag(config: type, name: str, value: float) -> None:
    assert dataclasses.is_dataclass(config)
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} {value}"):
        config(**{name: value})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layers": "1,x", "target": 2}, "--layers 1,x given; different layer numbers"),
        ({"layers": "", "target": 1}, "--layers '' given"),
        ({"layers": "1,-2", "target": 2}, "--layers 1,-2 given"),
        ({"layers": "1,01", "target": 2}, "--layers 1,01 given; different"),
        ({"layers": "1,2"}, "--layers 1,2 names 2 layers and --target is 5; give --target 2"),
        ({"layers": "1", "choice": "alternate", "target": 1}, "--layers 1 and --choice"),
        ({"layers": "3,9", "target": 2}, "--layers 3,9 given; the model has no layer 9"),
        ({"target": 4}, "--target 4 given; the model has 3"),
        ({"target": "1x"}, "--target 1x given; a whole number from 1 to 1000, or a speed-up abo"),
        ({"target": "half"}, "--target half given; a whole number from 1 to 1000, or a speed-up"),
        ({"layers": "1", "target": "1.5x"}, "--layers 1 names 1 layers and --target is 1.5x"),
    ],
)
def test_a_choice_that_contradicts_itself_or_the_model_is_refused(
    options: dict[str, str | int], sentence: str
) -> None:
    check_layers(SelectionConfig(layers="3,8", target=2), [3, 8, 11])
    with pytest.raises(ValueError) as caught:
        check_layers(SelectionConfig(**options), [3, 8, 11])
    assert str(caught.value).startswith(sentence)
