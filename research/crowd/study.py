"""A study of `research.crowd.experiments`: its settings, what it has no row for, and making it."""

import dataclasses
import functools
import json
import logging
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from linvideo_core import artifact
from linvideo_core.evaluate.config import CompareConfig
from linvideo_core.models.checkpoint import load_wan
from linvideo_core.models.config import NO_TILE
from linvideo_core.run import limits
from linvideo_core.run.callbacks import Callbacks
from linvideo_core.run.config import Settings, option
from linvideo_core.run.context import Run
from linvideo_core.run.devices import device_option, resolve_precision
from linvideo_core.run.errors import SettingError
from linvideo_core.run.files import write_json
from linvideo_core.run.folder import open_run
from linvideo_core.run.lock import alone_in
from linvideo_core.run.reading import read_json
from linvideo_core.transfer import cli as transfer_cli

from .. import declared_runs
from ..declared_runs import ROW_NAME, place_runs
from ..workers import Worker
from . import evaluate, trainings
from .arms import TABLES, Arm, find_arms
from .captions import CaptionsConfig, write_both
from .config import WHOLE, CrowdConfig
from .pace import decisive, find_kind, measure_pace
from .rows import RECORD_NAME, Row, read_rows
from .train import SHIFT, WEIGHTS
from .trainings import TRAININGS

logger = logging.getLogger(__name__)

ROWS_NAME, SUMMARY_NAME = "crowd.json", "summary.json"
REFERENCES = "references"
"""The table of the teacher itself and of rendered clips."""
_PACES_NAME = "paces.json"
_FAILURES = (ValueError, RuntimeError, OSError)
"""What becomes a row of its error, and keeps no other row from being made."""
# What a repeated command may change: none of it decides a row.
_FREE_FIELDS = ("tables", "arms", "seeds", "pace_steps", "jobs", "record", "device", "out")
_OF_WARM_START = (
    "states",
    "num_trajectories",
    "pool_videos",
    "more_sizes",
    "num_frames",
    "prompt_dropout",
    "tile",
    "attention_mass",
)


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
    jobs: int = option(
        1, "runs at a time on each card; steps are counted by what a run takes alone", limits.COUNT
    )
    compile: bool = option(
        False, "compile the blocks of what trains and samples: a minute, then faster"
    )
    flags: str = option(
        "--batch-size 32 --accumulation 1 --learning-rate 1e-3 --map-learning-rate 2e-3 "
        "--warm-start-steps 80 --frozen fp32 --activation-checkpointing false "
        "--checkpoint-every 500 --log-every 25",
        "other flags that all trainings have; an arm's own go before",
    )
    num_prompts: int = option(2000, "captions to train on, and as many held out", limits.COUNT)
    model: Path = option(WEIGHTS / "model.safetensors", "the teacher")
    judge: Path = option(WEIGHTS / "judge.safetensors", "the judge")
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
            "compile": self.compile,
            "num_frames": WHOLE,
            "height": 256,
            "width": 256,
        }
        return [*declared_runs.to_flags(sampler | shared), *shlex.split(self.flags)]


def read_kept(path: Path, empty: Row, is_whole: Callable[[Any], bool]) -> Row:
    """Return what a JSON file of a study has; empty: where there is none.

    Raises SettingError for a damaged one.
    """
    if not path.exists():
        return empty
    try:
        found = read_json(path)
    except ValueError:
        found = None
    if not is_whole(found):
        raise SettingError(
            f"{path} is damaged: delete it, and what it had is made again, or give another {{out}}",
            "out",
        )
    return found


def _are_rows(found: Any) -> bool:
    rows = found.get("rows") if isinstance(found, dict) else None
    key = {"table", "name", "seed", "num_frames"}
    return isinstance(rows, list) and all(isinstance(row, dict) and key <= {*row} for row in rows)


def _are_paces(found: Any) -> bool:
    return isinstance(found, dict) and all(map(limits.POSITIVE.takes, found.values()))


