"""Compare what a transfer can be made of: `python -m research.ablations`.

Every row of `TABLES` is a transfer of the embedded model, run with several seeds. Each run is one
`python -m linvideo_core.transfer` in a folder of its own, which compares its result with the
teacher; runs of a seed share the teacher's samples. Rows that come to the same flags share a run.
    python -m research.ablations                                   # small, on a CPU
    python -m research.ablations --preset gpu --tables objective,selection --record
    python -m research.ablations --tables target --flags "--steps 100 --learning-rate 1e-3"
Repeating a command continues where it stopped. `--out` then holds ablation.json with the means over
seeds, and the runs; `python -m research.ablation_plots` draws the record.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.record import RESULTS_FOLDER, show_rows, write_record
from linvideo_core import artifact
from linvideo_core.run import limits
from linvideo_core.run.config import Settings, option, parse, run_command, to_flags, to_json
from linvideo_core.run.devices import resolve_device
from linvideo_core.run.errors import SettingError
from linvideo_core.run.files import write_json
from linvideo_core.transfer.config import ARTIFACT_NAME

from .declared_runs import (
    ROW_NAME,
    Run,
    list_cards,
    place_runs,
    run_module,
    stopped_with,
    summarize,
)

logger = logging.getLogger(__name__)

RESULT_NAME = "ablation.json"

# A step of ADM takes so many times one of velocity matching (results/evidence.json, `plan`).
_EQUAL_TIME = 239 / 200
_ADM = {"objective": "adm"}
_VELOCITY = {"steps_factor": _EQUAL_TIME}

_SHOWN = ("table", "name", "seeds", "digit", "motion", "frechet_share", "frechet_teacher", "error")

Row = dict[str, Any]

TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "objective": {
        "adm": _ADM,
        "velocity_equal_time": _VELOCITY,
        "velocity": {},
        # All noise levels seen alike, however far the teacher's flow carries an error from there.
        "adm_even_levels": {**_ADM, "levels": "even"},
        "velocity_even_levels": {**_VELOCITY, "levels": "even"},
        # Every layer linear: where the student's own states lie furthest from the stored ones.
        "adm_all_layers": {**_ADM, "target": 10},
        "velocity_all_layers": {**_VELOCITY, "target": 10},
        # Nothing but feature maps moves: what the student cannot represent stays large.
        "adm_maps_alone": {**_ADM, "parameters": "feature_maps"},
        "velocity_maps_alone": {**_VELOCITY, "parameters": "feature_maps"},
    },
    "selection": {
        "learned": {},
        # What learning came to most often, known from the first step on as a rule's choice is.
        "learned_before": {"layers": "0,1,3,4,9"},
        "learned_sooner": {"selection_share": 0.2},
        "alternate": {"choice": "alternate"},
        "replace_one": {"choice": "sensitivity", "sensitivity": "replace-one"},
        "restore_one": {"choice": "sensitivity", "sensitivity": "restore-one"},
        # As the paper does it: layers stay mixed up to the last step and are rounded there.
        "rounded_at_end": {"selection_share": 1.0},
    },
    "target": {"5": {}, **{str(count): {"target": count} for count in (3, 7, 8, 10)}},
    "feature_map": {
        "D": {},
        "2D": {"feature_ratio": 2},
        "shared": {"map_sharing": "shared"},
        "joint": {"feature_map": "hedgehog_joint"},
        "gate": {"output_gate": True},
        # One frame of the embedded model.
        "window": {"window": 64},
    },
    "parameters": {
        "lora_32": {},
        "full": {"parameters": "full"},
        "lora_8": {"lora_rank": 8},
        "lora_64": {"lora_rank": 64},
        "feature_maps": {"parameters": "feature_maps"},
    },
    "best": {
        "steps_x2": {**_ADM, "steps_factor": 2.0},
        "steps_x4": {**_ADM, "steps_factor": 4.0},
        "velocity_x4": {"steps_factor": 4.0 * _EQUAL_TIME},
    },
}
"""Table -> row -> what it changes of a transfer's settings, and `steps_factor` of its steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationConfig(Settings):
    """Which rows are run, how often, and what all of them share."""

    tables: str = option("objective", "tables to make, such as objective,selection; or all")
    seeds: int = option(2, "seeds of each row, counted up from 0", limits.COUNT)
    jobs: int = option(
        2, "runs at a time, each in a process of its own, over all GPUs", limits.COUNT
    )
    steps: int = option(60, "training steps of a row", limits.COUNT)
    flags: str = option(
        "--num-trajectories 16 --learning-rate 2e-3 --layer-score-learning-rate 0.03 "
        "--warmup-steps 6",
        "other flags of linvideo_core.transfer that all runs have",
    )
    device: str = option("auto", "cpu or cuda", choices=("auto", "cpu", "cuda"))
    out: Path = option(Path("runs/ablate"), "folder of the runs")
    record: bool = option(False, "write results/evidence.json")

    def __post_init__(self) -> None:
        super().__post_init__()
        if strangers := [name for name in self.chosen if name not in TABLES]:
            raise SettingError(
                f"{{tables}} {self.tables} given, and {strangers[0]!r} is unknown; names of "
                f"{','.join(TABLES)} with commas between are needed",
                "tables",
            )

    @property
    def chosen(self) -> list[str]:
        """The names of the tables to make."""
        return list(TABLES) if self.tables == "all" else self.tables.split(",")


PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    # So few steps that what is compared does not yet reach the teacher.
    "gpu": {
        "out": Path("runs/ablate-gpu"),
        "tables": "all",
        "seeds": 3,
        "jobs": 7,
        "steps": 200,
        "flags": (
            "--num-trajectories 384 --states-per-trajectory 16 --shard-size 192 "
            "--warm-start-steps 80 --batch-size 64 --learning-rate 2e-3 "
            "--layer-score-learning-rate 0.03 --warmup-steps 20 --compile "
            "--checkpoint-every 100 --log-every 10 --evaluate-samples 250 "
            "--evaluate-batch-size 250"
        ),
    },
}


def list_runs(config: AblationConfig) -> dict[tuple[str, str], list[Run]]:
    """Return the runs, one a seed, of every row (table, name); rows of the same flags share."""
    rows = {}
    for table in config.chosen:
        for name, changes in TABLES[table].items():
            steps = max(1, round(config.steps * changes.get("steps_factor", 1.0)))
            settings = {name: value for name, value in changes.items() if name != "steps_factor"}
            seeds, folder = range(config.seeds), config.out / "runs"
            rows[table, name] = place_runs({**settings, "steps": steps}, seeds, folder)
    return rows


def do_run(run: Run, config: AblationConfig, device: str, started: list[subprocess.Popen]) -> Row:
    """Train and evaluate unless it is done; return its row, with `error` where it failed.

    started: gets the transfer's process.
    """
    if (run.folder / ROW_NAME).exists():
        return json.loads((run.folder / ROW_NAME).read_text(encoding="utf-8"))
    teacher = config.out.absolute() / "teacher" / f"seed-{run.seed}"
    own = ["--seed", run.seed, "--device", device, "--out", run.folder.absolute()]
    words = [*shlex.split(config.flags), *run.flags.split(), *own, "--teacher-folder", teacher]
    begin = time.monotonic()
    if (error := run_module("linvideo_core.transfer", words, started)) is not None:
        logger.warning("%s, seed %d: %s", run.flags, run.seed, error)
        return {"seed": run.seed, "error": error}
    row = {"seed": run.seed, **read_row(run.folder), "seconds": time.monotonic() - begin}
    row["layers"] = list(artifact.load(run.folder / ARTIFACT_NAME).header.linear_layers)
    write_json(run.folder / ROW_NAME, row)
    return row


def read_row(folder: Path) -> Row:
    """Return a finished transfer's measures, and of some the share of its teacher's own."""
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    rows = {row["model"]: row for row in evaluation["rows"]}
    teacher, row = rows["teacher"], {**rows["student"]}
    row["frechet_teacher"] = row.pop("frechet_to_teacher", None)
    shares = {
        f"{name}_share": row[name] / teacher[name]
        for name in ("digit", "motion", "frechet")
        if row.get(name) is not None and teacher.get(name)
    }
    size = (folder / ARTIFACT_NAME).stat().st_size
    return {k: v for k, v in row.items() if k != "model"} | shares | {"bytes": size}


def run(config: AblationConfig) -> dict[str, Any]:
    """Do every run that `config.out` does not hold yet; return what ablation.json holds.

    `rows`, one a row of a table; `members`, the runs of each of them; `runs`, one a run.
    """
    rows = list_runs(config)
    unique = {run.folder: run for runs in rows.values() for run in runs}
    # The first of each seed samples the teacher for all others.
    first = {run.seed: run for run in reversed(unique.values())}
    later = [run for run in unique.values() if run not in first.values()]
    device = resolve_device(config.device)
    cards = list_cards(device)
    done: dict[Path, Row] = {}
    started: list[subprocess.Popen] = []
    with (
        concurrent.futures.ThreadPoolExecutor(config.jobs) as pool,
        tqdm(total=len(unique)) as bar,
        stopped_with(started),
    ):
        for runs in (list(first.values()), later):
            settings = itertools.repeat(config), itertools.cycle(cards), itertools.repeat(started)
            for one, row in zip(runs, pool.map(do_run, runs, *settings), strict=True):
                done[one.folder] = row
                bar.update()
    names = {folder: str(folder.relative_to(config.out)) for folder in done}
    result = {
        "settings": json.loads(to_json(config)),
        "rows": [
            {"table": table, "name": name, **summarize([done[run.folder] for run in runs])}
            for (table, name), runs in rows.items()
        ],
        "members": [
            {"table": table, "name": name, "runs": [names[r.folder] for r in runs]}
            for (table, name), runs in rows.items()
        ],
        "runs": [{"run": names[folder], **row} for folder, row in done.items()],
    }
    write_json(config.out / RESULT_NAME, result)
    if config.record:
        write_record(
            RESULTS_FOLDER / "evidence.json",
            title="Embedded model, means over seeds",
            command=f"python -m research.ablations {to_flags(config, without=('out', 'device'))}",
            rows=result["rows"],
            device=device,
            details={key: result[key] for key in ("members", "runs")},
        )
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, do the runs with a bar, show the tables."""
    config = parse(AblationConfig, argv, description=__doc__, presets=PRESETS)
    rows = [{name: row.get(name) for name in _SHOWN} for row in run(config)["rows"]]
    sys.stdout.write(f"\n{show_rows(rows)}\nall of it: {config.out}\n")


if __name__ == "__main__":
    run_command(main)
