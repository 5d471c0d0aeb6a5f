"""Compare what a transfer can be made of: `python -m research.ablations`.

Every row of the declared tables (`ablations.py`) is a transfer of the embedded model, run with
several seeds, several of them side by side.
    python -m research.ablations                                   # small, on a CPU
    python -m research.ablations --preset gpu --tables objective,selection --record
Repeating a command continues where it stopped. `--out` then holds ablation.json with all tables and
runs, evidence_*.png and .gif, the teacher's samples, and a folder for each run. Every flag of a
transfer changes what all runs share.
"""

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import REPOSITORY, RESULTS_FOLDER, write_record
from tqdm.contrib.logging import logging_redirect_tqdm

from linvideo_core.run.config import option, parse, positive, to_flags, to_json
from linvideo_core.run.devices import resolve_device
from linvideo_core.run.files import write_json
from linvideo_core.run.folder import check_run, open_run
from linvideo_core.run.progress import Progress, TqdmProgress, silent
from linvideo_core.run.tables import format_value
from linvideo_core.teacher.teacher import TeacherConfig, open_teacher
from linvideo_core.transfer.objectives import OBJECTIVES
from linvideo_core.transfer.pipeline import TransferConfig

from .declared import Run, choose_tables, list_runs
from .findings import Findings
from .report import draw, draw_samples, publish
from .results import Row, share_of_teacher, show_tables, summarize
from .run_one import (
    ROW_NAME,
    SAMPLES_NAME,
    UNTRAINED_NAME,
    SampleTeacher,
    TimeSteps,
    Worker,
    teacher_folder,
)
from .workers import Failure, Workers

logger = logging.getLogger(__name__)

_Rows = Mapping[tuple[str, str], list[Run]]

RESULT_NAME, PLAN_NAME = "ablation.json", "plan.json"
RECORD_PATH = RESULTS_FOLDER / "evidence.json"

# What a repeated command may change: none of it decides a run's result.
_FREE_FIELDS = ("out", "teacher_folder", "tables", "only", "seeds", "jobs", "max_minutes", "record")
_FREE_OF_RECORD = ("out", "teacher_folder", "device", "jobs", "max_minutes")
_DETAILS = ("teacher", "untrained", "members", "runs", "plan")
_SAID = ("digit", "motion", "frechet", "frechet_teacher", "error")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """Which rows are run, how often, and what all of them share."""

    transfer: TransferConfig = dataclasses.field(default_factory=TransferConfig)
    tables: str = option("all", "tables to make, such as objective,selection; all: every one")
    only: str | None = option(None, "rows to run, such as adm,velocity; none: all of the tables")
    seeds: int = option(3, "seeds of each row, counted up from --seed")
    jobs: int = option(2, "runs at a time, each in a process of its own, over all GPUs")
    gap_samples: int = option(
        0, "videos for the gap that rounding opens, in the table selection; 0: it is not measured"
    )
    gap_points: int = option(1, "moments of a selection at which it is measured, the last included")
    max_minutes: float = option(0.0, "stop after so long, to be continued; 0: when all is done")
    record: bool = option(False, "write results/evidence.json")

    def __post_init__(self) -> None:
        positive(self, "seeds", "jobs", "gap_points")
        if self.max_minutes < 0:
            raise ValueError(f"--max-minutes {self.max_minutes} given; 0 or more are needed")
        if self.gap_samples < 0 or self.gap_samples == 1:
            raise ValueError(f"--gap-samples {self.gap_samples} given; 0, or 2 or more are needed")
        if self.transfer.evidence.evaluate_samples < max(2, self.gap_samples):
            raise ValueError(
                f"--evaluate-samples {self.transfer.evidence.evaluate_samples} given; 2 or more, "
                "and no fewer than --gap-samples, are needed"
            )
        if self.transfer.experts.low_noise_model is not None:
            raise ValueError("--low-noise-model given; an ablation compares runs of one model")
        if self.record and self.transfer.teacher != TeacherConfig():
            raise ValueError(
                "--record was given with --model or --prompts; the record is of the embedded model"
            )
        choose_tables(self.tables, self.only)


PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "out": Path("runs/ablate"),
        "tables": "objective",
        "seeds": 2,
        "steps": 60,
        "num_trajectories": 16,
        "learning_rate": 2e-3,
        "layer_score_learning_rate": 0.03,
        "warmup_steps": 6,
    },
    # So few steps that what is compared does not yet reach the teacher.
    "gpu": {
        "out": Path("runs/ablate-gpu"),
        "jobs": 7,
        "gap_samples": 100,
        "gap_points": 4,
        "num_trajectories": 384,
        "states_per_trajectory": 16,
        "shard_size": 192,
        "warm_start_steps": 80,
        "steps": 200,
        "batch_size": 64,
        "learning_rate": 2e-3,
        "layer_score_learning_rate": 0.03,
        "warmup_steps": 20,
        # Its minute at the start is won back many times over: kernels take 17 ms a step, not 31.
        "compile": True,
        "cuda_graphs": True,
        "checkpoint_every": 100,
        "log_every": 10,
        "evaluate_samples": 250,
        "evaluate_batch_size": 250,
    },
}


def run(config: AblateConfig, progress: Progress = silent) -> dict[str, Any]:
    """Do every run that `config.out` does not hold yet; return what ablation.json holds.

    `settings`; `rows`, one a row of a table; `members`, the runs of each of them; `runs`, one a
    run; `teacher` and `untrained`, one a seed; `plan`, the time of a step and the memory of each
    objective, where they are compared.

    Raises ValueError or FileNotFoundError, in one sentence, for bad input.
    """
    until = time.monotonic() + 60 * config.max_minutes if config.max_minutes else float("inf")
    out, tables = config.transfer.out, choose_tables(config.tables, config.only)
    seeds = range(config.transfer.seed, config.transfer.seed + config.seeds)
    check_run(out, config, ignore=_FREE_FIELDS)
    # A row that cannot be is refused before anything is made.
    rows = list_runs(tables, config.transfer, seeds, dict.fromkeys(OBJECTIVES, 1.0))
    open_run(out, config, ignore=_FREE_FIELDS)
    if (draft := open_teacher(config.transfer.teacher)) is not None:
        # Once, for all workers.
        draft.source.read(out, device=resolve_device(config.transfer.device), progress=progress)
    plan = _read(out / PLAN_NAME) or {}
    arguments = (config.transfer, config.gap_samples, config.gap_points)
    with Workers(Worker, *arguments, count=config.jobs) as workers:
        if "objective" in tables:
            timed = {r.config.objective.objective: r for (r, *_) in _table(rows, "objective")}
            if timed.keys() - plan.keys():
                _sample_teachers(workers, out, [config.transfer.seed], until)
                for _, found in workers.run([TimeSteps(timed)], until=until):
                    plan = _whole(found)
                    write_json(out / PLAN_NAME, plan)
        if all(v.time_of is None for table in tables.values() for v in table) or plan:
            per_step = {name: row["seconds_per_step"] for name, row in plan.items()}
            rows = list_runs(tables, config.transfer, seeds, per_step)
            finished = _do_runs(workers, config, rows, plan, until, progress)
        else:
            finished = {}
    result = save_tables(config, rows, finished, plan)
    found = Findings(result)
    draw(found, out)
    draw_samples(found, out, out / "evidence_samples")
    if config.record:
        publish(_record(config, result), RESULTS_FOLDER)
        draw_samples(found, out, REPOSITORY / "docs" / "evidence_samples")
    return result


def _do_runs(
    workers: Workers,
    config: AblateConfig,
    rows: _Rows,
    plan: Row,
    until: float,
    progress: Progress,
) -> dict[Path, Row]:
    """Do what is left of the runs; return the row of each that is finished, by folder."""
    runs = {run.folder: run for row in rows.values() for run in row}
    finished = {folder: row for folder in runs if (row := _read(folder / ROW_NAME))}
    left = [run for folder, run in runs.items() if folder not in finished]
    seeds = sorted({run.config.seed for run in left})
    _sample_teachers(workers, config.transfer.out, seeds, until)
    progress("runs", len(finished), len(runs))
    for run, found in workers.run(left, until=until):
        if isinstance(found, Failure):
            found, failure = {"seed": run.config.seed, "error": found.sentence}, found
            if failure.is_final:
                write_json(run.folder / ROW_NAME, found)
        finished[run.folder] = found
        measures = {k: format_value(found[k]) for k in _SAID if k in found}
        said = ", ".join(f"{name} {value}" for name, value in measures.items())
        logger.info("%s, seed %d: %s", run.key, run.config.seed, said)
        save_tables(config, rows, finished, plan)
        progress("runs", len(finished), len(runs))
    return finished