class Rows:
    """The rows of `<out>/crowd.json`, which is written anew, whole, with each that is added."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        found = read_kept(path, {"rows": []}, _are_rows)["rows"]
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
    """An arm that a seed has no row for yet, at some numbers of frames.

    trainings: the settings of its trainings in order, by the names of `TRAININGS`, all but steps.
    """

    table: str
    name: str
    seed: int
    arm: Arm
    trainings: Mapping[str, Row]
    num_frames: list[int]

    @property
    def row(self) -> Row:
        """What tells its rows from others, all but the number of frames."""
        return {"table": self.table, "name": self.name, "seed": self.seed}

    def tell(self, error: Exception) -> list[Row]:
        """Return rows that say why it could not be made, and log it."""
        logger.warning("%s: %s", self.row, error)
        return [{**self.row, "num_frames": n, "error": str(error)} for n in self.num_frames]

    @property
    def warm_start(self) -> Row:
        """Those of its transfer's settings that decide its warm start, which others share."""
        return find_warm_start(self.trainings[self.arm.training])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What all seeds share.

    arms: by (table, name). paces: seconds a step by kind of training, see `pace.find_kind`.
    num_layers: of the teacher.
    """

    config: ExperimentsConfig
    arms: Mapping[tuple[str, str], Arm]
    rows: Rows
    paces: dict[str, float]
    num_layers: int

    def settings_of(self, arm: Arm, seed: int) -> dict[str, Row]:
        """Return the settings of an arm's trainings, by their names, all but their steps."""
        target = max(1, round(arm.linear_share * self.num_layers))
        first = {"tile": NO_TILE, **arm.settings, "target": target}
        if arm.is_random:
            order = torch.randperm(self.num_layers, generator=torch.Generator().manual_seed(seed))
            first["layers"] = ",".join(map(str, sorted(order[:target].tolist())))
        found = {arm.training: first}
        if arm.distillation is not None:
            found[arm.second_training] = dict(arm.distillation)
        return found

    def missing(self) -> list[Missing]:
        """Return what has no row yet, seed by seed, but first who makes a warm start.

        Those go before the rest of the seed before, too: who shares one need not wait for it.
        """
        found = [*self._list_missing()]
        makers = {(each.seed, str(each.warm_start)): each.row for each in reversed(found)}.values()
        return sorted(found, key=lambda each: each.seed - 1.5 * (each.row in makers))

    def _list_missing(self) -> Iterator[Missing]:
        for seed in range(self.config.seeds):
            for (table, name), arm in self.arms.items():
                key = {"table": table, "name": name, "seed": seed}
                absent = [n for n in arm.num_frames if not self.rows.is_done(**key, num_frames=n)]
                if absent:
                    trainings = self.settings_of(arm, seed)
                    yield Missing(**key, arm=arm, trainings=trainings, num_frames=absent)

    def count_stored(self) -> dict[int, int]:
        """Return how many of the teacher's stored videos the missing trainings need, by seed."""
        stored = dict.fromkeys(range(self.config.seeds), 0)
        for each in self.missing():
            counts = [own.get("num_trajectories", 0) for own in each.trainings.values()]
            stored[each.seed] = max(stored[each.seed], *counts)
        return {seed: count for seed, count in stored.items() if count}

    def references(self) -> list[tuple[int, int]]:
        """Return of which seeds and numbers of frames the teacher's own row is missing."""
        key = {"table": REFERENCES, "name": "teacher"}
        wanted = dict.fromkeys((each.seed, n) for each in self.missing() for n in each.num_frames)
        return [(s, n) for s, n in wanted if not self.rows.is_done(**key, seed=s, num_frames=n)]

    def kinds(self) -> set[str]:
        """Return the kinds of training that are missing and whose pace is not known."""
        found = {
            find_kind(training, settings)
            for each in self.missing()
            for training, settings in each.trainings.items()
        }
        return found - set(self.paces)

    def has_paces(self, each: Missing) -> bool:
        """Say whether the pace of all trainings of an arm is known."""
        return all(find_kind(name, own) in self.paces for name, own in each.trainings.items())

    def find_paces(self, worker: Worker, card: str) -> None:
        """Time a short run of every kind of training that is missing; keep its seconds a step.

        Arms of a kind that fails get rows of its error.
        """
        failed: dict[str, Exception] = {}
        for each in self.missing():
            if self.has_paces(each):
                continue
            try:
                self._time(each, worker, card, failed)
            except ChildProcessError:
                # Nobody is there any more to time the others.
                raise
            except _FAILURES as error:
                for row in each.tell(error):
                    self.rows.add(row)

    def _time(self, each: Missing, worker: Worker, card: str, failed: dict[str, Exception]) -> None:
        """Time the kinds of an arm; failed: those that none tries again, and why."""
        config, below = self.config, self.config.out.absolute() / "pace"
        # Its own videos: those of the seeds may be in the making.
        words = [*config.list_words(), "--teacher-folder", str(below), "--device", card]
        made = {}
        for training, settings in each.trainings.items():
            kind = find_kind(training, settings)
            if kind in failed:
                raise failed[kind]
            [place] = place_runs(decisive(settings), [0], below / training)
            result = place.folder / TRAININGS[training].result
            # A distillation starts from the file of a transfer as short as itself.
            if kind not in self.paces or not result.exists():
                shutil.rmtree(place.folder, ignore_errors=True)
                how = (training, words, {**settings, **made}, place.folder, config.pace_steps)
                try:
                    self.paces.setdefault(kind, worker.call(measure_pace, *how))
                except _FAILURES as error:
                    failed[kind] = error
                    raise
                write_json(config.out / _PACES_NAME, self.paces)
                logger.info("%.4f seconds a step: %s", self.paces[kind], kind)
            made = {"artifact": result}


