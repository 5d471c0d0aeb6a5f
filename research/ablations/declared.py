"""The declared tables of an ablation, and the runs that they come to.

A table is a tuple of variants, a variant a name and the settings of a transfer that it changes: a
new row is one line here. A change to what the settings are already is none, so rows of several
tables that come to the same run share it.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from linvideo_core.run.config import override


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a table.

    changes: flat names of a transfer's settings, with their values.
    steps_factor: how much longer than the others it trains.
    time_of: the objective whose training time it gets, in steps of its own; None: equal steps.
    """

    name: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps_factor: float = 1.0
    time_of: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training of one variant: what a worker is given.

    key: its folder's name, made of what it changes; config: of the transfer, seed and folder too.
    is_followed: whether the course of its selection is kept, as of every row that a table compares
        by how layers are chosen.
    """

    key: str
    config: Any
    is_followed: bool = False

    @property
    def folder(self) -> Path:
        """Where it is trained and measured."""
        return self.config.out


def _rows(rows: Mapping[str, Mapping[str, Any]]) -> tuple[Variant, ...]:
    return tuple(Variant(name=name, changes=changes) for name, changes in rows.items())


TABLES: dict[str, tuple[Variant, ...]] = {
    "objective": (
        Variant(name="adm", changes={"objective": "adm"}),
        Variant(name="velocity_equal_time", changes={"objective": "velocity"}, time_of="adm"),
        Variant(name="velocity", changes={"objective": "velocity"}),
        # A step of velocity matching takes about six tenths of another's: in all no more time.
        Variant(
            name="adm_after_velocity",
            changes={"objective": "adm", "velocity_share": 0.5},
            steps_factor=1.25,
        ),
        # All noise levels seen alike, however far the teacher's flow carries an error from there.
        Variant(name="adm_even_levels", changes={"objective": "adm", "levels": "even"}),
        Variant(
            name="velocity_even_levels",
            changes={"objective": "velocity", "levels": "even"},
            time_of="adm",
        ),
        # Every layer linear: where the student's own states lie furthest from the stored ones.
        Variant(name="adm_all_layers", changes={"objective": "adm", "target": 10}),
        Variant(
            name="velocity_all_layers",
            changes={"objective": "velocity", "target": 10},
            time_of="adm",
        ),
        # Nothing but feature maps moves: what the student cannot represent stays large.
        Variant(name="adm_maps_alone", changes={"objective": "adm", "parameters": "feature_maps"}),
        Variant(
            name="velocity_maps_alone",
            changes={"objective": "velocity", "parameters": "feature_maps"},
            time_of="adm",
        ),
        Variant(name="adm_literal", changes={"objective": "adm_literal"}),
        Variant(name="dmd", changes={"objective": "dmd"}),
    ),
    "selection": _rows(
        {
            "learned": {"choice": "learned"},
            # What learning came to most often, known from the first step on as a rule's choice is.
            "learned_before": {"layers": "0,1,3,4,9"},
            "learned_sooner": {"selection_share": 0.2},
            "alternate": {"choice": "alternate"},
            "random": {"choice": "random"},
            "replace_one": {"choice": "sensitivity", "sensitivity": "replace-one"},
            "restore_one": {"choice": "sensitivity", "sensitivity": "restore-one"},
            "learned_from_ranking": {"choice": "learned", "score_start": "ranking"},
            "first": {"choice": "first"},
            "last": {"choice": "last"},
            "budget_as_loss": {"budget": "sum", "rounding_growth": 1.0},
            "without_rounding_loss": {"rounding_weight": 0.0},
            # As the paper does it: layers stay mixed up to the last step and are rounded there.
            "rounded_at_end": {"selection_share": 1.0},
            "rounded_at_end_without_rounding_loss": {
                "selection_share": 1.0,
                "rounding_weight": 0.0,
            },
        }
    ),
    "target": _rows({str(count): {"target": count} for count in (5, 3, 7, 8, 10)}),
    "feature_map": _rows(
        {
            "D": {"feature_ratio": 1},
            "2D": {"feature_ratio": 2},
            "shared": {"map_sharing": "shared"},
            "joint": {"feature_map": "hedgehog_joint"},
            "gate": {"output_gate": True},
            # One frame of the embedded model.
            "window": {"window": 64},
        }
    ),
    "parameters": _rows(
        {
            "lora_32": {"parameters": "lora", "lora_rank": 32},
            "full": {"parameters": "full"},
            "lora_8": {"parameters": "lora", "lora_rank": 8},
            "lora_64": {"parameters": "lora", "lora_rank": 64},
            "feature_maps": {"parameters": "feature_maps"},
        }
    ),
    "best": (
        Variant(name="steps_x2", steps_factor=2.0),
        Variant(name="steps_x4", steps_factor=4.0),
        Variant(
            name="velocity_x4", changes={"objective": "velocity"}, steps_factor=4.0, time_of="adm"
        ),
    ),
}
"""Table -> its rows, those that a claim rests on first: they are run in this order."""

_FOLLOWED = "selection"


def choose_tables(names: str, only: str | None = None) -> dict[str, tuple[Variant, ...]]:
    """Return the tables of a comma-separated list, "all" for every one; `only` these rows.

    Raises ValueError for a name that no table, or no row of them, has.
    """
    wanted = list(TABLES) if names == "all" else _split(names)
    if strangers := [name for name in wanted if name not in TABLES]:
        raise ValueError(
            f"--tables {names} given, and {strangers[0]!r} is no table; all, or some of "
            f"{','.join(TABLES)} with commas between, are needed"
        )
    tables = {name: TABLES[name] for name in wanted}
    if only is None:
        return tables
    rows = dict.fromkeys(variant.name for table in tables.values() for variant in table)
    chosen = _split(only)
    if strangers := [name for name in chosen if name not in rows]:
        raise ValueError(
            f"--only {only} given, and {strangers[0]!r} is no row of these tables; they have "
            f"{','.join(rows)}"
        )
    kept = {name: tuple(v for v in table if v.name in chosen) for name, table in tables.items()}
    return {name: table for name, table in kept.items() if table}


def resolve(
    variant: Variant, settings: Mapping[str, Any], seconds_per_step: Mapping[str, float]
) -> dict[str, Any]:
    """Return what a variant really changes.

    settings: flat, what all runs share; seconds_per_step: by objective, where `time_of` is used.

    Raises ValueError for a change of what is no setting.
    """
    if strangers := [name for name in variant.changes if name not in settings]:
        raise ValueError(f"row {variant.name} changes {strangers[0]!r}, which a transfer lacks")
    steps = settings["steps"] * variant.steps_factor
    if variant.time_of is not None:
        own = variant.changes.get("objective", settings["objective"])
        steps *= seconds_per_step[variant.time_of] / seconds_per_step[own]
    changes = {**variant.changes, "steps": max(1, round(steps))}
    return {name: value for name, value in changes.items() if value != settings[name]}


def key_of(changes: Mapping[str, Any]) -> str:
    """Return the name of a run: what it changes, as a folder can be called."""
    words = (f"{name}-{value}" for name, value in sorted(changes.items()))
    return re.sub(r"[^\w.,+-]", "_", "+".join(words)) or "default"


def flatten(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a config that `dataclasses.asdict` opened, by their flat names."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value)
        else:
            yield name, value


def list_runs(
    tables: Mapping[str, Sequence[Variant]],
    config: Any,
    seeds: Sequence[int],
    seconds_per_step: Mapping[str, float],
) -> dict[tuple[str, str], list[Run]]:
    """Return the runs, one a seed, of every row (table, name), in the order of work.

    config: what all runs share, its `out` the folder of all of them. Rows that come to the same
    run hold the same one.
    """
    settings = dict(flatten(dataclasses.asdict(config)))
    followed = {key_of(resolve(v, settings, seconds_per_step)) for v in TABLES[_FOLLOWED]}
    rows: dict[tuple[str, str], list[Run]] = {}
    for table, variants in tables.items():
        for variant in variants:
            changes = resolve(variant, settings, seconds_per_step)
            key = key_of(changes)
            folder = config.out / "runs" / key
            rows[table, variant.name] = [
                Run(
                    key=key,
                    config=override(
                        config, {**changes, "seed": seed, "out": folder / f"seed-{seed}"}
                    ),
                    is_followed=key in followed,
                )
                for seed in seeds
            ]
    return rows


def _split(names: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in names.split(",")))
