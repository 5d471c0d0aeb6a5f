"""Settings by name: how much a transfer learns, for a model of a kind and size.

A person says how good it should be and the model says the rest. The embedded model's values are
measured (docs/evidence.md); those of real models are the home recipe's, and a guess beyond it.
"""

from typing import Any

QUALITIES = ("draft", "standard", "best")

# Published: 16 of 30 layers of Wan 1.3B, 22 of 40 of Wan 14B (arXiv 2510.08318).
_LINEAR_SHARE = 0.54

_EMBEDDED = {
    "learning_rate": 2e-3,
    "map_learning_rate": 2e-3,
    "batch_size": 6,
    "lora_rank": 32,
    "warm_start_steps": 40,
    "checkpoint_every": 25,
    "guidance_scale": 3.0,
}
_EMBEDDED_LENGTHS = {
    "draft": {"steps": 80, "num_trajectories": 12, "sampler_steps": 25},
    "standard": {"steps": 200, "num_trajectories": 24, "sampler_steps": 50},
    "best": {"steps": 1000, "num_trajectories": 96, "sampler_steps": 50},
}
_REAL = {
    "learning_rate": 1e-4,
    "map_learning_rate": 1e-3,
    "batch_size": 1,
    "lora_rank": 32,
    "warm_start_steps": 120,
    "checkpoint_every": 50,
    "guidance_scale": 5.0,
}
_REAL_LENGTHS = {
    "draft": {"steps": 400, "num_trajectories": 12, "sampler_steps": 30, "accumulation": 1},
    "standard": {"steps": 3000, "num_trajectories": 48, "sampler_steps": 50, "accumulation": 2},
    "best": {"steps": 10_000, "num_trajectories": 192, "sampler_steps": 50, "accumulation": 4},
}


def settings_for(quality: str, *, is_embedded: bool, num_layers: int) -> dict[str, Any]:
    """Return the settings of a transfer by the names of `TransferConfig`'s fields.

    is_embedded: of the model that comes with LinVideo, which is small and learns fast.

    Raises ValueError for a quality that is none of `QUALITIES`.
    """
    if quality not in QUALITIES:
        raise ValueError(f"quality {quality!r} given; one of {', '.join(QUALITIES)} is needed")
    usual, lengths = (_EMBEDDED, _EMBEDDED_LENGTHS) if is_embedded else (_REAL, _REAL_LENGTHS)
    return {**usual, **lengths[quality], "target": max(1, round(_LINEAR_SHARE * num_layers))}


def settings_by_steps(steps: int) -> dict[str, Any]:
    """Return what follows from a training's length, by the names of `TransferConfig`'s fields."""
    return {
        # The embedded model's 0.03 moves r far enough in its 200 steps; in more of them less does.
        "layer_score_learning_rate": min(0.03, max(0.01, 6 / steps)),
        "warmup_steps": min(100, max(1, steps // 10)),
    }
