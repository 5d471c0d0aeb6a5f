"""Compare what a student of `crowd` can be made of: `python -m research.crowd.experiments`.

Every arm of `arms.TABLES` is a `linvideo_core.transfer` of the stored teacher, of some a
`linvideo_core.distill` after it, run with several seeds and measured by `research.crowd.evaluate`
on captions that no training has seen.
    python -m research.crowd.experiments --tables objectives --seeds 4 --record
    python -m research.crowd.experiments --tables selection,sizes --num-samples 1000
    python -m research.crowd.experiments --arms stored_384,pool,on_policy --seeds 8 --record
All trainings take equal time. `transfer` knows steps alone, so a short run of each kind is timed
first, and its seconds a step say how many steps fit into `--minutes-per-run`: those of the training
itself. The warm start before it is alike in all; stored videos are sampled once a seed. On several
GPUs each does whole seeds.

A seed is one of everything: the student's, and the noise and captions of its evaluation. An arm is
compared with its baseline seed by seed (`research.paired`), in every measure.
Repeating the command continues where it stopped, also with more tables, arms or seeds. On another
machine config.json, paces.json and crowd.json of `--out` are enough to go on to what has no row.
crowd.json has a row an arm and seed; the tables go to summary.json there or, with `--record`, into
results/crowd.json: `unpaired_frechet` is to the teacher of other noise, `floor` the teacher's own.
"""

import collections
import concurrent.futures
import contextlib
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.record import RESULTS_FOLDER, write_part
from linvideo_core.run.config import parse, run_command, to_flags
from linvideo_core.run.devices import resolve_device
from linvideo_core.run.lock import locked

from .. import declared_runs
from ..declared_runs import list_cards
from . import summary
from .arms import NOT_RUN
from .study import (
    RECORD_NAME,
    REFERENCES,
    ROWS_NAME,
    SUMMARY_NAME,
    ExperimentsConfig,
    Study,
    do_arm,
    find_warm_start,
    open_study,
)
from .workers import Worker, started

Row = dict[str, Any]

# Of one H200. A guided step of one of 40 videos together was measured; what a warm start takes, a
# training besides its steps, timing one kind of training, and the start are guesses by counting.
_H200_SECONDS = {
    "guided_step": 0.134 / 30,
    "warm_start": 5.0,
    "training": 3.0,
    "pace": 10.0,
    "start": 20.0,
}


def run(config: ExperimentsConfig) -> dict[str, list[Row]]:
    """Make and measure what `config.out` has no row for; return the rows of all tables by name."""
    with locked(config.out):
        rows = do_all(open_study(config), resolve_device(config.device))
    return {table: summary.tabulate(rows, table) for table in [REFERENCES, *config.chosen]}


def do_all(study: Study, device: str) -> list[Row]:
    """Say what is missing of a study, make it on all devices of a kind, return all rows."""
    config, cards = study.config, list_cards(device)
    sys.stdout.write(f"{forecast(study, len(cards), device)}\n")
    # Whoever is free takes the next: seeds end one after another.
    waiting = collections.deque(study.missing())
    places = config.jobs * cards

    def work(worker: Worker, card: str) -> None:
        with contextlib.suppress(IndexError):
            while True:
                for row in worker.call(do_arm, config, waiting.popleft(), study.paces, card):
                    study.rows.add(row)

    threads = concurrent.futures.ThreadPoolExecutor(len(places))
    with threads, started(places) as workers:
        # Alone on its card: what else runs there must not make a training shorter.
        study.find_paces(workers[0], cards[0])
        try:
            futures = [threads.submit(work, *each) for each in zip(workers, places, strict=True)]
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            waiting.clear()
            raise
    return study.rows.read()


def forecast(study: Study, num_cards: int, device: str) -> str:
    """Say how many trainings and videos are missing, and how long they take by what is known.

    Videos to measure count as their steps, and stored ones to learn from as if none were there.

    Seconds of a video and of a training are those of rows that are there, over the runs at a time
    that they shared a card with. Without any they are counted for an H200, see `_H200_SECONDS`; on
    a CPU what is not known is left out.
    """
    config, comparison = study.config, study.config.comparison
    trainings, warm_starts, references = set(), set(), set()
    videos, stored = 0.0, dict.fromkeys(range(config.seeds), 0)
    for each in study.missing():
        place = ""
        for training, settings in each.trainings.items():
            place += " ".join([training, *declared_runs.to_flags(settings)])
            trainings.add((each.seed, place))
            stored[each.seed] = max(stored[each.seed], settings.get("num_trajectories", 0))
        warm_starts.add((each.seed, str(find_warm_start(each.trainings[each.arm.training]))))
        key = {"table": REFERENCES, "name": "teacher", "seed": each.seed}
        absent = [n for n in each.num_frames if not study.rows.is_done(**key, num_frames=n)]
        references |= {(each.seed, num_frames) for num_frames in absent}
        steps = (each.arm.distillation or {}).get("num_steps") or each.arm.sampler_steps
        share = (steps or comparison.sampler_steps) / comparison.sampler_steps
        videos += share * len(each.num_frames) * comparison.num_samples
    videos += 2 * len(references) * comparison.num_samples + sum(stored.values())
    usual = _H200_SECONDS if device == "cuda" else dict.fromkeys(_H200_SECONDS, 0.0)
    rows = [row for row in study.rows.read() if "steps" in row]
    per_training = 60 * config.minutes_per_run + usual["training"] / config.jobs
    per_video = usual["guided_step"] * comparison.sampler_steps
    seconds = usual["start"] + len(study.kinds()) * usual["pace"]
    if rows:
        per_training = statistics.median(row["run_seconds"] / row["jobs"] for row in rows)
        per_video = statistics.median(row["seconds_per_video"] / row["jobs"] for row in rows)
    else:
        seconds += len(warm_starts) * usual["warm_start"] / num_cards
    seconds += (len(trainings) * per_training + videos * per_video) / num_cards
    unknown = ", without the videos" if not rows and device != "cuda" else ""
    return (
        f"{len(trainings)} trainings of {config.minutes_per_run:g} minutes are missing, and as "
        f"many videos to sample as {videos:,.0f} of the teacher: about {seconds:.0f} seconds on "
        f"{num_cards} devices, {config.jobs} runs at a time on each{unknown}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, say what is missing, make it, write and show the tables."""
    config = parse(ExperimentsConfig, argv, description=__doc__)
    tables = run(config)
    path = RESULTS_FOLDER / RECORD_NAME if config.record else config.out / SUMMARY_NAME
    runs = json.loads((config.out / ROWS_NAME).read_text(encoding="utf-8"))["rows"]
    flags = to_flags(config, without=("out", "device"))
    for table, rows in tables.items():
        write_part(
            path,
            table,
            title="crowd: students of the stored teacher on captions that no training has seen",
            command=f"python -m research.crowd.experiments {flags}".strip(),
            rows=rows,
            device=resolve_device(config.device),
            details={
                **summary.count_tests(rows),
                "note": summary.describe_tests(rows),
                "not_run": NOT_RUN.get(table, {}),
                "runs": [row for row in runs if row["table"] == table],
            },
        )
    for table in config.chosen:
        sys.stdout.write(f"\n{summary.show(table, tables[table], tables[REFERENCES])}")
    sys.stdout.write(f"\nall of it: {path}\n")


if __name__ == "__main__":
    run_command(main)
