"""The objective: which states a batch is trained at, and anytime distribution matching there.

LinVideo's ADM (eq. 8) pushes the student's state x^_t along `s_p - s_q`, the score of the teacher
less the student's own. Both scores are affine in a velocity, `s_p - s_q = -(1 - t)/t (u_p - u_q)`,
so the push vanishes where the two velocities agree at the states that the student itself reaches.
The literal push acts on the parameters through the step that led to x^_t: what linear attention
cannot represent stays in it as a constant force and nothing balances it. Here the same two
velocities at the same states make the weighted Fisher divergence

    E_{x ~ q_t} w(t) |s_q(x) - s_p(x)|^2,    with w(t) = (t / (1 - t))^2, hence |u_q - u_p|^2,

whose gradient is taken at (x^_t, t) through u_q alone: bounded below, zero only at the same fixed
point, no critic.

A share of each batch stays at its stored state, where the teacher's velocity is known: plain
velocity matching, which keeps the student near the states that the teacher's sampler visits, and
costs nothing more. With all rows stored it is velocity matching and nothing else.

Of a trajectory pool (`teacher.pool`) every row stays where it is: the same share of its videos is
moved by the teacher, and the others, which the student moves from noise to video, are where the
student's own sampling leads.

Noise levels. A student's velocity is wrong by e_i at the grid point i. To first order its video
ends

    sum_i  J_i (s_i - s_i+1) e_i

away from the teacher's, with J_i what the teacher's own flow makes of a small push on the way from
there to the end. By Cauchy and Schwarz the square of that is at most

    (sum_i a_i) (sum_i a_i |e_i|^2),    a_i = (s_i - s_i+1) |J_i|,

so a squared error that weighs each level by a_i bounds the error of the video. |J_i|^2, the gain,
was measured (docs/evidence.md): an error hardly grows below s = 0.8, and its square a
thousandfold near s = 1, where what is drawn is decided.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..flow import euler_step
from ..run.process_group import SINGLE_PROCESS, ProcessGroup
from ..teacher.pool import GuidedFn, TrajectoryPool
from ..teacher.teacher import Teacher
from ..teacher.trajectories import States, Trajectories
from .config import ObjectiveConfig

# Of the order of what is measured at s = 1 itself, where the formula of the gain has no limit.
_MOST_GAIN = 1600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One process's rows of a batch: states of trajectories.

    latents, velocity: [B, C, F, H, W], a state as it was drawn and the teacher's velocity there,
        in the row's guidance branch.
    unconditional: [B, C, F, H, W], the teacher's velocity there in the branch without the prompt.
    step: [B] int64, the state's index into the sampling grid.
    is_stored: [B] bool on the CPU, whether the student is trained at the stored state itself; if
        not, it first moves by one step of its own. Stored rows come first.
    step_to: [B] int64, grid index of the state that the student is trained at.
    weight: [B], of the row in the loss.
    branch_embeds: [B, S, T], the prompt of the row's branch.
    prompt_embeds, negative_embeds: [B, S, T], the prompts of both branches, for guidance.
    any_moves: whether any row of the whole batch moves.
    """

    latents: Tensor
    velocity: Tensor
    unconditional: Tensor
    step: Tensor
    is_stored: Tensor
    step_to: Tensor
    weight: Tensor
    branch_embeds: Tensor
    prompt_embeds: Tensor
    negative_embeds: Tensor
    any_moves: bool

    def take(self, rows: slice) -> "Batch":
        """Return some rows, as views."""
        tensors = {
            field.name: value[rows]
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return Batch(**tensors, any_moves=self.any_moves)


class Batches:
    """The batches of one training, and the one place where they are divided among processes.

    All processes draw a batch whole, each keeps its rows. Sampling calls both guidance branches, so
    both are trained: guidance multiplies the error of either.
    """

    def __init__(
        self,
        teacher: Teacher,
        trajectories: Trajectories | TrajectoryPool,
        config: ObjectiveConfig,
        batch_size: int,
        processes: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        """batch_size: over all processes."""
        self.teacher = teacher
        self.trajectories = trajectories
        self.config = config
        self.batch_size = batch_size
        self.processes = processes
        self.pool = trajectories if isinstance(trajectories, TrajectoryPool) else None
        density = level_density(trajectories.sigmas, config.levels)
        self.level_weights = level_weights(config.max_jump, density)
        self.state_weights = None
        if self.pool is None and config.levels != "even":
            self.state_weights = trajectories.weigh(density)

    def draw(self, generator: torch.Generator, student: GuidedFn | None = None) -> Batch:
        """Draw a batch; return this process's rows, on the teacher's device.

        student: moves those of a pool's videos that adm does not leave to the teacher.
        """
        B, own = self.batch_size, slice(self.processes.rank, None, self.processes.size)
        states = self._draw_states(generator, student)
        device = states.latents.device
        is_dropped = (torch.rand(B, generator=generator) < self.config.prompt_dropout)[own]
        is_stored, step_to, weight = torch.ones(B, dtype=torch.bool), states.step, torch.ones(())
        if self.config.objective == "adm" and self.pool is None:
            is_stored = torch.arange(B) < count_stored(B, self.config.anchor_share, generator)
            moves = torch.rand(B, generator=generator)[own]
            num_steps = len(self.trajectories.sigmas) - 1
            step_to = move(states.step, moves.to(device), self.config.max_jump, num_steps)
            weight = self.level_weights.to(device)[step_to]
        stored = is_stored[own].to(device)
        is_dropped = is_dropped.to(device)
        velocity = torch.where(
            is_dropped.view(-1, 1, 1, 1, 1), states.unconditional, states.conditional
        )
        prompt_embeds = self.teacher.prompt_embeds[states.prompt]
        negative_embeds = self.teacher.negatives_for(prompt_embeds, states.negative)
        return Batch(
            latents=states.latents,
            velocity=velocity,
            unconditional=states.unconditional,
            step=states.step,
            is_stored=is_stored[own],
            step_to=torch.where(stored, states.step, step_to),
            weight=torch.where(stored, 1.0, weight),
            branch_embeds=torch.where(is_dropped.view(-1, 1, 1), negative_embeds, prompt_embeds),
            prompt_embeds=prompt_embeds,
            negative_embeds=negative_embeds,
            any_moves=not bool(is_stored.all()),
        )

    def _draw_states(self, generator: torch.Generator, student: GuidedFn | None) -> States:
        if self.pool is not None:
            is_adm = self.config.objective == "adm"
            share = 1 - self.config.anchor_share if is_adm else 0.0
            return self.pool.draw(generator, student, share)
        picks = self.trajectories.pick(self.batch_size, generator, self.state_weights)
        device = self.teacher.prompt_embeds.device
        return self.trajectories.take(self.processes.share(picks), device)

    def after_step(self) -> None:
        """Make a pool's videos, as they are now, those that the next step finds."""
        if self.pool is not None:
            self.pool.keep()

    def state(self) -> dict[str, Any]:
        """Return what must survive a restart: a pool's videos."""
        return {} if self.pool is None else self.pool.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        if self.pool is not None:
            self.pool.load_state(state)


def count_stored(num_samples: int, share: float, generator: torch.Generator) -> int:
    """Return how many of a batch's rows stay at their stored state: `share` of them on average.

    Where that is no whole number, one more by chance: of batches of one, every other stays.
    """
    wanted = round(num_samples * share, 6)
    if wanted.is_integer():
        return int(wanted)
    return int(wanted + torch.rand((), generator=generator).item())


def move(step: Tensor, uniform: Tensor, max_jump: int, num_steps: int) -> Tensor:
    """Return the grid index [B] that each row moves to: 1 to `max_jump` points on, evenly.

    Where fewer points are left, among those; at the last index nothing moves.

    step: [B] int64; uniform: [B], random numbers in [0, 1).
    """
    room = (num_steps - 1 - step).clamp(max=max_jump)
    return step + torch.minimum((uniform * room).long() + 1, room)


def level_weights(max_jump: int, density: Tensor) -> Tensor:
    """Return the weight [num_steps] fp32 of a row that has moved to each grid index.

    Moves lead away from high noise, where motion is decided. With these weights each level that can
    be reached counts as likely as it is drawn; they are 1 on average over the draws, and 0 where no
    move leads.

    density: [num_steps], how likely a row starts at each index.
    """
    num_steps = len(density)
    visits = torch.zeros(num_steps)
    for step in range(num_steps):
        room = min(max_jump, num_steps - 1 - step)
        visits[step + 1 : step + room + 1] += density[step] / max(1, room)
        visits[step] += density[step] * (room == 0)
    is_reached = visits > 0
    weights = density / (density[is_reached].sum() * visits)
    return torch.where(is_reached, weights, torch.zeros(()))


def fitted_gain(sigma: Tensor) -> Tensor:
    """Return `1 + (s / (1 - s))^2 / 4`, at most 1600, for noise levels of any shape.

    Below s = 0.9 it is at most 1.6 times what was measured on the embedded model, nearer to 1 about
    a third: there a few videos become others, and their mean is all of the gain.
    """
    return (1 + (sigma / (1 - sigma)).square() / 4).clamp(max=_MOST_GAIN)


def level_density(sigmas: Tensor, levels: str) -> Tensor:
    """Return how likely each level is to be drawn, [steps] fp32 that sum to 1.

    sigmas: the sampling grid [steps + 1]. levels: one of LEVELS.
    """
    if levels == "even":
        return torch.full((len(sigmas) - 1,), 1 / (len(sigmas) - 1))
    weights = (sigmas[:-1] - sigmas[1:]) * fitted_gain(sigmas[:-1]).sqrt()
    return weights / weights.sum()


BatchVelocityFn = Callable[[Tensor, Tensor, Batch], Tensor]
"""`(latents [B, C, F, H, W], sigma [B], batch) -> velocity`; the batch's rows have the prompts."""


def adm_loss(
    batch: Batch,
    sigmas: Tensor,
    *,
    student: BatchVelocityFn,
    student_guided: BatchVelocityFn,
    teacher: BatchVelocityFn,
) -> Tensor:
    """Return the weighted mean squared error of the student's velocity, a scalar.

    sigmas: the sampling grid [steps + 1].
    student, teacher: in each row's own guidance branch; student_guided: both branches combined, as
        the sampler calls the student.

    Rows that are not stored move first, by one guided step of the student, as in sampling; no
    gradient flows through the move or the teacher.
    """
    sigmas = sigmas.to(batch.latents.device)
    latents, target = batch.latents, batch.velocity
    if batch.any_moves:
        latents, target = _move(batch, sigmas, student_guided, teacher)
    error = student(latents, sigmas[batch.step_to], batch) - target
    return (batch.weight * error.float().square().flatten(1).mean(dim=1)).mean()


@torch.no_grad()
def _move(
    batch: Batch, sigmas: Tensor, student_guided: BatchVelocityFn, teacher: BatchVelocityFn
) -> tuple[Tensor, Tensor]:
    """Return all rows' states after the moves, and the teacher's velocities there."""
    # Stored rows come first. All processes must call a sharded model: one of which no row moves
    # calls it with a row whose result it drops.
    num_stored = int(batch.is_stored.sum())
    first = min(num_stored, len(batch.is_stored) - 1)
    moving = batch.take(slice(first, None))
    start, end = sigmas[moving.step], sigmas[moving.step_to]
    jump = student_guided(moving.latents, start, moving)
    latents = euler_step(moving.latents, jump, start, end)
    velocity = teacher(latents, end, moving)
    moved = slice(num_stored - first, None)
    return (
        torch.cat([batch.latents[:num_stored], latents[moved]]),
        torch.cat([batch.velocity[:num_stored], velocity[moved]]),
    )