def find_warm_start(settings: Row) -> Row:
    """Return those of a transfer's settings that decide its warm start, which the others share."""
    return {name: settings[name] for name in _OF_WARM_START if name in settings}


def do_training(
    config: ExperimentsConfig,
    training: str,
    settings: Row,
    steps: int,
    seed: int,
    place: Path,
    own: list[object],
) -> Row:
    """Train with a seed unless it was; return `path` of the file, `steps`, `run_seconds`.

    place: below which the run's folder lies; own: words that do not decide the result.
    Raises one of `_FAILURES` where it fails.
    """
    [run] = place_runs({**settings, "steps": steps}, [seed], place / training)
    chosen = TRAININGS[training]
    with alone_in(run.folder):
        if not (run.folder / ROW_NAME).exists():
            shared = config.out.absolute() / "warm_starts"
            [warm_start] = place_runs(find_warm_start(settings), [seed], shared)
            words = [*config.list_words(), *run.flags.split(), "--seed", seed, *own]
            begin = time.monotonic()
            read = chosen.read([*map(str, words), "--out", str(run.folder)])
            chosen.run(read, Callbacks(), warm_start.folder)
            write_json(run.folder / ROW_NAME, {"run_seconds": time.monotonic() - begin})
    known = json.loads((run.folder / ROW_NAME).read_text(encoding="utf-8"))
    return {"path": run.folder / chosen.result, "steps": steps, **known}


def store_videos(config: ExperimentsConfig, seed: int, count: int, card: str) -> None:
    """Sample the stored videos that a seed's trainings share."""
    own = {"states": "stored", "num_trajectories": count, "seed": seed, "device": card}
    trainings.store(transfer_cli.read([*config.list_words(), *declared_runs.to_flags(own)]))


def measure_references(config: ExperimentsConfig, seed: int, num_frames: int, card: str) -> None:
    """Sample and measure what a seed's models are compared with."""
    open_sampling(config, seed, num_frames, card)


