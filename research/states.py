"""Compare what a transfer learns from: `python -m research.states`.

Every row of `TABLES` is a transfer of the embedded model, run with several seeds, whose layers are
given and whose prompts are three quarters of all. It draws `--steps` batches of 8 states: of stored
videos, each drawn many times, or of a pool, each once. The squared error of its velocity is then
measured at states of the teacher with the other prompts, in both guidance branches. Of the warm
start that goes before, `layer_error` is the mean over layers and its last steps.
    python -m research.states --tables states --seeds 1 --steps 20
    python -m research.states --jobs 14 --record
`video_error` is the mean squared difference of whole videos from the teacher's, of the same noise.
`_more` and `_t` compare a row with its table's `pool`, seed by seed.
"""

import concurrent.futures
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.record import RESULTS_FOLDER, show_rows, write_part
from linvideo_core.flow import bind, bind_guided, make_sigmas, sample_euler
from linvideo_core.run import limits
from linvideo_core.run.config import (
    Settings,
    option,
    override,
    parse,
    run_command,
    to_flags,
)
from linvideo_core.run.context import Run
from linvideo_core.run.devices import resolve_device
from linvideo_core.run.errors import SettingError
from linvideo_core.run.files import write_json
from linvideo_core.run.folder import read_metrics
from linvideo_core.teacher.config import TrajectoryConfig
from linvideo_core.teacher.teacher import Teacher, load_teacher
from linvideo_core.teacher.trajectories import Trajectories, collect
from linvideo_core.transfer.config import WARM_START_NAME, TransferConfig
from linvideo_core.transfer.pipeline import linearize
from linvideo_core.transfer.student import Student

from . import workers
from .declared_runs import list_cards
from .paired import compare_paired

Row = dict[str, Any]

_HALF = "0,1,3,4,9"
_ALL = "0,1,2,3,4,5,6,7,8,9"
_ALL_LAYERS = "_all_layers"
_STORED = {"states": "stored", "objective": "velocity", "levels": "even"}
_POOL = {"states": "pool", "objective": "adm", "levels": "even"}

TABLES: dict[str, dict[str, Row]] = {
    "warm_start": {
        f"{steps}_steps": {**_STORED, "warm_start_steps": steps, "steps": 1} for steps in (40, 120)
    },
    "states": {
        "stored_6": {**_STORED, "num_trajectories": 6},
        "stored_96": {**_STORED, "num_trajectories": 96},
        "stored_384": {**_STORED, "num_trajectories": 384},
        "pool": {**_POOL, "anchor_share": 1.0},
        "pool_16_states": {**_POOL, "anchor_share": 1.0, "states_per_trajectory": 16},
        "pool_50_states": {**_POOL, "anchor_share": 1.0, "states_per_trajectory": 50},
        "pool_256_videos": {**_POOL, "anchor_share": 1.0, "pool_videos": 256},
    },
    "on_policy": {
        f"{name}{suffix}": {**settings, **layers}
        for suffix, layers in (("", {}), (_ALL_LAYERS, {"layers": _ALL, "target": 10}))
        for name, settings in {
            **{f"stored_{n}": {**_STORED, "num_trajectories": n} for n in (8, 96, 384)},
            "pool": {**_POOL, "anchor_share": 1.0},
            **{f"pool_share_{p:g}": {**_POOL, "anchor_share": 1 - p} for p in (0.5, 1)},
        }.items()
    },
}
"""Table -> row -> the settings of a transfer, by the names of `TransferConfig`'s fields.

A name stands for the same settings in every table: such rows are of the same runs.
"""

_BASELINES = {False: "pool", True: f"pool{_ALL_LAYERS}"}

