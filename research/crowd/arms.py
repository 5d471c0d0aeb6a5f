"""What the experiments on `crowd` compare, declared: table -> arm -> how its file is made.

All that arms do not declare is the same for all of a table; see `research.crowd.experiments`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from linvideo_core.evaluate.config import CompareConfig
from linvideo_core.flow import Recipe, make_sigmas

from .config import WHOLE

SHORT = 13
"""Frames of the videos a quarter as long that the teacher was trained on, too: 16 with the last."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """A row of a table: a transfer, perhaps a distillation after it, and how its file is sampled.

    settings: of the transfer, by the names of `TransferConfig`'s fields.
    training, second_training: what they are, by the names of `trainings.TRAININGS`.
    baseline: the arm of the same table that it is compared with seed by seed; None: with none.
    linear_share: of all layers; with a tile they are hybrid. is_random: the seed draws which.
    distillation: settings of the distillation, by the names of `DistillConfig`'s fields; None: the
        transfer's file is measured.
    sampler_steps: Euler steps, where they are fewer than all others'; is_guided: these few.
    num_frames: of the videos that are sampled and measured, one row each.
    num_spans: of the time of a training that its transfer takes; a distillation takes one besides.
    """

    settings: Mapping[str, Any]
    training: str = "transfer"
    second_training: str = "distill"
    baseline: str | None = None
    linear_share: float = 0.5
    is_random: bool = False
    distillation: Mapping[str, Any] | None = None
    sampler_steps: int | None = None
    is_guided: bool = True
    num_frames: tuple[int, ...] = (WHOLE,)
    num_spans: int = 1

    def count_calls(self, usual_steps: int) -> int:
        """Return how often its model is called for a video, twice a guided step."""
        if self.distillation is not None:
            return self.distillation["num_steps"]
        return (1 + self.is_guided) * (self.sampler_steps or usual_steps)

    def find_recipe(self, usual: CompareConfig) -> Recipe | None:
        """Return how its file is sampled; None: as the file says; usual: of all others."""
        if self.sampler_steps is None:
            return None
        return Recipe(
            sigmas=make_sigmas(self.sampler_steps, usual.shift),
            guidance_scale=usual.guidance_scale if self.is_guided else 1.0,
        )


_SPREAD = {"choice": "alternate"}
_STORED = {**_SPREAD, "states": "stored", "objective": "velocity"}
_POOL = {**_SPREAD, "states": "pool", "objective": "adm", "pool_videos": 64}
# The most first: the others take theirs among these.
_VIDEOS = (384, 96, 24, 8)
_MOST_VIDEOS = f"stored_{max(_VIDEOS)}"
_MAPS = {"parameters": "feature_maps"}
# Of the 4,096 tokens, 16 x 16 x 16, a tile has 1.6 % and a frame 6 %.
_TILE = {"tile": "1x8x8"}
_FRAME = {"tile": "1x16x16", "attention_mass": "moments"}


def _pool(on_policy: float) -> dict[str, Any]:
    """Return the settings of a pool of which the student moves so large a share."""
    return {**_POOL, "anchor_share": 1 - on_policy}


def _stored(num_videos: int, **more: Any) -> dict[str, Any]:
    return {**_STORED, "num_trajectories": num_videos, **more}


def _selected(**settings: Any) -> Arm:
    """Return an arm of `selection`: stored videos, which rankings need."""
    chosen = {name: value for name, value in _stored(96).items() if name != "choice"}
    return Arm(settings={**chosen, **settings}, baseline="learned")


def _distilled(num_steps: int, regression_weight: float, **more: Any) -> Arm:
    settings = {
        "num_trajectories": 96,
        "num_steps": num_steps,
        "regression_weight": regression_weight,
        "critic_steps": 3,
        "learning_rate": 1e-4,
        "map_learning_rate": 1e-4,
    }
    return Arm(settings=_pool(0), distillation=settings, **more)


def _long(arm: Arm) -> Arm:
    return dataclasses.replace(arm, num_spans=6)


TABLES: dict[str, dict[str, Arm]] = {
    "objectives": {
        "pool": Arm(settings=_pool(0), baseline=_MOST_VIDEOS),
        "on_policy_half": Arm(settings=_pool(0.5), baseline="pool"),
        "on_policy": Arm(settings=_pool(1), baseline="pool"),
        **{
            f"stored_{n}": Arm(
                settings=_stored(n), baseline=None if n == max(_VIDEOS) else _MOST_VIDEOS
            )
            for n in _VIDEOS
        },
        **{
            f"adm_{n}": Arm(settings=_stored(n, objective="adm"), baseline=f"stored_{n}")
            for n in _VIDEOS
        },
    },
    # Who begins slower may end nearer: six times as long.
    "longer": {
        "pool": _long(Arm(settings=_pool(0))),
        "on_policy_half": _long(Arm(settings=_pool(0.5), baseline="pool")),
        "stored": _long(Arm(settings=_stored(max(_VIDEOS)), baseline="pool")),
    },
    # A student that cannot represent its teacher: every layer linear, as few features as there are.
    "students": {
        "velocity": Arm(settings=_pool(0), linear_share=1),
        "on_policy_half": Arm(settings=_pool(0.5), linear_share=1, baseline="velocity"),
        "on_policy": Arm(settings=_pool(1), linear_share=1, baseline="velocity"),
        **{
            name: Arm(settings=_pool(on), training=name, linear_share=1, baseline=baseline)
            for name, on, baseline in (
                ("block_features", 0, "velocity"),
                ("kl_push", 1, "on_policy"),
            )
        },
        "velocity_maps": Arm(settings=_pool(0) | _MAPS, linear_share=1),
        "on_policy_maps": Arm(settings=_pool(1) | _MAPS, linear_share=1, baseline="velocity_maps"),
    },
    "few_steps": {
        f"{name}_{steps}": arm
        for steps in (8, 4)
        for name, arm in {
            "matching_and_regression": _distilled(steps, 1.0),
            "matching": _distilled(steps, 0.0, baseline=f"matching_and_regression_{steps}"),
            "regression": _distilled(
                steps,
                1.0,
                second_training="regression",
                baseline=f"matching_and_regression_{steps}",
            ),
            "undistilled": Arm(
                settings=_pool(0),
                sampler_steps=steps,
                baseline=f"matching_and_regression_{steps}",
            ),
            # The transfer itself learns to do without guidance, in the time of the others' two.
            "velocity": Arm(
                settings=_pool(0) | {"prompt_dropout": 0.0},
                training="guided_velocity",
                sampler_steps=steps,
                is_guided=False,
                num_spans=2,
                baseline=f"matching_and_regression_{steps}",
            ),
        }.items()
    },
    "selection": {
        "learned": dataclasses.replace(_selected(choice="learned"), baseline=None),
        "from_ranking": dataclasses.replace(_selected(choice="learned"), training="from_ranking"),
        "alternate": _selected(choice="alternate"),
        "random": dataclasses.replace(_selected(), is_random=True),
        "replace_one": _selected(choice="sensitivity", sensitivity="replace-one"),
        "restore_one": _selected(choice="sensitivity", sensitivity="restore-one"),
    },
    # Softmax within tiles beside linear attention, in half of the layers and in all.
    "hybrid": {
        "linear_half": Arm(settings=_pool(0)),
        "hybrid_half": Arm(settings=_pool(0) | _TILE, baseline="linear_half"),
        "linear_all": Arm(settings=_pool(0), linear_share=1, baseline="linear_half"),
        "hybrid_all": Arm(settings=_pool(0) | _TILE, linear_share=1, baseline="linear_all"),
        "hybrid_frame_all": Arm(settings=_pool(0) | _FRAME, linear_share=1, baseline="linear_all"),
    },
    "sizes": {
        "whole": Arm(settings=_pool(0), num_frames=(WHOLE, SHORT)),
        "short": Arm(
            settings=_pool(0) | {"num_frames": SHORT}, num_frames=(WHOLE, SHORT), baseline="whole"
        ),
        "mixed": Arm(
            settings=_pool(0) | {"more_sizes": f"256x256x{SHORT}"},
            num_frames=(WHOLE, SHORT),
            baseline="whole",
        ),
    },
}
"""Table -> arm, in the order in which they are made and shown.

Arms of the same settings are of the same runs, in whatever tables they are.
"""

NOT_RUN: dict[str, dict[str, str]] = {
    "students": {
        "critic": "a trained critic on the ends of the teacher's own grid has no code: it needs "
        "whole videos of the student, whose sampling would take all of a short training's time; "
        "linvideo_core.distill has one for few steps",
    },
    "selection": {
        "in_cost": "layers of a kind cost alike, so that a budget in cost is one in count, and a "
        "third kind among softmax and hybrid ones would hardly pay (docs/kernels.md)",
    },
}
"""Table -> what the study asks for and the product cannot do -> why it has no row."""


def find_arms(tables: Sequence[str], names: Sequence[str] = ()) -> dict[tuple[str, str], Arm]:
    """Return the arms of some tables by (table, name); names: of those to return, none: all."""
    return {
        (table, name): arm
        for table in tables
        for name, arm in TABLES[table].items()
        if not names or name in names
    }
