"""Measure whole models at real sizes: `python -m benchmarks.models`.

One call of the denoiser and a whole guided video, softmax by every backend beside the model with
linear layers, in our own Wan and, with --comfyui, in ComfyUI's with the pack applied. Weights are
random in the published shapes: time and memory do not depend on what a model has learned. A model
must agree with the plain one before it is timed, and ratios are those of one run.
    python -m benchmarks.models                          # cuda: Wan 1.3B and 14B; cpu: tiny
    python -m benchmarks.models --shapes 14b-720p --softmax fa2,default --seconds 1
    python -m benchmarks.models --comfyui ~/ComfyUI --record
A repeated command continues: what --out holds of this device and these versions is not measured
again. Rows of one size replace earlier ones in the table of --out or, with --record, of results;
those of other sizes stay, so they can be measured one by one.
"""

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from linvideo_core.run import records
from linvideo_core.run.config import option, parse, positive, to_flags, to_json
from linvideo_core.run.devices import resolve_device
from linvideo_core.run.folder import open_run
from linvideo_core.run.progress import Progress, TqdmProgress, silent
from linvideo_core.run.tables import render_table

from ..kernels import cost
from ..plots import plot_cost
from . import comfyui, lengths, measuring, table
from .agreement import check_headless, check_kernels
from .measuring import Patience
from .runs import RECORD_NAME, RECORD_TITLE, list_commands, merge_runs
from .sizes import SIZES, Size
from .teachers import HeadlessSubject, Setting
from .variants import BASELINES, find_softmax, plan_variants

logger = logging.getLogger(__name__)

COMMAND = "python -m benchmarks.models"

