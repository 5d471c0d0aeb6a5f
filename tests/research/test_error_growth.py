"""What flows make of errors: where all is known."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from linvideo_core.flow import make_sigmas, sample_euler
from research import error_growth

SIGMAS = make_sigmas(10, 3.0).double()


def factor(point: int, rate: float) -> float:
    """Return what the flow with u(x) = rate x makes of a push behind a grid point."""
    return float((1 + rate * (SIGMAS[point + 2 :] - SIGMAS[point + 1 : -1])).prod())


@pytest.mark.parametrize("rate", [-1.5, 0.0, 0.7])
def test_the_gain_of_a_linear_flow_is_the_square_of_its_factor(rate: float) -> None:
    def teacher(x: Tensor, sigma: Tensor) -> Tensor:
        return rate * x

    noise = torch.randn(3, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    states: list[Tensor] = []
    states.append(sample_euler(teacher, noise, SIGMAS, on_step=lambda _, x, __: states.append(x)))
    errors = {point: torch.ones_like(noise) * (point + 1) for point in (0, 4, 9)}
    rows = error_growth.measure(teacher, states, errors, SIGMAS)
    assert [row["gain"] for row in rows] == pytest.approx([factor(p, rate) ** 2 for p in errors])
    assert [row["error"] for row in rows] == pytest.approx([(p + 1) ** 2 for p in errors])


def test_a_student_errs_where_it_has_come_to_as_its_velocity_says() -> None:
    """Teacher u(x) = 2 x, student u(x) = 3 x: at its state x they differ by x."""
    state, own = torch.full((2, 1, 1, 1, 1), 5.0), torch.full((2, 1, 1, 1, 1), 4.0)
    rows = error_growth.measure_straying(lambda x, _: 2 * x, [0], [state], [own], [3 * own], SIGMAS)
    assert rows == [{"strayed": 1.0, "own_error": 16.0}]


def test_errors_weighted_by_the_flow_bound_what_the_end_is_off_by() -> None:
    """The bound of `level_density`, where the gain is known instead of fitted."""
    rate, errors = -1.5, torch.tensor([0.1, -0.3, 0.2, 0.0, 0.5, 0.4, -0.1, 0.3, 0.2, 0.6])
    step = iter(range(10))

    def student(x: Tensor, sigma: Tensor) -> Tensor:
        return rate * x + errors[next(step)]

    noise = torch.ones(1, 1, 1, 1, 1).double()
    end = sample_euler(lambda x, _: rate * x, noise, SIGMAS)
    off = (sample_euler(student, noise, SIGMAS) - end).abs().item()
    weights = torch.tensor([abs(factor(p, rate)) for p in range(10)]) * (SIGMAS[:-1] - SIGMAS[1:])
    assert 0 < off**2 <= float(weights.sum() * (weights * errors.square()).sum())


def test_the_embedded_models_flow_is_measured(tmp_path: Path) -> None:
    given = ["--videos", "1", "--points", "2", "--steps", "3", "--out", str(tmp_path)]
    error_growth.main([*given, "--device", "cpu"])
    rows = json.loads((tmp_path / error_growth.NAME).read_text())["rows"]
    assert [row["sigma"] for row in rows] == pytest.approx([1, make_sigmas(3, 3.0)[2].item()])
    assert all(row["gain"] > 0 and row["error"] > 0 for row in rows)
    # From the same noise: at first it has not strayed, and errs as it does there.
    first, last = rows
    assert first["strayed"] == 0 and first["own_error"] == pytest.approx(first["error"], rel=1e-4)
    assert last["strayed"] > 0 and last["own_error"] > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--points", "30"], "--points 30 given; at most --steps 25"),
        (["--model", "a.safetensors"], "--model was given without --artifact"),
        (["--record", "--artifact", "a.safetensors"], "--record was given with"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        error_growth.main(given)
    assert said in str(error.value) + capsys.readouterr().err
