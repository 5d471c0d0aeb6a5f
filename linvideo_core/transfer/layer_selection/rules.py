"""Selective transfer: learn which layers become linear (LinVideo section 3.2), or fix them.

Learned: each layer mixes `r softmax + (1 - r) linear` with a learnable layer score r in [0, 1],
and starts at r = 1 - target / layers, where the budget is met exactly. The objective then decides
which layers give softmax up, the budget loss holds the sum, and the rounding loss drives each r to
0 or 1. The choice is hardened long before training ends, and the rest of training runs on it.

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
from ...run.errors import SettingError

logger = logging.getLogger(__name__)

CHOICES = ("learned", "alternate", "sensitivity")

# Share of the selection after which the rounding loss is at its end: only then does it reach the
# middle, and what is undecided there needs the rest to get to 0 or 1 before the choice is made.
_ROUNDED_AT = 0.6
# The rounding loss's exponent falls between these, and its weight grows to this many times.
_ALPHAS = (20.0, 2.0)
_ROUNDING_GROWTH = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """How many layers become linear and how they are found."""

    target: int = option(5, "layers to make linear")
    choice: str = option(
        "learned",
        "what chooses them: training, every other layer, or what each alone does to the velocity",
        choices=CHOICES,
    )
    layers: str | None = option(None, "the layers themselves, such as 1,3,4, and no --choice")
    selection_share: float = option(0.3, "share of the training steps spent choosing layers")
    layer_score_learning_rate: float = option(0.01, "learning rate of the layer scores r")
    selection_weight: float = option(0.01, "weight of the budget and rounding losses (lambda)")

    def __post_init__(self) -> None:
        positive(self, "target", "layer_score_learning_rate")
        fraction(self, "selection_share")
        if self.layers is not None:
            self._check_list(self.layers)

    @property
    def rule(self) -> str:
        """How the layers are chosen: the choice, or "listed"."""
        return self.choice if self.layers is None else "listed"

    @property
    def listed(self) -> tuple[int, ...]:
        """The layers of the list, in depth order; none without one."""
        return tuple(sorted(map(int, self.layers.split(",")))) if self.layers is not None else ()

    def _check_list(self, text: str) -> None:
        words = [word.strip() for word in text.split(",")]
        if not all(word.isdecimal() for word in words) or len({*map(int, words)}) < len(words):
            raise SettingError(
                f"{{layers}} {text!r} given; different layer numbers, such as 1,3,4, are needed",
                "layers",
            )
        if self.choice != "learned":
            raise SettingError(
                f"{{layers}} {text} and {{choice}} {self.choice} given; leave one of them out",
                "layers",
                "choice",
            )
        if len(words) != self.target:
            raise SettingError(
                f"{{layers}} {text} names {len(words)} layers and {{target}} is {self.target}; "
                f"give {{target}} {len(words)}, or another list",
                "layers",
                "target",
            )


def alpha_at(share: float) -> float:
    """Return the rounding loss's exponent after `share` in [0, 1] of its way, geometric."""
    start, end = _ALPHAS
    return start * (end / start) ** share


def count_selection_steps(config: SelectionConfig, num_steps: int) -> int:
    """Return after how many of a training's steps the choice is made."""
    return max(1, round(config.selection_share * num_steps))


def check_target(config: SelectionConfig, num_layers: int) -> None:
    """Raise SettingError for a target larger than the number of layers."""
    if config.target > num_layers:
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