def make_file(
    config: ExperimentsConfig, each: Missing, paces: Mapping[str, float], card: str
) -> Row:
    """Make an arm's file; return what `do_training` does, of the last training."""
    place, own, made = config.out.absolute() / "runs", ["--device", card], {}
    for training, settings in each.trainings.items():
        if made:
            place, own = made["path"].parent, [*own, "--artifact", made["path"]]
        seconds = 60 * config.minutes_per_run * (1 if made else each.arm.num_spans)
        steps = max(1, int(seconds / paces[find_kind(training, settings)]))
        made = do_training(config, training, settings, steps, each.seed, place, own)
    return made


def do_arm(
    config: ExperimentsConfig, each: Missing, paces: Mapping[str, float], card: str
) -> list[Row]:
    """Make and measure what is missing of an arm on one device; return its rows.

    Beside them, those of the teacher of this seed. A training that fails makes rows of its error,
    a measurement one.
    """
    try:
        made = make_file(config, each, paces, card)
    except _FAILURES as error:
        return each.tell(error)
    path, rows = made.pop("path"), []
    for num_frames in each.num_frames:
        try:
            found = measure(config, each, path, num_frames, card)
        except _FAILURES as error:
            rows += dataclasses.replace(each, num_frames=[num_frames]).tell(error)
            continue
        own = {"num_frames": num_frames, "jobs": config.jobs, **made, **found.pop("student")}
        key = {"table": REFERENCES, "seed": each.seed, "num_frames": num_frames}
        # The arm's own last: where it is there, nothing is asked for again.
        rows += [{**key, "name": n, "jobs": config.jobs, **row} for n, row in found.items()]
        rows.append({**each.row, **own})
    return rows


def measure(
    config: ExperimentsConfig, each: Missing, path: Path, num_frames: int, card: str
) -> dict[str, Row]:
    """Return the measures of a file's model, as "student" with its `layers`, and of references."""
    sampling, folder = open_sampling(config, each.seed, num_frames, card)
    recipe, name = each.arm.find_recipe(config.comparison), "student"
    if recipe is not None:
        name = f"student-{len(recipe.sigmas) - 1}"
    # Its own lock: who has the seed's takes what is half written below for that of a dead process.
    # And of tables that share a file the second waits, and finds its measures.
    measures = evaluate.place_measures(folder, name, path)
    with alone_in(measures):
        evaluate.measure_file(sampling, measures, path, recipe)
    rows = {row.pop("model"): row for row in read_rows(folder, {"student": measures})}
    floor = rows["teacher"]["frechet_teacher"]
    for row in rows.values():
        row["unpaired_frechet"], row["floor"] = row.pop("frechet_teacher"), floor
    layers = list(artifact.load(path).header.linear_layers)
    return {**rows, "student": {"layers": layers, **rows["student"]}}


@functools.lru_cache(maxsize=2)
def open_sampling(
    config: ExperimentsConfig, seed: int, num_frames: int, card: str
) -> tuple[evaluate.Sampling, Path]:
    """Return what samples a seed's videos, and a folder that holds the references' measures."""
    crowd = CrowdConfig(
        comparison=config.comparison,
        compile=config.compile,
        model=config.model,
        judge=config.judge,
        prompts=config.out / "held_out.safetensors",
        num_frames=num_frames,
        seed=seed,
    )
    precision = resolve_precision("auto", card)
    sampling = evaluate.open_sampling(crowd, Run(device=card, precision=precision))
    folder = config.out / "evaluation" / f"frames-{num_frames}" / f"seed-{seed}"
    with alone_in(folder):
        evaluate.measure_references(sampling, folder)
    return sampling, folder


def open_study(config: ExperimentsConfig) -> Study:
    """Open the folder of a study, new or continued; write the prompts."""
    open_run(config.out, config, ignore=_FREE_FIELDS)
    if not (config.out / "held_out.safetensors").exists():
        write_both(CaptionsConfig(num_prompts=config.num_prompts, out=config.out))
    path = config.out / _PACES_NAME
    return Study(
        config=config,
        arms=find_arms(config.chosen, config.chosen_arms),
        rows=Rows(config.out / ROWS_NAME),
        paces=read_kept(path, {}, _are_paces),
        num_layers=load_wan(config.model).config.num_layers,
    )