_COMMON = {
    "layers": _HALF,
    "target": 5,
    "batch_size": 8,
    "learning_rate": 2e-3,
    "map_learning_rate": 2e-3,
    "warmup_steps": 20,
    "pool_videos": 64,
    "checkpoint_every": 1000,
    "log_every": 1,
    "precision": "fp32",
}
_HELD_OUT = TrajectoryConfig(num_trajectories=32)
_HELD_OUT_SEED, _NUM_VIDEOS = 777, 64
_HIGH_NOISE = 0.9
_LAST_STEPS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatesConfig(Settings):
    """Which rows are run, and how often."""

    tables: str = option(",".join(TABLES), "tables to make")
    seeds: int = option(4, "seeds of each row, counted up from 0", limits.COUNT)
    steps: int = option(375, "training steps of a row", limits.COUNT)
    jobs: int = option(
        2, "runs at a time, each in a process of its own, over all GPUs", limits.COUNT
    )
    device: str = option("auto", "cpu or cuda", choices=("auto", "cpu", "cuda"))
    out: Path = option(Path("runs/states"), "folder of the runs and the rows")
    record: bool = option(False, "write results/recipe.json, not the one in --out")

    def __post_init__(self) -> None:
        super().__post_init__()
        if strangers := [name for name in self.tables.split(",") if name not in TABLES]:
            raise SettingError(
                f"{{tables}} {self.tables} given, and {strangers[0]!r} is unknown; names of "
                f"{','.join(TABLES)} with commas between are needed",
                "tables",
            )


