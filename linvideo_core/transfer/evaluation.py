"""Pictures of a training, and how its result is compared with its teacher."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from ..evaluate.sampler import CompareConfig
from ..run.config import option, positive
from ..run.errors import SettingError
from ..run.folder import read_metrics
from ..teacher.trajectories import TrajectoryConfig
from .layer_selection.order import LAYER_ORDER_NAME, save_layer_order
from .layer_selection.rules import SelectionConfig, count_selection_steps
from .layer_selection.sensitivity import RANKING_NAME

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How much is sampled to compare the result with its teacher, by the teacher's own sampler."""

    evaluate_samples: int = option(8, "videos that each model samples in the end; 0: no comparison")
    evaluate_batch_size: int = option(8, "videos sampled together in the end")

    def __post_init__(self) -> None:
        positive(self, "evaluate_batch_size")
        if self.evaluate_samples < 0 or self.evaluate_samples == 1:
            raise SettingError(
                f"{{evaluate_samples}} {self.evaluate_samples} given; 0, or 2 or more are needed",
                "evaluate_samples",
            )


def compare_config(config: EvaluationConfig, trajectories: TrajectoryConfig) -> CompareConfig:
    """Return how the comparison samples: as the teacher's trajectories were sampled."""
    return CompareConfig(
        num_samples=config.evaluate_samples,
        steps=trajectories.sampler_steps,
        guidance_scale=trajectories.guidance_scale,
        shift=trajectories.shift,
        batch_size=config.evaluate_batch_size,
    )


def is_evaluated(config: EvaluationConfig, folder: Path) -> bool:
    """Say whether a run folder holds the comparison that is asked for, if any is."""
    if not config.evaluate_samples:
        return True
    # Here, as in `draw_training`, so that a node pack does not load matplotlib.
    from ..evaluate.compare import read_evaluation

    found = read_evaluation(folder)
    return found is not None and found["settings"]["num_samples"] == config.evaluate_samples


def draw_training(
    folder: Path, layers: Sequence[int], selection: SelectionConfig, num_steps: int
) -> None:
    """Draw losses, and layer scores if learned, from a training's metrics if still there.

    Scores that were learned beside a ranking are compared with it, in layer_order.json.

    layers: those that became linear; num_steps: of the training.
    """
    from ..evaluate import plots

    metrics_path = folder / "training" / "metrics.jsonl"
    if not metrics_path.exists():
        logger.warning("%s is gone; its pictures are left out", metrics_path)
        return
    rows = read_metrics(metrics_path)
    if selection.rule == "learned":
        hardened_at = count_selection_steps(selection, num_steps)
        save_layer_order(
            metrics_path, folder / RANKING_NAME, folder / LAYER_ORDER_NAME, hardened_at
        )
        chosen = {"target": selection.target, "layers": layers, "hardened_at": hardened_at}
        plots.plot_layer_scores(rows, folder / "layer_scores.png", **chosen)
    plots.plot_losses(rows, folder / "losses.png")
