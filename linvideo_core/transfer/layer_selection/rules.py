"""Selective transfer: learn which layers become linear (LinVideo section 3.2), or fix them.

Learned: each layer mixes `r softmax + (1 - r) linear` with a learnable layer score r in [0, 1],
and starts at r = 1 - target / layers, where the budget is met exactly, or around it in the order
of a sensitivity ranking; the objective then decides which layers give softmax up, the budget holds
the sum, and the rounding loss drives each r to 0 or 1. The choice is hardened long before training
ends, and the rest of training runs on it.

The paper's budget is a loss, and so it is here while layers compete: its push is the same for all,
so that the layers to which softmax is worth most keep it. But it leaves the sum a little off, and
at the end, when the rounding loss holds every r at 0 or 1, a whole layer off: hardening then swaps
a layer that nobody trained for it. So in the last part of the selection scores are also projected
onto the budget after each step, where the rounding loss is at its strongest and reaches furthest.

Fixed, by a rule, a list or a ranking: the whole training runs on the hardened choice; no layer
score moves and there are no selection losses.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...models.attention import MixedAttention
from ...run.config import fraction, option, positive
from .scores import BUDGETS, along_budget, budget_loss, project, rounding_loss

logger = logging.getLogger(__name__)

CHOICES = ("learned", "first", "last", "alternate", "random", "sensitivity")
SCORE_STARTS = ("even", "ranking")

# Scores that start in order lie this far around their mean at most, and so far from 0 and 1 at
# least. At alpha 20 the rounding loss has a slope of 40 at 0 and 1, which holds a score there
# whatever the objective says; 0.6 at 0.1 and 1e-4 at 0.25, where the objective can still overrule
# the ranking.
_START_REACH, _START_MARGIN = 0.25, 0.1

# Share of the selection after which the rounding loss is at its end: only then does it reach the
# middle, and what is undecided there needs the rest to get to 0 or 1 before the choice is made.
_ROUNDED_AT = 0.6


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """How many layers become linear and how they are found."""

    target: int = option(5, "layers to make linear")
    choice: str = option("learned", "rule that chooses them", choices=CHOICES)
    layers: str | None = option(None, "the layers themselves, such as 1,3,4, and no --choice")
    score_start: str = option(
        "even", "layer scores start alike, or ordered by --sensitivity", choices=SCORE_STARTS
    )
    selection_share: float = option(0.3, "share of the training steps spent choosing layers")
    layer_score_learning_rate: float = option(0.01, "learning rate of the layer scores r")
    selection_weight: float = option(0.01, "weight of the budget and rounding losses (lambda)")
    rounding_weight: float = option(1.0, "weight of the rounding loss (L_reg) beside the budget's")
    rounding_growth: float = option(10.0, "how much heavier the rounding loss is at its end")
    budget: str = option(
        "exact",
        "lose for the sum of 1 - r and hold it in the end; only lose, or for its rounded count",
        choices=BUDGETS,
    )
    alpha_start: float = option(20.0, "exponent of the rounding loss at the start")
    alpha_end: float = option(2.0, "exponent of the rounding loss at its end")

    def __post_init__(self) -> None:
        positive(self, "target", "layer_score_learning_rate", "alpha_start", "alpha_end")
        positive(self, "rounding_growth")
        fraction(self, "selection_share")
        if not self.rounding_weight >= 0:
            raise ValueError(
                f"--rounding-weight {self.rounding_weight} given; a number >= 0 is needed"
            )
        if self.layers is not None:
            self._check_list(self.layers)
        if self.score_start == "ranking" and self.rule != "learned":
            raise ValueError(
                f"--score-start ranking and a {self.rule} choice of layers given; only learned "
                "layer scores start anywhere: leave one of them out"
            )

    @property
    def needs_ranking(self) -> bool:
        """Whether a sensitivity ranking decides the layers or where their scores start."""
        return self.rule == "sensitivity" or self.score_start == "ranking"

    @property
    def rule(self) -> str:
        """How the layers are chosen: the choice, or "listed"."""
        return self.choice if self.layers is None else "listed"

    @property
    def listed(self) -> list[int]:
        """The layers of the list, in depth order; none without one."""
        return sorted(map(int, self.layers.split(","))) if self.layers is not None else []

    def _check_list(self, text: str) -> None:
        words = [word.strip() for word in text.split(",")]
        if not all(word.isdecimal() for word in words) or len({*map(int, words)}) < len(words):
            raise ValueError(
                f"--layers {text!r} given; different layer numbers, such as 1,3,4, are needed"
            )
        if self.choice != "learned":
            raise ValueError(
                f"--layers {text} and --choice {self.choice} given; leave one of them out"
            )
        if len(words) != self.target:
            raise ValueError(
                f"--layers {text} names {len(words)} layers and --target is {self.target}; give "
                f"--target {len(words)}, or another list"
            )


def alpha_at(config: SelectionConfig, share: float) -> float:
    """Return the exponent after `share` in [0, 1] of its way: geometric from start to end."""
    return config.alpha_start * (config.alpha_end / config.alpha_start) ** share


def count_selection_steps(config: SelectionConfig, num_steps: int) -> int:
    """Return after how many of a training's steps the choice is made."""
    return max(1, round(config.selection_share * num_steps))