class Selection:
    """The choice of a student's layers: scores on their way to a hardened choice, or a fixed one.

    is_learned: whether layer scores are trained.
    """

    def __init__(
        self,
        mixed: Mapping[int, MixedAttention],
        config: SelectionConfig,
        num_steps: int,
        linear_layers: Sequence[int] | None = None,
    ) -> None:
        """mixed: the mixed attention of every layer; num_steps: steps of the whole training.

        linear_layers: a fixed choice, hardened at once; None: they are learned.

        Raises SettingError for a target larger than the number of layers.
        """
        check_target(config, len(mixed))
        self.is_learned = linear_layers is None
        self.mixed = dict(mixed)
        self.config = config
        self.harden_at = count_selection_steps(config, num_steps)
        for module in self.mixed.values():
            module.layer_score.data.fill_(1 - config.target / len(mixed))
            module.layer_score.requires_grad_(self.is_learned)
        if linear_layers is not None:
            self.harden(linear_layers)

    @property
    def linear_layers(self) -> tuple[int, ...] | None:
        """The linear layers once the choice is made, None before."""
        chosen = tuple(layer for layer, module in self.mixed.items() if module.mode == "linear")
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
        if self.linear_layers is not None:
            return scores.new_zeros(())
        share = self._share(step)
        budget = budget_loss(scores, self.config.target)
        moving = along_budget(scores) if share == 1 else scores
        rounding = rounding_loss(moving, alpha_at(share))
        return self.config.selection_weight * (budget + _ROUNDING_GROWTH**share * rounding)

    def _share(self, step: int) -> float:
        """Return how far the rounding loss is on its way, in [0, 1]; 1: scores are projected."""
        return min(1.0, step / (_ROUNDED_AT * self.harden_at))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Keep every r in [0, 1]; make the choice when `step` is the last of the selection."""
        if self.linear_layers is not None:
            return
        scores, target = self.layer_scores(), self.config.target
        scores = project(scores, target) if self._share(step) == 1 else scores.clamp(0, 1)
        for module, score in zip(self.mixed.values(), scores, strict=True):
            module.layer_score.copy_(score)
        if step + 1 >= self.harden_at:
            layers, lowest = [*self.mixed], scores.argsort(stable=True)[:target]
            self.harden(sorted(layers[pick] for pick in lowest.tolist()))

    @torch.no_grad()
    def harden(self, linear_layers: Sequence[int]) -> None:
        """Make exactly these layers linear, r = 0, and all others softmax, r = 1."""
        for layer, module in self.mixed.items():
            module.mode = "linear" if layer in linear_layers else "softmax"
            module.layer_score.fill_(0 if layer in linear_layers else 1)
        logger.info("linear layers from here on: %s", [*linear_layers])


def budget_loss(layer_scores: Tensor, target: int) -> Tensor:
    """Return `(sum of 1 - r - target)^2` for layer scores [layers] (LinVideo eq. 6).

    The paper counts `round(1 - r)` with a straight-through gradient, whose sign flips whenever a
    layer crosses 0.5, which holds layers there.
    """
    return ((1 - layer_scores).sum() - target).square()


def project(layer_scores: Tensor, target: int) -> Tensor:
    """Return the nearest scores [layers] in [0, 1] whose sum of 1 - r is `target`, exactly.

    The Euclidean projection onto the capped simplex: `clamp(r - shift, 0, 1)`. The sum falls
    linearly between the shifts at which a score reaches 0 or 1, so it is solved between two.

    target: from 0 to the number of layers.
    """
    wanted = len(layer_scores) - target
    shifts = torch.cat([layer_scores, layer_scores - 1]).sort().values
    sums = (layer_scores - shifts.unsqueeze(1)).clamp(0, 1).sum(dim=1)
    right = (sums > wanted).sum(dim=0, keepdim=True).clamp(1, len(shifts) - 1)
    (low, high), (more, less) = ((x[right - 1], x[right]) for x in (shifts, sums))
    share = (more - wanted) / (more - less).clamp_min(1e-12)
    return (layer_scores - torch.lerp(low, high, share.clamp(0, 1))).clamp(0, 1)


def along_budget(layer_scores: Tensor) -> Tensor:
    """Return the same scores [layers] with the gradient's mean over those within (0, 1) taken out.

    Scores whose sum is held move against each other alone. An optimiser that divides each gradient
    by its own size would make one common push of them, which the projection takes back.
    """
    is_free = (layer_scores > 0) & (layer_scores < 1)
    mean = (layer_scores * is_free).sum() / is_free.sum().clamp_min(1)
    return torch.where(is_free, layer_scores - (mean - mean.detach()), layer_scores)


def rounding_loss(layer_scores: Tensor, alpha: float) -> Tensor:
    """Return `sum (1 - |2 r - 1|^alpha)`, zero only where every r is 0 or 1 (LinVideo eq. 7)."""
    return (1 - (2 * layer_scores - 1).abs().pow(alpha)).sum()
