"""What a reader sees of an ablation: plots, verdicts, and videos of some rows side by side."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from linvideo_core.evaluate import videos as video_files
from linvideo_core.evaluate.plots import plot_layer_scores
from linvideo_core.run.files import write_json

from . import claims, plots
from .findings import Findings
from .frame_cache import read_frames
from .run_one import FRAMES_NAME, UNTRAINED_NAME, teacher_folder

logger = logging.getLogger(__name__)

CLAIMS_NAME = "evidence_claims.json"
COMMAND = "python -m research.ablations.evidence_report"

_SHOWN = {
    "velocity": ("objective", "velocity_equal_time"),
    "ADM": ("objective", "adm"),
    "all linear": ("target", "10"),
}


def publish(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw a record's plots into a folder, and write the claims beside them, a record of their own.

    The claims carry the device and date of the record that they are made of.

    Returns the files.
    """
    found = Findings(record)
    path = folder / CLAIMS_NAME
    about = {key: value for key, value in record.items() if key not in ("rows", "details")}
    about |= {"title": "What was to be shown, and what was measured", "command": COMMAND}
    write_json(path, {**about, "rows": claims.judge(found)})
    return [path, *draw(found, folder)]


def draw(found: Findings, folder: Path) -> list[Path]:
    """Draw what was run as evidence_*.png; return the files, without those of what was not run."""
    drawers: dict[str, Callable[[Findings, Path], bool]] = {
        "target": plots.plot_target,
        "objective": plots.plot_objective,
        "selection": plots.plot_selection,
        "scores": plot_scores,
        "order": plots.plot_order,
        "gap": plots.plot_gap,
    }
    drawn = []
    for name, drawer in drawers.items():
        path = folder / f"evidence_{name}.png"
        if drawer(found, path):
            drawn.append(path)
        else:
            logger.info("%s is not drawn: its rows were not run", path.name)
    return drawn


def plot_scores(found: Findings, path: Path) -> bool:
    """Draw the layer scores of one learned run, until the choice was made."""
    runs = [run for run in found.runs_of("selection", "learned") if run.get("score_course")]
    if not runs:
        return False
    run = runs[0]
    rows = list(run["score_course"])
    # What is trained on from the choice is 0 or 1: drawn as far again as makes it seen.
    hardened_at = run["gap_course"][-1]["step"] + 1 if "gap_course" in run else rows[-1]["step"]
    last = [0.0 if i in run["layers"] else 1.0 for i in range(len(rows[-1]["layer_scores"]))]
    rows += [{"step": s, "layer_scores": last} for s in (hardened_at, round(1.2 * hardened_at))]
    target = len(run["layers"])
    plot_layer_scores(rows, path, target=target, layers=run["layers"], hardened_at=hardened_at)
    return True


def draw_samples(found: Findings, out: Path, stem: Path) -> list[Path]:
    """Draw the first videos of the teacher and of some rows, all of the same prompts and noise.

    out: the ablation's folder, with the frames that its first seed kept. stem: of the PNG and GIF.

    Returns the files; none where the teacher's frames are not there.
    """
    shared = teacher_folder(out, found.teacher[0]["seed"]) if found.teacher else out
    places = {"teacher": shared, "swapped": shared / UNTRAINED_NAME}
    for name, row in _SHOWN.items():
        if runs := found.runs_of(*row):
            places[name] = out / runs[0]["run"]
    kept = {name: folder / FRAMES_NAME for name, folder in places.items()}
    whole = {name: read_frames(path) for name, path in kept.items() if path.exists()}
    if "teacher" not in whole:
        logger.info("no samples are drawn: %s holds no frames of the teacher", out)
        return []
    prompts = whole["teacher"][1]
    videos = {name: frames for name, (frames, _) in whole.items()}
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".gif")]
    video_files.save_strip(videos, prompts, paths[0])
    video_files.save_animation(videos, prompts, paths[1])
    return paths
