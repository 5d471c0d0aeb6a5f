"""Softmax within tiles and linear attention in one layer, compared: `python -m research.hybrid`.

Every row of `TABLES` is a student of the embedded model, trained with several seeds to match the
teacher's velocity at its stored states, or needs no training (Sol-Attn, PISA), then sampled from
the teacher's own noise; `sparse_baselines` has what others published. `frechet` is the
distance to the teacher's videos, 0 for the same ones, `frechet_share` that to real clips over the
teacher's own. `cost` is the softmax attention that is computed, pairs of queries and keys over
those of the teacher: what is linear adds nothing to it.
    python -m research.hybrid --tables forms --jobs 12
    python -m research.hybrid --tables layers,longer --forms linear,moments --jobs 12 --record
Repeating a command continues where it stopped; the record is written after each run, with a row a
case, means over seeds, and all runs in its `details`. Rows of other cases stay there.
"""

import concurrent.futures
import dataclasses
import itertools
import logging
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.record import RESULTS_FOLDER, change_part, check_parts, show_rows, without
from linvideo_core.models.config import ATTENTION_MASSES
from linvideo_core.run import limits
from linvideo_core.run.config import Settings, option, parse, run_command, to_flags
from linvideo_core.run.devices import resolve_device
from linvideo_core.run.errors import SettingError
from linvideo_core.run.folder import open_run

from . import workers
from .declared_runs import list_cards
from .hybrid_student import (
    FORMS,
    LINEAR,
    PISA,
    PISA_BLOCKS,
    SLA,
    SOL_ATTN,
    WINDOW,
    Case,
    do_run,
    parse_flags,
    prepare,
)

logger = logging.getLogger(__name__)

Row = dict[str, Any]

_RECORD_NAME = "hybrid.json"
_SMALL, _FRAME = (1, 4, 4), (1, 8, 8)
# Of a row, what tells its case from others.
_CASE = ("form", "tile", "layers", "steps")
_MEANS = ("frechet", "frechet_share", "digit", "motion", "seconds")
# What a repeated command may change: none of it decides a run's numbers.
_FREE_FIELDS = ("tables", "forms", "seeds", "steps", "jobs", "record", "out")
_DENSITIES = (0.1, 0.2, 0.4)
# Flags of a transfer that rows decide.
_OF_ROWS = ("--tile", "--window", "--attention-mass")


def _untrained(form: str) -> list[Case]:
    return [Case(form=form, density=density, steps_factor=0) for density in _DENSITIES]


_TRAINED = (Case(form=LINEAR), Case(form=WINDOW, tile=_FRAME))
_BASELINES = (
    *_TRAINED,
    *_untrained(SOL_ATTN),
    *_untrained(PISA),
    Case(form=SLA, density=0.2),
)
_HYBRID = tuple(
    Case(form=form, tile=tile) for tile in (_SMALL, _FRAME) for form in ATTENTION_MASSES
)

TABLES: dict[str, list[Case]] = {
    "forms": [
        *_BASELINES,
        *_untrained(PISA_BLOCKS),
        # The paper's density, here one block of 28.
        Case(form=SLA, density=0.05),
        *_HYBRID,
    ],
    "layers": [
        dataclasses.replace(case, layers=layers)
        for layers in (5, 8, 10)
        for case in (*_BASELINES, *_HYBRID)
    ],
    "longer": [
        dataclasses.replace(case, layers=layers, steps_factor=4)
        for layers in (5, 10)
        for case in (*_TRAINED, *_HYBRID)
    ],
}
"""Table -> its rows; rows that several tables have are of the same runs."""

