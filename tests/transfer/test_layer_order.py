"""Rank correlation has its known values, ties included, and takes a run's files as they are."""

import json
import math
from pathlib import Path

import pytest
import torch
from linvideo_core.transfer.layer_selection.order import (
    correlate,
    learned_scores,
    rank_correlation,
    save_layer_order,
)


def test_the_same_order_is_one_and_the_reverse_minus_one_whatever_the_values() -> None:
    assert rank_correlation([1, 5, 9, 30], [0.1, 0.2, 7, 7.5]) == pytest.approx(1)
    assert rank_correlation([1, 5, 9, 30], [4, 3, 2, -8]) == pytest.approx(-1)


def test_known_answers_without_and_with_ties() -> None:
    # 1 - 6 sum d^2 / (n (n^2 - 1)) of the ranks 0 1 2 3 4 and 1 0 3 4 2: 1 - 48 / 120.
    assert rank_correlation([1, 2, 3, 4, 5], [2, 1, 3, 6, 2.5]) == pytest.approx(0.6)
    # Ranks (0.5, 0.5, 2, 3) and (0, 1, 2.5, 2.5): 4 / sqrt(4.5 * 4.5).
    assert rank_correlation([0, 0, 1, 2], [1, 2, 3, 3]) == pytest.approx(4 / 4.5)


def test_it_agrees_with_scipy_on_many_ties() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    for length in (2, 7, 63):
        a, b = torch.randint(0, 5, (2, length), generator=generator).double().tolist()
        expected = stats.spearmanr(a, b).statistic if len(set(a)) > 1 < len(set(b)) else math.nan
        assert rank_correlation(a, b) == pytest.approx(expected, nan_ok=True)


def test_what_has_no_order_has_no_correlation() -> None:
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    for a, b in (([1.0], [1.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(ValueError, match="2 or more, needed"):
            rank_correlation(a, b)


def test_scores_follow_a_ranking_where_the_layers_that_cost_least_have_the_lowest() -> None:
    scores = {0: 0.9, 3: 0.1, 7: 0.5}
    # Replaced alone, layer 3 errs least; with its softmax back, the others' error stays largest.
    assert correlate(scores, {7: 0.2, 0: 0.4, 3: 0.1}, "replace-one") == pytest.approx(1)
    assert correlate(scores, {7: 0.6, 0: 0.4, 3: 0.8}, "restore-one") == pytest.approx(1)
    with pytest.raises(ValueError, match=r"scores of layers \[0, 3, 7\]"):
        correlate(scores, {0: 0.1, 3: 0.2}, "replace-one")


def test_learned_scores_are_those_of_the_selection_alone() -> None:
    rows = [{"step": step, "layer_scores": [step / 4, 1 - step / 4]} for step in range(3)]
    rows += [{"step": 3, "layer_scores": [0, 1]}, {"step": 4}]
    last, mean = learned_scores(rows, [5, 8], hardened_at=3)
    assert last == {5: 0.5, 8: 0.5}
    assert mean == {5: 0.25, 8: 0.75}
    with pytest.raises(ValueError, match="no scores of 3 layers"):
        learned_scores(rows, [5, 8, 9], hardened_at=3)


@pytest.mark.parametrize(
    "content", [None, "", "[]", '{"measure": "replace-one", "errors": {"0": 1}, "ranking": null}']
)
def test_without_a_whole_ranking_nothing_is_written(content: str | None, tmp_path: Path) -> None:
    metrics, ranking = tmp_path / "metrics.jsonl", tmp_path / "sensitivity.json"
    metrics.write_text(json.dumps({"step": 0, "layer_scores": [0.5]}))
    if content is not None:
        ranking.write_text(content)
    save_layer_order(metrics, ranking, tmp_path / "order.json", 3)
    assert not (tmp_path / "order.json").exists()


def test_scores_without_an_order_are_written_as_such(tmp_path: Path) -> None:
    metrics, ranking = tmp_path / "metrics.jsonl", tmp_path / "sensitivity.json"
    metrics.write_text(json.dumps({"step": 0, "layer_scores": [0.5, 0.5]}))
    found = {"measure": "restore-one", "errors": {"4": 0.2, "2": 0.3}, "ranking": [2, 4]}
    ranking.write_text(json.dumps(found))
    save_layer_order(metrics, ranking, tmp_path / "order.json", 3)
    row = json.loads((tmp_path / "order.json").read_text())
    assert row["last_scores"] == {"2": 0.5, "4": 0.5}
    assert row["last_correlation"] is None and row["measure"] == "restore-one"
