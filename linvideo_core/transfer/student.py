"""The student: the teacher's own model with adapters, and the task of training it."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models import lora
from ..models.attention import LinearAttention, LinearForm, MixedAttention
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
from ..models.velocity import bind, bind_guided
from ..run.config import option, positive
from ..run.context import Run
from ..teacher.teacher import Teacher
from ..teacher.trajectories import Trajectories
from ..training.trainer import ParameterGroup, TrainingConfig
from .adm import VelocityFns, adm_loss
from .batches import Batch, Batches, ObjectiveConfig
from .layer_selection.rules import Selection, SelectionConfig
from .warm_start import feature_maps

PARAMETERS = ("full", "lora", "feature_maps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """What of the student may move."""

    parameters: str = option("lora", "weights that are trained and saved", choices=PARAMETERS)
    lora_rank: int = option(32, "rank of the weight changes (parameters lora)")
    feature_ratio: int = option(1, "features M of a query or key, in units of the head dim: 1 or 2")
    form: LinearForm = dataclasses.field(default_factory=LinearForm)

    def __post_init__(self) -> None:
        positive(self, "lora_rank", "feature_ratio")


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
            return MixedAttention(linear, 1.0).to(device)

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
        for layer, module in self.mixed.items():
            module.mode = "linear" if layer in linear_layers else "softmax"

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


class TransferTask:
    """Train a student with an objective while its layers are being selected (LinVideo eq. 9).

    models: all that a step calls, each once.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        trajectories: Trajectories,
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
        self.velocities = VelocityFns(
            student=self._student, student_guided=self._student_guided, teacher=self._teacher
        )
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
        batch = self.batches.draw(generator)
        objective_loss = adm_loss(batch, self.velocities, self.trajectories.sigmas)
        metrics = {"objective_loss": objective_loss.detach()}
        if self.selection.is_learned:
            metrics["layer_scores"] = self.selection.layer_scores().detach().clone()
        return objective_loss + self.selection.loss(step), metrics

    def _student(self, latents: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        velocity = bind(self.student.model, batch.branch_embeds, precision=self.precision)
        return velocity(latents, sigma)

    def _student_guided(self, latents: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        velocity = bind_guided(
            self.student.model,
            batch.prompt_embeds,
            batch.negative_embeds,
            self.trajectories.guidance_scale,
            precision=self.precision,
        )
        return velocity(latents, sigma)

    @torch.no_grad()
    def _teacher(self, latents: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        with self.student.disabled():
            velocity = bind(self.teacher.model, batch.branch_embeds, precision=self.precision)
            return velocity(latents, sigma)

    def after_step(self, step: int) -> None:
        """Advance the selection."""
        self.selection.after_step(step)

    def state(self) -> dict[str, Any]:
        """Return the hardened choice."""
        return {"linear_layers": self.selection.linear_layers}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take the hardened choice back."""
        if state["linear_layers"] is not None:
            self.selection.harden(state["linear_layers"])
