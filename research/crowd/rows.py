"""Rows of `research.crowd.evaluate`, made of its files of measures, and their record."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.record import RESULTS_FOLDER, change_part, without
from linvideo_core.evaluate import metrics

from .judge import QUESTIONS

RECORD_NAME = "crowd.json"
RECORD_TITLE = "crowd: the teacher and its students on captions that no training has seen"
# A sprite's measures, and whether their median stands for them: lost sprites lie anywhere.
_TRACK_MEASURES = {"found": False, "recall": False, "position_error": True, "speed_ratio": False}

# What tells a model's row from its others.
_KEY = ("model", "softmax_backend", "density", "keep_first_steps", "guidance_scale")

Row = dict[str, Any]
Measured = Mapping[str, Tensor]


def read_rows(folder: Path, files: Mapping[str, Path]) -> list[Row]:
    """Return the rows of rendered clips, the teacher, and models by the folders of their measures.

    folder: that `measure_references` filled.
    """
    folders = {name: folder / name for name in ("real", "teacher")} | dict(files)
    found = {name: read_measures(path) for name, path in folders.items()}
    others = [read_measures(folder / name) for name in ("real_other", "teacher_other")]
    rows = [summarize(name, each, found["teacher"], *others) for name, each in found.items()]
    teacher = next(row for row in rows if row["model"] == "teacher")
    return [row | find_shares(row, teacher) for row in rows]


def read_measures(folder: Path) -> dict[str, Tensor]:
    """Join the measures of all batches; the teacher's latents, a gigabyte, are not read."""
    parts: dict[str, list[Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in set(file.keys()) - {"latents"}:
                parts.setdefault(name, []).append(file.get_tensor(name))
    return {name: torch.cat(each) for name, each in parts.items()}


def summarize(
    name: str, found: Measured, teacher: Measured, real_other: Measured, teacher_other: Measured
) -> Row:
    """Return the row of one model; see `research.crowd.evaluate` for its columns."""
    row: Row = {"model": name, "videos": len(found["features"])}
    row |= {question: found[question].mean().item() for question in QUESTIONS}
    for measure, is_median in _TRACK_MEASURES.items():
        values = found[measure][~found[measure].isnan()]
        if measure == "speed_ratio":
            row["speed_error"] = (values - 1).abs().mean().item()
        else:
            row[measure] = (values.median() if is_median else values.mean()).item()
    features = found["features"]
    row["frechet_real"] = _frechet(features, real_other["features"])
    row["frechet_teacher"] = _frechet(features, teacher_other["features"])
    spectra = (each["spectrum"].mean(dim=0) for each in (found, teacher_other))
    row["temporal_spectrum_db"] = metrics.log_spectral_distance(*spectra)
    row["diversity"] = found["diversity"].nanmean().item()
    if name not in ("real", "teacher"):
        row["paired_frechet"] = _frechet(features, teacher["features"])
        row["fidelity"] = found["fidelity"].mean().item()
    # The first batch of each process also compiles kernels.
    row["seconds_per_video"] = None if name == "real" else found["seconds"].median().item()
    return row


def _frechet(features: Tensor, reference: Tensor) -> float:
    return metrics.frechet_distance(
        *metrics.feature_statistics(features), *metrics.feature_statistics(reference)
    )


def find_shares(row: Row, teacher: Row) -> Row:
    """Return a row's figures over the teacher's own; where that is 0 they are not finite."""
    names = (*QUESTIONS, "found", "recall", "frechet_teacher")
    own, teachers = (torch.tensor([each[name] for name in names]) for each in (row, teacher))
    *shares, recall, frechet = (own / teachers).unbind()
    return {
        "share_of_teacher": torch.stack(shares).min().item(),
        "recall_share": recall.item(),
        "frechet_over_floor": frechet.item(),
    }


def record(rows: Sequence[Row], settings: Row, *, command: str, device: torch.device | str) -> None:
    """Put rows into results/crowd.json, where others that were measured alike stay.

    settings: all that must be the same of rows of one table, `num_samples` among it.
    """
    path, part = RESULTS_FOLDER / RECORD_NAME, f"evaluation_{settings['num_samples']}"
    files = {row["model"]: row["file"] for row in rows}

    def change(earlier: list[Row], source: Row) -> tuple[list[Row], Row]:
        kept = [
            row
            for row in without(earlier, rows, _KEY)
            if source.get("settings") == settings
            and row["file"] == files.get(row["model"], row["file"])
        ]
        details = source if kept else {"settings": settings}
        return [*({"what": part, **row} for row in rows), *kept], details

    change_part(path, part, change, title=RECORD_TITLE, command=command, device=device)
