"""The gap that rounding opens: a mixed student just before its choice of layers, and hardened.

Both are sampled with the same weights from the same noise, so nothing but the rounding of the
layer scores lies between them. What trains on from there is the hardened model, and it is what a
training ends with: at the end there is no mixed model left to differ from. Earlier moments of the
selection show how the gap closes.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from linvideo_core.run.files import write_json
from linvideo_core.transfer.config import SelectionConfig
from linvideo_core.transfer.layer_selection.rules import choose, count_selection_steps
from linvideo_core.transfer.student import Student

logger = logging.getLogger(__name__)

Measure = Callable[[str, nn.Module], dict[str, Any]]


class HardeningGap:
    """Writes both models' measures down when the training's progress says that it is time.

    The file holds `points`, one a moment: `step`, the `layers` that rounding would choose,
    `layer_scores`, and the rows `mixed` and `rounded`.
    """

    def __init__(
        self,
        student: Student,
        selection: SelectionConfig,
        num_steps: int,
        path: Path,
        measure: Measure,
        *,
        num_points: int = 1,
    ) -> None:
        """measure: name and model -> its row; path: of the JSON, one moment written after another.

        num_points: moments, evenly spread over the selection; the last is just before the choice.
        """
        self.student = student
        self.target = selection.target
        harden_at = count_selection_steps(selection, num_steps)
        self.due = {max(0, round(i * harden_at / num_points) - 1) for i in range(1, num_points + 1)}
        self.path = path
        self.measure = measure

    def is_due(self, stage: str, done: int) -> bool:
        """Say whether this is one of the moments and nothing is written of it yet."""
        if stage != "training" or done not in self.due:
            return False
        return all(point["step"] != done for point in self.points())

    def points(self) -> list[dict[str, Any]]:
        """Return what was written, in the order of the training."""
        if not self.path.exists():
            return []
        return json.loads(self.path.read_text(encoding="utf-8"))["points"]

    def write(self, step: int) -> None:
        """Measure both models after `step` steps and leave the student as it was."""
        mixed = self.student.mixed
        scores = {layer: module.layer_score.item() for layer, module in mixed.items()}
        row = self.measure("mixed", self.student.model)
        layers = list(mixed)
        first_score = next(iter(mixed.values())).layer_score
        picks = choose(first_score.new_tensor(list(scores.values())), self.target)
        try:
            for i, module in enumerate(mixed.values()):
                module.harden("linear" if i in picks else "softmax")
            rounded = self.measure("rounded", self.student.model)
        finally:
            for module in mixed.values():
                module.choice = None
        found = {
            "step": step,
            "layers": [layers[pick] for pick in picks],
            "layer_scores": scores,
        }
        points = [*self.points(), {**found, "mixed": row, "rounded": rounded}]
        write_json(self.path, {"points": points})


def summarize_gap(found: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a table for one moment.

    score_distance: how far a layer score was from 0 or 1, on average, when the choice was made.
    `mixed_*` and `rounded_*` measures; `gap_*`: rounded over mixed, less 1.
    """
    scores = list(found["layer_scores"].values())
    row = {"score_distance": sum(min(r, 1 - r) for r in scores) / len(scores)}
    for name in ("frechet", "frechet_to_teacher", "motion"):
        mixed, rounded = (found[kind].get(name) for kind in ("mixed", "rounded"))
        if mixed is None or rounded is None:
            continue
        row |= {f"mixed_{name}": mixed, f"rounded_{name}": rounded}
        if mixed > 0:
            row[f"gap_{name}"] = rounded / mixed - 1
    return row
