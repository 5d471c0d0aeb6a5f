"""Anytime distribution matching in a form that cannot drift: a least-squares score difference.

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
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..flow import euler_step
from .batches import Batch

BatchVelocityFn = Callable[[Tensor, Tensor, Batch], Tensor]
"""`(latents [B, C, F, H, W], sigma [B], batch) -> velocity`; the batch's rows have the prompts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VelocityFns:
    """The velocities that the objective compares.

    student, teacher: in each row's own guidance branch.
    student_guided: both branches combined, as the sampler calls the student.
    """

    student: BatchVelocityFn
    student_guided: BatchVelocityFn
    teacher: BatchVelocityFn


def adm_loss(batch: Batch, velocities: VelocityFns, sigmas: Tensor) -> Tensor:
    """Return the weighted mean squared error of the student's velocity, a scalar.

    sigmas: the sampling grid [steps + 1]. Rows that are not stored move first, by one guided step
    of the student, as in sampling; no gradient flows through the move or the teacher.
    """
    sigmas = sigmas.to(batch.latents.device)
    latents, target = batch.latents, batch.velocity
    if batch.any_moves:
        latents, target = _move(batch, velocities, sigmas)
    error = velocities.student(latents, sigmas[batch.step_to], batch) - target
    return (batch.weight * error.float().square().flatten(1).mean(dim=1)).mean()


@torch.no_grad()
def _move(batch: Batch, velocities: VelocityFns, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """Return all rows' states after the moves, and the teacher's velocities there."""
    rows = (~batch.is_stored).nonzero().squeeze(1).to(sigmas.device)
    # All processes must call a sharded model: one of which no row moves calls it, too.
    moving = batch.take(rows if len(rows) else torch.zeros(1, dtype=torch.int64))
    start, end = sigmas[moving.step], sigmas[moving.step_to]
    jump = velocities.student_guided(moving.latents, start, moving)
    latents = euler_step(moving.latents, jump, start, end)
    velocity = velocities.teacher(latents, end, moving)
    if not len(rows):
        return batch.latents, batch.velocity
    return (
        batch.latents.index_copy(0, rows, latents.to(batch.latents.dtype)),
        batch.velocity.index_copy(0, rows, velocity.to(batch.velocity.dtype)),
    )