def choose(layer_scores: Tensor, target: int) -> tuple[int, ...]:
    """Return the indices of the `target` layers with the lowest r, in depth order."""
    return tuple(sorted(layer_scores.argsort(stable=True)[:target].tolist()))


def check_target(config: SelectionConfig, num_layers: int) -> None:
    """Raise ValueError for a target larger than the number of layers."""
    if config.target > num_layers:
        raise ValueError(
            f"--target {config.target} given; the model has {num_layers} self-attention layers"
        )


def check_layers(config: SelectionConfig, layers: Sequence[int]) -> None:
    """Raise ValueError where a model with these layers cannot have the target or the list."""
    check_target(config, len(layers))
    if strangers := [layer for layer in config.listed if layer not in layers]:
        raise ValueError(
            f"--layers {config.layers} given; the model has no layer {strangers[0]}, its "
            f"self-attention layers are {min(layers)} to {max(layers)}"
        )


def choose_layers(
    config: SelectionConfig,
    layers: Sequence[int],
    seed: int,
    ranking: Sequence[int] | None = None,
) -> list[int] | None:
    """Return which layers a rule, a list or a ranking makes linear, in depth order.

    "alternate" spreads them evenly over depth: every other layer where half become linear.
    layers: the model's, in depth order; seed: of "random", which takes every set equally likely;
    ranking: layers from the least to the most sensitive, for "sensitivity".

    Returns None where they are learned.
    Raises ValueError for "sensitivity" without a ranking.
    """
    check_layers(config, layers)
    count, total = config.target, len(layers)
    match config.rule:
        case "first":
            picks = range(count)
        case "last":
            picks = range(total - count, total)
        case "alternate":
            picks = [(2 * i + 1) * total // (2 * count) for i in range(count)]
        case "random":
            generator = torch.Generator().manual_seed(seed)
            picks = sorted(torch.randperm(total, generator=generator)[:count].tolist())
        case "listed":
            return config.listed
        case "sensitivity":
            if ranking is None:
                raise ValueError("--choice sensitivity given without a ranking of the layers")
            return sorted(ranking[:count])
        case _:
            return None
    return [layers[pick] for pick in picks]


def start_scores(
    config: SelectionConfig, layers: Sequence[int], ranking: Sequence[int] | None = None
) -> list[float]:
    """Return the layer score r that each layer starts from; their sum meets the budget exactly.

    "even": 1 - target / layers for all. "ranking": evenly spaced around it, the least sensitive
    lowest, by at most 0.25 and within [0.1, 0.9]; alike where the mean itself lies outside.

    layers: the model's, in depth order. ranking: the same from the least to the most sensitive.

    Raises ValueError where "ranking" is configured and no ranking of these layers was given.
    """
    mean = 1 - config.target / len(layers)
    if config.score_start == "even":
        return [mean] * len(layers)
    if ranking is None or sorted(ranking) != sorted(layers):
        raise ValueError(
            f"--score-start ranking given with the ranking {ranking}; one of the layers "
            f"{list(layers)} is needed"
        )
    reach = min(_START_REACH, mean - _START_MARGIN, 1 - _START_MARGIN - mean)
    middle = (len(layers) - 1) / 2
    spacing = max(0.0, reach) / max(1.0, middle)
    return [mean + spacing * (ranking.index(layer) - middle) for layer in layers]


class Selection:
    """The choice of a student's layers: scores on their way to a hardened choice, or a fixed one.

    is_learned: whether layer scores are trained.
    """

    def __init__(
        self,
        mixed: Mapping[int, MixedAttention],
        config: SelectionConfig,
        num_steps: int,
        layers: Sequence[int] | None = None,
        ranking: Sequence[int] | None = None,
    ) -> None:
        """mixed: the mixed attention of every layer; num_steps: steps of the whole training.

        layers: those that a fixed choice makes linear, hardened at once; None: they are learned.
        ranking: layers from the least to the most sensitive, where scores start from it.

        Raises ValueError for a target larger than the number of layers, and for a choice that is
        not the config's: fixed where it says learned, or the other way.
        """
        check_target(config, len(mixed))
        self.is_learned = layers is None
        if self.is_learned != (config.rule == "learned"):
            raise ValueError(
                f"a {config.rule} choice of layers is configured and {layers} was given; a "
                "learned choice takes none, any other the layers that it has chosen"
            )
        self.mixed = dict(mixed)
        self.config = config
        self.harden_at = count_selection_steps(config, num_steps)
        starts = start_scores(config, list(mixed), ranking)
        for module, start in zip(self.mixed.values(), starts, strict=True):
            module.layer_score.data.fill_(start)
            module.layer_score.requires_grad_(self.is_learned)
        if layers is not None:
            self.harden(layers)

    @property
    def layers(self) -> list[int] | None:
        """The linear layers once the choice is made, None before."""
        chosen = [layer for layer, module in self.mixed.items() if module.choice == "linear"]
        return chosen or None

    def layer_scores(self) -> Tensor:
        """Return r of every layer [layers], with gradient."""
        return torch.stack([module.layer_score for module in self.mixed.values()])

    def trained_scores(self) -> dict[str, nn.Parameter]:
        """Return the layer scores that are trained, by name: all of them, or none if fixed."""
        if not self.is_learned:
            return {}
        return {f"{layer}.layer_score": module.layer_score for layer, module in self.mixed.items()}

    def loss(self, step: int) -> Tensor:
        """Return `lambda (L_con + L_reg)` while layers are being chosen, 0 afterwards."""
        scores = self.layer_scores()
        if self.layers is not None:
            return scores.new_zeros(())
        share = self._share(step)
        budget = budget_loss(scores, self.config.target, self.config.budget)
        moving = along_budget(scores) if self._is_held(step) else scores
        rounding = rounding_loss(moving, alpha_at(self.config, share))
        weight = self.config.rounding_weight * self.config.rounding_growth**share
        return self.config.selection_weight * (budget + weight * rounding)

    def _share(self, step: int) -> float:
        """Return how far the rounding loss is on its way, in [0, 1]."""
        return min(1.0, step / (_ROUNDED_AT * self.harden_at))

    def _is_held(self, step: int) -> bool:
        """Return whether scores are projected onto the budget."""
        return self.config.budget == "exact" and self._share(step) == 1

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Keep every r in [0, 1]; make the choice when `step` is the last of the selection."""
        if self.layers is not None:
            return
        scores = self.layer_scores()
        is_held = self._is_held(step)
        kept = project(scores, self.config.target) if is_held else scores.clamp(0, 1)
        for module, score in zip(self.mixed.values(), kept, strict=True):
            module.layer_score.copy_(score)
        if step + 1 >= self.harden_at:
            names = list(self.mixed)
            picks = choose(self.layer_scores(), self.config.target)
            self.harden([names[pick] for pick in picks])

    @torch.no_grad()
    def harden(self, layers: Sequence[int]) -> None:
        """Make exactly `layers` linear, r = 0, and all others softmax, r = 1."""
        for layer, module in self.mixed.items():
            module.harden("linear" if layer in layers else "softmax")
            module.layer_score.fill_(0 if layer in layers else 1)
        logger.info("linear layers from here on: %s", list(layers))
