"""The layers that a list, a rule or a ranking makes linear, where training does not choose them.

A ranking is by layer sensitivity: what one linear layer does to the velocity, by forward passes
only. Replace-one makes one layer linear in the softmax model: the layers that then err least are
chosen. Restore-one gives one layer its softmax back in the linear model: the layers whose return
helps least are chosen. The error is the mean of |u - v| / |v| over the stored states of a few
videos, which are spread over all noise levels, and over both guidance branches. States and the
teacher's velocities v are stored in fp16, which adds about 1e-3.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluate.metrics import velocity_error
from ..flow import bind
from ..models.attention import MixedAttention
from ..run.context import Run
from ..run.errors import SettingError
from ..run.files import write_json
from ..run.reading import read_json
from ..teacher.teacher import Teacher
from ..teacher.trajectories import Trajectories
from .config import SelectionConfig, SensitivityConfig

logger = logging.getLogger(__name__)

RANKING_NAME = "sensitivity.json"


def count_selection_steps(config: SelectionConfig, num_steps: int) -> int:
    """Return after how many of a training's steps the choice is made."""
    return max(1, round(config.selection_share * num_steps))


def check_target(config: SelectionConfig, num_layers: int) -> None:
    """Raise SettingError for a target larger than the number of layers."""
    if config.speedup is None and config.target > num_layers:
        raise SettingError(
            f"{{target}} {config.target} given; the model has {num_layers} self-attention layers",
            "target",
        )


def check_layers(config: SelectionConfig, layers: Sequence[int]) -> None:
    """Raise SettingError where a model with these layers cannot have the target or the list."""
    check_target(config, len(layers))
    if unknown := [layer for layer in config.listed if layer not in layers]:
        raise SettingError(
            f"{{layers}} {config.layers} given; the model has no layer {unknown[0]}, its "
            f"self-attention layers are {min(layers)} to {max(layers)}",
            "layers",
        )


def choose_layers(
    config: SelectionConfig, layers: Sequence[int], ranking: Sequence[int] = ()
) -> tuple[int, ...] | None:
    """Return the layers that a rule, a list or a ranking makes linear; None where learned.

    "alternate" spreads them evenly over depth: every other layer where half become linear.
    layers: the model's, in depth order; ranking: the same from the least to the most sensitive, for
    "sensitivity".
    """
    check_layers(config, layers)
    count, total = config.target, len(layers)
    match config.rule:
        case "learned":
            return None
        case "listed":
            return config.listed
        case "alternate":
            return tuple(layers[(2 * i + 1) * total // (2 * count)] for i in range(count))
    if sorted(ranking) != sorted(layers):
        raise ValueError(f"a ranking of the layers {[*layers]} is needed; {[*ranking]} given")
    return tuple(sorted(ranking[:count]))


def rank_layers(
    model: nn.Module,
    mixed: Mapping[int, MixedAttention],
    teacher: Teacher,
    trajectories: Trajectories,
    config: SensitivityConfig,
    run: Run,
    batch_size: int,
) -> list[int]:
    """Return the layers from the least to the most sensitive.

    Every layer's velocity error is written to RANKING_NAME in the run's folder, one by one: a
    repeated call takes those that are there and measures the others. The layers of `mixed` are left
    as they were.

    Raises SettingError where a velocity is not finite.
    """
    path = run.folder / RANKING_NAME
    num_states = config.sensitivity_videos * trajectories.states_per_trajectory
    picks = torch.arange(min(num_states, len(trajectories)))
    measured = {"measure": config.sensitivity, "states": len(picks)}
    batches = run.processes.share(picks).split(batch_size // run.processes.size)
    errors = {layer: error for layer, error in _read(path, measured).items() if layer in mixed}
    one, others = ("linear", "softmax")[:: 1 if config.sensitivity == "replace-one" else -1]
    modes = {module: module.mode for module in mixed.values()}
    try:
        run.begin_stage("ranking_layers", len(mixed), len(errors))
        for layer in [layer for layer in mixed if layer not in errors]:
            for other, module in mixed.items():
                module.mode = one if other == layer else others
            errors[layer] = error = mean_velocity_error(model, teacher, trajectories, batches, run)
            if not math.isfinite(error):
                raise SettingError(
                    f"the velocity error of layer {layer} alone is {error}; choose the layers by "
                    "another {choice}, or lower {warm_start_learning_rate}",
                    "choice",
                    "warm_start_learning_rate",
                )
            if run.processes.is_first:
                ranking = rank(errors, config) if len(errors) == len(mixed) else None
                write_json(path, {**measured, "ranking": ranking, "errors": errors})
            run.callbacks.on_step_end(len(errors))
    finally:
        for module, mode in modes.items():
            module.mode = mode
    return rank(errors, config)


def rank(errors: Mapping[int, float], config: SensitivityConfig) -> list[int]:
    """Return the layers from the least to the most sensitive; equal ones in depth order.

    A layer's cost is its error where it was replaced, and the negative where it was restored: an
    error that stays large is that of a layer whose softmax was not missed.
    """
    sign = 1 if config.sensitivity == "replace-one" else -1
    return sorted(errors, key=lambda layer: (sign * errors[layer], layer))


@torch.no_grad()
def mean_velocity_error(
    model: nn.Module,
    teacher: Teacher,
    trajectories: Trajectories,
    batches: Sequence[Tensor],
    run: Run,
) -> float:
    """Return the mean of |u - v| / |v| over states and both guidance branches.

    batches: numbers of stored states, as `Trajectories.take` takes them; of several processes,
        this one's, and the mean is over all.
    """
    device = teacher.prompt_embeds.device
    errors: list[Tensor] = [torch.empty(0, dtype=torch.float64, device=device)]
    for picks in batches:
        states = trajectories.take(picks, device)
        sigma = trajectories.sigmas.to(device)[states.step]
        prompt_embeds = teacher.prompt_embeds[states.prompt]
        negative_embeds = teacher.negatives_for(prompt_embeds)
        for embeds, reference in (
            (prompt_embeds, states.conditional),
            (negative_embeds, states.unconditional),
        ):
            velocity = bind(model, embeds, precision=run.precision)(states.latents, sigma)
            errors.append(velocity_error(velocity, reference)[0].double())
    found = torch.cat(errors)
    return run.processes.mean(found.mean(), weight=len(found)).item()


def _read(path: Path, measured: Mapping[str, Any]) -> dict[int, float]:
    """Return the errors of an earlier call that measured the same."""
    try:
        found = read_json(path)
        if {key: found[key] for key in measured} == measured:
            return {int(layer): float(error) for layer, error in found["errors"].items()}
        problem = "it was measured in another way"
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"it is damaged: {error}"
    logger.warning("%s is measured again: %s", path, problem)
    return {}
