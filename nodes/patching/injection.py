"""How chosen layers compute linear attention while ComfyUI samples, and stop when it is done.

ComfyUI calls `inject` and `eject` with the patcher that it runs: nothing is remembered from the
time when a node ran. A layer keeps its class's own forward (projections, norms, RoPE, patches of
other packs); only the attention call inside is answered by ours, whatever backend or override the
user chose for the rest.

What a changed module computes with, the forward that stood there before, and the check of calls lie
in a module's `__dict__`: as attributes they would become part of the user's model.

Around each call of the model, outside of what torch.compile sees, the first steps of a sampling may
keep the original model: its softmax layers and its weights. The changed weights belong to the
linear layers. With softmax layers they are worse than either: on the embedded model, over 8 steps,
the velocity differs from the teacher's by 0.25 to 0.60 of its norm, that of linear layers with the
changed weights by 0.04 to 0.11. So both rest together. And every call is checked: a pack that
computes whole blocks itself would pass our layers over without a word, and an input may bring
tokens that no file was trained with. Where another node replaces a linear layer's block, as
ComfyUI's own sparse attention does, that layer is computed by us or the sampling ends.
"""

import contextlib
import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Collection, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .attention_override import run_answered
from .families import host_family
from .layer_clock import CLOCK
from .weights import FeatureMaps, LowRankChange, LowRankChanges, Part, check_merged

KEY = "linvideo"
"""Ours among a ModelPatcher's attachments, injections, callbacks and additional models."""

_CHECK = "_linvideo_call_check"
_PART, _FORWARD, _PREVIOUS = "_linvideo_part", "_linvideo_forward", "_linvideo_previous"
_UNFUSED, _WAS_UNFUSED = "_full_precision_mm", "_linvideo_full_precision_mm"
"""ComfyUI's own field of a layer, and of ours what it was before."""

logger = logging.getLogger(__name__)


def inject(patcher: Any) -> None:
    """Make the patcher's layers linear, with their changes; doing it again changes nothing."""
    eject(patcher)
    check_merged(patcher)
    maps, *changes = (part.model for part in patcher.get_additional_models_with_key(KEY))
    family = host_family(maps.family_name)
    diffusion_model = patcher.model.diffusion_model
    for name, layer_maps in zip(maps.site_names, maps.layers, strict=True):
        layer_maps.run_fused = family.run_fused
        _replace_forward(diffusion_model.get_submodule(name), _linear_forward, layer_maps)
        block = diffusion_model.get_submodule(name.rpartition(".")[0])
        block = getattr(block, "_orig_mod", block)
        if "attention" in inspect.signature(type(block).forward).parameters:
            _replace_forward(block, _block_forward, layer_maps)
    if changes:
        _change_layers(diffusion_model, changes[0])
    patcher.model.__dict__[_CHECK] = _CallCheck(maps, patcher)


def eject(patcher: Any) -> None:
    """Undo what `inject` did, by whichever patcher of this model; what is not ours stays."""
    if check := patcher.model.__dict__.pop(_CHECK, None):
        check.close()
    for module in patcher.model.diffusion_model.modules():
        _restore_forward(module)
        _restore_fusing(module)
        _restore_weight(module)


def _replace_forward(module: nn.Module, function: Callable[..., Any], part: Part) -> None:
    """Let a module compute `function(module, ...)`, for one module always the same function."""
    fields = module.__dict__
    fields[_PART] = part
    if "forward" in fields:
        fields[_PREVIOUS] = fields["forward"]
    # One bound method for the module's life: torch.compile takes a new one for new code.
    fields["forward"] = fields.setdefault(_FORWARD, MethodType(function, module))


def _restore_forward(module: nn.Module) -> None:
    fields = module.__dict__
    if _FORWARD not in fields:
        return
    fields.pop(_PART, None)
    previous = fields.pop(_PREVIOUS, None)
    if fields.get("forward") is fields[_FORWARD]:
        del fields["forward"]
        if previous is not None:
            fields["forward"] = previous


