"""Layer sensitivity: what one linear layer does to the velocity, by forward passes only.

Replace-one makes one layer linear in the softmax model: the layers that then err least are chosen.
Restore-one gives one layer its softmax back in the linear model: the layers whose return helps
least are chosen. The error is the mean of |u - v| / |v| over the stored states of a few videos,
which are spread over all noise levels, and over both guidance branches. States and the teacher's
velocities v are stored in fp16, which adds about 1e-3.
"""

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...evaluate.metrics import velocity_error
from ...models.attention import MixedAttention
from ...models.velocity import bind
from ...run.config import option, positive
from ...run.files import write_json
from ...run.process_group import SINGLE_PROCESS, ProcessGroup
from ...run.progress import Progress, silent
from ...teacher.teacher import Teacher
from ...teacher.trajectories import Trajectories

logger = logging.getLogger(__name__)

RANKING_NAME = "sensitivity.json"
STAGE = "ranking the layers"
MEASURES = ("replace-one", "restore-one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SensitivityConfig:
    """How the layers are ranked where --choice or --score-start asks for it."""

    sensitivity: str = option(
        "replace-one", "one linear layer among softmax ones, or the reverse", choices=MEASURES
    )
    sensitivity_videos: int = option(8, "stored videos to rank the layers on, or all there are")

    def __post_init__(self) -> None:
        positive(self, "sensitivity_videos")


def measure(
    model: nn.Module,
    mixed: Mapping[int, MixedAttention],
    teacher: Teacher,
    trajectories: Trajectories,
    config: SensitivityConfig,
    path: Path,
    *,
    batch_size: int,
    precision: str,
    progress: Progress = silent,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> dict[int, float]:
    """Return the velocity error of every layer, written to `path` one by one.

    A repeated call takes the layers that `path` holds and measures the others. The layers of
    `mixed` are left as they were.

    Raises ValueError where a velocity is not finite.
    """
    num_states = config.sensitivity_videos * trajectories.states_per_trajectory
    picks = torch.arange(min(num_states, len(trajectories)))
    measured = {"measure": config.sensitivity, "states": len(picks)}
    batches = processes.share(picks).split(batch_size // processes.size)
    errors = {layer: error for layer, error in _read(path, measured).items() if layer in mixed}
    alone, rest = ("linear", "softmax")[:: 1 if config.sensitivity == "replace-one" else -1]
    with _choices_kept(mixed):
        progress(STAGE, len(errors), len(mixed))
        for layer in mixed:
            if layer in errors:
                continue
            for other, module in mixed.items():
                module.harden(alone if other == layer else rest)
            error = mean_velocity_error(
                model, teacher, trajectories, batches, precision=precision, processes=processes
            )
            if not math.isfinite(error):
                raise ValueError(
                    f"the velocity error of layer {layer} alone is {error}; choose the layers by "
                    "another --choice, or lower --warm-start-learning-rate"
                )
            errors[layer] = error
            is_done = len(errors) == len(mixed)
            ranking = rank(errors, config) if is_done else None
            if processes.is_first:
                write_json(path, {**measured, "ranking": ranking, "errors": errors})
            progress(STAGE, len(errors), len(mixed))
    return errors


def rank(errors: Mapping[int, float], config: SensitivityConfig) -> list[int]:
    """Return the layers from the least to the most sensitive; equal ones in depth order."""
    cost = sensitivities(errors, config.sensitivity)
    return sorted(cost, key=lambda layer: (cost[layer], layer))


def sensitivities(errors: Mapping[int, float], kind: str) -> dict[int, float]:
    """Return a number by layer that grows with what a linear layer there costs.

    The error itself where one was replaced; where one was restored, its negative: an error that
    stays large is that of a layer whose softmax was not missed.

    kind: one of `MEASURES`.
    """
    sign = 1 if kind == "replace-one" else -1
    return {layer: sign * error for layer, error in errors.items()}


def read_ranking(path: Path) -> tuple[str, dict[int, float]] | None:
    """Return the kind of a finished ranking and its errors by layer; None without a whole file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        errors = {int(layer): float(error) for layer, error in found["errors"].items()}
        is_whole = found["measure"] in MEASURES and sorted(found["ranking"]) == sorted(errors)
        return (found["measure"], errors) if is_whole else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


@torch.no_grad()
def mean_velocity_error(
    model: nn.Module,
    teacher: Teacher,
    trajectories: Trajectories,
    batches: Sequence[Tensor],
    *,
    precision: str,
    processes: ProcessGroup = SINGLE_PROCESS,
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
        negative_embeds = teacher.negative_embeds.expand_as(prompt_embeds)
        for embeds, reference in (
            (prompt_embeds, states.conditional),
            (negative_embeds, states.unconditional),
        ):
            velocity = bind(model, embeds, precision=precision)(states.latents, sigma)
            errors.append(velocity_error(velocity, reference)[0].double())
    found = torch.cat(errors)
    return processes.mean(found.mean(), weight=len(found)).item()


@contextlib.contextmanager
def _choices_kept(mixed: Mapping[int, MixedAttention]) -> Iterator[None]:
    choices = [module.choice for module in mixed.values()]
    try:
        yield
    finally:
        for module, choice in zip(mixed.values(), choices, strict=True):
            module.choice = choice


def _read(path: Path, measured: Mapping[str, Any]) -> dict[int, float]:
    """Return the errors of an earlier call that measured the same."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if {key: found[key] for key in measured} == measured:
            return {int(layer): float(error) for layer, error in found["errors"].items()}
        problem = "it was measured in another way"
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"it is damaged: {error!r}"
    logger.warning("%s is measured again: %s", path, problem)
    return {}
