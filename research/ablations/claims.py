"""What an ablation is to show and whether it does: bars, what was measured, verdicts.

A bar on one row is held against the mean over its seeds. "Outside the spread" is decided by
`ablation_results.is_outside_spread`, against a median of random choices by
`is_below_by_own_spread`. With fewer than three seeds there is no verdict, and a row of which a seed
diverged misses its bar.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence

from linvideo_core.run.tables import format_spread, format_value

from .findings import Findings
from .results import Row, is_below_by_own_spread, is_outside_spread

MIN_SEEDS = 3
REACHED, MOONSHOT, MISSED = "reached", "moonshot reached", "missed"
NOT_RUN, FEW_SEEDS, NOT_MEASURED = "not run", "too few seeds", "not measured"

_DEFAULT = ("target", "5")
_OBJECTIVES = {
    "adm": "velocity_equal_time",
    "adm_after_velocity": "velocity_equal_time",
    "adm_even_levels": "velocity_even_levels",
    "adm_all_layers": "velocity_all_layers",
    "adm_maps_alone": "velocity_maps_alone",
}
_TO_TEACHER = "frechet_teacher"

_Place = tuple[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Bar:
    """A measure, what it must reach, and what would be more than was asked for."""

    question: str
    column: str
    bar: float
    moonshot: float
    is_at_most: bool = False

    def judge(self, found: Findings, place: _Place) -> Row:
        """Return the claim about one row's mean."""
        values = found.values(*place, self.column)
        sign = "<=" if self.is_at_most else ">="

        def reach(limit: float) -> bool:
            mean = statistics.fmean(values)
            return mean <= limit if self.is_at_most else mean >= limit

        verdict = _verdict(
            found, place, values, lambda: reach(self.bar), lambda: reach(self.moonshot)
        )
        bar, moonshot = (f"{sign} {limit:g}" for limit in (self.bar, self.moonshot))
        return _claim(self.question, place, bar, moonshot, _show(values), verdict)


_HALF = (
    _Bar(question="digit, share of the teacher's", column="digit_share", bar=0.98, moonshot=1.0),
    _Bar(question="motion, share of the teacher's", column="motion_share", bar=0.93, moonshot=0.99),
    _Bar(
        question="Frechet to real clips over the teacher's own",
        column="frechet_share",
        bar=1.5,
        moonshot=1.1,
        is_at_most=True,
    ),
)
_GAP = _Bar(
    question="Frechet of the rounded model over the mixed one's, less 1",
    column="gap_frechet",
    bar=0.05,
    moonshot=0.0,
    is_at_most=True,
)


def judge(found: Findings) -> list[Row]:
    """Return the claims about an ablation: what is asked, of which row, the bar, the verdict."""
    halves = [_DEFAULT, *(("best", name) for name in found.names("best"))]
    claims = [bar.judge(found, place) for place in halves for bar in _HALF]
    for name, rival in _OBJECTIVES.items():
        claims.append(_judge_objective(found, ("objective", name), ("objective", rival)))
    for name in ("learned", "learned_before", "learned_from_ranking"):
        place = ("selection", name)
        claims.append(_judge_below(found, place, ("selection", "alternate")))
        claims.append(_judge_below_median(found, place, ("selection", "random")))
        for ranking in ("replace_one", "restore_one"):
            claims.append(_judge_below(found, place, ("selection", ranking), is_moonshot=True))
    claims += [_GAP.judge(found, ("selection", name)) for name in ("learned", "rounded_at_end")]
    for name in ("lora_8", "lora_32", "lora_64"):
        claims += _judge_file(found, ("parameters", name), ("parameters", "full"))
    return claims


def _judge_objective(found: Findings, place: _Place, rival: _Place) -> Row:
    mine, other = (found.values(*p, _TO_TEACHER) for p in (place, rival))
    verdict = _verdict(
        found,
        place,
        mine,
        lambda: is_outside_spread(mine, other),
        lambda: statistics.fmean(mine) <= statistics.fmean(other) / 2,
        others=other,
    )
    bar, question = "outside the spread", f"lower Frechet to the teacher than {rival[1]}"
    return _claim(question, place, bar, "half of it", _show(mine, other), verdict)


