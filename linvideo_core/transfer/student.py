"""The student: the teacher's own model with adapters, how its layers are chosen, and its training.

Layers are chosen by selective transfer (LinVideo section 3.2). Each layer mixes
`r softmax + (1 - r) linear` with a learnable layer score r in [0, 1], and starts at
r = 1 - target / layers, where the budget is met exactly. The objective then decides which layers
give softmax up, the budget loss holds the sum, and the rounding loss drives each r to 0 or 1. The
choice is hardened long before training ends, and the rest of training runs on it.

The paper's budget is a loss, and so it is here while layers compete: its push is the same for all,
so that the layers to which softmax is worth most keep it. But it leaves the sum a little off, and
at the end, when the rounding loss holds every r at 0 or 1, a whole layer off: hardening then swaps
a layer that nobody trained for it. So in the last part of the selection scores are also projected
onto the budget after each step, where the rounding loss is at its strongest and reaches furthest.

A choice that is fixed (see `layer_selection`) is hardened at once: no layer score moves, and there
are no selection losses.
"""

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..flow import bind, bind_guided
from ..models import lora
from ..models.attention import LinearAttention, MixedAttention
from ..models.attention_sites import (
    AttentionSite,
    attention_at,
    blocks,
    checkpoint_activations,
    compiled_blocks,
    install,
    restore,
    shapes_of,
    trainable_weights,
)
from ..models.families import identify
from ..run.context import Run
from ..teacher.pool import TrajectoryPool
from ..teacher.teacher import Teacher
from ..teacher.trajectories import Trajectories
from ..training.config import TrainingConfig
from ..training.trainer import ParameterGroup, Task
from .config import ObjectiveConfig, SelectionConfig, StudentConfig, TransferConfig
from .layer_selection import count_selection_steps
from .objective import Batch, Batches, adm_loss
from .warm_start import feature_maps

logger = logging.getLogger(__name__)

# Share of the selection after which the rounding loss is at its end: only then does it reach the
# middle, and what is undecided there needs the rest to get to 0 or 1 before the choice is made.
_ROUNDED_AT = 0.6
# The rounding loss's exponent falls between these, and its weight grows to this many times.
_ALPHAS = (20.0, 2.0)
_ROUNDING_GROWTH = 10.0


class Student(contextlib.AbstractContextManager):
    """A model with a `MixedAttention` at every attention site and weights that may be trained.

    It is the teacher's own model, changed in place: mixed attention and LoRA are adapters, and with
    them disabled it is the teacher again. Only `parameters` "full" trains a copy, in fp32. As a
    context manager it removes its adapters in the end.

    mixed: layer -> its mixed attention.
    """

    def __init__(self, teacher: Teacher, config: StudentConfig, *, seed: int) -> None:
        """Raises ValueError for an unknown model, a rank too large, a teacher with a student."""
        self.config = config
        self.family, self.sites = identify(shapes_of(teacher.model))
        if any(isinstance(attention_at(teacher.model, s), MixedAttention) for s in self.sites):
            raise ValueError("the teacher's model has a student already: remove that one first")
        is_full = config.parameters == "full"
        self.model = copy.deepcopy(teacher.model).float() if is_full else teacher.model
        self._forwards = {
            block: block.__dict__.get("forward") for block in blocks(self.model, self.sites)
        }
        device = teacher.prompt_embeds.device
        generator = torch.Generator().manual_seed(seed)

        def mix(site: AttentionSite) -> MixedAttention:
            feature_dim = config.feature_ratio * site.head_dim
            linear = LinearAttention(site.num_heads, site.head_dim, feature_dim, config.form)
            linear.init_weights(generator)
            softmax = attention_at(teacher.model, site)
            return MixedAttention(linear, 1.0, softmax).to(device)

        self._changes: dict[str, lora.LowRank] = {}
        self._weight_names = self._free_weights(seed, device)
        self._originals = install(self.model, self.sites, mix)
        self.mixed: dict[int, MixedAttention] = {
            site.layer: attention_at(self.model, site) for site in self.sites
        }

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The trainable weights by name, as they are now: sharding puts others in their place."""
        return {name: self.model.get_parameter(name) for name in self._weight_names}

    def _free_weights(self, seed: int, device: torch.device) -> list[str]:
        self.model.requires_grad_(False)
        if self.config.parameters == "feature_maps":
            return []
        if self.config.parameters == "lora":
            self._changes = self.add_low_rank(seed, device)
            return [f"{name}.lora.{side}" for name in self._changes for side in ("down", "up")]
        weights = trainable_weights(self.model, self.family, self.sites)
        for parameter in weights.values():
            parameter.requires_grad_(True)
        return list(weights)

    def add_low_rank(
        self, seed: int, device: torch.device, adapter: str = "lora"
    ) -> dict[str, lora.LowRank]:
        """Give the model's linear layers low-rank changes; see `lora.attach`."""
        prefix, rank = self.family.trainable_prefix, self.config.lora_rank
        options = {"is_frozen": self.family.is_frozen, "adapter": adapter}
        return lora.attach(self.model, prefix, rank, seed, device, **options)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the adapters off: while the context lasts the model is the teacher."""
        with lora.switched(dict.fromkeys([*self.mixed.values(), *self._changes.values()], False)):
            yield

    def harden(self, linear_layers: Sequence[int]) -> None:
        """Make exactly these layers linear and all others softmax."""
        harden(self.mixed, linear_layers)

    def remove(self) -> None:
        """Take the adapters out of the model."""
        restore(self.model, self.sites, self._originals)
        lora.detach(self.model, self._changes)
        for block, forward in self._forwards.items():
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward

    def __exit__(self, *_: object) -> None:
        self.remove()


@torch.no_grad()
def harden(mixed: Mapping[int, MixedAttention], linear_layers: Sequence[int]) -> None:
    """Make exactly these layers linear, r = 0, and all others softmax, r = 1."""
    for layer, module in mixed.items():
        module.mode = "linear" if layer in linear_layers else "softmax"
        module.layer_score.fill_(0 if layer in linear_layers else 1)


class Selection:
    """The choice of a student's layers: scores on their way to a hardened choice, or a fixed one.

    is_learned: whether layer scores are trained. mixed: of every layer.
    """

    def __init__(
        self,
        mixed: Mapping[int, MixedAttention],
        config: SelectionConfig,
        num_steps: int,
        linear_layers: Sequence[int] | None = None,
    ) -> None:
        """num_steps: of all the training; linear_layers: a fixed choice, none: they are learned."""
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

    def harden(self, linear_layers: Sequence[int]) -> None:
        """Make the choice."""
        harden(self.mixed, linear_layers)
        logger.info("chosen layers from here on: %s", [*linear_layers])


def alpha_at(share: float) -> float:
    """Return the rounding loss's exponent after `share` in [0, 1] of its way, geometric."""
    start, end = _ALPHAS
    return start * (end / start) ** share


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
    """Return `sum (1 - |2 r - 1|^alpha)` of layer scores [layers] (LinVideo eq. 7).

    It is zero only where every r is 0 or 1.
    """
    return (1 - (2 * layer_scores - 1).abs().pow(alpha)).sum()


