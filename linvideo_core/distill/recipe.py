"""What a distillation is set to where nothing says otherwise: by model, quality and graphics card.

The embedded model's guidance and regression weight are those that held the diversity of its videos
(docs/few_step.md). A real model takes them over, its guidance in the same proportion to that of
its sampler; its steps, samples and learning rates are guesses. Nobody has distilled real weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..run.config import override
from ..teacher.config import TeacherConfig
from ..transfer import recipe
from ..transfer.config import RecipeConfig
from .config import DistillConfig, check_artifact

# Towards what the teacher's guided videos are as a whole, not to the most typical of them.
_GUIDANCE_SHARE, _REGRESSION_WEIGHT = 0.5, 1.0
# What `transfer` of the same quality samples of the teacher serves here, too.
_AS_TRANSFER = (
    "num_trajectories",
    "sampler_steps",
    "guidance_scale",
    "lora_rank",
    "warm_start_steps",
    "checkpoint_every",
)
_EMBEDDED = {
    "batch_size": 8,
    "accumulation": 1,
    "learning_rate": 1e-4,
    "map_learning_rate": 1e-4,
    "critic_learning_rate": 2e-4,
    "critic_steps": 3,
    "ema_decay": 0.9,
}
_EMBEDDED_LENGTHS = {
    "draft": {"steps": 100},
    "standard": {"steps": 400},
    "best": {"steps": 1000},
}
_REAL = {
    "batch_size": 1,
    "learning_rate": 1e-4,
    "map_learning_rate": 1e-4,
    "critic_learning_rate": 2e-4,
    "critic_steps": 5,
    "ema_decay": 0.98,
}
_REAL_LENGTHS = {
    "draft": {"steps": 200, "accumulation": 4},
    "standard": {"steps": 600, "accumulation": 8},
    "best": {"steps": 2000, "accumulation": 16},
}
PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "gpu": {
        "out": Path("runs/distill-gpu"),
        "num_trajectories": 256,
        "shard_size": 256,
        "warm_start_steps": 300,
        "steps": 1000,
        "batch_size": 64,
        "learning_rate": 5e-4,
        "map_learning_rate": 5e-4,
        "critic_learning_rate": 1e-3,
        "warmup_steps": 50,
        "ema_decay": 0.98,
        "compile": True,
        "checkpoint_every": 250,
        "log_every": 10,
        "evaluate_samples": 1000,
        "evaluate_batch_size": 250,
    },
}
"""Named settings of the command for the embedded model, which flags refine."""


def settings_for(quality: str, given: Mapping[str, Any], *, is_embedded: bool) -> dict[str, Any]:
    """Return the settings of a distillation by the names of `DistillConfig`'s fields.

    given: the flags, of which the steps and the teacher's guidance decide others.

    Raises ValueError for a quality that is none of `QUALITIES`.
    """
    earlier = recipe.settings_for(quality, is_embedded=is_embedded, num_layers=1)
    usual, lengths = (_EMBEDDED, _EMBEDDED_LENGTHS) if is_embedded else (_REAL, _REAL_LENGTHS)
    values = {name: earlier[name] for name in _AS_TRANSFER} | usual | lengths[quality]
    found = {**values, **given}
    return {
        **values,
        "regression_weight": _REGRESSION_WEIGHT,
        "real_guidance_scale": max(1.0, _GUIDANCE_SHARE * found["guidance_scale"]),
        "warmup_steps": recipe.settings_by_steps(found["steps"])["warmup_steps"],
    }


def find_settings(preset: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a distillation that follow from its preset and the flags given.

    preset: one of `PRESETS`, for the embedded model. given: the flags by the names of
        `DistillConfig`'s fields. Of a model of one's own, and of the file that was made for it,
        the headers are read, and PyTorch is asked how much memory the card has.

    Raises FileNotFoundError or ValueError, in one sentence, for what cannot be used.
    """
    quality = given.get("quality", RecipeConfig().quality)
    is_embedded = recipe.is_embedded(preset, PRESETS, given)
    values = settings_for(quality, given, is_embedded=is_embedded)
    if is_embedded:
        return values | PRESETS[preset]
    # PyTorch is imported here, when it is needed.
    from ..evaluate.compare import load_linearized
    from ..teacher.teacher import open_teacher
    from .preflight import count_trained

    teacher = open_teacher(override(TeacherConfig(), given))
    check_artifact(given["model"], given.get("artifact"))
    first = load_linearized(given["artifact"])
    return recipe.fit_card(
        teacher,
        DistillConfig(),
        values,
        given,
        count_trained=lambda config: count_trained(teacher, config.distillation, first),
    )
