"""Objectives against a case where everything is known: Gaussian data, affine velocities.

The student's state at t' is N(m', s'^2); its step with u(x) = a x + b makes x_t = x + (t - t') u(x)
Gaussian too. Every expectation here is of a quadratic in x, so the two nodes m' - s' and m' + s'
as a batch make it exact.
"""

import math
from collections.abc import Callable

import pytest
import torch
from linvideo_core.transfer.noise_levels import LEVELS, level_density
from linvideo_core.transfer.objectives import Batch, Players, make_objective, needs_critic
from linvideo_core.transfer.objectives.adm import count_anchored, draw_move, level_weights
from linvideo_core.transfer.objectives.adm_literal import score_difference
from linvideo_core.transfer.objectives.protocol import draw_jump, surrogate_loss
from torch import Tensor, nn

from linvideo_core.flow import euler_step, make_sigmas, velocity_to_score
from linvideo_core.transfer.config import OBJECTIVES, ObjectiveConfig

DATA_MEAN, DATA_STD = 0.6, 0.5
STATE_MEAN, STATE_STD = 0.2, 0.9
SIGMAS = make_sigmas(6, 3.0).double()
NUM_STEPS = len(SIGMAS) - 1
EVEN = level_density(SIGMAS, "even")
CASES = [(1, 2, -0.3, 0.4), (0, 5, 0.8, -0.6), (3, 4, 0.0, 0.0), (4, 5, -0.7, 1.1)]
Moments = tuple[Tensor, Tensor]


def as_latents(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1, 1)


def nodes() -> Tensor:
    """Return the two points whose mean and variance are those of the stored state."""
    return as_latents([STATE_MEAN - STATE_STD, STATE_MEAN + STATE_STD])


def teacher_moments(t: Tensor) -> Moments:
    """Return mean and standard deviation of p_t."""
    return (1 - t) * DATA_MEAN, ((1 - t) ** 2 * DATA_STD**2 + t**2).sqrt()


def gaussian_velocity(x: Tensor, t: Tensor, moments: Moments) -> Tensor:
    """Return the velocity whose score at t is that of N(mean, std^2)."""
    mean, std = moments
    return -(x - t * (x - mean) / std**2) / (1 - t)


def teacher(x: Tensor, sigma: Tensor) -> Tensor:
    """Return E[noise - x0 | x_t] for Gaussian data, at every sigma, 1 included."""
    t = sigma.view(-1, 1, 1, 1, 1)
    mean, std = teacher_moments(t)
    return (t - (1 - t) * DATA_STD**2) / std**2 * (x - mean) - DATA_MEAN


def pushed_moments(a: Tensor, b: Tensor, start: Tensor, end: Tensor) -> Moments:
    """Return mean and standard deviation of q_t, reached from the state by one step."""
    step = end - start
    return STATE_MEAN + step * (a * STATE_MEAN + b), STATE_STD * (1 + step * a)


def parameters(a: float, b: float) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (a, b))


def divergence(q: Moments, p: Moments) -> Tensor:
    """Return KL(q || p) of two Gaussians."""
    (m_q, s_q), (m_p, s_p) = q, p
    return (s_p / s_q).log() + (s_q**2 + (m_q - m_p) ** 2) / (2 * s_p**2) - 0.5


def make_batch(step: int, latents: Tensor | None = None) -> Batch:
    latents = nodes() if latents is None else latents
    steps = torch.full((len(latents),), step)
    sigma = SIGMAS[steps]
    return Batch(latents=latents, velocity=teacher(latents, sigma), step=steps)


def make_players(student: Callable, **others: Callable) -> Players:
    """Return players that know no prompts, so that they play for any part of a batch."""
    named = {"student": student, "student_guided": student, "teacher": teacher, **others}
    return Players(**named, part=lambda _: Players(**named, part=None))


def seed_of_move(step: int, length: int, *, max_jump: int, size: int = 2) -> int:
    """Return a seed with which every sample of the batch moves by exactly `length` points."""
    for seed in range(10_000):
        generator = torch.Generator().manual_seed(seed)
        steps = torch.full((size,), step)
        drawn = draw_move(steps, max_jump, NUM_STEPS, generator)
        if bool((drawn - step == length).all()):
            return seed
    raise AssertionError("no seed draws this jump")


