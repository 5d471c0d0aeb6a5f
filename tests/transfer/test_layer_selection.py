"""Which layers become linear: the counts, the losses, the choice."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from linvideo_core.models.attention import LinearAttention, MixedAttention
from linvideo_core.transfer.config import SelectionConfig
from linvideo_core.transfer.layer_selection import choose_layers
from linvideo_core.transfer.student import (
    Selection,
    along_budget,
    alpha_at,
    budget_loss,
    project,
    rounding_loss,
)

SCORES = (0.9, 0.2, 0.45, 0.7, 0.05)


def scores(*values: float) -> Tensor:
    return torch.tensor(values or SCORES, requires_grad=True)


def make_selection(
    num_layers: int = 5, *, num_steps: int = 20, **options: float | str
) -> Selection:
    return Selection(
        make_mixed(*range(num_layers)), SelectionConfig(**{"target": 2, **options}), num_steps
    )


def make_mixed(*layers: int) -> dict[int, MixedAttention]:
    return {layer: MixedAttention(LinearAttention(1, 4, 4), 1.0) for layer in layers}


def set_scores(selection: Selection, values: tuple[float, ...]) -> None:
    for module, value in zip(selection.mixed.values(), values, strict=True):
        module.layer_score.data.fill_(value)


def test_the_budget_loss_counts_the_share_that_is_linear() -> None:
    r = scores()
    count = sum(1 - value for value in SCORES)
    loss = budget_loss(r, 1)
    assert loss.item() == pytest.approx((count - 1) ** 2)
    loss.backward()
    torch.testing.assert_close(r.grad, torch.full((5,), -2 * (count - 1)))
    assert budget_loss(scores(0.0, 0.0, 1.0), 2).item() == 0


@pytest.mark.parametrize("alpha", [2.0, 5.5, 20.0])
def test_the_rounding_loss_and_its_slope_are_closed_forms(alpha: float) -> None:
    r = scores()
    loss = rounding_loss(r, alpha)
    assert loss.item() == pytest.approx(sum(1 - abs(2 * v - 1) ** alpha for v in SCORES))
    loss.backward()
    slopes = [
        -2 * alpha * math.copysign(1, 2 * v - 1) * abs(2 * v - 1) ** (alpha - 1) for v in SCORES
    ]
    torch.testing.assert_close(r.grad, torch.tensor(slopes))


def test_alpha_falls_geometrically_from_20_to_2() -> None:
    assert [alpha_at(share) for share in (0.0, 0.5, 1.0)] == pytest.approx([20, math.sqrt(40), 2])


@pytest.mark.parametrize(("num_layers", "target"), [(1, 1), (5, 2), (30, 16), (7, 7)])
def test_the_start_meets_the_budget_with_equal_scores(num_layers: int, target: int) -> None:
    selection = make_selection(num_layers, target=target)
    r = selection.layer_scores()
    assert r.unique().numel() == 1
    assert budget_loss(r, target).item() == pytest.approx(0, abs=1e-8)
    assert selection.linear_layers is None


def test_the_loss_is_the_weighted_sum_of_both_terms() -> None:
    selection = make_selection(selection_weight=0.3, selection_share=0.5)
    set_scores(selection, SCORES)
    for step, share in ((0, 0.0), (3, 0.5), (6, 1.0), (10, 1.0)):
        r = scores()
        expected = 0.3 * (budget_loss(r, 2) + 10**share * rounding_loss(r, alpha_at(share)))
        torch.testing.assert_close(selection.loss(step), expected)


def test_scores_are_kept_within_zero_and_one() -> None:
    selection = make_selection(selection_share=1.0)
    set_scores(selection, (-0.5, 0.0, 0.3, 1.0, 1.7))
    selection.after_step(0)
    torch.testing.assert_close(
        selection.layer_scores().detach(), torch.tensor([0.0, 0.0, 0.3, 1.0, 1.0])
    )


@given(
    st.lists(st.floats(-1, 2, width=32), min_size=1, max_size=12).flatmap(
        lambda values: st.tuples(st.just(values), st.integers(0, len(values)))
    ),
    st.integers(0, 2**31),
)
def test_projection_is_the_nearest_point_that_meets_the_budget(
    case: tuple[list[float], int], seed: int
) -> None:
    values, target = case
    r = torch.tensor(values)
    found = project(r, target)
    assert (found >= 0).all() and (found <= 1).all()
    assert (1 - found).sum().item() == pytest.approx(target, abs=1e-5)
    # Against a point of the same set: a mixture of two choices of `target` layers.
    generator = torch.Generator().manual_seed(seed)
    other = torch.ones(2, len(values))
    for row in other:
        row[torch.randperm(len(values), generator=generator)[:target]] = 0
    other = torch.lerp(*other, torch.rand((), generator=generator))
    assert (r - found).norm() <= (r - other).norm() + 1e-5
    torch.testing.assert_close(project(found, target), found, rtol=0, atol=1e-5)


def test_along_the_budget_free_scores_move_against_each_other_alone() -> None:
    r = scores(0.0, 0.2, 0.55, 0.9, 1.0)
    found = along_budget(r)
    torch.testing.assert_close(found, r, rtol=0, atol=0)
    weights = torch.tensor([5.0, 1.0, 2.0, 6.0, -4.0])
    (found * weights).sum().backward()
    torch.testing.assert_close(r.grad, torch.tensor([5.0, -2.0, -1.0, 3.0, -4.0]))


@pytest.mark.parametrize(
    ("num_steps", "first", "start", "linear"),
    [
        (120, 0, (0.5, 0.52, 0.55, 0.57, 0.6, 0.61, 0.65), {0, 1, 2}),
        # A score that alone can meet the budget falls, though it lies above one half.
        (80, 40, (0.0, 0.73, 0.94, 0.55, 0.88, 0.9), {0, 3}),
    ],
)
def test_selection_by_its_own_losses_ends_undecided_by_none_and_on_target(
    num_steps: int, first: int, start: tuple[float, ...], linear: set[int]
) -> None:
    selection = make_selection(
        len(start), num_steps=num_steps, selection_share=1.0, target=len(linear)
    )
    set_scores(selection, start)
    optimizer = torch.optim.Adam(selection.trained_scores().values(), lr=0.03)
    for step in range(first, num_steps - 1):
        optimizer.zero_grad()
        selection.loss(step).backward()
        optimizer.step()
        selection.after_step(step)
    ends = torch.tensor([0.0 if layer in linear else 1.0 for layer in range(len(start))])
    torch.testing.assert_close(selection.layer_scores().detach(), ends, rtol=0, atol=0.02)


def test_scores_compete_freely_first_and_are_held_on_the_budget_in_the_end() -> None:
    selection = make_selection(num_steps=20, selection_share=1.0)
    for step, is_held in ((0, False), (11, False), (12, True), (18, True)):
        set_scores(selection, SCORES)
        selection.after_step(step)
        total = (1 - selection.layer_scores()).sum().item()
        expected = 2 if is_held else sum(1 - r for r in SCORES)
        assert total == pytest.approx(expected, abs=1e-5), step


def test_the_choice_is_made_at_its_step_and_stays() -> None:
    selection = make_selection(num_steps=20, selection_share=0.3)
    set_scores(selection, SCORES)
    for step in range(5):
        selection.after_step(step)
        assert selection.linear_layers is None
        assert all(module.mode == "mixed" for module in selection.mixed.values())
        set_scores(selection, SCORES)
    selection.after_step(5)
    assert selection.linear_layers == (1, 4)
    modes = [module.mode for module in selection.mixed.values()]
    assert modes == ["softmax", "linear", "softmax", "softmax", "linear"]
    assert float(selection.loss(6)) == 0
    set_scores(selection, (0.0, 1.0, 0.0, 1.0, 1.0))
    selection.after_step(6)
    assert selection.linear_layers == (1, 4)


def test_of_equal_scores_the_first_are_chosen_and_layers_keep_the_models_numbers() -> None:
    mixed = make_mixed(3, 8, 11)
    selection = Selection(mixed, SelectionConfig(target=2), 1)
    mixed[3].layer_score.data.fill_(0.8)
    selection.after_step(0)
    assert selection.linear_layers == (8, 11)
    selection = make_selection(63, num_steps=1, target=3)
    selection.after_step(0)
    assert selection.linear_layers == (0, 1, 2)


@pytest.mark.parametrize("num_steps", [1, 2, 63])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_training_never_ends_before_the_choice(num_steps: int, share: float) -> None:
    selection = make_selection(num_steps=num_steps, selection_share=share)
    for step in range(num_steps):
        selection.after_step(step)
    assert len(selection.linear_layers) == 2


@pytest.mark.parametrize(
    ("options", "layers", "expected"),
    [
        ({"choice": "alternate", "target": 5}, range(10), (1, 3, 5, 7, 9)),
        ({"choice": "alternate", "target": 3}, range(10), (1, 5, 8)),
        ({"choice": "alternate", "target": 1}, range(10), (5,)),
        ({"layers": "11, 3", "target": 2}, (3, 8, 11), (3, 11)),
        ({"choice": "sensitivity", "target": 2}, (3, 8, 11), (3, 11)),
        ({"target": 1}, (3, 8, 11), None),
    ],
)
def test_a_rule_a_list_or_a_ranking_chooses_and_a_learned_choice_does_not(
    options: dict[str, str | int], layers: tuple[int, ...], expected: tuple[int, ...] | None
) -> None:
    assert choose_layers(SelectionConfig(**options), layers, [11, 3, 8]) == expected


@pytest.mark.parametrize("total", [1, 7, 30])
def test_every_other_layer_is_as_many_different_layers_as_asked_for(total: int) -> None:
    layers = list(range(3, 3 + 2 * total, 2))
    for target in range(1, total + 1):
        picks = choose_layers(SelectionConfig(choice="alternate", target=target), layers)
        assert picks == tuple(sorted(set(picks))) and len(picks) == target
        assert set(picks) <= set(layers)


def test_a_choice_by_sensitivity_needs_a_ranking_of_the_models_layers() -> None:
    with pytest.raises(ValueError, match="a ranking of the layers"):
        choose_layers(SelectionConfig(choice="sensitivity", target=2), [3, 8, 11], [3, 8])


def test_a_fixed_choice_is_hard_from_the_start_and_trains_no_score() -> None:
    mixed = make_mixed(3, 8, 11)
    selection = Selection(mixed, SelectionConfig(target=1), 20, linear_layers=[11])
    assert [module.mode for module in mixed.values()] == ["softmax", "softmax", "linear"]
    assert selection.layer_scores().tolist() == [1, 1, 0]
    assert selection.trained_scores() == {}
    assert not selection.layer_scores().requires_grad
    for step in range(20):
        assert float(selection.loss(step)) == 0
        selection.after_step(step)
    assert selection.linear_layers == (11,)
