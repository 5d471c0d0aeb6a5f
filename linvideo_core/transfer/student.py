"""The student: the teacher's twin with mixed attention, and the task of training it."""

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models import lora
from ..models.attention import LinearAttention, LinearForm, MixedAttention
from ..models.attention_sites import (
    AttentionSite,
    checkpoint_activations,
    compiled_blocks,
    install,
    shapes_of,
    trainable_weights,
)
from ..models.families import identify
from ..models.velocity import bind, bind_guided
from ..run.config import option, positive
from ..run.process_group import SINGLE_PROCESS, ProcessGroup
from ..teacher.teacher import Teacher
from ..teacher.trajectories import Trajectories
from ..training.trainer import ParameterGroup, TrainingConfig
from .batches import PromptedBatch, draw_batch
from .layer_selection.rules import Selection, SelectionConfig
from .noise_levels import level_density
from .objectives import ObjectiveConfig, Players, make_objective, needs_critic
from .replay import replayed
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


class Student:
    """The teacher's twin, whose attention sites all hold a `MixedAttention`.

    model: modules of its own around the teacher's frozen tensors, of which only one copy is in
        memory; all weights are copies, in fp32, where `full` trains them.
    mixed: layer -> its mixed attention.
    """

    def __init__(self, teacher: Teacher, config: StudentConfig, *, seed: int) -> None:
        """Raises ValueError for a model of an unknown family or a rank that is too large."""
        self.config = config
        self.family, self.sites = identify(shapes_of(teacher.model))
        is_full = config.parameters == "full"
        self.model = copy.deepcopy(teacher.model).float() if is_full else twin(teacher.model)
        device = teacher.prompt_embeds.device
        generator = torch.Generator().manual_seed(seed)

        def mix(site: AttentionSite) -> MixedAttention:
            feature_dim = config.feature_ratio * site.head_dim
            linear = LinearAttention(site.num_heads, site.head_dim, feature_dim, config.form)
            linear.init_weights(generator)
            return MixedAttention(linear, 1.0).to(device)

        self._weight_names = self._free_weights(seed, device)
        install(self.model, self.sites, mix)
        self.mixed: dict[int, MixedAttention] = {
            site.layer: self.model.get_submodule(site.name).attention for site in self.sites
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
            prefix, rank = self.family.trainable_prefix, self.config.lora_rank
            is_frozen = self.family.is_frozen
            changes = lora.attach(self.model, prefix, rank, seed, device, is_frozen=is_frozen)
            return [f"{name}.lora.{side}" for name in changes for side in ("down", "up")]
        weights = trainable_weights(self.model, self.family, self.sites)
        for parameter in weights.values():
            parameter.requires_grad_(True)
        return list(weights)

    def choices(self) -> tuple[str | None, ...]:
        """Return what each layer computes: "linear", "softmax", or None while it mixes both."""
        return tuple(module.choice for module in self.mixed.values())


def twin(model: nn.Module) -> nn.Module:
    """Return a copy of a model's modules that hold the model's own parameters and buffers."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@contextlib.contextmanager
def accelerated(
    models: Sequence[nn.Module],
    student: Student,
    config: TrainingConfig,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Iterator[None]:
    """Compile or replay a training's models, as its settings ask, while the context lasts.

    Raises ValueError for a process group's models that are to be replayed.
    """
    if config.cuda_graphs and processes.size > 1:
        raise ValueError(
            f"--cuda-graphs was given to {processes.size} processes; graphs hold no messages "
            "between them: leave it out"
        )
    with contextlib.ExitStack() as stack:
        if config.compile:
            stack.enter_context(compiled_blocks(models, student.sites))
        if config.cuda_graphs:
            stack.enter_context(replayed(models, student.choices))
        yield


class TransferTask:
    """Train a student with an objective while its layers are being selected (LinVideo eq. 9).

    With `layers`, those that a fixed choice made linear, nothing is selected any more. `ranking`:
    layers from the least to the most sensitive, where `--score-start ranking` asks for it.
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
        precision: str,
        layers: Sequence[int] | None = None,
        ranking: Sequence[int] | None = None,
        processes: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.trajectories = trajectories
        self.selection = Selection(student.mixed, selection, training.steps, layers, ranking)
        self.selection_config = selection
        self.objective_config = objective
        self.training = training
        self.precision = precision
        self.processes = processes
        self.objective = make_objective(objective, trajectories.sigmas, training.steps)
        self.weights: Tensor | None = None
        if objective.levels != "even":
            density = level_density(trajectories.sigmas, objective.levels)
            self.weights = trajectories.weigh(density)
        self.critic: nn.Module | None = None
        if needs_critic(objective):
            self.critic = copy.deepcopy(teacher.model).float().requires_grad_(True)
        if training.activation_checkpointing:
            checkpoint_activations(student.model, student.sites)

    @property
    def models(self) -> list[nn.Module]:
        """All models that a step calls."""
        critic = [self.critic] if self.critic is not None else []
        return [self.teacher.model, self.student.model, *critic]

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return weights, feature maps, layer scores if learned, and the critic if there is one."""
        scores = self.selection.trained_scores()
        groups = [
            ParameterGroup(self.student.weights, self.training.learning_rate),
            ParameterGroup(feature_maps(self.student.mixed), self.training.map_learning_rate),
            ParameterGroup(scores, self.selection_config.layer_score_learning_rate),
        ]
        if self.critic is not None:
            critic = {f"critic.{name}": p for name, p in self.critic.named_parameters()}
            groups.append(ParameterGroup(critic, self.objective_config.critic_learning_rate))
        return [group for group in groups if group.parameters]

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        """Return the objective on a fresh batch plus the selection losses."""
        drawn = draw_batch(
            self.teacher,
            self.trajectories,
            self.training.batch_size,
            self.objective_config.prompt_dropout,
            generator,
            self.processes,
            self.weights,
        )
        players = self._players(drawn, slice(None))
        objective_loss, metrics = self.objective(drawn.batch, players, step, generator)
        metrics |= {"objective_loss": objective_loss.detach()}
        if self.selection.is_learned:
            metrics["layer_scores"] = self.selection.layer_scores().detach().clone()
        return objective_loss + self.selection.loss(step), metrics

    def _players(self, drawn: PromptedBatch, part: slice) -> Players:
        branch = drawn.branch_embeds[part]
        return Players(
            student=bind(self.student.model, branch, precision=self.precision),
            student_guided=bind_guided(
                self.student.model,
                drawn.prompt_embeds[part],
                drawn.negative_embeds[part],
                self.trajectories.guidance_scale,
                precision=self.precision,
            ),
            teacher=bind(self.teacher.model, branch, precision=self.precision),
            part=lambda part: self._players(drawn, part),
            critic=self.critic and bind(self.critic, branch, precision=self.precision),
        )

    def after_step(self, step: int) -> None:
        """Advance the selection."""
        self.selection.after_step(step)

    def state(self) -> dict[str, Any]:
        """Return the hardened choice."""
        return {"layers": self.selection.layers}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take the hardened choice back."""
        if state["layers"] is not None:
            self.selection.harden(state["layers"])
