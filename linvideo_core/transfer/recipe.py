"""What a transfer is set to where nothing says otherwise: by model, quality and graphics card.

A person says how good it should be, and the model says the rest. The embedded model's values are
measured (docs/evidence.md). Those of real models are the published share of layers and what their
memory allows; steps, videos and learning rates are a guess that nobody has tried on real weights.
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.config import NO_TILE, LinearForm
from ..run.config import override
from ..run.devices import count_device_bytes, resolve_device
from ..run.errors import SettingError
from ..teacher.config import PoolConfig, TeacherConfig, TrajectoryConfig, check_embedded
from .config import QUALITIES, ObjectiveConfig, RecipeConfig, RunConfig, TransferConfig

if TYPE_CHECKING:
    from ..kernels.tiles import Size
    from ..teacher.teacher import TeacherCheckpoint

logger = logging.getLogger(__name__)

# Each axis in so many: 1.6 to 2 % of the tokens, as whole Wans were timed with. On both models that
# were trained half of the layers hybrid came nearer than half linear (docs/training.md says how).
_TILES_OF_AXIS = 4
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
    # How errors grow along the flow was measured on the embedded model alone.
    "levels": "even",
}
_REAL_LENGTHS = {
    "draft": {"steps": 400, "num_trajectories": 12, "sampler_steps": 30, "accumulation": 1},
    "standard": {"steps": 3000, "num_trajectories": 48, "sampler_steps": 50, "accumulation": 2},
    "best": {"steps": 10_000, "num_trajectories": 192, "sampler_steps": 50, "accumulation": 4},
}
_EMBEDDED_LAYERS = 10
# What a card decides of a run that may be continued on another one.
_KEPT = ("frozen", "activation_checkpointing")
PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    # A small model keeps a GPU waiting for its kernels: a batch of 256 takes no longer than of 64.
    "gpu": {
        "out": Path("runs/transfer-gpu"),
        "num_trajectories": 2048,
        "shard_size": 256,
        "warm_start_steps": 300,
        "steps": 2500,
        "batch_size": 256,
        "ema_decay": 0.998,
        "compile": True,
        "checkpoint_every": 500,
        "log_every": 25,
        "evaluate_samples": 1000,
        "evaluate_batch_size": 250,
    },
}
"""Named settings of a command for the embedded model, which flags refine."""
HELP_NOTE = (
    "The defaults below are those of the embedded model; with --model they follow from the model, "
    "--card and --quality, and --dry-run prints them."
)


def settings_for(quality: str, *, is_embedded: bool, num_layers: int) -> dict[str, Any]:
    """Return the settings of a transfer by the names of `TransferConfig`'s fields.

    is_embedded: of the model that comes with LinVideo, which is small and learns fast.

    Raises ValueError for a quality that is none of `QUALITIES`.
    """
    if quality not in QUALITIES:
        known = ", ".join(QUALITIES)
        raise SettingError(f"{{quality}} {quality} given; one of {known} is needed", "quality")
    usual, lengths = (_EMBEDDED, _EMBEDDED_LENGTHS) if is_embedded else (_REAL, _REAL_LENGTHS)
    return {**usual, **lengths[quality], "target": max(1, round(_LINEAR_SHARE * num_layers))}


def tile_for(grids: Iterable["Size"], given: Mapping[str, Any]) -> str:
    """Return the tile of a model of one's own, as `LinearForm` spells it, for hybrid layers.

    It is a quarter of the smallest video along each axis; none where that is all of a video, and
    beside what goes with linear layers alone.

    grids: (frames, height, width) of the videos in tokens. given: settings that were given.
    """
    smallest = [*map(min, zip(*grids, strict=True))]
    if LinearForm.parts_of_linear_layers(given) or max(smallest) == 1:
        return NO_TILE
    return "x".join(str(-(-length // _TILES_OF_AXIS)) for length in smallest)


def settings_by_steps(steps: int) -> dict[str, Any]:
    """Return what follows from a training's length, by the names of `TransferConfig`'s fields."""
    return {
        # The embedded model's 0.03 moves r far enough in its 200 steps; in more of them less does.
        "layer_score_learning_rate": min(0.03, max(0.01, 6 / max(1, steps))),
        "warmup_steps": min(100, max(1, steps // 10)),
    }


def find_settings(preset: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a transfer that follow from its preset and the flags that were given.

    preset: one of `PRESETS`, for the embedded model. given: the flags by the names of
        `TransferConfig`'s fields. Of a model of one's own the headers are read, and PyTorch is
        asked how much memory the card has.

    Raises FileNotFoundError or ValueError, in one sentence, for a model that cannot be used.
    """
    quality = given.get("quality", RecipeConfig().quality)
    if is_embedded(preset, PRESETS, given):
        values = settings_for(quality, is_embedded=True, num_layers=_EMBEDDED_LAYERS)
        values |= PRESETS[preset]
        if given.get("states") == "pool":
            values["levels"] = "even"
        _check_used(given.get("states", PoolConfig().states), given)
        return values | settings_by_steps(given.get("steps", values["steps"]))
    return _settings_of_own(quality, given)


def is_embedded(preset: str, presets: Mapping[str, object], given: Mapping[str, Any]) -> bool:
    """Say whether flags mean the embedded model.

    Raises SettingError for one of its presets with another model, and for flags that it has not.

    presets: those of the command, the first one being what no `--preset` means.
    """
    if given.get("model") is None:
        check_embedded(given)
        return True
    if preset != next(iter(presets)):
        raise SettingError(
            f"{{preset}} {preset} given, which is for the embedded model; with {{model}} give "
            "{quality} instead",
            "preset",
            "model",
            "quality",
        )
    return False


