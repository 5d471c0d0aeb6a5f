"""Distil a linear student to a few steps (DMD2): its three networks and the task of training them.

generator: the student, linear where its file says so; it makes x0 in one call at each of `sigmas`.
real_score: the softmax teacher with guidance, frozen.
fake_score: the critic, softmax, which learns the flow of the student's videos; conditional alone.
With LoRA all three are one model: the student's changes are on, none are, or the critic's are.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact import Artifact
from ..flow import VelocityFn, add_noise, bind, bind_guided, make_sigmas, velocity_to_x0
from ..models import lora
from ..models.attention_sites import checkpoint_activations
from ..run.context import Run
from ..run.errors import SettingError
from ..teacher.teacher import Teacher
from ..training.config import TrainingConfig
from ..training.trainer import ParameterGroup
from ..transfer.config import StudentConfig
from ..transfer.student import Student
from ..transfer.warm_start import feature_maps
from . import dmd2
from .config import DistillationConfig
from .teacher_statistics import Endpoints, TeacherStatistics, motion_of

_BETAS = (0.0, 0.999)


def make_student(
    teacher: Teacher, artifact: Artifact, config: DistillationConfig, *, seed: int
) -> Student:
    """Return a student whose layers are hardened as the artifact's, with untrained feature maps.

    Raises ValueError when the artifact changes whole weights, which LoRA cannot carry on.
    """
    header = artifact.header
    if config.parameters == "lora" and header.parameters == "full":
        raise SettingError(
            "{train} lora was given for a file that changes whole weights; use {train} full",
            "train",
        )
    head_dim = next(iter(artifact.linear.values()))["query_map"].shape[1]
    settings = StudentConfig(
        parameters=config.parameters,
        lora_rank=max(config.lora_rank, header.lora_rank),
        feature_ratio=header.feature_dim // head_dim,
        form=header.form,
    )
    student = Student(teacher, settings, seed=seed)
    student.harden(header.linear_layers)
    return student


@torch.no_grad()
def start_from(student: Student, artifact: Artifact) -> None:
    """Give a student of `make_student` what the artifact holds: maps and weight changes.

    Low-rank changes go on being trained as they are: they fill the first directions of the
    student's, and where it has more, those begin at zero.
    """
    for layer in artifact.header.linear_layers:
        linear = student.mixed[layer].linear
        for name, found in artifact.linear[layer].items():
            linear.get_parameter(name).copy_(found)
    for name, delta in artifact.deltas.items():
        parameter = student.model.get_parameter(name)
        parameter += delta.to(parameter)
    for name, (down, up) in artifact.low_rank.items():
        layer = student.model.get_submodule(name)
        if student.config.parameters == "full":
            layer.weight += (up.float() @ down.float()).to(layer.weight)
        else:
            layer.lora.down[: len(down)] = down
            layer.lora.up[:, : len(down)] = up


class DistillationTask:
    """The task: a critic update at each step, and in its turn one of the student.

    models: all that a step calls, each once.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        statistics: TeacherStatistics,
        config: DistillationConfig,
        *,
        training: TrainingConfig,
        shift: float,
        run: Run,
        endpoints: Endpoints | None = None,
    ) -> None:
        """statistics: of the teacher's videos, to log the student's as shares of them.

        endpoints: where the teacher's trajectories end, for the regression loss.
        """
        self.student = student
        self.teacher = teacher
        self.statistics = statistics
        self.endpoints = endpoints
        self.config = config
        self.training = training
        self.shift = shift
        self.precision = run.precision
        self.processes = run.processes
        self.sigmas = make_sigmas(config.num_steps, shift)
        self._critic_changes: dict[str, lora.LowRank] = {}
        self.critic, self._critic_names = self._make_critic(run.seed)
        self.models = [*dict.fromkeys([teacher.model, student.model, self.critic])]
        if training.activation_checkpointing:
            for model in dict.fromkeys([student.model, self.critic]):
                checkpoint_activations(model, student.sites)

    def _make_critic(self, seed: int) -> tuple[nn.Module, list[str]]:
        if self.config.parameters == "full":
            critic = copy.deepcopy(self.teacher.model).float().requires_grad_(True)
            return critic, [name for name, _ in critic.named_parameters()]
        device = self.teacher.prompt_embeds.device
        self._critic_changes = self.student.add_low_rank(seed + 1, device, adapter="critic")
        for change in self._critic_changes.values():
            change.enabled = False
        names = [f"{name}.critic.{s}" for name in self._critic_changes for s in ("down", "up")]
        return self.student.model, names

    def remove_critic(self) -> None:
        """Take the critic's changes out of the student's model."""
        lora.detach(self.student.model, self._critic_changes, "critic")
        self._critic_changes = {}

    @property
    def critic_weights(self) -> dict[str, nn.Parameter]:
        """The critic's trainable weights by name, as they are now; see `Student.weights`."""
        return {f"critic.{name}": self.critic.get_parameter(name) for name in self._critic_names}

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the student's weights and feature maps, then the critic's weights."""
        linear = {n: m for n, m in self.student.mixed.items() if m.mode == "linear"}
        mine = {"every": self.config.critic_steps, "betas": _BETAS, "network": "generator"}
        critic_rate = self.config.critic_learning_rate
        return [
            ParameterGroup(self.student.weights, self.training.learning_rate, **mine),
            ParameterGroup(feature_maps(linear), self.training.map_learning_rate, **mine),
            ParameterGroup(self.critic_weights, critic_rate, betas=_BETAS, network="critic"),
        ]

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        """Return the critic's loss, plus the student's at every `critic_steps`-th step."""
        is_generator_turn = step % self.config.critic_steps == 0
        rollout, on_device = self._draw_rollout(generator)
        prompt_embeds = self.teacher.prompt_embeds[rollout.prompt.to(rollout.noise.device)]
        latents = dmd2.simulate_backward(
            lambda count: self._bind(self.student.model, prompt_embeds[:count]),
            rollout,
            self.sigmas,
        )
        sigma = self.sigmas[rollout.exits].to(latents.device)
        if is_generator_turn:
            x0, losses = self._learn(latents, sigma, prompt_embeds, generator)
        else:
            with torch.no_grad():
                x0 = self._predict(latents, sigma, prompt_embeds)
        B, share = self.training.batch_size, self.processes.share
        sigma = share(dmd2.draw_score_sigma(B, self.shift, on_device))
        noise = share(torch.randn(B, *x0.shape[1:], generator=on_device, device=x0.device))
        noisy = add_noise(x0.detach(), noise, sigma)
        with self._as_critic():
            fake_velocity = self._bind(self.critic, prompt_embeds)(noisy, sigma)
        critic_loss = dmd2.critic_loss(fake_velocity, x0, noise)
        metrics = {"critic_loss": critic_loss.detach(), **self._compare(x0.detach(), rollout.exits)}
        if not is_generator_turn:
            return critic_loss, metrics
        with torch.no_grad(), self.student.disabled():
            guided = bind_guided(
                self.teacher.model,
                prompt_embeds,
                self.teacher.negatives_for(prompt_embeds),
                self.config.real_guidance_scale,
                precision=self.precision,
            )
            real_velocity = guided(noisy, sigma)
        push = dmd2.distribution_push(x0, noisy, sigma, real_velocity, fake_velocity)
        losses["generator"] = dmd2.generator_loss(x0, push)
        metrics |= {f"{name}_loss": loss.detach() for name, loss in losses.items()}
        weights = {"generator": 1.0, "motion": self.config.motion_weight}
        weights["regression"] = self.config.regression_weight
        return critic_loss + sum(weights[name] * loss for name, loss in losses.items()), metrics

    @contextlib.contextmanager
    def _as_critic(self) -> Iterator[None]:
        """Make the student's model the critic while the context lasts."""
        enabled = dict.fromkeys(self._critic_changes.values(), True)
        with self.student.disabled(), lora.switched(enabled):
            yield

    def _draw_rollout(self, generator: torch.Generator) -> tuple[dmd2.Rollout, torch.Generator]:
        """Draw random prompts, exits and noise; return a generator on the device, too."""
        device = self.teacher.prompt_embeds.device
        B = self.training.batch_size
        prompt = torch.randint(len(self.teacher.prompts), (B,), generator=generator)
        exits = dmd2.draw_exits(B, self.config.num_steps, generator)
        seed = int(torch.randint(2**31, (), generator=generator))
        # A GPU draws a batch's noise in no time; a CPU would take longer than the model.
        on_device = torch.Generator(device).manual_seed(seed)
        shape = self.teacher.latent_shape
        return dmd2.draw_rollout(prompt, exits, shape, on_device, self.processes), on_device

    def _predict(self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor) -> Tensor:
        velocity = self._bind(self.student.model, prompt_embeds)(latents, sigma)
        return velocity_to_x0(latents, velocity, sigma)

    def _learn(
        self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return x0 with a gradient, and the losses that need no score.

        States that are regressed to their endpoints join the same call of the student.
        """
        B, losses = len(latents), {}
        if self.endpoints is not None:
            picks = self.processes.share(self.endpoints.pick(self.training.batch_size, generator))
            states, levels, wanted = self.endpoints.take(picks, latents.device)
            latents, sigma = torch.cat([latents, states.latents]), torch.cat([sigma, levels])
            prompt_embeds = torch.cat([prompt_embeds, self.teacher.prompt_embeds[states.prompt]])
        predicted = self._predict(latents, sigma, prompt_embeds)
        x0 = predicted[:B]
        if self.endpoints is not None:
            losses["regression"] = dmd2.regression_loss(predicted[B:], wanted)
        if self.config.motion_weight:
            losses["motion"] = self._motion_ratio(x0).log().square()
        return x0, losses

    def _compare(self, x0: Tensor, exits: Tensor) -> dict[str, Tensor]:
        """Return what of the teacher's variety all x0 have, and of its motion the last step's."""
        count = int((exits == self.config.num_steps - 1).sum())
        spread = self.processes.std(x0.float()).mean()
        return {
            "spread_ratio": spread / self.statistics.spread,
            "motion_ratio": self._motion_ratio(x0[:count]),
        }

    def _motion_ratio(self, x0: Tensor) -> Tensor:
        """Return the motion of all processes' x0 [B, C, F, H, W] over the teacher's; 1 for stills.

        A process of many may have none: B = 0.
        """
        if not self.statistics.motion:
            return torch.ones((), device=x0.device)
        return self.processes.mean(motion_of(x0), weight=len(x0)) / self.statistics.motion

    def _bind(self, model: nn.Module, prompt_embeds: Tensor) -> VelocityFn:
        return bind(model, prompt_embeds, precision=self.precision)

    def after_step(self, step: int) -> None:
        """Nothing follows a step."""

    def state(self) -> dict[str, Any]:
        """Nothing but the parameters must survive a restart."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""