def _sample_teachers(workers: Workers, out: Path, seeds: Sequence[int], until: float) -> None:
    missing = [
        SampleTeacher(seed)
        for seed in seeds
        if not all((teacher_folder(out, seed) / n).exists() for n in (SAMPLES_NAME, ROW_NAME))
    ]
    for _, found in workers.run(missing, until=until):
        _whole(found)


def save_tables(
    config: AblateConfig, rows: _Rows, finished: Mapping[Path, Row], plan: Row
) -> dict[str, Any]:
    """Write ablation.json from the rows of the runs that are finished; return what it holds."""
    out = config.transfer.out
    seeds = sorted({run.config.seed for row in rows.values() for run in row})
    folders = {s: teacher_folder(out, s) for s in seeds}
    teachers = {s: row for s, f in folders.items() if (row := _read(f / ROW_NAME))}
    untrained = [
        row | share_of_teacher(row, teachers[s])
        for s in teachers
        if (row := _read(folders[s] / UNTRAINED_NAME / ROW_NAME))
    ]
    whole = {
        folder: row | share_of_teacher(row, teachers[row["seed"]])
        for folder, row in finished.items()
    }
    summaries = _summarize_reference(teachers, untrained)
    for (table, name), runs in rows.items():
        mine = [whole[run.folder] for run in runs if run.folder in whole]
        if mine:
            summary = summarize(table, name, mine)
            if table == "objective":
                summary |= plan.get(runs[0].config.objective.objective, {})
            summaries.append(summary)
    result = {
        "settings": json.loads(to_json(config)),
        "rows": summaries,
        "members": [
            {"table": table, "name": name, "runs": [str(r.folder.relative_to(out)) for r in runs]}
            for (table, name), runs in rows.items()
        ],
        "runs": [{"run": str(f.relative_to(out)), **row} for f, row in whole.items()],
        "teacher": list(teachers.values()),
        "untrained": untrained,
        "plan": plan,
    }
    write_json(out / RESULT_NAME, result)
    return result


def _summarize_reference(teachers: Mapping[int, Row], untrained: Sequence[Row]) -> list[Row]:
    """Return the rows that all others lie between: the teacher, and its first layers swapped."""
    whole = [row | share_of_teacher(row, row) for row in teachers.values()]
    rows = {"teacher": whole, "swapped_untrained": untrained}
    summaries = [summarize("reference", name, mine) for name, mine in rows.items() if mine]
    # Of the sampler: in every other row they are of the training.
    return [{k: v for k, v in row.items() if k != "steps"} for row in summaries]


def _record(config: AblateConfig, result: Mapping[str, Any]) -> dict[str, Any]:
    count = config.transfer.evidence.evaluate_samples
    return write_record(
        RECORD_PATH,
        title=f"Embedded model, {count} samples a seed, means over seeds",
        command=f"python -m research.ablations {to_flags(config, without=_FREE_OF_RECORD)}",
        rows=result["rows"],
        device=resolve_device(config.transfer.device),
        details={key: result[key] for key in _DETAILS},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, do the runs with a bar, show the tables."""
    config, is_dry_run = parse(
        AblateConfig, argv, description=__doc__.splitlines()[0], presets=PRESETS
    )
    if is_dry_run:
        sys.stdout.write(to_json(config))
        return
    try:
        with logging_redirect_tqdm(), TqdmProgress() as progress:
            result = run(config, progress)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command continues where it stopped\n")
        sys.exit(130)
    sys.stdout.write(f"\n{show_tables(result['rows'])}\nall of it: {config.transfer.out}\n")


def _table(rows: _Rows, table: str) -> list[list[Run]]:
    return [runs for (name, _), runs in rows.items() if name == table]


def _whole(found: Row | Failure) -> Row:
    if isinstance(found, Failure):
        raise ValueError(found.sentence)
    return found


def _read(path: Path) -> Row | None:
    """Return a JSON file's object; None where there is nothing whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


command = main