_USUAL = {
    "cpu": {
        "shapes": "tiny",
        "softmax": "default",
        "seconds": 0.2,
        "video_seconds": 10.0,
        "most_frames": 4,
    },
    "cuda": {
        "shapes": "1.3b-480p,14b-480p,14b-720p",
        "softmax": "fa2,cudnn,default,sage",
        "seconds": 2.0,
        "video_seconds": 60.0,
        "most_frames": 32,
    },
}
# What may differ between two commands that fill one folder.
_FREE = ("shapes", "comfyui", "comfyui_python", "record", "out")
# What the rows of these commands are called in a record that others fill, too.
_PART = "denoise"
# The models, at their widths, that are measured over the number of tokens: the first one asked for.
_OVER_TOKENS = ("1.3b-480p", "tiny")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Which sizes, compared how, and how patiently."""

    device: str = option(
        "auto", "what is measured; auto: cuda where there is one", choices=("auto", "cpu", "cuda")
    )
    shapes: str | None = option(
        None, f"models and videos, of {', '.join(SIZES)}; none: tiny, cuda all others"
    )
    softmax: str | None = option(
        None, f"backends of softmax, of {', '.join(BASELINES)}; none: default, cuda all"
    )
    compiled: bool = option(False, "also with compiled blocks, headless")
    comfyui: Path | None = option(None, "a ComfyUI's folder, to measure inside it, too")
    comfyui_python: Path | None = option(None, "interpreter for --comfyui; none: this one")
    runs: int = option(5, "most runs behind a call's time, which is their median")
    seconds: float | None = option(
        None, "time after which no further run of a call is started; none: 0.2, cuda 2 but 3 runs"
    )
    video_seconds: float | None = option(
        None,
        "longest whole video that is sampled, by the default backend; others are computed from "
        "their calls; none: 10, cuda 60",
    )
    most_frames: int | None = option(
        None, "latent frames of the longest video over tokens; 0: none; none: 4, cuda 32"
    )
    seed: int = option(0, "seed of weights and inputs")
    out: Path = option(Path("runs/benchmark"), "folder of what was measured")
    record: bool = option(False, "write results/scale.json and scale.png, not those in --out")

    def __post_init__(self) -> None:
        positive(self, "runs", *(["seconds"] if self.seconds is not None else []))
        for flag, names, known in (
            ("shapes", self.shapes, SIZES),
            ("softmax", self.softmax, BASELINES),
        ):
            for name in names.split(",") if names is not None else ():
                if name not in known:
                    raise ValueError(
                        f"--{flag} {names} given; names of {', '.join(known)} are needed, with a "
                        "comma between two"
                    )

    @property
    def sizes(self) -> list[Size]:
        """The sizes of a settled config, each once."""
        return [SIZES[name] for name in dict.fromkeys(self.shapes.split(","))]

    @property
    def backends(self) -> list[str]:
        """The softmax backends of a settled config, each once."""
        return list(dict.fromkeys(self.softmax.split(",")))

    @property
    def patience(self) -> Patience:
        """How long is measured."""
        return Patience(runs=self.runs, seconds=self.seconds, video_seconds=self.video_seconds)

    def settle(self) -> "ScaleConfig":
        """Return the config with the device that is meant, and its usual settings filled in."""
        device = resolve_device(self.device)
        missing = {k: v for k, v in _USUAL[device].items() if getattr(self, k) is None}
        return dataclasses.replace(self, device=device, **missing)


def run(config: ScaleConfig, progress: Progress = silent) -> dict[str, Any]:
    """Check agreement, measure what is not measured yet, write record and picture.

    Returns the record.
    Raises ValueError, before anything is measured, where a size or ComfyUI cannot be had, and where
    the record has other sizes, or another command's rows, of another device.
    """
    config = config.settle()
    is_cuda = config.device == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    setting = Setting(torch.device(config.device), dtype, config.seed)
    for size in config.sizes:
        measuring.check_memory(size, setting.device, dtype)
    jobs = {"headless": lambda size, path: _measure_headless(config, setting, size, path, progress)}
    if config.comfyui is not None:
        name = f"comfyui-{comfyui.read_version(config.comfyui)}"
        jobs[name] = lambda size, path: _measure_host(config, setting, size, path, progress)
    path = _record_path(config)
    names = {size.name for size in config.sizes}
    records.check_parts(path, setting.device, without=_PART)
    earlier = records.read_part(path, _PART).get("runs", [])
    merge_runs([each for each in earlier if each["size"] not in names], [], _facts(setting), path)
    open_run(config.out, config, ignore=_FREE)
    found = [
        _find_or_measure(config.out / f"{job}_{size.name}.json", setting, size, measure)
        for size in config.sizes
        for job, measure in jobs.items()
    ]
    over_tokens = _measure_over_tokens(config, setting, progress) if config.most_frames else []
    return _write(config, setting, found, over_tokens)


def _find_or_measure(
    path: Path, setting: Setting, size: Size, measure: Callable[[Size, Path], None]
) -> dict[str, Any]:
    found = measuring.read_measured(path, _facts(setting))
    if found is None:
        measure(size, path)
        found = measuring.read_measured(path, _facts(setting))
    else:
        logger.info("%s was measured before: kept", path)
    return found


def _facts(setting: Setting) -> dict[str, Any]:
    """Name what a number belongs to: numbers of another device or version are not kept."""
    return {
        "device": records.describe_device(setting.device),
        "versions": records.describe_versions(),
    }


def _measure_headless(
    config: ScaleConfig, setting: Setting, size: Size, path: Path, progress: Progress
) -> None:
    wanted, absent = find_softmax(config.backends, setting.device.type)
    softmax, kernels, left_out = check_kernels(wanted, setting)
    models = check_headless(size, softmax, setting, compiled=config.compiled)
    measuring.free_memory()
    measuring.measure_subject(
        HeadlessSubject(size, softmax, setting),
        plan_variants(list(softmax), len(size.layers), compiled=config.compiled),
        config.patience,
        setting.device,
        path,
        progress,
        {
            **_facts(setting),
            "agreement": [*kernels, *models],
            "absent": [*absent, *left_out],
        },
    )
    measuring.free_memory()


def _measure_host(
    config: ScaleConfig, setting: Setting, size: Size, path: Path, progress: Progress
) -> None:
    job = {
        "size": size.name,
        "softmax": config.backends,
        "device": str(setting.device),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "seed": setting.seed,
        "patience": dataclasses.asdict(config.patience),
        "results": str(path.absolute()),
        "facts": _facts(setting),
    }
    progress(f"starting ComfyUI, {size.name}", 0, 1)
    comfyui.measure_in_host(config.comfyui, config.comfyui_python, job, config.out, progress)


def _measure_over_tokens(
    config: ScaleConfig, setting: Setting, progress: Progress
) -> list[dict[str, Any]]:
    base = next((SIZES[name] for name in _OVER_TOKENS if SIZES[name] in config.sizes), None)
    rows = []
    for frames, size in lengths.list_lengths(base, config.most_frames) if base else ():
        found = _find_or_measure(
            config.out / f"tokens_{base.name}_{frames}.json",
            setting,
            size,
            lambda size, path: lengths.measure_length(
                size, setting, config.patience, path, progress, _facts(setting)
            ),
        )
        rows += lengths.to_rows(size, found)
    return rows


def _write(
    config: ScaleConfig,
    setting: Setting,
    found: Sequence[Mapping[str, Any]],
    over_tokens: list[dict[str, Any]],
) -> dict[str, Any]:
    """Put what was found into the record: other sizes and places that it holds stay."""
    path = _record_path(config)
    kept, facts = records.read_part(path, _PART), _facts(setting)
    new = [{**run_found, "flags": _flags(config)} for run_found in found]
    runs = merge_runs(kept.get("runs", []), new, facts, path)
    if not over_tokens and all(kept.get(name) == value for name, value in facts.items()):
        over_tokens = kept["over_tokens"]
    slopes = {}
    if over_tokens:
        slopes = {
            name: cost.fit_slope(over_tokens, name, "milliseconds") for name in lengths.LAYERS
        }
        plot_cost(over_tokens, path.with_suffix(".png"), slopes=slopes, what="one denoiser call")
    return records.write_part(
        path,
        _PART,
        title=RECORD_TITLE,
        command=" && ".join(list_commands(runs, COMMAND, _USUAL[config.device]["shapes"])),
        rows=[row for run_found in runs for row in table.to_rows(run_found)],
        device=config.device,
        details={"runs": runs, "over_tokens": over_tokens, "slopes": slopes},
    )


def _record_path(config: ScaleConfig) -> Path:
    return (records.RESULTS_FOLDER if config.record else config.out) / RECORD_NAME


def _flags(config: ScaleConfig) -> str:
    """Return what a command says beside what is measured where."""
    usual = {k: None for k, v in _USUAL[config.device].items() if getattr(config, k) == v}
    told = dataclasses.replace(config, **usual)
    return to_flags(told, without=["out", "record", "shapes", "comfyui", "comfyui_python"])


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure with a progress bar, show the table."""
    config, is_dry_run = parse(ScaleConfig, argv, description=__doc__.splitlines()[0])
    if is_dry_run:
        sys.stdout.write(to_json(config.settle()))
        return
    with TqdmProgress() as progress:
        record = run(config, progress)
    part = record["details"]["parts"][_PART]
    for run_found in part["runs"]:
        for sentence in [*run_found["absent"], *run_found["left_out"]]:
            sys.stdout.write(f"{run_found['where']}: {sentence}\n")
    rows = [row for row in record["rows"] if row["what"] == _PART]
    sys.stdout.write(f"\n{record['title']}\n\n{render_table(rows)}\n")
    sys.stdout.write(f"table and picture: {_record_path(config).parent}\n")


command = main
