"""Distil a linear student to a few steps (DMD2): its three networks and the task of training them.

generator: the student, linear where its file says so; it makes x0 in one call at each of `sigmas`.
real_score: the softmax teacher with guidance, frozen.
fake_score: the critic, softmax, which learns the flow of the student's videos; conditional alone.
With LoRA all three are one model: the student's changes are on, none are, or the critic's are.
"""

import contextlib
import copy
import dataclasses
import functools
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
from ..training.trainer import ParameterGroup, Task
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One process's rows of a part of a step's batch.

    prompt: [B] int64. exits: [B] int64 on the CPU, the step at which each row left the sampler.
    latents, exit_sigma: [B, C, F, H, W] and [B], where the student makes its videos from.
    x0: [B, C, F, H, W], these videos; without a gradient.
    noise, sigma: [B, C, F, H, W] and [B], where scores are compared.
    picks: [B] int64, the states that are regressed to their endings; None: none are.
    """

    prompt: Tensor
    exits: Tensor
    latents: Tensor
    exit_sigma: Tensor
    x0: Tensor
    noise: Tensor
    sigma: Tensor
    picks: Tensor | None


class DistillationTask(Task):
    """The task: a critic update at each step, and in its turn one of the student.

    A step's batch, `batch_size` times `accumulation` videos, is drawn whole and computed in as many
    parts as `accumulation` says. What depends on all of it (the steps at which videos leave the
    sampler, how varied they are, how much they move) is of the whole batch: losses and gradients
    are those of a single pass.

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

    def losses(
        self, step: int, generator: torch.Generator, accumulation: int
    ) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield the losses of a step, each of one network's pass over a part of the batch.

        The critic learns from every part, the student at every `critic_steps`-th step.
        """
        is_students_turn = step % self.config.critic_steps == 0
        parts = self._draw(generator, accumulation, is_students_turn)
        x0 = torch.cat([part.x0 for part in parts])
        metrics = self._compare(x0, torch.cat([part.exits for part in parts]))
        motion = self._motion_ratio(x0)
        weights = {"motion": self.config.motion_weight, "regression": self.config.regression_weight}
        for part in parts:
            for terms in self._passes(part, motion, is_students_turn):
                for name, loss in terms.items():
                    key = f"{name}_loss"
                    metrics[key] = metrics.get(key, 0) + loss.detach() / accumulation
                total = sum(weights.get(name, 1.0) * loss for name, loss in terms.items())
                yield total / accumulation, metrics

    def _passes(
        self, part: Part, motion: Tensor, is_students_turn: bool
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the losses of each pass over a part, by name; motion: see `dmd2.motion_loss`."""
        prompt_embeds = self.teacher.prompt_embeds[part.prompt]
        noisy = add_noise(part.x0, part.noise, part.sigma)
        with self._as_critic():
            fake_velocity = self._bind(self.critic, prompt_embeds)(noisy, part.sigma)
        yield {"critic": dmd2.critic_loss(fake_velocity, part.x0, part.noise)}
        if not is_students_turn:
            return
        real_velocity = self._ask_teacher(noisy, part.sigma, prompt_embeds)
        push = dmd2.distribution_push(part.x0, noisy, part.sigma, real_velocity, fake_velocity)
        del fake_velocity, real_velocity
        # The same x0 once more, now with a gradient, when the critic's activations are gone.
        x0 = self.predict(part.latents, part.exit_sigma, prompt_embeds)
        losses = {"generator": dmd2.generator_loss(x0, push)}
        if self.config.motion_weight and self.statistics.motion:
            own = motion_of(x0) / self.statistics.motion
            losses["motion"] = dmd2.motion_loss(own, motion)
        yield losses
        if part.picks is not None:
            states, sigma, ending = self.endpoints.take(part.picks, x0.device)
            found = self.predict(states.latents, sigma, self.teacher.prompt_embeds[states.prompt])
            yield {"regression": dmd2.regression_loss(found, ending)}

    @torch.no_grad()
    def _ask_teacher(self, noisy: Tensor, sigma: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Return the real score's velocity, guided."""
        with self.student.disabled():
            guided = bind_guided(
                self.teacher.model,
                prompt_embeds,
                self.teacher.negatives_for(prompt_embeds),
                self.config.real_guidance_scale,
                precision=self.precision,
            )
            return guided(noisy, sigma)

    @contextlib.contextmanager
    def _as_critic(self) -> Iterator[None]:
        """Make the student's model the critic while the context lasts."""
        enabled = dict.fromkeys(self._critic_changes.values(), True)
        with self.student.disabled(), lora.switched(enabled):
            yield

    def _draw(
        self, generator: torch.Generator, num_parts: int, is_students_turn: bool
    ) -> list[Part]:
        """Draw a step's whole batch; return this process's rows of its parts, sampled."""
        device, shape = self.teacher.prompt_embeds.device, self.teacher.latent_shape
        B = self.training.batch_size * num_parts
        prompt = torch.randint(len(self.teacher.prompts), (B,), generator=generator)
        exits = dmd2.draw_exits(B, self.config.num_steps, generator)
        seed = int(torch.randint(2**31, (), generator=generator))
        # A GPU draws a batch's noise in no time; a CPU would take longer than the model.
        on_device = torch.Generator(device).manual_seed(seed)
        own = functools.partial(dmd2.split, num_parts=num_parts, processes=self.processes)
        rollouts = dmd2.draw_rollouts(prompt, exits, shape, on_device, num_parts, self.processes)
        sigmas = own(dmd2.draw_score_sigma(B, self.shift, on_device))
        noises = own(torch.randn(B, *shape, generator=on_device, device=device))
        picks: list[Tensor | None] = [None] * num_parts
        if is_students_turn and self.endpoints is not None:
            picks = own(self.endpoints.pick(B, generator))
        rows = zip(rollouts, sigmas, noises, picks, strict=True)
        return [self._sample(r, sigma=s, noise=n, picks=p) for r, s, n, p in rows]

    @torch.no_grad()
    def _sample(self, rollout: dmd2.Rollout, **scored_at: Tensor | None) -> Part:
        """Sample a part's rows up to their exits, and their videos from there."""
        prompt = rollout.prompt.to(rollout.noise.device)
        prompt_embeds = self.teacher.prompt_embeds[prompt]
        latents = dmd2.simulate_backward(
            lambda count: self._bind(self.student.model, prompt_embeds[:count]),
            rollout,
            self.sigmas,
        )
        sigma = self.sigmas[rollout.exits].to(latents.device)
        return Part(
            prompt=prompt,
            exits=rollout.exits,
            latents=latents,
            exit_sigma=sigma,
            x0=self.predict(latents, sigma, prompt_embeds),
            **scored_at,
        )

    def predict(self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Return the x0 [B, C, F, H, W] that the student makes of latents at sigma [B]."""
        velocity = self._bind(self.student.model, prompt_embeds)(latents, sigma)
        return velocity_to_x0(latents, velocity, sigma)

    def _compare(self, x0: Tensor, exits: Tensor) -> dict[str, Tensor]:
        """Return what of the teacher's variety all x0 have, and of its motion the last step's."""
        spread = self.processes.std(x0.float()).mean()
        is_last = exits == self.config.num_steps - 1
        return {
            "spread_ratio": spread / self.statistics.spread,
            "motion_ratio": self._motion_ratio(x0[is_last]),
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
