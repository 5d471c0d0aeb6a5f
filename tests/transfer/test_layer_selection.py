"""Which layers become linear: the counts, the losses, the choice."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linvideo_core.transfer.layer_selection.scores import (
    BUDGETS,
    along_budget,
    budget_loss,
    project,
    rounding_loss,
)
from torch import Tensor

from linvideo_core.models.attention import LinearAttention, MixedAttention
from linvideo_core.transfer.config import SelectionConfig
from linvideo_core.transfer.layer_selection.rules import (
    Selection,
    alpha_at,
    check_layers,
    choose,
    choose_layers,
    start_scores,
)

SCORES = (0.9, 0.2, 0.45, 0.7, 0.05)


def scores(*values: float) -> Tensor:
    return torch.tensor(values or SCORES, requires_grad=True)


def make_selection(
    num_layers: int = 5, *, num_steps: int = 20, **options: float | str
) -> Selection:
    mixed = {i: MixedAttention(LinearAttention(1, 4, 4), 1.0) for i in range(num_layers)}
    return Selection(mixed, SelectionConfig(**{"target": 2, **options}), num_steps)


def set_scores(selection: Selection, values: tuple[float, ...]) -> None:
    for module, value in zip(selection.mixed.values(), values, strict=True):
        module.layer_score.data.fill_(value)


def test_the_rounded_budget_counts_layers_and_passes_the_gradient_straight_through() -> None:
    r = scores()
    loss = budget_loss(r, 1, "rounded")
    # Three of the five lie below one half; one is wanted.
    assert loss.item() == 4
    loss.backward()
    torch.testing.assert_close(r.grad, torch.full((5,), 2.0 * (3 - 1) * -1))


def test_the_sum_budget_counts_the_unrounded_share() -> None:
    r = scores()
    count = sum(1 - value for value in SCORES)
    loss = budget_loss(r, 1, "sum")
    assert loss.item() == pytest.approx((count - 1) ** 2)
    loss.backward()
    torch.testing.assert_close(r.grad, torch.full((5,), -2 * (count - 1)))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("target", [1, 3])
def test_a_budget_is_zero_exactly_on_target(budget: str, target: int) -> None:
    r = scores(*[0.0] * target, *[1.0] * (5 - target))
    for wanted in range(1, 6):
        assert budget_loss(r, wanted, budget).item() == (target - wanted) ** 2


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


@pytest.mark.parametrize("alpha", [2.0, 20.0])
def test_the_rounding_loss_is_zero_only_at_zero_and_one(alpha: float) -> None:
    assert rounding_loss(scores(0.0, 1.0, 1.0), alpha).item() == 0
    for value in torch.linspace(0, 1, 63)[1:-1]:
        assert float(rounding_loss(value[None], alpha)) > 0


def test_the_rounding_loss_drives_r_to_the_nearer_end_and_rests_at_one_half() -> None:
    r = scores(0.3, 0.5, 0.7)
    rounding_loss(r, 2.0).backward()
    # Descent moves against the gradient.
    assert float(r.grad[0]) > 0
    assert float(r.grad[1]) == 0
    assert float(r.grad[2]) < 0


def test_alpha_falls_geometrically_from_its_start_to_its_end() -> None:
    config = SelectionConfig(alpha_start=20.0, alpha_end=2.0)
    assert alpha_at(config, 0.0) == pytest.approx(20)
    assert alpha_at(config, 0.5) == pytest.approx(math.sqrt(40))
    assert alpha_at(config, 1.0) == pytest.approx(2)


@pytest.mark.parametrize("target", [1, 2, 5])
def test_choose_picks_exactly_target_layers_with_the_lowest_r(target: int) -> None:
    picks = choose(torch.tensor(SCORES), target)
    assert picks == tuple(sorted(sorted(range(5), key=lambda i: SCORES[i])[:target]))


def test_equal_scores_are_chosen_in_depth_order() -> None:
    assert choose(torch.full((63,), 0.5), 3) == (0, 1, 2)


@pytest.mark.parametrize(("num_layers", "target"), [(1, 1), (5, 2), (30, 16), (7, 7)])
def test_the_start_meets_the_budget_with_equal_scores(num_layers: int, target: int) -> None:
    selection = make_selection(num_layers, target=target)
    r = selection.layer_scores()
    assert r.unique().numel() == 1
    assert budget_loss(r, target, "sum").item() == pytest.approx(0, abs=1e-8)
    assert selection.layers is None


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_loss_is_the_weighted_sum_of_both_terms(budget: str) -> None:
    selection = make_selection(selection_weight=0.3, selection_share=0.5, budget=budget)
    set_scores(selection, SCORES)
    for step, share in ((0, 0.0), (3, 0.5), (6, 1.0), (10, 1.0)):
        r = scores()
        alpha = alpha_at(selection.config, share)
        weight = selection.config.rounding_growth**share
        expected = 0.3 * (budget_loss(r, 2, budget) + weight * rounding_loss(r, alpha))
        torch.testing.assert_close(selection.loss(step), expected)


def test_the_loss_reaches_every_score_and_nothing_else() -> None:
    selection = make_selection()
    set_scores(selection, SCORES)
    selection.loss(0).backward()
    for module in selection.mixed.values():
        assert float(module.layer_score.grad) != 0
        assert module.linear.query_map.grad is None


def test_scores_are_kept_within_zero_and_one() -> None:
    selection = make_selection(selection_share=1.0, budget="sum")
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


def test_a_score_that_alone_can_meet_the_budget_falls_though_it_lies_above_one_half() -> None:
    selection = make_selection(6, num_steps=80, selection_share=1.0, target=2)
    start = (0.0, 0.73, 0.94, 0.55, 0.88, 0.9)
    set_scores(selection, start)
    optimizer = torch.optim.Adam(selection.trained_scores().values(), lr=0.03)
    for step in range(40, 79):
        optimizer.zero_grad()
        selection.loss(step).backward()
        optimizer.step()
        selection.after_step(step)
    ends = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(selection.layer_scores().detach(), ends, rtol=0, atol=0.02)


def test_selection_by_its_own_losses_ends_undecided_by_none_and_on_target() -> None:
    selection = make_selection(7, num_steps=120, selection_share=1.0, target=3)
    r = selection.trained_scores().values()
    set_scores(selection, (0.5, 0.52, 0.55, 0.57, 0.6, 0.61, 0.65))
    optimizer = torch.optim.Adam(r, lr=0.03)
    for step in range(119):
        optimizer.zero_grad()
        selection.loss(step).backward()
        optimizer.step()
        selection.after_step(step)
    ends = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(selection.layer_scores().detach(), ends, rtol=0, atol=1e-3)


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
        assert selection.layers is None
        assert all(module.choice is None for module in selection.mixed.values())
    selection.after_step(5)
    assert selection.layers == [1, 4]
    choices = [module.choice for module in selection.mixed.values()]
    assert choices == ["softmax", "linear", "softmax", "softmax", "linear"]
    assert float(selection.loss(6)) == 0
    set_scores(selection, (0.0, 1.0, 0.0, 1.0, 1.0))
    selection.after_step(6)
    assert selection.layers == [1, 4]


@pytest.mark.parametrize("num_steps", [1, 2, 63])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_training_never_ends_before_the_choice(num_steps: int, share: float) -> None:
    selection = make_selection(num_steps=num_steps, selection_share=share)
    for step in range(num_steps):
        selection.after_step(step)
    assert len(selection.layers) == 2


def test_layers_keep_the_models_own_numbers() -> None:
    mixed = {i: MixedAttention(LinearAttention(1, 4, 4), 1.0) for i in (3, 8, 11)}
    selection = Selection(mixed, SelectionConfig(target=1), 1)
    mixed[8].layer_score.data.fill_(0.0)
    selection.after_step(0)
    assert selection.layers == [8]


def test_rules_choose_by_depth_and_count() -> None:
    layers = range(10)

    def pick(choice: str, target: int) -> list[int]:
        return choose_layers(SelectionConfig(choice=choice, target=target), layers, 0)

    assert pick("first", 3) == [0, 1, 2]
    assert pick("last", 3) == [7, 8, 9]
    assert pick("alternate", 5) == [1, 3, 5, 7, 9]
    assert pick("alternate", 3) == [1, 5, 8]
    assert pick("alternate", 1) == [5]


@pytest.mark.parametrize("choice", ["first", "last", "alternate", "random"])
@pytest.mark.parametrize("total", [1, 7, 30])
def test_every_rule_chooses_target_layers_of_the_models_own_in_depth_order(
    choice: str, total: int
) -> None:
    layers = list(range(3, 3 + 2 * total, 2))
    for target in range(1, total + 1):
        config = SelectionConfig(choice=choice, target=target)
        picks = choose_layers(config, layers, seed=5)
        assert picks == sorted(set(picks)) and len(picks) == target
        assert set(picks) <= set(layers)


def test_the_seed_alone_decides_a_random_choice_and_every_layer_has_its_chance() -> None:
    config = SelectionConfig(choice="random", target=3)
    chosen = [choose_layers(config, range(10), seed) for seed in range(300)]
    assert chosen == [choose_layers(config, range(10), seed) for seed in range(300)]
    counts = [sum(layer in picks for picks in chosen) for layer in range(10)]
    # 90 each on average, with a standard deviation of 8.
    assert min(counts) > 60 and max(counts) < 120


def test_a_list_is_taken_as_it_is_in_depth_order() -> None:
    config = SelectionConfig(layers="11, 3", target=2)
    assert config.rule == "listed"
    assert choose_layers(config, [3, 8, 11], seed=0) == [3, 11]


def test_a_ranking_chooses_its_first_layers_and_a_learned_choice_none() -> None:
    ranked = SelectionConfig(choice="sensitivity", target=2)
    assert choose_layers(ranked, [3, 8, 11], 0, [11, 3, 8]) == [3, 11]
    with pytest.raises(ValueError, match="--choice sensitivity given without a ranking"):
        choose_layers(ranked, [3, 8, 11], 0)
    assert choose_layers(SelectionConfig(target=1), [3, 8, 11], 0, [11, 3, 8]) is None


@pytest.mark.parametrize(("num_layers", "target"), [(30, 16), (40, 22), (10, 3), (5, 4), (2, 1)])
def test_scores_from_a_ranking_follow_it_meet_the_budget_and_can_still_move(
    num_layers: int, target: int
) -> None:
    layers = list(range(2, 2 + num_layers))
    order = torch.randperm(num_layers, generator=torch.Generator().manual_seed(0))
    ranking = [layers[i] for i in order.tolist()]
    config = SelectionConfig(target=target, score_start="ranking")
    starts = dict(zip(layers, start_scores(config, layers, ranking), strict=True))
    ordered = [starts[layer] for layer in ranking]
    assert all(low < high for low, high in itertools.pairwise(ordered))
    assert sum(1 - r for r in ordered) == pytest.approx(target)
    assert min(ordered) >= 0.1 - 1e-9 and max(ordered) <= 0.9 + 1e-9
    assert max(ordered) - min(ordered) <= 0.5 + 1e-9
    # The rounding loss pulls 50 times less than it does at 0 and 1.
    r = scores(*ordered)
    rounding_loss(r, config.alpha_start).backward()
    assert r.grad.abs().max() < 40 / 50


@pytest.mark.parametrize(("num_layers", "target"), [(7, 7), (30, 29), (1, 1)])
def test_scores_start_alike_where_their_mean_leaves_no_room(num_layers: int, target: int) -> None:
    layers = list(range(num_layers))
    config = SelectionConfig(target=target, score_start="ranking")
    assert start_scores(config, layers, layers[::-1]) == [1 - target / num_layers] * num_layers


def test_a_selection_starts_from_the_ranking_it_is_given() -> None:
    mixed = {i: MixedAttention(LinearAttention(1, 4, 4), 1.0) for i in (3, 8, 11)}
    config = SelectionConfig(target=1, score_start="ranking")
    selection = Selection(mixed, config, 20, ranking=[11, 3, 8])
    assert choose(selection.layer_scores(), 1) == (2,)
    assert selection.layers is None and len(selection.trained_scores()) == 3
    # 2 / 3 on average; 0.9 is the highest.
    torch.testing.assert_close(
        selection.layer_scores().detach(), torch.tensor([2 / 3, 0.9, 2 / 3 - 0.9 + 2 / 3])
    )
    for ranking in (None, [11, 3], [11, 3, 7]):
        with pytest.raises(ValueError, match="--score-start ranking given with the ranking"):
            Selection(mixed, config, 20, ranking=ranking)


@pytest.mark.parametrize("options", [{"choice": "first"}, {"layers": "1,2,3", "target": 3}])
def test_only_learned_scores_start_from_a_ranking(options: dict[str, str | int]) -> None:
    with pytest.raises(ValueError, match=r"^--score-start ranking and a .* choice of layers given"):
        SelectionConfig(score_start="ranking", **options)


def test_a_fixed_choice_is_hard_from_the_start_and_trains_no_score() -> None:
    mixed = {i: MixedAttention(LinearAttention(1, 4, 4), 1.0) for i in (3, 8, 11)}
    selection = Selection(mixed, SelectionConfig(choice="last", target=1), 20, layers=[11])
    assert selection.layers == [11]
    assert [module.choice for module in mixed.values()] == ["softmax", "softmax", "linear"]
    assert selection.layer_scores().tolist() == [1, 1, 0]
    assert selection.trained_scores() == {}
    assert not selection.layer_scores().requires_grad
    for step in range(20):
        assert float(selection.loss(step)) == 0
        selection.after_step(step)
    assert selection.layers == [11]


@pytest.mark.parametrize(("choice", "layers"), [("first", None), ("learned", [0, 1])])
def test_a_choice_other_than_the_configured_one_is_refused(
    choice: str, layers: list[int] | None
) -> None:
    mixed = {i: MixedAttention(LinearAttention(1, 4, 4), 1.0) for i in range(3)}
    with pytest.raises(ValueError, match=f"a {choice} choice of layers is configured"):
        Selection(mixed, SelectionConfig(choice=choice, target=2), 20, layers=layers)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layers": "1,x", "target": 2}, "--layers '1,x' given; different layer numbers"),
        ({"layers": "", "target": 1}, "--layers '' given"),
        ({"layers": "1,-2", "target": 2}, "--layers '1,-2' given"),
        ({"layers": "1,01", "target": 2}, "--layers '1,01' given; different"),
        ({"layers": "1,2"}, "--layers 1,2 names 2 layers and --target is 5; give --target 2"),
        ({"layers": "1", "choice": "first", "target": 1}, "--layers 1 and --choice first given"),
    ],
)
def test_a_list_that_contradicts_itself_or_the_rest_is_refused(
    options: dict[str, str | int], sentence: str
) -> None:
    with pytest.raises(ValueError) as caught:
        SelectionConfig(**options)
    assert str(caught.value).startswith(sentence)


def test_a_listed_layer_that_the_model_lacks_is_refused() -> None:
    check_layers(SelectionConfig(layers="3,8", target=2), [3, 8, 11])
    with pytest.raises(ValueError, match=r"--layers 3,9 given; the model has no layer 9"):
        check_layers(SelectionConfig(layers="3,9", target=2), [3, 8, 11])


def test_a_target_beyond_the_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="--target 6 given; the model has 5"):
        make_selection(5, target=6)


@pytest.mark.parametrize(
    "options",
    [
        {"target": 0},
        {"selection_share": 1.5},
        {"alpha_start": 0.0},
        {"alpha_end": -1.0},
        {"layer_score_learning_rate": 0.0},
    ],
)
def test_impossible_settings_are_refused_by_flag(options: dict[str, float]) -> None:
    flag = "--" + next(iter(options)).replace("_", "-")
    with pytest.raises(ValueError, match=flag):
        SelectionConfig(**options)