_FLAGS = {
    "cpu": "--batch-size 4 --evaluate-samples 20 --evaluate-batch-size 20",
    "cuda": "--num-trajectories 384 --states-per-trajectory 16 --shard-size 192 "
    "--warm-start-steps 80 --batch-size 64 --learning-rate 2e-3 --compile "
    "--checkpoint-every 1000 --evaluate-samples 250 --evaluate-batch-size 250",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridConfig(Settings):
    """Which rows are run, and how often."""

    tables: str = option("forms", f"tables to make, of {','.join(TABLES)}")
    forms: str = option("", "forms whose rows are made, such as linear,moments; none: all")
    seeds: int = option(2, "seeds of each row, counted up from 0", limits.COUNT)
    steps: int = option(200, "training steps of a row", limits.COUNT)
    jobs: int = option(
        2, "runs at a time, each in a process of its own, over all GPUs", limits.COUNT
    )
    flags: str | None = option(
        None,
        "other flags of linvideo_core.transfer that all runs have; none: few videos on a CPU, "
        "those of research.ablations on cuda",
    )
    device: str = option("auto", "cpu or cuda", choices=("auto", "cpu", "cuda"))
    out: Path = option(Path("runs/hybrid"), "folder of the runs and the rows")
    record: bool = option(False, f"write results/{_RECORD_NAME}, not the one in --out")

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {"tables": [*TABLES], "forms": [*FORMS]}
        for field, names in known.items():
            given = getattr(self, field)
            if strangers := [name for name in _split(given) if name not in names]:
                raise SettingError(
                    f"{{{field}}} {given} given, and {strangers[0]!r} is unknown; names of "
                    f"{','.join(names)} with commas between are needed",
                    field,
                )
        flags = {word.partition("=")[0] for word in (self.flags or "").split()}
        if decided := [name for name in _OF_ROWS if name in flags]:
            raise SettingError(
                f"{{flags}} {self.flags} given, and rows have their own {decided[0]}: leave it out",
                "flags",
            )
        if not any(self.cases.values()):
            raise SettingError(
                f"{{tables}} {self.tables} and {{forms}} {self.forms or 'none'} given, which have "
                "no row in common: give others",
                "tables",
                "forms",
            )

    @property
    def cases(self) -> dict[str, list[Case]]:
        """Table -> the rows to make."""
        forms = _split(self.forms) or FORMS
        return {
            table: [case for case in TABLES[table] if case.form in forms]
            for table in _split(self.tables)
        }


def _split(names: str) -> list[str]:
    return [name for name in names.split(",") if name]


def run(config: HybridConfig) -> dict[str, list[Row]]:
    """Do all runs that `config.out` does not hold yet; return the tables' rows, one a run.

    The record is written after each run. One that fails is told in the log and has no row; it is
    tried again when the command is repeated.
    """
    device = resolve_device(config.device)
    cards = list_cards(device)
    flags = _FLAGS[device] if config.flags is None else config.flags
    out = config.out.absolute()
    # All that can be wrong is looked at before anything long begins.
    parse_flags(flags, 0, device, out)
    check_parts(_path_of(config), device)
    open_run(out, dataclasses.replace(config, flags=flags, device=device), ignore=_FREE_FIELDS)
    # Rows of several tables are run once, those of a seed one after another.
    cases = dict.fromkeys(case for table in config.cases.values() for case in table)
    runs = list(itertools.product(range(config.seeds), cases))
    done: dict[tuple[int, Case], Row] = {}
    with workers.pool(cards, config.jobs) as submit, tqdm(total=len(runs)) as bar:
        for future in [submit(prepare, flags, seed, out) for seed in range(config.seeds)]:
            future.result()
        waiting = {
            submit(do_run, case, flags, config.steps, seed, out): (seed, case)
            for seed, case in runs
        }
        for future in concurrent.futures.as_completed(waiting):
            seed, case = waiting[future]
            if (error := future.exception()) is None:
                done[seed, case] = future.result()
                for table, rows in _to_tables(config, done).items():
                    _write(config, device, table, rows)
            elif isinstance(error, ChildProcessError):
                # Of the processes one is gone, and what the others do is not waited for.
                raise error
            else:
                logger.warning("%s, seed %d: %s", case, seed, error)
            bar.update()
    return _to_tables(config, done)


def _to_tables(config: HybridConfig, done: dict[tuple[int, Case], Row]) -> dict[str, list[Row]]:
    return {
        table: [
            done[seed, case]
            for case in cases
            for seed in range(config.seeds)
            if (seed, case) in done
        ]
        for table, cases in config.cases.items()
    }


def _path_of(config: HybridConfig) -> Path:
    return (RESULTS_FOLDER if config.record else config.out) / _RECORD_NAME


def _write(config: HybridConfig, device: str, table: str, rows: list[Row]) -> None:
    """Put a table's rows into the record: those of other cases stay."""

    def change(_: list[Row], source: Row) -> tuple[list[Row], Row]:
        kept = without(source.get("runs", []), rows, _CASE)
        places = [(case.form, case.tile_name, case.layers) for case in TABLES[table]]
        order = {place: number for number, place in enumerate(places)}
        runs = sorted([*kept, *rows], key=lambda row: order.get(_case_of(row)[:3], len(order)))
        shown = [{"what": table, **row} for row in summarize(runs)]
        return shown, {**(source if kept else {}), "runs": runs}

    change_part(
        _path_of(config),
        table,
        change,
        title="Embedded model: softmax within tiles and linear attention in one layer",
        command=f"python -m research.hybrid {to_flags(config, without=('out', 'device'))}",
        device=device,
    )


def _case_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _CASE)


def summarize(rows: Sequence[Row]) -> list[Row]:
    """Return a row for all seeds of a case: means, and the spread of the Frechet distance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_case_of(row), []).append(row)
    found = []
    for case, runs in groups.items():
        # Runs of earlier versions have no share.
        names = [name for name in _MEANS if all(name in each for each in runs)]
        means = {name: statistics.fmean(each[name] for each in runs) for name in names}
        distances = [each["frechet"] for each in runs]
        spread = statistics.stdev(distances) if len(runs) > 1 else None
        row = {**dict(zip(_CASE, case, strict=True)), "cost": runs[-1]["cost"]}
        row |= {"seeds": len(runs), **means}
        found.append({**row, "frechet_spread": spread})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, do the runs with a bar, show the tables."""
    config = parse(HybridConfig, argv, description=__doc__)
    for table, rows in run(config).items():
        sys.stdout.write(f"\n{table}\n{show_rows(summarize(rows))}")


if __name__ == "__main__":
    run_command(main)
