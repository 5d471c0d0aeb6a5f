"""Pictures of a training, and how its result is compared with its teacher."""

import logging
from collections.abc import Sequence
from pathlib import Path

from ..evaluate.config import CompareConfig
from ..run.folder import read_metrics
from ..teacher.config import TrajectoryConfig
from .config import EvaluationConfig, SelectionConfig
from .layer_selection.rules import count_selection_steps

logger = logging.getLogger(__name__)


def compare_config(config: EvaluationConfig, trajectories: TrajectoryConfig) -> CompareConfig:
    """Return how the comparison samples: as the teacher's trajectories were sampled."""
    return CompareConfig(
        num_samples=config.evaluate_samples,
        sampler_steps=trajectories.sampler_steps,
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
    folder: Path, linear_layers: Sequence[int], selection: SelectionConfig, num_steps: int
) -> None:
    """Draw losses, and layer scores if learned, from a training's metrics if still there.

    linear_layers: those that became linear; num_steps: of the training.
    """
    from ..evaluate import plots

    metrics_path = folder / "training" / "metrics.jsonl"
    if not metrics_path.exists():
        logger.warning("%s is gone; its pictures are left out", metrics_path)
        return
    rows = read_metrics(metrics_path)
    if selection.rule == "learned":
        plots.plot_layer_scores(
            rows,
            folder / "layer_scores.png",
            target=selection.target,
            layers=linear_layers,
            hardened_at=count_selection_steps(selection, num_steps),
        )
    plots.plot_losses(rows, folder / "losses.png")
