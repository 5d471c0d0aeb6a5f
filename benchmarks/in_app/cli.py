"""Measure transfers in a real ComfyUI server: `python -m benchmarks.in_app --comfyui PATH`.

Each row is a case of `cases.py`, measured on its own in a server with the pack: seconds a training
step, the process's memory at its peak, whether the result samples and the model comes back. Models
have random weights in the published shapes. A row that fails says why, and the others go on; rows
of the same name replace earlier ones in --out, or with --record in results.
    python -m benchmarks.in_app --comfyui ~/ComfyUI --record
    python -m benchmarks.in_app --comfyui ~/ComfyUI --rows demo,1.3b-bf16,1.3b-headless
    python -m benchmarks.in_app --comfyui ~/ComfyUI --cpu --rows 1.3b-bf16
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from linvideo_core.run import limits
from linvideo_core.run.config import Settings, option, parse, to_flags
from linvideo_core.run.errors import SettingError
from linvideo_core.run.tables import format_value

from ..record import RESULTS_FOLDER, check_parts, read_record, show_rows, write_part
from .cases import Case, choose
from .comfyui_server import Installation, read_version
from .measuring import KINDS
from .workbench import UnavailableError, Workbench, opened

TITLE = "Transfers in a real ComfyUI server, and the same by the core alone, with random weights"
LIMIT_SECONDS = 300.0
"""Of a row: one that takes longer is stopped."""
COLUMNS = ("what", "frames", "where", "seconds_per_step", "peak_gb", "ok", "seconds", "error")

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InAppConfig(Settings):
    """Which rows are measured, and where."""

    comfyui: Path | None = option(None, "folder of a ComfyUI; needed")
    python: Path | None = option(None, "interpreter with ComfyUI's requirements; none: this one")
    gguf_pack: Path | None = option(None, "folder of a pack with UnetLoaderGGUF")
    rows: str = option("", "rows to measure, such as demo,14b-81; none: all")
    frames: int | None = option(
        None, "frames of every row but the demo's; none: each row's own", limits.FRAMES
    )
    steps: int | None = option(
        None, "training steps of those rows; none: each row's own", limits.COUNT
    )
    cpu: bool = option(False, "measure on the CPU, with models of next to no size")
    out: Path = option(Path("runs/in-app"), "folder of the servers, their logs, and the record")
    record: bool = option(False, "write results/in_app.json, not the one in --out")

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(self.rows)

    @property
    def cases(self) -> list[Case]:
        """The cases as they are measured here."""
        chosen = [case.on_cpu() if self.cpu else case for case in choose(self.rows)]
        return [
            case if case.kind == "demo" else dataclasses.replace(case, **self._changes)
            for case in chosen
        ]

    @property
    def _changes(self) -> dict[str, int]:
        given = {"frames": self.frames, "steps": self.steps}
        return {name: value for name, value in given.items() if value is not None}


def run(config: InAppConfig, on_row: Callable[[Row], None] = lambda row: None) -> dict[str, Any]:
    """Measure every row and write the record after each; return it.

    on_row: called with each row when it is measured.

    Raises ValueError, before anything is measured, for bad input, for a missing GPU, and where the
    record has rows of another device.
    """
    installation = find_installation(config.comfyui, config.python, config.gguf_pack)
    device = "cpu" if config.cpu else "cuda"
    if not config.cpu and not torch.cuda.is_available():
        raise SettingError("no GPU was found; give {cpu} to measure tiny models", "cpu")
    path = (RESULTS_FOLDER if config.record else config.out) / "in_app.json"
    check_parts(path, device)
    hidden = ["comfyui", "python", "gguf_pack", "rows", "out", "record"]
    flags = to_flags(config, without=hidden)
    measured: dict[str, Row] = {}
    with opened(installation, config.out, device) as bench:
        for case in config.cases:
            row, details = measure(case, bench)
            measured[case.name] = row
            _compare(measured)
            write_part(
                path,
                case.name,
                title=TITLE,
                command=f"python -m benchmarks.in_app --comfyui PATH {flags}".strip(),
                rows=[row],
                device=device,
                details={"comfyui": read_version(installation.root), **details},
            )
            on_row(row)
            bench.tidy()
    return read_record(path)


def measure(case: Case, bench: Workbench) -> tuple[Row, dict[str, Any]]:
    """Return a case's row, and what is kept beside it; of one that fails, why and what it has."""
    begin = time.monotonic()
    bench.deadline = begin + LIMIT_SECONDS
    row = {**case.columns(), "seconds_per_step": None, "peak_gb": None}
    found: dict[str, Any] = {}
    try:
        if case.needs_gpu and bench.device == "cpu":
            raise UnavailableError("needs a GPU")
        KINDS[case.kind](case, bench, found)
    except UnavailableError as reason:
        found |= {"ok": None, "error": f"not measured: {reason}"}
    except Exception as error:
        found |= {"ok": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    stages = [dataclasses.asdict(stage) for stage in found.pop("stages", [])]
    return {**row, "seconds": time.monotonic() - begin, **found}, {"stages": stages}


def find_installation(
    comfyui: Path | None, python: Path | None, gguf_pack: Path | None = None
) -> Installation:
    """Return the ComfyUI of a command's flags; raise SettingError where there is none."""
    if comfyui is None:
        raise SettingError("{comfyui} was not given; name the folder of a ComfyUI", "comfyui")
    root = comfyui.expanduser().absolute()
    read_version(root)
    if gguf_pack is not None and not (gguf_pack / "__init__.py").is_file():
        raise SettingError(
            f"{{gguf_pack}} {gguf_pack} given, which holds no pack of nodes", "gguf_pack"
        )
    python = (python or Path(sys.executable)).expanduser().absolute()
    if not os.access(python, os.X_OK) or python.is_dir():
        raise SettingError(
            f"{{python}} {python} given, which cannot be run; give an interpreter that has "
            "ComfyUI's requirements",
            "python",
        )
    return Installation(root=root, python=python, gguf_pack=gguf_pack)


def _compare(measured: Mapping[str, Row]) -> None:
    """Say in the headless row how many times as long a step takes in the app, in the same run."""
    in_app, headless = (measured.get(name, {}) for name in ("1.3b-bf16", "1.3b-headless"))
    seconds = [row.get("seconds_per_step") for row in (in_app, headless)]
    if all(seconds) and in_app["frames"] == headless["frames"]:
        headless["app_over_headless"] = seconds[0] / seconds[1]


def _show(row: Row) -> None:
    shown = {name: value for name, value in row.items() if value not in (None, "")}
    words = ", ".join(f"{name} {format_value(value)}" for name, value in shown.items())
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure, show each row as it ends and a short table last."""
    config = parse(InAppConfig, argv, description=__doc__)
    record = run(config, _show)
    rows = [{name: row.get(name) for name in COLUMNS} for row in record["rows"]]
    sys.stdout.write(f"\n{show_rows(rows)}")
