"""Compare rows of results/evidence.json seed by seed: `python -m research.seed_by_seed`.

What a seed brings (trajectories, initial weights, batches, prompts, noise) is in a row and in its
baseline alike, and leaves with their difference. Every pair of `PAIRS` is compared in every one of
`MEASURES`; results/evidence_pairs.json has all tests, those that find nothing, too; t is shown.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS_FOLDER, SOURCE, read_record, show_rows
from linvideo_core.run.config import option, parse, run_command
from linvideo_core.run.files import write_json

from .paired import compare_measures, least_p, to_columns

Row = dict[str, Any]

PAIRS: dict[str, list[tuple[str, str]]] = {
    "objective": [
        ("adm", "velocity_equal_time"),
        ("adm_after_velocity", "velocity_equal_time"),
        ("adm_even_levels", "velocity_even_levels"),
        ("adm_all_layers", "velocity_all_layers"),
        ("adm_maps_alone", "velocity_maps_alone"),
    ],
    "best": [("steps_x4", "velocity_x4")],
    "selection": [
        ("learned", "alternate"),
        ("learned", "random"),
        ("learned", "replace_one"),
        ("learned", "restore_one"),
        ("learned", "rounded_at_end"),
        ("learned_from_ranking", "learned"),
    ],
    "feature_map": [("window", "D"), ("2D", "D"), ("gate", "D")],
}
"""Table -> a row, and the one that it is compared with."""

MEASURES = {
    "digit": "digit",
    "motion": "motion",
    "frechet": "frechet",
    "paired_frechet": "frechet_teacher",
    "distance_to_teacher": "distance_to_teacher",
    "temporal_spectrum_db": "temporal_spectrum_db",
    "spatial_spectrum_db": "spatial_spectrum_db",
    "diversity": "diversity",
    "flicker": "flicker",
    "velocity_error": "velocity_error",
}
"""Measure -> its column in the record. `frechet` is to real clips; `paired_frechet` to the
teacher's videos of the same noise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedConfig:
    """What is read and written."""

    record: Path = option(RESULTS_FOLDER / "evidence.json", "record of research.ablations")
    out: Path = option(RESULTS_FOLDER / "evidence_pairs.json", "record of the tests")


def compare_all(record: Mapping[str, Any]) -> list[Row]:
    """Return a row for each pair: of every measure difference, t and p of `compare_paired`.

    record: as `research.ablations` writes it. `one_sided` are the measures in which all seeds
    differ in one direction.
    """
    runs = {run["run"]: run for run in record["details"]["runs"]}
    members = {(m["table"], m["name"]): m["runs"] for m in record["details"]["members"]}
    found = []
    for table, pairs in PAIRS.items():
        for pair in pairs:
            own, other = ([runs.get(run, {}) for run in members[table, name]] for name in pair)
            tests = compare_measures(own, other, MEASURES)
            one_sided = [m for m, x in tests.items() if x.seeds > 1 and x.p <= least_p(x.seeds)]
            row: Row = {"table": table, "row": pair[0], "less": pair[1], "one_sided": one_sided}
            row |= {"seeds": max((x.seeds for x in tests.values()), default=0)}
            found.append(row | to_columns(tests))
    return found


def describe(rows: Sequence[Row]) -> str:
    """Say how much was looked at, and what of it chance alone would give."""
    tested = {m: [row for row in rows if f"{m}_p" in row] for m in MEASURES}
    by_chance = sum(least_p(row["seeds"]) for found in tested.values() for row in found)
    one_sided = sum(len(row["one_sided"]) for row in rows)
    return (
        f"{sum(map(len, tested.values()))} paired tests, {len(tested)} measures of {len(rows)} "
        f"pairs of rows: {one_sided} differ in one direction in every seed, where chance alone "
        f"would give {by_chance:.0f}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Read the record, compare, write and show all tests."""
    config = parse(SeedConfig, argv, description=__doc__)
    record = read_record(config.record)
    rows = compare_all(record)
    source = {name: record[name] for name in SOURCE}
    source["command"] += " && python -m research.seed_by_seed"
    if note := record.get("command_note"):
        source["command_note"] = note
    write_json(config.out, {"title": describe(rows), **source, "rows": rows})
    names = ("row", "less", *(f"{measure}_t" for measure in MEASURES))
    shown = [{name: row.get(name) for name in names} for row in rows]
    sys.stdout.write(f"{show_rows(shown)}\n{describe(rows)}\n")


if __name__ == "__main__":
    run_command(main)
