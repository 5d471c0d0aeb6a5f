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

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS_FOLDER, write_part
from linvideo_core import artifact
from linvideo_core.evaluate.config import CompareConfig
from linvideo_core.flow import Recipe, make_sigmas
from linvideo_core.models.checkpoint import load_wan
from linvideo_core.run import limits
from linvideo_core.run.config import Settings, option, parse, run_command, to_flags
from linvideo_core.run.context import Run
from linvideo_core.run.devices import device_option, resolve_device, resolve_precision
from linvideo_core.run.errors import SettingError
from linvideo_core.run.files import write_json
from linvideo_core.run.folder import open_run
from linvideo_core.run.lock import locked

from .. import declared_runs
from ..declared_runs import ROW_NAME, list_cards, place_runs, run_module, stopped_with
from . import evaluate, summary
from .arms import NOT_RUN, TABLES, Arm, find_arms
from .captions import CaptionsConfig, write_both
from .pace import COMMANDS, decisive, find_kind, measure_pace
from .train import SHIFT

logger = logging.getLogger(__name__)

Row = dict[str, Any]

RECORD_NAME, ROWS_NAME, SUMMARY_NAME = "crowd.json", "crowd.json", "summary.json"
REFERENCES = "references"
"""The table of the teacher itself and of rendered clips."""
_PACES_NAME = "paces.json"
# A guided step of one of 40 videos together.
_H200_SECONDS = 0.134 / 30
_WAIT_SECONDS = 5
_WEIGHTS = Path("research/crowd/weights")
# What a repeated command may change: none of it decides a row.
_FREE_FIELDS = ("tables", "arms", "seeds", "pace_steps", "record", "device", "out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentsConfig(Settings):
    """Which arms are run, how often, how long, and how they are measured."""

    comparison: CompareConfig = dataclasses.field(
        default_factory=lambda: CompareConfig(
            num_samples=256, seeds_per_prompt=2, sampler_steps=30, shift=SHIFT, batch_size=32
        )
    )
    tables: str = option("objectives", f"tables to make, of {','.join(TABLES)}; or all")
    arms: str = option("", "arms of these tables to make, such as pool,on_policy; none: all")
    seeds: int = option(4, "seeds of each arm, counted up from 0", limits.COUNT)
    minutes_per_run: float = option(0.75, "time of each training", limits.POSITIVE)
    pace_steps: int = option(
        30, "steps of the run that tells how many fit into the time", limits.COUNT
    )
    flags: str = option(
        "--batch-size 8 --accumulation 1 --learning-rate 1e-3 --map-learning-rate 2e-3 "
        "--warm-start-steps 80 --frozen fp32 --activation-checkpointing false "
        "--checkpoint-every 500 --log-every 25",
        "other flags that all trainings have; an arm's own go before",
    )
    num_prompts: int = option(2000, "captions to train on, and as many held out", limits.COUNT)
    model: Path = option(_WEIGHTS / "model.safetensors", "the teacher")
    judge: Path = option(_WEIGHTS / "judge.safetensors", "the judge")
    out: Path = option(Path("runs/crowd_experiments"), "folder of the runs and the rows")
    record: bool = option(False, f"write results/{RECORD_NAME}, not {SUMMARY_NAME} in --out")
    device: str = device_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if strangers := [name for name in self.chosen if name not in TABLES]:
            raise SettingError(
                f"{{tables}} {self.tables} given, and {strangers[0]!r} is unknown; names of "
                f"{','.join(TABLES)} with commas between are needed",
                "tables",
            )
        known = {name for _, name in find_arms(self.chosen)}
        if strangers := [name for name in self.chosen_arms if name not in known]:
            raise SettingError(
                f"{{arms}} {self.arms} given, and {strangers[0]!r} is unknown; of {{tables}} "
                f"{self.tables} there are {','.join(sorted(known))}",
                "arms",
                "tables",
            )

    @property
    def chosen(self) -> list[str]:
        """The names of the tables to make."""
        return list(TABLES) if self.tables == "all" else self.tables.split(",")

    @property
    def chosen_arms(self) -> list[str]:
        """The names of the arms to make; none: all."""
        return self.arms.split(",") if self.arms else []

    def list_words(self) -> list[str]:
        """Return the words of the command line that all trainings share."""
        sampler = {
            name: getattr(self.comparison, name)
            for name in ("sampler_steps", "guidance_scale", "shift")
        }
        shared = {
            "model": self.model.absolute(),
            "prompts": self.out.absolute() / "prompts.safetensors",
            "teacher_folder": self.out.absolute() / "teacher",
            "shard_size": self.comparison.batch_size,
            "evaluate_samples": 0,
            "num_frames": evaluate.WHOLE,
            "height": 256,
            "width": 256,
        }
        return [*declared_runs.to_flags(sampler | shared), *shlex.split(self.flags)]


class Rows:
    """The rows of `<out>/crowd.json`, which is written anew, whole, with each that is added."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        found = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        self._rows = {self._key(**row): row for row in found}

    @staticmethod
    def _key(*, table: str, name: str, seed: int, num_frames: int, **_: Any) -> tuple:
        return (table, name, seed, num_frames)

    def is_done(self, **key: Any) -> bool:
        """Say whether there is a row of measures for a table, name, seed and num_frames."""
        row = self._rows.get(self._key(**key))
        return row is not None and "error" not in row

    def add(self, row: Row) -> None:
        """Keep a row, in place of one of the same table, name, seed and num_frames."""
        with self._lock:
            self._rows[self._key(**row)] = row
            write_json(self._path, {"rows": self.read()})

    def read(self) -> list[Row]:
        """Return all rows."""
        return list(self._rows.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Missing:
    """An arm that a seed has no row for yet, at some numbers of frames."""

    table: str
    name: str
    seed: int
    arm: Arm
    num_frames: list[int]

    @property
    def row(self) -> Row:
        """What tells its rows from others, all but the number of frames."""
        return {"table": self.table, "name": self.name, "seed": self.seed}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What all seeds share.

    arms: by (table, name). paces: seconds a step by kind of training, see `pace.find_kind`.
    num_layers: of the teacher. started: the processes that train. is_stopped: no other may start.
    """

    config: ExperimentsConfig
    arms: Mapping[tuple[str, str], Arm]
    rows: Rows
    paces: dict[str, float]
    num_layers: int
    started: list[subprocess.Popen] = dataclasses.field(default_factory=list)
    is_stopped: threading.Event = dataclasses.field(default_factory=threading.Event)

    def settings_of(self, arm: Arm, seed: int) -> dict[str, Row]:
        """Return the settings of an arm's trainings, by command, all but their steps."""
        target = max(1, round(arm.linear_share * self.num_layers))
        transfer = {**arm.settings, "target": target}
        if arm.is_random:
            order = torch.randperm(self.num_layers, generator=torch.Generator().manual_seed(seed))
            transfer["layers"] = ",".join(map(str, sorted(order[:target].tolist())))
        found = {"transfer": transfer}
        if arm.distillation is not None:
            found["distill"] = dict(arm.distillation)
        return found

    def missing(self, seeds: Iterable[int] | None = None) -> Iterator[Missing]:
        """Yield what has no row yet of some seeds, none: of all."""
        for seed in range(self.config.seeds) if seeds is None else seeds:
            for (table, name), arm in self.arms.items():
                key = {"table": table, "name": name, "seed": seed}
                absent = [n for n in arm.num_frames if not self.rows.is_done(**key, num_frames=n)]
                if absent:
                    yield Missing(**key, arm=arm, num_frames=absent)

    def find_paces(self) -> None:
        """Time a short run of every kind of training that is missing; keep its seconds a step."""
        config, below = self.config, self.config.out.absolute() / "pace"
        words = [*config.list_words(), "--device", config.device]
        for each in self.missing():
            trainings = self.settings_of(each.arm, each.seed)
            kinds = {command: find_kind(command, own) for command, own in trainings.items()}
            if set(kinds.values()) <= set(self.paces):
                continue
            made = {}
            for command, settings in trainings.items():
                [place] = place_runs(decisive(settings), [0], below / command)
                result, kind = place.folder / COMMANDS[command].result, kinds[command]
                # A distillation starts from the file of a transfer as short as itself.
                if kind not in self.paces or not result.exists():
                    shutil.rmtree(place.folder, ignore_errors=True)
                    own = {**settings, **made}
                    pace = measure_pace(command, words, own, place.folder, config.pace_steps)
                    self.paces.setdefault(kind, pace)
                    write_json(config.out / _PACES_NAME, self.paces)
                    logger.info("%.4f seconds a step: %s", self.paces[kind], kind)
                made = {"artifact": result}

    def train(self, command: str, settings: Row, seed: int, place: Path, own: list) -> Row:
        """Train with a seed unless it was; return `path` of the file, `steps`, `run_seconds`.

        place: below which the run's folder lies; own: words that do not decide the result.
        Raises RuntimeError, with the command's own last line, where it fails.
        """
        pace = self.paces[find_kind(command, settings)]
        steps = max(1, int(60 * self.config.minutes_per_run / pace))
        [run] = place_runs({**settings, "steps": steps}, [seed], place)
        if not (run.folder / ROW_NAME).exists():
            _wait_for(run.folder)
            words = [*self.config.list_words(), *run.flags.split(), "--seed", seed, *own]
            begin = time.monotonic()
            module = f"linvideo_core.{command}"
            if error := run_module(module, [*words, "--out", run.folder], self.started):
                raise RuntimeError(error)
            write_json(run.folder / ROW_NAME, {"run_seconds": time.monotonic() - begin})
        known = json.loads((run.folder / ROW_NAME).read_text(encoding="utf-8"))
        return {"path": run.folder / COMMANDS[command].result, "steps": steps, **known}

    def make_file(self, arm: Arm, seed: int, card: str) -> Row:
        """Make an arm's file; return what `train` does, of the last training."""
        place, own, made = self.config.out.absolute() / "runs", ["--device", card], {}
        for command, settings in self.settings_of(arm, seed).items():
            if made:
                place, own = made["path"].parent, [*own, "--artifact", made["path"]]
            made = self.train(command, settings, seed, place, own)
        return made

    def do_seed(self, seed: int, card: str) -> None:
        """Make and measure, on one device, all that a seed has no row for."""
        if card.startswith("cuda"):
            torch.cuda.set_device(card)
        measuring = Measuring(config=self.config, seed=seed, card=card, rows=self.rows)
        for each in self.missing([seed]):
            if self.is_stopped.is_set():
                return
            try:
                made = self.make_file(each.arm, seed, card)
            except RuntimeError as error:
                if not self.is_stopped.is_set():
                    logger.warning("%s: %s", each.row, error)
                    for num_frames in each.num_frames:
                        failed = {"num_frames": num_frames, "error": str(error)}
                        self.rows.add({**each.row, **failed})
                continue
            path = made.pop("path")
            for num_frames in each.num_frames:
                found = measuring.measure(path, each.arm, num_frames)
                self.rows.add({**each.row, "num_frames": num_frames, **made, **found})
                shown = {key: found[key] for key in ("unpaired_frechet", "floor", "recall")}
                logger.info("%s: %s", each.row, shown)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measuring:
    """Measures files of one seed, beside a teacher that samples the same noise."""

    config: ExperimentsConfig
    seed: int
    card: str
    rows: Rows
    opened: dict[int, tuple[evaluate.Sampling, Path]] = dataclasses.field(default_factory=dict)

    def measure(self, path: Path, arm: Arm, num_frames: int) -> Row:
        """Return a file's measures at a number of frames, with the `layers` that are linear."""
        sampling, folder = self._open(num_frames)
        recipe, name = None, "student"
        if arm.sampler_steps is not None:
            settings = self.config.comparison
            sigmas = make_sigmas(arm.sampler_steps, settings.shift)
            recipe = Recipe(sigmas=sigmas, guidance_scale=settings.guidance_scale)
            name = f"student-{arm.sampler_steps}"
        measures = evaluate.measure_file(sampling, folder, name, path, recipe)
        layers = list(artifact.load(path).header.linear_layers)
        return {"layers": layers, **self._read(folder, {name: measures})[name]}

    def _open(self, num_frames: int) -> tuple[evaluate.Sampling, Path]:
        """Return what samples at a number of frames; the teacher's own measures are there then."""
        if num_frames not in self.opened:
            config, folder = self.config, self.config.out / "evaluation"
            crowd = evaluate.CrowdConfig(
                comparison=config.comparison,
                model=config.model,
                judge=config.judge,
                prompts=config.out / "held_out.safetensors",
                num_frames=num_frames,
                seed=self.seed,
            )
            precision = resolve_precision("auto", self.card)
            sampling = evaluate.open_sampling(crowd, Run(device=self.card, precision=precision))
            folder = folder / f"frames-{num_frames}" / f"seed-{self.seed}"
            evaluate.measure_references(sampling, folder)
            for name, row in self._read(folder, {}).items():
                key = {"table": REFERENCES, "name": name, "seed": self.seed}
                self.rows.add({**key, "num_frames": num_frames, **row})
            self.opened[num_frames] = (sampling, folder)
        return self.opened[num_frames]

    @staticmethod
    def _read(folder: Path, files: Mapping[str, Path]) -> dict[str, Row]:
        rows = {row.pop("model"): row for row in evaluate.read_rows(folder, files)}
        floor = rows["teacher"]["frechet_teacher"]
        for row in rows.values():
            row["unpaired_frechet"], row["floor"] = row.pop("frechet_teacher"), floor
        return rows


def open_study(config: ExperimentsConfig) -> Study:
    """Open the folder of a study, new or continued; write the prompts."""
    open_run(config.out, config, ignore=_FREE_FIELDS)
    if not (config.out / "held_out.safetensors").exists():
        write_both(CaptionsConfig(num_prompts=config.num_prompts, out=config.out))
    path = config.out / _PACES_NAME
    return Study(
        config=config,
        arms={
            key: arm
            for key, arm in find_arms(config.chosen).items()
            if not config.arms or key[1] in config.chosen_arms
        },
        rows=Rows(config.out / ROWS_NAME),
        paces=json.loads(path.read_text(encoding="utf-8")) if path.exists() else {},
        num_layers=load_wan(config.model).config.num_layers,
    )


def run(config: ExperimentsConfig) -> dict[str, list[Row]]:
    """Make and measure what `config.out` has no row for; return the rows of all tables by name."""
    with locked(config.out):
        rows = do_all(open_study(config), resolve_device(config.device))
    return {table: summary.tabulate(rows, table) for table in [REFERENCES, *config.chosen]}


def do_all(study: Study, device: str) -> list[Row]:
    """Say what is missing of a study, make it on all devices of a kind, return all rows."""
    config, cards = study.config, list_cards(device)
    sys.stdout.write(f"{forecast(study, len(cards), device)}\n")
    study.find_paces()

    def work(number: int) -> None:
        for seed in range(number, config.seeds, len(cards)):
            study.do_seed(seed, cards[number])

    with concurrent.futures.ThreadPoolExecutor(len(cards)) as pool, _stopped(study):
        futures = [pool.submit(work, number) for number in range(len(cards))]
        for future in concurrent.futures.as_completed(futures):
            future.result()
    return study.rows.read()


def _wait_for(folder: Path) -> None:
    """Wait until nobody works in a run's folder: a training outlives a study that was killed."""
    while True:
        try:
            with locked(folder):
                return
        except SettingError as error:
            logger.info("waiting: %s", error)
            time.sleep(_WAIT_SECONDS)


@contextlib.contextmanager
def _stopped(study: Study) -> Iterator[None]:
    """Stop all of a study's trainings, and begin none, when the block is left early."""
    with stopped_with(study.started):
        try:
            yield
        except BaseException:
            study.is_stopped.set()
            raise


def forecast(study: Study, num_cards: int, device: str) -> str:
    """Say how many trainings and videos are missing, and how long they take by what is known.

    Seconds of a video, and of what a training takes besides its steps, are those of rows that are
    there. Without any a video on a GPU takes what the stored teacher's took on an H200.
    """
    config, comparison = study.config, study.config.comparison
    trainings, references, videos = set(), set(), 0.0
    for each in study.missing():
        place = ""
        for command, settings in study.settings_of(each.arm, each.seed).items():
            place += " ".join([command, *declared_runs.to_flags(settings)])
            trainings.add((each.seed, place))
        key = {"table": REFERENCES, "name": "teacher", "seed": each.seed}
        absent = [n for n in each.num_frames if not study.rows.is_done(**key, num_frames=n)]
        references |= {(each.seed, num_frames) for num_frames in absent}
        steps = (each.arm.distillation or {}).get("num_steps") or each.arm.sampler_steps
        share = (steps or comparison.sampler_steps) / comparison.sampler_steps
        videos += share * len(each.num_frames) * comparison.num_samples
    videos += 2 * len(references) * comparison.num_samples
    rows = [row for row in study.rows.read() if "error" not in row]
    paces = [row["seconds_per_video"] for row in rows if row["name"] == "teacher"]
    besides = [row["run_seconds"] - 60 * config.minutes_per_run for row in rows if "steps" in row]
    usual = _H200_SECONDS * comparison.sampler_steps if device == "cuda" else None
    pace = statistics.median(paces) if paces else usual
    seconds = len(trainings) * 60 * config.minutes_per_run
    seconds += len(trainings) * max(0.0, statistics.median(besides)) if besides else 0.0
    left_out = [] if besides else ["what a training takes besides its steps"]
    if pace is None:
        left_out.append("the videos")
    else:
        seconds += videos * pace
    without = f", without {' and '.join(left_out)}" if left_out else ""
    return (
        f"{len(trainings)} trainings of {config.minutes_per_run:g} minutes are missing, and as "
        f"many videos to measure as {videos:,.0f} of the teacher: about "
        f"{seconds / 60 / num_cards:.0f} minutes on {num_cards} devices{without}"
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