def _judge_below(
    found: Findings, place: _Place, rival: _Place, *, is_moonshot: bool = False
) -> Row:
    """Return the claim that one row lies below another, which is the bar or the moonshot."""
    mine, other = (found.values(*p, _TO_TEACHER) for p in (place, rival))

    def is_below() -> bool:
        return is_outside_spread(mine, other)

    verdict = _verdict(found, place, mine, is_below, lambda: is_moonshot, others=other)
    question = f"lower Frechet to the teacher than {rival[1]}"
    bars = ("", "outside the spread") if is_moonshot else ("outside the spread", "")
    return _claim(question, place, *bars, _show(mine, other), verdict)


def _judge_below_median(found: Findings, place: _Place, rival: _Place) -> Row:
    mine, other = (found.values(*p, _TO_TEACHER) for p in (place, rival))
    median = [statistics.median(other)] if other else []
    verdict = _verdict(
        found,
        place,
        mine,
        lambda: is_below_by_own_spread(mine, median[0]),
        lambda: False,
        others=other,
    )
    question = f"lower Frechet to the teacher than the median of {len(other)} random choices"
    return _claim(question, place, "outside its own spread", "", _show(mine, median), verdict)


def _judge_file(found: Findings, place: _Place, full: _Place) -> list[Row]:
    """Return the claims that a smaller file costs little quality, and is as small as was asked."""
    columns = ("digit", "motion", "frechet", "bytes")
    mine, whole = ({c: found.values(*p, c) for c in columns} for p in (place, full))
    losses, size = [], []
    # A teacher of no use shows no digit at all, and nothing is a share of that.
    if all(mine.values()) and all(sum(values) for values in whole.values()):
        ratios = {c: statistics.fmean(mine[c]) / statistics.fmean(whole[c]) for c in columns}
        losses = [max(ratios["frechet"] - 1, 1 - ratios["digit"], 1 - ratios["motion"])]
        size = [ratios["bytes"]]
    bars = (
        ("worst loss of digit, motion, Frechet against full", losses, 0.05),
        ("bytes over those of full", size, 0.2),
    )
    claims = []
    for question, value, bar in bars:
        verdict = _verdict(
            found,
            place,
            mine["frechet"],
            lambda v=value, b=bar: bool(v) and v[0] <= b,
            lambda: False,
            others=whole["frechet"],
        )
        claims.append(_claim(question, place, f"<= {bar:g}", "", _show(value), verdict))
    return claims


def _verdict(
    found: Findings,
    place: _Place,
    values: Sequence[float],
    is_reached: Callable[[], bool],
    is_more: Callable[[], bool],
    *,
    others: Sequence[float] | None = None,
) -> str:
    """Return the verdict about a row, whose tests are asked only where there is enough to ask.

    others: measures of the row that it is compared with.
    """
    if place not in found.rows:
        return NOT_RUN
    if found.num_failed(*place):
        return MISSED
    sides = [values] if others is None else [values, others]
    if not all(sides):
        return NOT_MEASURED
    if min(map(len, sides)) < MIN_SEEDS:
        return FEW_SEEDS
    if not is_reached():
        return MISSED
    return MOONSHOT if is_more() else REACHED


def _claim(
    question: str, place: _Place, bar: str, moonshot: str, measured: str, verdict: str
) -> Row:
    return {
        "question": question,
        "row": " ".join(place),
        "bar": bar or None,
        "moonshot": moonshot or None,
        "measured": measured,
        "verdict": verdict,
    }


def _show(*sides: Sequence[float]) -> str | None:
    """Show a measure, and against what: means with their spreads."""
    shown = [
        format_spread(statistics.fmean(side), statistics.stdev(side))
        if len(side) > 1
        else format_value(side[0])
        for side in sides
        if side
    ]
    return " against ".join(shown) if len(shown) == len(sides) else None