def do_run(name: str, settings: Row, seed: int, out: Path, device: str) -> Row:
    """Train one student, unless it was, and return its row."""
    folder = out / name / f"seed-{seed}"
    if (path := folder / "row.json").exists():
        return json.loads(path.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    whole = load_teacher(TransferConfig().teacher).to(device)
    cut = len(whole.prompts) * 3 // 4
    teacher, held_out = _with_prompts(whole, slice(cut)), _with_prompts(whole, slice(cut, None))
    run = Run(folder=folder, device=device, precision=settings["precision"], seed=seed)
    begin = time.monotonic()
    own = {"out": folder, "seed": seed, "device": device, "teacher_folder": out / "teacher"}
    config = override(TransferConfig(), settings | own)
    with Student(teacher, config.student, seed=seed) as student:
        linearize(student, teacher, config, run)
        seconds = time.monotonic() - begin
        run = dataclasses.replace(run, seed=_HELD_OUT_SEED)
        row = _measure(student, dataclasses.replace(held_out, model=teacher.model), run, out)
    steps = read_metrics(folder / WARM_START_NAME / "metrics.jsonl")
    row["layer_error"] = statistics.fmean(each["loss"] for each in steps[-_LAST_STEPS:])
    write_json(path, row := {"seed": seed, "seconds": seconds, **row})
    return row


def _with_prompts(teacher: Teacher, part: slice) -> Teacher:
    return dataclasses.replace(
        teacher, prompts=teacher.prompts[part], prompt_embeds=teacher.prompt_embeds[part]
    )


@torch.no_grad()
def _measure(student: Student, teacher: Teacher, run: Run, out: Path) -> Row:
    """Return the errors of a student; teacher: with prompts that it has not seen."""
    videos = dataclasses.replace(_HELD_OUT, teacher_folder=out / "teacher")
    with student.disabled():
        stored = collect(teacher, videos, run)
    errors, sigma = _velocity_errors(student, teacher, stored, run)
    is_high = sigma > _HIGH_NOISE
    generator = torch.Generator().manual_seed(run.seed)
    prompt = torch.randint(len(teacher.prompts), (_NUM_VIDEOS,), generator=generator)
    noise = torch.randn(_NUM_VIDEOS, *teacher.latent_shape, generator=generator).to(run.device)
    velocity_fn = bind_guided(
        student.model,
        teacher.prompt_embeds[prompt.to(run.device)],
        teacher.negative_embeds.expand(_NUM_VIDEOS, -1, -1),
        _HELD_OUT.guidance_scale,
        precision=run.precision,
    )
    sigmas = make_sigmas(_HELD_OUT.sampler_steps, _HELD_OUT.shift)
    with student.disabled():
        wanted = sample_euler(velocity_fn, noise, sigmas)
    video_error = (sample_euler(velocity_fn, noise, sigmas) - wanted).square().mean()
    return {
        "error_high_noise": errors[is_high].mean().item(),
        "error": errors.mean().item(),
        "video_error": video_error.item(),
    }


def _velocity_errors(
    student: Student, teacher: Teacher, stored: Trajectories, run: Run
) -> tuple[Tensor, Tensor]:
    """Return the squared error of both branches at every stored state, and its noise level."""
    errors, sigmas = [], []
    for picks in torch.arange(len(stored)).split(32):
        states = stored.take(picks, run.device)
        sigma = stored.sigmas.to(run.device)[states.step]
        prompts = teacher.prompt_embeds[states.prompt]
        negatives = teacher.negative_embeds.expand_as(prompts)
        for prompt, target in ((prompts, states.conditional), (negatives, states.unconditional)):
            velocity = bind(student.model, prompt, precision=run.precision)(states.latents, sigma)
            errors.append((velocity - target).square().flatten(1).mean(dim=1))
            sigmas.append(sigma)
    return torch.cat(errors), torch.cat(sigmas)


def summarize(table: str, name: str, runs: Sequence[Mapping[str, float]]) -> Row:
    """Return a row of a table: the mean over seeds of every number, and their spread."""
    row: Row = {"what": table, "name": name, "seeds": len(runs)}
    for column in runs[0]:
        if column != "seed":
            values = [run[column] for run in runs]
            row[column] = statistics.fmean(values)
            if len(values) > 1:
                row[f"{column}_spread"] = statistics.stdev(values)
    return row


def compare(
    runs: Sequence[Mapping[str, float]], baseline: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """Return how much larger a row's errors are than a baseline's, paired by seed, and t of that.

    t: the mean difference over its standard error, of `seeds - 1` degrees of freedom.
    """
    found = {}
    for column in ("error_high_noise", "video_error"):
        own, other = ({run["seed"]: run[column] for run in each} for each in (runs, baseline))
        test = compare_paired(own, other)
        found[f"{column}_more"] = test.difference
        if test.t is not None:
            found[f"{column}_t"] = test.t
    return found


def run(config: StatesConfig) -> dict[str, list[Row]]:
    """Do all runs; return the rows by table."""
    device = resolve_device(config.device)
    tables = {table: TABLES[table] for table in config.tables.split(",")}
    every = {name: row for rows in tables.values() for name, row in rows.items()}
    jobs = [(seed, name) for seed in range(config.seeds) for name in every]
    found: dict[str, list[Row]] = {}
    with workers.pool(list_cards(device), config.jobs) as submit, tqdm(total=len(jobs)) as bar:
        waiting = {}
        for seed, name in jobs:
            settings = {**_COMMON, "steps": config.steps, **every[name]}
            waiting[submit(do_run, name, settings, seed, config.out.absolute())] = name
        for future in concurrent.futures.as_completed(waiting):
            found.setdefault(waiting[future], []).append(future.result())
            bar.update()
    return {
        table: [
            summarize(table, name, found[name]) | compare(found[name], found[base])
            if (base := _BASELINES[name.endswith(_ALL_LAYERS)]) in rows
            else summarize(table, name, found[name])
            for name in rows
        ]
        for table, rows in tables.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, do the runs with a bar, keep and show the tables."""
    config = parse(StatesConfig, argv, description=__doc__)
    path = (RESULTS_FOLDER if config.record else config.out) / "recipe.json"
    for table, rows in run(config).items():
        write_part(
            path,
            table,
            title="What a transfer of a model of one's own takes and learns from",
            command=f"python -m research.states {to_flags(config, without=('out', 'device'))}",
            rows=rows,
            device=resolve_device(config.device),
        )
        sys.stdout.write(f"\n{show_rows(rows)}\n")


if __name__ == "__main__":
    run_command(main)