@pytest.mark.parametrize("sigma", [0.05, 0.4, 0.9])
def test_the_cases_own_velocities_have_the_scores_they_claim(sigma: float) -> None:
    x, t = nodes(), torch.full((2,), sigma, dtype=torch.float64)
    mean, std = teacher_moments(t[0])
    torch.testing.assert_close(velocity_to_score(x, teacher(x, t), t), -(x - mean) / std**2)
    torch.testing.assert_close(teacher(x, t), gaussian_velocity(x, t[0], (mean, std)))


@pytest.mark.parametrize(("departed", "reached", "a", "b"), CASES)
def test_score_difference_is_that_of_the_scores(
    departed: int, reached: int, a: float, b: float
) -> None:
    t = SIGMAS[reached]
    q = pushed_moments(torch.tensor(a), torch.tensor(b), SIGMAS[departed], t)
    p = teacher_moments(t)
    x = nodes()
    found = score_difference(x, t.expand(2), teacher(x, t.expand(2)), gaussian_velocity(x, t, q))
    torch.testing.assert_close(found, -(x - q[0]) / q[1] ** 2 + (x - p[0]) / p[1] ** 2)


@pytest.mark.parametrize(("departed", "reached", "a", "b"), CASES)
def test_the_literal_surrogates_gradient_is_that_of_the_kl_divergence(
    departed: int, reached: int, a: float, b: float
) -> None:
    start, end = SIGMAS[departed], SIGMAS[reached]
    theta = parameters(a, b)
    expected = torch.autograd.grad(
        divergence(pushed_moments(*theta, start, end), teacher_moments(end)), theta
    )

    x = nodes()
    latents = euler_step(x, theta[0] * x + theta[1], start.expand(2), end.expand(2))
    own = [m.detach() for m in pushed_moments(*theta, start, end)]
    push = score_difference(
        latents.detach(),
        end.expand(2),
        teacher(latents.detach(), end.expand(2)),
        gaussian_velocity(latents.detach(), end, own),
    )
    # In fp32 inside the surrogate, hence not exact to fp64.
    found = torch.autograd.grad(surrogate_loss(latents, push), theta)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("departed", "a", "b"), [(1, -0.3, 0.4), (3, 0.5, 0.0), (0, 0.2, -1.0)])
def test_the_literal_objectives_gradient_is_that_of_the_kl_divergence(
    departed: int, a: float, b: float
) -> None:
    start, end = SIGMAS[departed], SIGMAS[departed + 1]
    theta = parameters(a, b)
    expected = torch.autograd.grad(
        divergence(pushed_moments(*theta, start, end), teacher_moments(end)), theta
    )
    own = [m.detach() for m in pushed_moments(*theta, start, end)]

    def student(x: Tensor, sigma: Tensor) -> Tensor:
        # A flow whose velocity is its own score, as the method supposes.
        is_departing = bool((sigma == start).all())
        return theta[0] * x + theta[1] if is_departing else gaussian_velocity(x, end, own)

    objective = make_objective(ObjectiveConfig(objective="adm_literal", max_jump=1), SIGMAS)
    loss, _ = objective(make_batch(departed), make_players(student), 0, torch.Generator())
    found = torch.autograd.grad(loss, theta)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_literal_objective_leaves_states_that_cannot_move_alone() -> None:
    theta = parameters(0.3, -0.2)
    objective = make_objective(ObjectiveConfig(objective="adm_literal"), SIGMAS)
    batch = make_batch(NUM_STEPS - 1)
    student = lambda x, sigma: theta[0] * x + theta[1]  # noqa: E731
    loss, _ = objective(batch, make_players(student), 0, torch.Generator())
    found = torch.autograd.grad(loss, theta, allow_unused=True)
    assert all(g is None or float(g) == 0 for g in found)