def _settings_of_own(quality: str, given: Mapping[str, Any]) -> dict[str, Any]:
    # PyTorch is imported here, when it is needed.
    from ..teacher.teacher import open_teacher
    from .preflight import count_trained, find_grids

    more_sizes = override(PoolConfig(), given).sizes
    teacher = open_teacher(override(TeacherConfig(), given), more_sizes)
    num_layers = teacher.checkpoint.config.num_layers
    values = settings_for(quality, is_embedded=False, num_layers=num_layers)
    values |= settings_by_steps(given.get("steps", values["steps"]))
    values["tile"] = tile_for(find_grids(teacher), given)
    if "sampler_steps" in given:
        # A state a step at most.
        most = TrajectoryConfig().states_per_trajectory
        values["states_per_trajectory"] = max(1, min(most, given["sampler_steps"]))
    needs_stored = given.get("low_noise_model") or given.get("choice") == "sensitivity"
    values["states"] = "stored" if needs_stored else "pool"
    _check_used(given.get("states", values["states"]), given)
    return fit_card(
        teacher,
        TransferConfig(),
        values,
        given,
        count_trained=lambda config: count_trained(teacher, config.student),
        is_alone=given.get("low_noise_model") is None,
    )


def _check_used(states: str, given: Mapping[str, Any]) -> None:
    """Raise SettingError for a flag that was given of states or an objective that are not used."""
    objective = given.get("objective", ObjectiveConfig().objective)
    for what, used, other, name in (
        ("states", states, "stored", "num_trajectories"),
        ("states", states, "pool", "pool_videos"),
        ("objective", objective, "adm", "anchor_share"),
        ("objective", objective, "adm", "max_jump"),
        ("states", states, "stored", "max_jump"),
    ):
        if other != used and name in given:
            raise SettingError(
                f"{{{name}}} {given[name]} given, which is for {{{what}}} {other}, and {{{what}}} "
                f"is {used} here: give {{{what}}} {other}, or leave {{{name}}} out",
                name,
                what,
            )


def fit_card(
    teacher: "TeacherCheckpoint",
    defaults: RunConfig,
    values: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    count_trained: Callable[[Any], int],
    is_alone: bool = True,
) -> dict[str, Any]:
    """Return settings of a model of one's own, with what the graphics card decides.

    That is how many of a step's samples go through the model at once, how frozen weights are held,
    and whether activations are recomputed. Without a card samples go one at a time. A run that is
    continued keeps all that, whatever card it is on now. A warning says where the card is
    expected to be too small.

    defaults: the command's config as it is declared.
    values: settings by the names of its fields; `batch_size` times `accumulation` is the samples
        of a step. given: flags that were given, likewise; what they say is not decided here.
    count_trained: config -> the numbers that are trained.
    is_alone: whether no other model waits in CPU memory, so that blocks may.
    """
    from ..run.folder import read_settings
    from .preflight import find_batch

    found = {**values, "shard_size": 1, "evaluate_samples": 2, "evaluate_batch_size": 1}
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    num_samples = values["batch_size"] * values["accumulation"]
    earlier = read_settings(given.get("out", defaults.out))
    sizes = _list_sizes(num_samples, num_processes, given, earlier)
    size, offload_blocks = sizes[-1], 0
    card = given.get("card") or _card_gb(given.get("device", "auto"))
    # What trains whole weights holds them in fp32.
    is_fitted = card and given.get("parameters") != "full"
    if is_fitted:
        found |= {"frozen": "bf16", "activation_checkpointing": True}
    found |= {name: earlier[name] for name in _KEPT if name in earlier}
    if is_fitted:
        config = override(defaults, {**found, **given})
        size, offload_blocks, expected_gb = find_batch(
            teacher,
            config,
            sizes,
            card,
            num_trained=count_trained(config),
            may_offload=is_alone and num_processes == 1,
            num_processes=num_processes,
        )
        if expected_gb > card:
            logger.warning(
                "about %.0f GB are expected, more than a card of %d GB has: give fewer "
                "--num-frames, or --frozen fp8",
                expected_gb,
                card,
            )
    settings = {**found, **given}
    if settings.get("compile") or not settings.get("activation_checkpointing"):
        offload_blocks = 0
    found |= {"batch_size": size, "accumulation": max(1, -(-num_samples // max(1, size)))}
    return found | ({"offload_blocks": offload_blocks} if offload_blocks else {})


def _list_sizes(
    num_samples: int, num_processes: int, given: Mapping[str, Any], earlier: Mapping[str, Any]
) -> list[int]:
    """Return the batch sizes in which a step's samples may be taken, the preferred first.

    given, earlier: flags, and the settings of a run that is continued.
    """
    if "batch_size" in given:
        return [given["batch_size"]]
    most = max(1, num_samples // num_processes)
    sizes = [num_processes * size for size in range(most, 0, -1) if not most % size]
    if "accumulation" in given:
        return sizes[-1:]
    if earlier.get("batch_size", 0) * earlier.get("accumulation", 0) == num_samples:
        return [earlier["batch_size"]]
    return sizes


def _card_gb(device: str) -> int:
    """Return the memory of the GPU that a run would use, in GB of 2^30 bytes; 0 without one."""
    return (count_device_bytes(resolve_device(device)) or 0) // 2**30
