"""Compare what a student of `crowd` can be made of: `python -m research.crowd.experiments`.

Every arm of `arms.TABLES` is a training of the stored teacher by the stages of
`linvideo_core.transfer`, of some by those of `linvideo_core.distill` after it, with several seeds;
`research.crowd.evaluate` measures it on captions that no training has seen.
    python -m research.crowd.experiments --tables sizes --seeds 1 --num-samples 64
On two H200s, the first words being
    python -m research.crowd.experiments --compile --jobs 4 --minutes-per-run 0.1 \
        --pace-steps 12 --num-samples 128 --sampler-steps 20 --out runs/study --record
and the seconds those of `forecast`, which are counted, the second call's after the first:
    --tables all --seeds 4                                                             1252
    --tables students,selection --seeds 8 --arms velocity,on_policy,learned,alternate,random  215
where on_policy stands for whatever was best. Of `objectives` with 0.12 minutes it counts 447; 439
were taken when processes still waited for each other's videos. All tables took 1.3 to 1.4 times
what is counted on a machine that had compiled nothing yet: besides its steps a training of hybrid,
sizes or few_steps takes 6 to 9 seconds of a card, compiling among them, one of objectives, students
or selection 2 to 3, and 0.75 and warm starts are counted. In one folder a table finds the arms and
videos that it shares with others. Whether 20 steps tell models apart as 30 do, the teacher's own
row says, in 15 seconds:
    python -m research.crowd.evaluate --model research/crowd/weights/model.safetensors \
        --judge research/crowd/weights/judge.safetensors \
        --prompts runs/study/held_out.safetensors \
        --num-samples 128 --batch-size 32 --sampler-steps 20 --out runs/steps_20

All trainings take equal time; `velocity` of few_steps that of a transfer and a distillation
together. Trainings know steps alone, so a short run of each kind is timed first, alone on the first
device, and its seconds a step say how many steps fit into `--minutes-per-run`: those of the
training itself. With `--jobs` several share a card afterwards, and take longer by the clock; their
steps are those of a card of their own, which no neighbour changes. `seconds_per_video` is then of a
card that is shared, too: speeds are another command's. What runs of a seed have in common is made
once and takes none of that time: stored videos, the warm start of the same states, and the
teacher's and rendered videos that all are compared with.

A seed is one of everything: the student's, and the noise and captions of its evaluation. An arm is
compared with its baseline seed by seed (`research.paired`), in every measure.
The teacher's videos of all seeds are sampled first, on the other cards while one times. Then seeds
are made one after another, by whichever process is free. Repeating the command continues where it
stopped, also with more tables, arms or seeds; killed, it loses the arms that were being made. It
records its tables in the end: with as few tables and seeds as are done, at once. On another machine
config.json, paces.json and crowd.json of `--out` are enough to go on to what has no row; the
teacher's videos of the seeds that are not done are sampled there again.
crowd.json has a row an arm and seed; the tables go to summary.json there or, with `--record`, into
results/crowd.json: `unpaired_frechet` is to the teacher of other noise, `floor` the teacher's own.
"""

import concurrent.futures
import contextlib
import json
import queue
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.record import RESULTS_FOLDER, check_parts, write_part
from linvideo_core.run.config import parse, run_command, to_flags
from linvideo_core.run.devices import resolve_device
from linvideo_core.run.lock import locked

from ..declared_runs import list_cards
from ..workers import Worker, started
from . import summary
from .arms import NOT_RUN
from .forecast import forecast
from .rows import RECORD_NAME, RECORD_TITLE
from .study import (
    REFERENCES,
    ROWS_NAME,
    SUMMARY_NAME,
    ExperimentsConfig,
    Study,
    do_arm,
    measure_references,
    open_study,
    store_videos,
)

Row = dict[str, Any]


def run(config: ExperimentsConfig) -> dict[str, list[Row]]:
    """Make and measure what `config.out` has no row for; return the rows of all tables by name."""
    with locked(config.out):
        rows = do_all(open_study(config), resolve_device(config.device))
    tables = {table: summary.tabulate(rows, table) for table in [REFERENCES, *config.chosen]}
    # A table of which no arm was chosen has nothing to say, and keeps its part of a record.
    return {table: found for table, found in tables.items() if found}


def do_all(study: Study, device: str) -> list[Row]:
    """Say what is missing of a study, make it on all devices of a kind, return all rows."""
    config, cards = study.config, list_cards(device)
    if not study.missing():
        return study.rows.read()
    sys.stdout.write(f"{forecast(study, len(cards), device)}\n")
    places = config.jobs * cards
    calls: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    for each in study.count_stored().items():
        calls.put((store_videos, *each))
    for each in study.references():
        calls.put((measure_references, *each))
    # A thread a process, and one that times.
    threads = concurrent.futures.ThreadPoolExecutor(1 + len(places))
    with threads, started(places) as workers:

        def time_kinds() -> None:
            study.find_paces(workers[0], cards[0])
            for each in filter(study.has_paces, study.missing()):
                calls.put((do_arm, each, study.paces))

        def work(worker: Worker, card: str) -> None:
            # Alone on its card: what else runs there must not make a training shorter.
            if card != cards[0]:
                take_calls(worker, card)
            timing.result()
            take_calls(worker, card)

        def take_calls(worker: Worker, card: str) -> None:
            # Whoever is free takes the next.
            with contextlib.suppress(queue.Empty):
                while True:
                    function, *args = calls.get_nowait()
                    for row in worker.call(function, config, *args, card) or ():
                        study.rows.add(row)

        timing = threads.submit(time_kinds)
        futures = [threads.submit(work, *each) for each in zip(workers, places, strict=True)]
        for future in concurrent.futures.as_completed([timing, *futures]):
            future.result()
    return study.rows.read()


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, say what is missing, make it, write and show the tables."""
    config = parse(ExperimentsConfig, argv, description=__doc__)
    path = RESULTS_FOLDER / RECORD_NAME if config.record else config.out / SUMMARY_NAME
    check_parts(path, resolve_device(config.device))
    tables = run(config)
    runs = json.loads((config.out / ROWS_NAME).read_text(encoding="utf-8"))["rows"]
    flags = to_flags(config, without=("out", "device"))
    for table, rows in tables.items():
        write_part(
            path,
            table,
            title=RECORD_TITLE,
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
    for table in [name for name in config.chosen if name in tables]:
        sys.stdout.write(f"\n{summary.show(table, tables[table], tables[REFERENCES])}")
    sys.stdout.write(f"\nall of it: {path}\n")


if __name__ == "__main__":
    run_command(main)