def make_pool(
    student: Student, teacher: Teacher, config: TransferConfig, run: Run
) -> TrajectoryPool:
    """Return the pool that a transfer's config asks for, its videos at their first states."""
    in_flight = (config.pool.pool_videos, config.training.batch_size)
    return TrajectoryPool(teacher, config.trajectories, *in_flight, run, student.disabled)


@contextlib.contextmanager
def accelerated(
    models: Sequence[nn.Module], student: Student, config: TrainingConfig, run: Run
) -> Iterator[None]:
    """Compile and shard a training's models, as its settings ask, while the context lasts."""
    with contextlib.ExitStack() as stack:
        if config.compile:
            stack.enter_context(compiled_blocks(models, student.sites))
        sharded = {model: blocks(model, student.sites) for model in models}
        stack.enter_context(run.processes.sharded(sharded))
        yield


class TransferTask(Task):
    """Train a student with an objective while its layers are being selected (LinVideo eq. 9).

    models: all that a step calls, each once.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        trajectories: Trajectories | TrajectoryPool,
        *,
        selection: SelectionConfig,
        objective: ObjectiveConfig,
        training: TrainingConfig,
        run: Run,
        linear_layers: Sequence[int] | None = None,
    ) -> None:
        """linear_layers: a fixed choice; none: they are learned."""
        self.student = student
        self.teacher = teacher
        self.trajectories = trajectories
        self.selection = Selection(student.mixed, selection, training.steps, linear_layers)
        self.training = training
        self.precision = run.precision
        size = training.batch_size
        self.batches = Batches(teacher, trajectories, objective, size, run.processes)
        self.models = [*dict.fromkeys([teacher.model, student.model])]
        if training.activation_checkpointing:
            checkpoint_activations(student.model, student.sites)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return weights, feature maps, and layer scores if learned."""
        groups = [
            ParameterGroup(self.student.weights, self.training.learning_rate),
            ParameterGroup(feature_maps(self.student.mixed), self.training.map_learning_rate),
            ParameterGroup(
                self.selection.trained_scores(), self.selection.config.layer_score_learning_rate
            ),
        ]
        return [group for group in groups if group.parameters]

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Any]]:
        """Return the objective on a fresh batch plus the selection losses."""
        objective_loss = self.objective_loss(self.batches.draw(generator, self.guided))
        metrics = {"objective_loss": objective_loss.detach()}
        if self.selection.is_learned:
            metrics["layer_scores"] = self.selection.layer_scores().detach().clone()
        return objective_loss + self.selection.loss(step), metrics

    def objective_loss(self, batch: Batch) -> Tensor:
        """Return the objective on a batch, a scalar: what a task of another objective overrides."""
        return adm_loss(
            batch,
            self.trajectories.sigmas,
            student=self.student_velocity,
            student_guided=self._student_guided,
            teacher=self.teacher_velocity,
        )

    def student_velocity(self, latents: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        """Return the student's velocity in each row's own branch; see `BatchVelocityFn`."""
        velocity = bind(self.student.model, batch.branch_embeds, precision=self.precision)
        return velocity(latents, sigma)

    def _student_guided(self, latents: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        return self.guided(latents, sigma, batch.prompt_embeds, batch.negative_embeds)

    def guided(
        self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor, negative_embeds: Tensor
    ) -> Tensor:
        """Return the student's guided velocity; see `GuidedFn`."""
        velocity = bind_guided(
            self.student.model,
            prompt_embeds,
            negative_embeds,
            self.trajectories.guidance_scale,
            precision=self.precision,
        )
        return velocity(latents, sigma)

    @torch.no_grad()
    def teacher_velocity(self, latents: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        """Return the teacher's velocity in each row's own branch, without a gradient."""
        with self.student.disabled():
            velocity = bind(self.teacher.model, batch.branch_embeds, precision=self.precision)
            return velocity(latents, sigma)

    def after_step(self, step: int) -> None:
        """Advance the selection."""
        self.selection.after_step(step)
        self.batches.after_step()

    def state(self) -> dict[str, Any]:
        """Return the hardened choice, and what is in flight."""
        return {"linear_layers": self.selection.linear_layers, **self.batches.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take the hardened choice back, and what was in flight."""
        self.batches.load_state(state)
        if state["linear_layers"] is not None:
            self.selection.harden(state["linear_layers"])
