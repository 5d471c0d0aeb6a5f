"""Paired tests agree with what is computed by hand."""

import pytest

from research.paired import compare_paired, least_p


def test_the_mean_difference_over_its_standard_error_is_t() -> None:
    row, baseline = {0: 3.0, 1: 5.0, 2: 4.0, 3: 8.0}, {0: 2.0, 1: 3.0, 2: 1.0, 3: 4.0}
    found = compare_paired(row, baseline)
    # Differences 1, 2, 3, 4: mean 2.5, sample deviation sqrt(5 / 3), t = 2.5 / (1.29099 / 2).
    assert found.difference == 2.5 and found.seeds == 4
    assert found.t == pytest.approx(3.872983, abs=1e-6)
    # All have one sign: of 16 ways to flip signs, only none and all give a sum of 10.
    assert found.p == 2 / 16 == least_p(4)


def test_p_counts_the_ways_to_swap_that_differ_by_as_much() -> None:
    found = compare_paired({0: 3.0, 1: 2.0, 2: -1.0}, {0: 0.0, 1: 0.0, 2: 0.0})
    # |+-3 +-2 +-1| is 6, 4, 2, 0 and their mirror images: 4 or more in 4 of 8.
    assert found.p == 4 / 8
    assert compare_paired({0: 0.1, 1: 0.2}, {0: 0.3, 1: 0.0}).p == 1.0


def test_only_seeds_that_both_have_are_compared() -> None:
    found = compare_paired({0: 1.0, 1: 9.0, 2: 3.0}, {0: 0.5, 2: 2.0, 7: 4.0})
    assert (found.difference, found.seeds) == (0.75, 2)
    assert compare_paired({0: 1.0}, {1: 1.0}) is None


def test_what_does_not_vary_has_no_t() -> None:
    assert compare_paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}).t is None
    alone = compare_paired({5: 2.0}, {5: 1.0})
    assert (alone.t, alone.p) == (None, 1.0)


def test_more_seeds_than_can_be_swapped_in_all_ways_are_refused() -> None:
    values = {seed: float(seed) for seed in range(17)}
    with pytest.raises(ValueError, match="17 seeds given; at most 16"):
        compare_paired(values, values)
