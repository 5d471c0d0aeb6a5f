"""A study of `research.crowd.experiments`: its settings, what it has no row for, and making it."""

import dataclasses
import json
import logging
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from linvideo_core import artifact
from linvideo_core.evaluate.config import CompareConfig
from linvideo_core.flow import Recipe, make_sigmas
from linvideo_core.models.checkpoint import load_wan
from linvideo_core.run import limits
from linvideo_core.run.config import Settings, option
from linvideo_core.run.context import Run
from linvideo_core.run.devices import device_option, resolve_precision
from linvideo_core.run.errors import SettingError
from linvideo_core.run.files import write_json
from linvideo_core.run.folder import open_run
from linvideo_core.run.lock import locked

from .. import declared_runs
from ..declared_runs import ROW_NAME, place_runs, run_module
from . import evaluate
from .arms import TABLES, Arm, find_arms
from .captions import CaptionsConfig, write_both
from .pace import COMMANDS, decisive, find_kind, measure_pace
from .train import SHIFT

logger = logging.getLogger(__name__)

Row = dict[str, Any]

RECORD_NAME, ROWS_NAME, SUMMARY_NAME = "crowd.json", "crowd.json", "summary.json"
REFERENCES = "references"
"""The table of the teacher itself and of rendered clips."""
_PACES_NAME = "paces.json"
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


def _wait_for(folder: Path) -> None:
    """Wait until nobody works in a run's folder: a training outlives a study that was killed."""
    while True:
        try:
            with locked(folder):
                return
        except SettingError as error:
            logger.info("waiting: %s", error)
            time.sleep(_WAIT_SECONDS)