@pytest.mark.parametrize(("departed", "length"), [(1, 1), (1, 4), (2, 2)])
def test_the_stable_form_is_the_weighted_fisher_divergence(departed: int, length: int) -> None:
    start, end = SIGMAS[departed], SIGMAS[departed + length]
    q = pushed_moments(torch.tensor(-0.3), torch.tensor(0.4), start, end)
    p = teacher_moments(end)

    def student(x: Tensor, sigma: Tensor) -> Tensor:
        return gaussian_velocity(x, end, q)

    def student_guided(x: Tensor, sigma: Tensor) -> Tensor:
        return -0.3 * x + 0.4

    config = ObjectiveConfig(objective="adm", max_jump=4, anchor_share=0.0, levels="even")
    objective = make_objective(config, SIGMAS)
    seed = seed_of_move(departed, length, max_jump=4)
    players = make_players(student, student_guided=student_guided)
    generator = torch.Generator().manual_seed(seed)
    loss, _ = objective(make_batch(departed), players, 0, generator)

    slope = 1 / p[1] ** 2 - 1 / q[1] ** 2
    offset = q[0] / q[1] ** 2 - p[0] / p[1] ** 2
    fisher = (slope * q[0] + offset) ** 2 + slope**2 * q[1] ** 2
    weight = (end / (1 - end)) ** 2 * level_weights(4, EVEN)[departed + length]
    torch.testing.assert_close(loss.double(), weight * fisher, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("departed", [0, 2, NUM_STEPS - 1])
def test_the_stable_form_rests_exactly_where_the_velocities_agree(departed: int) -> None:
    objective = make_objective(ObjectiveConfig(objective="adm"), SIGMAS)

    def evaluate(offset: float, slope: float) -> tuple[float, float]:
        theta = parameters(offset, slope)
        student = lambda x, s: teacher(x, s) + theta[0] + theta[1] * x  # noqa: E731
        generator = torch.Generator().manual_seed(1)
        loss, _ = objective(make_batch(departed), make_players(student), 0, generator)
        gradient = torch.autograd.grad(loss, theta)
        return loss.item(), torch.stack(gradient).abs().max().item()

    assert evaluate(0.0, 0.0) == (0.0, 0.0)
    for offset, slope in ((0.1, 0.0), (0.0, -0.1), (1e-3, 2e-3)):
        loss, gradient = evaluate(offset, slope)
        assert loss > 0
        assert gradient > 0


def test_the_stable_forms_gradient_stops_at_the_jump() -> None:
    theta = parameters(-0.3, 0.4)
    student = lambda x, sigma: theta[0] * x + theta[1]  # noqa: E731
    departed, length = 1, 3
    start, end = (SIGMAS[i].expand(2) for i in (departed, departed + length))
    with torch.no_grad():
        reached = euler_step(nodes(), student(nodes(), start), start, end)
    expected_loss = (student(reached, end) - teacher(reached, end)).square().mean()
    expected_loss = expected_loss * level_weights(4, EVEN)[departed + length]
    config = ObjectiveConfig(objective="adm", max_jump=4, anchor_share=0.0, levels="even")
    objective = make_objective(config, SIGMAS)
    generator = torch.Generator().manual_seed(seed_of_move(departed, length, max_jump=4))
    loss, _ = objective(make_batch(departed), make_players(student), 0, generator)
    torch.testing.assert_close(
        torch.autograd.grad(loss, theta),
        torch.autograd.grad(expected_loss, theta),
        rtol=1e-5,
        atol=1e-7,
    )


def test_the_stable_form_moves_as_the_sampler_does() -> None:
    seen: list[str] = []

    def note(name: str) -> Callable:
        return lambda x, sigma: (seen.append(name), teacher(x, sigma))[1]

    players = make_players(note("student"), student_guided=note("guided"), teacher=note("teacher"))
    objective = make_objective(ObjectiveConfig(objective="adm"), SIGMAS)
    objective(make_batch(1), players, 0, torch.Generator().manual_seed(0))
    assert seen == ["guided", "teacher", "student"]


def test_anchored_alone_it_is_velocity_matching() -> None:
    theta = parameters(-0.3, 0.4)
    student = lambda x, sigma: theta[0] * x + theta[1]  # noqa: E731
    batch = make_batch(2)
    gradients = []
    for name in ("adm", "velocity"):
        objective = make_objective(ObjectiveConfig(objective=name, anchor_share=1.0), SIGMAS)
        loss, _ = objective(batch, make_players(student), 0, torch.Generator())
        gradients.append((loss, *torch.autograd.grad(loss, theta)))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("anchor_share", [0.3, 0.5])
def test_a_share_of_the_batch_stays_where_it_was_stored(anchor_share: float) -> None:
    batch = make_batch(2, as_latents([0.1 * i for i in range(10)]))
    seen = {}

    def note(name: str) -> Callable:
        return lambda x, sigma: (seen.__setitem__(name, (x, sigma)), teacher(x, sigma))[1]

    players = make_players(note("student"), student_guided=note("guided"), teacher=note("teacher"))
    config = ObjectiveConfig(objective="adm", anchor_share=anchor_share)
    make_objective(config, SIGMAS)(batch, players, 0, torch.Generator().manual_seed(0))
    stays = round(10 * anchor_share)
    torch.testing.assert_close(seen["guided"][0], batch.latents[stays:])
    torch.testing.assert_close(seen["student"][0][:stays], batch.latents[:stays])
    torch.testing.assert_close(seen["student"][0][stays:], seen["teacher"][0])
    assert bool((seen["student"][1][:stays] == SIGMAS[2]).all())
    assert bool((seen["student"][1][stays:] < SIGMAS[2]).all())


@pytest.mark.parametrize(("num_samples", "share"), [(1, 0.5), (3, 0.5), (7, 0.3), (10, 0.3)])
def test_the_share_of_anchored_samples_is_met_on_average(num_samples: int, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = [count_anchored(num_samples, share, generator) for _ in range(2000)]
    assert sum(counts) / len(counts) == pytest.approx(num_samples * share, abs=0.04)
    assert max(counts) - min(counts) <= 1 and min(counts) == int(num_samples * share)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize(("max_jump", "num_steps"), [(1, 2), (6, 50), (3, 7), (100, 20), (4, 1)])
def test_every_noise_level_that_a_move_reaches_counts_as_it_is_drawn(
    max_jump: int, num_steps: int, levels: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    density = level_density(make_sigmas(num_steps, 3.0), levels)
    # Evenly many samples, each worth its level's density, are as many as that would draw.
    steps = torch.arange(num_steps).repeat(4000)
    worth = density[steps] * num_steps
    reached = draw_move(steps, max_jump, num_steps, generator)
    moves = reached - steps
    room = (num_steps - 1 - steps).clamp(max=max_jump)
    assert bool((moves <= room).all()) and bool((moves >= room.clamp(max=1)).all())
    weights = level_weights(max_jump, density)
    weight_at = torch.zeros(num_steps).index_add_(0, reached, worth * weights[reached])
    is_reached = weights > 0
    assert is_reached.tolist() == [num_steps == 1] + [True] * (num_steps - 1)
    expected = torch.where(is_reached, density, 0) / density[is_reached].sum()
    torch.testing.assert_close(weight_at / len(reached), expected, rtol=0.1, atol=0)


def test_velocity_matching_is_the_mean_squared_error_to_the_stored_velocity() -> None:
    batch = make_batch(2)
    objective = make_objective(ObjectiveConfig(objective="velocity"), SIGMAS)
    player = lambda x, sigma: 0.5 * x  # noqa: E731
    loss, _ = objective(batch, make_players(player), 0, torch.Generator())
    expected = (0.5 * batch.latents - batch.velocity).square().mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)


class Affine(nn.Module):
    """A model with an offset to learn around a given velocity."""

    def __init__(self, base: Callable, offset: float) -> None:
        super().__init__()
        self.base = base
        self.offset = nn.Parameter(torch.tensor(offset, dtype=torch.float64))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the given velocity, moved by the offset."""
        return self.base(x, sigma) + self.offset


def dmd_gradients(
    student_offset: float, critic_offset: float, step: int
) -> tuple[Tensor | None, Tensor | None]:
    student, critic = Affine(teacher, student_offset), Affine(teacher, critic_offset)
    objective = make_objective(ObjectiveConfig(objective="dmd", critic_steps=5), SIGMAS)
    generator = torch.Generator().manual_seed(4)
    players = make_players(student, critic=critic)
    loss, _ = objective(make_batch(2), players, step, generator)
    loss.backward()
    return student.offset.grad, critic.offset.grad


def test_the_critics_loss_never_moves_the_student() -> None:
    # Critic and teacher agree: nothing pushes the student, while the critic itself must move.
    student, critic = dmd_gradients(0.7, 0.0, step=0)
    assert float(student) == 0
    assert float(critic.abs()) > 1e-3


def test_the_students_push_never_moves_the_critic() -> None:
    _, with_push = dmd_gradients(0.7, 0.3, step=0)
    student, without_push = dmd_gradients(0.7, 0.3, step=1)
    assert student is None
    torch.testing.assert_close(with_push, without_push, rtol=0, atol=0)


def test_the_student_is_pushed_away_from_the_critic_towards_the_teacher() -> None:
    # The critic's velocity lies above the teacher's: its x0 lies below, so x0 must rise and the
    # student's velocity fall; descent lowers the offset where its gradient is positive.
    for offset in (0.5, -0.5):
        student, _ = dmd_gradients(0.7, offset, step=5)
        assert math.copysign(1, float(student)) == math.copysign(1, offset)


def test_only_dmd_needs_a_critic() -> None:
    needing = [name for name in OBJECTIVES if needs_critic(ObjectiveConfig(objective=name))]
    assert needing == ["dmd"]


@pytest.mark.parametrize(("min_jump", "max_jump"), [(0, 1), (0, 6), (1, 6), (1, 100)])
def test_a_jump_stays_on_the_grid_and_reaches_every_length(min_jump: int, max_jump: int) -> None:
    generator = torch.Generator().manual_seed(0)
    num_steps = 50
    steps = torch.arange(num_steps).repeat(63)
    reached = draw_jump(steps, max_jump, min_jump, num_steps, generator)
    jumps = reached - steps
    assert reached.dtype == torch.int64
    assert bool((reached <= num_steps - 1).all())
    free = steps + max_jump <= num_steps - 1
    if bool(free.any()):
        assert set(jumps[free].tolist()) == set(range(min_jump, max_jump + 1))
    assert bool((jumps[steps == num_steps - 1] == 0).all())
    assert bool((jumps >= 0).all())


@pytest.mark.parametrize("num_steps", [1, 2, 50])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_finite_at_both_ends_of_the_grid(name: str, num_steps: int) -> None:
    sigmas = make_sigmas(num_steps, 5.0).double()
    objective = make_objective(ObjectiveConfig(objective=name), sigmas)
    latents = torch.cat([nodes()] * 4)
    steps = torch.tensor([0, num_steps - 1] * 4)
    batch = Batch(latents=latents, velocity=teacher(latents, sigmas[steps]), step=steps)
    student, critic = Affine(teacher, 0.4), Affine(teacher, -0.2)
    players = make_players(student, critic=critic)
    loss, metrics = objective(batch, players, 0, torch.Generator().manual_seed(0))
    assert loss.shape == ()
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(student.offset.grad))
    assert all(bool(torch.isfinite(value)) for value in metrics.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_velocity_matching_comes_first_for_its_share_of_the_steps(name: str) -> None:
    config = ObjectiveConfig(objective=name, velocity_share=0.3)
    objectives = {
        "staged": make_objective(config, SIGMAS, 10),
        "velocity": make_objective(ObjectiveConfig(objective="velocity"), SIGMAS),
        name: make_objective(ObjectiveConfig(objective=name), SIGMAS),
    }
    players = make_players(Affine(teacher, 0.4), critic=Affine(teacher, -0.2))
    for step in (0, 2, 3, 9):
        generators = {kind: torch.Generator().manual_seed(step) for kind in objectives}
        losses = {
            kind: objective(make_batch(1), players, step, generators[kind])[0]
            for kind, objective in objectives.items()
        }
        expected = losses["velocity" if step < 3 else name]
        torch.testing.assert_close(losses["staged"], expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_generator_alone_decides_a_loss(name: str) -> None:
    objective = make_objective(ObjectiveConfig(objective=name), SIGMAS)
    players = make_players(Affine(teacher, 0.4), critic=Affine(teacher, -0.2))
    losses = [
        objective(make_batch(1), players, 0, torch.Generator().manual_seed(3))[0] for _ in range(2)
    ]
    torch.testing.assert_close(*losses, rtol=0, atol=0)


def test_the_surrogates_gradient_is_the_push_over_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, push = torch.randn(2, 3, 2, 1, 3, 5, generator=generator)
    latents.requires_grad_(True)
    push.requires_grad_(True)
    surrogate_loss(latents, push).backward()
    torch.testing.assert_close(latents.grad, push.detach() / push.numel())
    assert push.grad is None


@pytest.mark.parametrize(
    "options",
    [
        {"max_jump": 0},
        {"prompt_dropout": 1.1},
        {"anchor_share": -0.1},
        {"velocity_share": 2.0},
        {"critic_steps": 0},
        {"critic_learning_rate": 0.0},
    ],
)
def test_impossible_settings_are_refused_by_flag(options: dict[str, float]) -> None:
    flag = "--" + next(iter(options)).replace("_", "-")
    with pytest.raises(ValueError, match=flag):
        ObjectiveConfig(**options)
