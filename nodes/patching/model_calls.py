"""What is done around each call of a linearized model, outside of what torch.compile sees.

The first steps of a sampling may keep the original model: its softmax layers and its weights. The
changed weights belong to the linear layers. With softmax layers they are worse than either: on
the embedded model, over 8 steps, the velocity differs from the teacher's by 0.25 to 0.60 of its
norm, that of linear layers with the changed weights by 0.04 to 0.11. So both rest together.

And every call is checked: a pack that computes whole blocks itself would pass our layers over
without a word, and an input may bring tokens that no file was trained with.
"""

import dataclasses
import functools
import logging
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from .additional_models import FeatureMaps, Part
from .families import host_family

_CHECK = "_linvideo_call_check"

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class KeepFirstSteps:
    """ComfyUI's wrapper around every call of the model: our parts rest in the first steps.

    key: of the additional models whose parts rest.
    num_steps: of each sampling. A sampler may call the model several times a step, or for several
        windows: what counts is the noise level.
    """

    key: str
    num_steps: int

    def __call__(self, executor: Any, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run one call of the model, our parts resting if it belongs to the first steps."""
        inputs = [each for each in (*args, *kwargs.values()) if isinstance(each, dict)]
        schedule = next((i["sample_sigmas"] for i in inputs if "sample_sigmas" in i), None)
        patcher = executor.class_obj.current_patcher
        if schedule is None or patcher is None or not self._is_early(sigma, schedule):
            return executor(x, sigma, *args, **kwargs)
        parts = [
            part
            for model in patcher.get_additional_models_with_key(self.key)
            for part in model.model.modules()
            if isinstance(part, Part)
        ]
        try:
            for part in parts:
                part.is_resting = True
            return executor(x, sigma, *args, **kwargs)
        finally:
            for part in parts:
                part.is_resting = False

    def _is_early(self, sigma: Tensor, schedule: Tensor) -> bool:
        last = schedule[min(self.num_steps, len(schedule) - 1)]
        return bool(sigma.max() > last.to(sigma) * (1 + 1e-4))


def expect_layers(model: nn.Module, maps: FeatureMaps) -> None:
    """Expect that every call of ComfyUI's model runs its linear layers."""
    # Straight into __dict__: as an attribute, the maps would become part of the user's model.
    model.__dict__[_CHECK] = _CallCheck(maps)


def expect_nothing(model: nn.Module) -> None:
    """Undo `expect_layers`."""
    model.__dict__.pop(_CHECK, None)


def check_call(
    executor: Any,
    x: Any,
    t: Any,
    c_concat: Any = None,
    c_crossattn: Any = None,
    control: Any = None,
    transformer_options: Mapping[str, Any] | None = None,
    **inputs: Any,
) -> Any:
    """Run one call of the model, ComfyUI's `apply_model`, and see that the linear layers ran.

    Raises RuntimeError when they did not.
    """
    check = executor.class_obj.__dict__.get(_CHECK)
    if check is None:
        raise RuntimeError(
            "LinVideo's linear layers are not in the model that is sampled: remove LinVideo "
            "Linearize, or the node that loads this model in a way of its own"
        )
    options = transformer_options or {}
    check.begin(executor.class_obj.diffusion_model, inputs)
    output = executor(x, t, c_concat, c_crossattn, control, options, **inputs)
    check.end({key[1] for key in options.get("patches_replace", {}).get("dit", {})})
    return output


class _CallCheck:
    """Counts the runs of one model's linear layers while it samples."""

    def __init__(self, maps: FeatureMaps) -> None:
        self.family = host_family(maps.family_name)
        self.layers = dict(zip(maps.linear_layers, maps.layers, strict=True))
        self.have_run = False

    def begin(self, diffusion_model: nn.Module, inputs: Collection[str]) -> None:
        """Start counting; warn of inputs whose tokens join the video's."""
        # Under torch.compile's node it is a wrapper that stands here.
        diffusion_model = getattr(diffusion_model, "_orig_mod", diffusion_model)
        if joining := self.family.find_joining_inputs(diffusion_model, inputs):
            _warn_of_joining_inputs(type(diffusion_model).__name__, ", ".join(joining))
        # Always 0 when a compiled layer starts: its guard on the number holds, call after call.
        for layer_maps in self.layers.values():
            layer_maps.num_runs = 0

    def end(self, replaced: Collection[int]) -> None:
        """Raise unless each layer ran once; replaced: blocks that a patch stands in for.

        After a call in which all did, a cache may reuse what the last blocks, or all, once gave.
        """
        counts = {layer: layer_maps.num_runs for layer, layer_maps in self.layers.items()}
        ran = [layer for layer, count in counts.items() if count]
        if self.have_run and not ran:
            return
        tail = [n for n in counts if n > ran[-1]] if self.have_run else []
        skipped = [n for n, count in counts.items() if not count and (n in replaced or n in tail)]
        if skipped:
            _warn_of_skipped_blocks(", ".join(map(str, skipped)))
        wrong = [n for n, count in counts.items() if count != 1 and n not in skipped]
        if wrong:
            raise RuntimeError(
                f"LinVideo's linear layer {wrong[0]} was run {counts[wrong[0]]} times in one call "
                "of the model instead of once: another node computes this model's blocks in its "
                "own way; remove that node or LinVideo Linearize"
            )
        self.have_run = True


@functools.cache
def _warn_of_joining_inputs(model_name: str, joining: str) -> None:
    logger.warning(
        "LinVideo: the tokens of %s join the video's in this model (%s); linear layers work on "
        "them too, but their quality was not tested",
        joining,
        model_name,
    )


@functools.cache
def _warn_of_skipped_blocks(layers: str) -> None:
    logger.warning(
        "LinVideo: the blocks of layers %s were not run in a call of the model; this is as it "
        "should be if another node skips blocks or reuses what they gave, otherwise they were "
        "not linear",
        layers,
    )