def _call_previous(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Compute a module as it was before its forward was replaced."""
    previous = module.__dict__.get(_PREVIOUS)
    if previous is not None:
        return previous(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


def _linear_forward(
    self: nn.Module, x: Tensor, *args: Any, transformer_options: dict | None = None, **kwargs: Any
) -> Tensor:
    """Run the class's own forward with linear attention, or the family's faster way to the same."""
    kwargs["transformer_options"] = dict(transformer_options or {})
    maps = self.__dict__.get(_PART)
    if maps is not None:
        maps.num_runs += 1
        maps.is_compiled = torch.compiler.is_compiling()
    if maps is None or maps.is_resting:
        return _call_previous(self, x, *args, **kwargs)
    fused = maps.run_fused(self, maps, x, *args, **kwargs)
    return run_answered(self, maps, x, *args, **kwargs) if fused is None else fused


def _block_forward(self: nn.Module, *args: Any, attention: Any = None, **kwargs: Any) -> Tensor:
    """Run a block with its own attention, which is linear, not with what another node hands in."""
    maps = self.__dict__.get(_PART)
    if maps is None or maps.is_resting:
        kwargs["attention"] = attention
    return _call_previous(self, *args, **kwargs)


def _change_layers(diffusion_model: nn.Module, changes: LowRankChanges) -> None:
    for name, change in zip(changes.layer_names, changes.layers, strict=True):
        layer = diffusion_model.get_submodule(name)
        layout = getattr(layer.weight, "_layout_cls", None)
        if layout == "TensorWiseINT8Layout":
            # ComfyUI may fuse such a layer with what is before it and never call its forward. In
            # its weight the change costs it its fast 8-bit product.
            layer.weight_function = [*layer.weight_function, change.change_weight]
        else:
            _replace_forward(layer, _changed_forward, change)
        if layout is None:
            _forbid_fusing(layer)


def _forbid_fusing(layer: nn.Module) -> None:
    """Let ComfyUI call the forward of a layer whose weight is none of its quantised ones.

    While PyTorch may sum in fp16, which a node may allow for one sampling, newer ones fuse it
    otherwise. Of such a layer the field says nothing else.
    """
    fields = layer.__dict__
    fields[_WAS_UNFUSED] = fields.get(_UNFUSED)
    fields[_UNFUSED] = True


def _restore_fusing(layer: nn.Module) -> None:
    fields = layer.__dict__
    if _WAS_UNFUSED in fields:
        fields[_UNFUSED] = fields.pop(_WAS_UNFUSED)
        if fields[_UNFUSED] is None:
            del fields[_UNFUSED]


def _changed_forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    output = _call_previous(self, x, *args, **kwargs)
    change = self.__dict__.get(_PART)
    return output if change is None else change(x, output)


def _restore_weight(layer: nn.Module) -> None:
    """Take ours from the functions that ComfyUI calls on a layer's weight."""
    functions = layer.__dict__.get("weight_function", ())
    others = [f for f in functions if not isinstance(getattr(f, "__self__", None), LowRankChange)]
    if len(others) < len(functions):
        layer.weight_function = others


@dataclasses.dataclass(frozen=True)
class KeepFirstSteps:
    """ComfyUI's wrapper around every call of the model: our parts rest in the first steps.

    num_steps: of each sampling. A sampler may call the model several times a step, or for several
        windows: what counts is the noise level.
    """

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
            for model in patcher.get_additional_models_with_key(KEY)
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
    replaced = {key[1] for key in options.get("patches_replace", {}).get("dit", {})}
    check.begin(executor.class_obj.diffusion_model, x, inputs, replaced)
    with check.measure(executor.class_obj.diffusion_model, options):
        output = executor(x, t, c_concat, c_crossattn, control, options, **inputs)
    check.end(replaced)
    return output


class _CallCheck:
    """Counts the runs of one model's linear layers while it samples; ends with the sampling."""

    def __init__(self, maps: FeatureMaps, patcher: Any) -> None:
        """patcher: of the model; what is found stands on its report, too."""
        self.family = host_family(maps.family_name)
        self.layers = dict(zip(maps.linear_layers, maps.layers, strict=True))
        self.names = dict(zip(maps.linear_layers, maps.site_names, strict=True))
        self.report = patcher.get_attachment(KEY)
        self.clock = patcher.get_attachment(CLOCK)
        self.guards: dict[int, list[RemovableHandle]] = {}
        self.have_run = self.have_been_skipped = self.is_warm = False

    def begin(
        self,
        diffusion_model: nn.Module,
        x: Tensor,
        inputs: Mapping[str, Any],
        replaced: Collection[int],
    ) -> None:
        """Start counting; tell hybrid layers where tokens lie, warn of those that join the video's.

        x: latents [B, C, F, H, W], or several streams in one, the video first.
        replaced: blocks that a patch stands in for.
        """
        # Under torch.compile's node it is a wrapper that stands here.
        diffusion_model = getattr(diffusion_model, "_orig_mod", diffusion_model)
        if joining := self.family.find_joining_inputs(diffusion_model, inputs):
            _warn_of_joining_inputs(type(diffusion_model).__name__, ", ".join(joining))
        # Always 0 when a compiled layer starts: its guard on the number holds, call after call.
        for layer_maps in self.layers.values():
            layer_maps.num_runs = 0
            if layer_maps.form.tile:
                shape, *_ = inputs.get("latent_shapes") or [x.shape]
                layer_maps.grid = self.family.find_grid(diffusion_model, tuple(shape[2:]), inputs)
        for layer in self.layers.keys() & replaced - self.guards.keys():
            self._guard(layer, diffusion_model.get_submodule(self.names[layer]))

    def measure(
        self, diffusion_model: nn.Module, options: Mapping[str, Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Measure the layers in the call that is run within, if it is the one to be measured.

        It is the one after a call in which linear layers worked, uncompiled: a hook would have
        torch.compile compile them anew.
        """
        if not self.is_warm or any(x.is_resting for x in self.layers.values()):
            return contextlib.nullcontext()
        return self.clock.measure(diffusion_model, options)

    def _guard(self, layer: int, attention: nn.Module) -> None:
        """Let a layer's projections, which hold its changed weights, run in its own call alone."""
        maps = self.layers[layer]

        def refuse(*_: Any) -> None:
            if not (maps.num_runs or maps.is_resting):
                raise _other_way(layer, 0)

        projections = [x for x in attention.modules() if isinstance(x, nn.Linear)]
        self.guards[layer] = [x.register_forward_pre_hook(refuse) for x in projections]

    def close(self) -> None:
        """Leave the model as it was."""
        for handle in (each for handles in self.guards.values() for each in handles):
            handle.remove()

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
        if skipped and not self.have_been_skipped:
            self.have_been_skipped = True
            self.report.add_warning(
                f"the blocks of layers {', '.join(map(str, skipped))} were not run in a call of "
                "the model; this is as it should be if another node skips blocks or reuses what "
                "they gave, otherwise they were not linear"
            )
        wrong = [n for n, count in counts.items() if count != 1 and n not in skipped]
        if wrong:
            raise _other_way(wrong[0], counts[wrong[0]])
        self.have_run = True
        self.is_warm = not any(x.is_resting or x.is_compiled for x in self.layers.values())


def _other_way(layer: int, num_runs: int) -> RuntimeError:
    return RuntimeError(
        f"LinVideo's linear layer {layer} was run {num_runs} times in one call of the model "
        "instead of once: another node computes this model's blocks in its own way; remove that "
        "node or LinVideo Linearize"
    )


@functools.cache
def _warn_of_joining_inputs(model_name: str, joining: str) -> None:
    logger.warning(
        "LinVideo: the tokens of %s join the video's in this model (%s); linear layers work on "
        "them too, but their quality was not tested",
        joining,
        model_name,
    )
