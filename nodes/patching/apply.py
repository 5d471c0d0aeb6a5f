"""How a ComfyUI MODEL is linearized by an artifact and given back, and what the node says of it.

A clone carries everything: weight changes as ComfyUI's own patches, feature maps as a model of
their own that ComfyUI loads and offloads with it, and the hook that works while it samples. The
MODEL that came in stays as it was.
"""

import functools
import logging
import sys
import uuid
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP
from comfy_execution.utils import get_executing_context
from torch import nn

from ...linvideo_core.artifact import Artifact, ArtifactError, ArtifactHeader, Usage, check
from ...linvideo_core.artifact.summary import find_differences, title
from ...linvideo_core.models import attention_sites
from ...linvideo_core.models.base_weights import WeightsMatch
from ...linvideo_core.models.families import identify
from .families import host_family, pixels_of
from .injection import KEY, KeepFirstSteps, check_call, eject, inject
from .layer_clock import CLOCK, LayerClock, why_plain
from .weights import (
    FeatureMaps,
    LowRankChanges,
    add_weight_changes,
    are_blocks_compiled,
    compare_base,
    make_patcher,
)

_AS_MADE = "sampled as the file was made"
_SAMPLE = "sample_"

logger = logging.getLogger(__name__)


def linearize(
    model: Any,
    artifact: Artifact,
    *,
    strength: float = 1.0,
    keep_first_steps: int = 0,
    node_id: str | None = None,
) -> Any:
    """Return a clone of a ModelPatcher whose chosen layers are linear.

    strength: scales the weight changes; the feature maps are as trained at any strength.
    keep_first_steps: so many steps of every sampling run the model as it came in.
    node_id: of the node that reports what differs; a difference is never an error.

    Raises ArtifactError when the artifact does not fit the model or one is applied already.
    """
    diffusion_model = untouched(model)
    shapes = attention_sites.shapes_of(diffusion_model)
    sites = check(artifact, shapes)
    family = host_family(artifact.header.family)
    for site in sites:
        family.check(diffusion_model.get_submodule(site.name))
    if artifact.header.tile:
        family.check_grid(diffusion_model)
    match = compare_base(artifact.header, model)
    if match.kind == "other":
        logger.warning("LinVideo: %s", match)
    report = Report(artifact.header, match, strength, keep_first_steps, node_id)
    dtype = getattr(model.model, "manual_cast_dtype", None) or model.model_dtype()
    report.add_kernel(model.load_device, sites[0].head_dim, dtype)

    linearized = model.clone()
    must_rest = keep_first_steps > 0
    bypassed = add_weight_changes(linearized, artifact, strength, must_rest=must_rest)
    devices = (model.load_device, model.offload_device)
    settings = {"disable_dynamic": not model.is_dynamic()}
    patchers = [make_patcher(FeatureMaps, (artifact,), *devices, **settings)]
    if bypassed:
        contents = (bypassed, strength)
        patchers.append(make_patcher(LowRankChanges, contents, *devices, **settings))
    linearized.set_additional_models(KEY, patchers)
    linearized.set_injections(KEY, [PatcherInjection(inject, eject)])
    if must_rest:
        keep = KeepFirstSteps(keep_first_steps)
        linearized.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, keep)
    linearized.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, check_call)
    clock = LayerClock(artifact.header, identify(shapes)[1], report)
    linearized.set_attachments(CLOCK, clock)
    linearized.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, clock.sample)
    linearized.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, report.compare)
    for moment, action in (
        # ComfyUI would leave the model injected until another patcher of it is loaded.
        (CallbacksMP.ON_CLEANUP, _eject_all),
        # A clone inherits its parent's mark of being injected, and would eject on its way out.
        (CallbacksMP.ON_CLONE, _prepare_clone),
        # Injections are undone in the order they were done in, so one may put ours back.
        (CallbacksMP.ON_EJECT_MODEL, eject),
    ):
        linearized.add_callback_with_key(moment, KEY, action)
    linearized.set_attachments(KEY, report)
    linearized.patches_uuid = uuid.uuid4()
    return linearized


def untouched(model: Any) -> nn.Module:
    """Return the diffusion model of a ModelPatcher that is not linearized yet.

    Raises ArtifactError for any other MODEL.
    """
    if model.get_attachment(KEY) is not None:
        raise ArtifactError(
            "this model is linearized already: connect the model from before the first LinVideo "
            "Linearize"
        )
    diffusion_model = getattr(model.model, "diffusion_model", None)
    if diffusion_model is None:
        raise ArtifactError("this is no diffusion model: connect a video model's MODEL output")
    if are_blocks_compiled(diffusion_model):
        # By another clone: while it is loaded, their weights have other names.
        comfy.model_management.unload_all_models()
    return diffusion_model


def _eject_all(patcher: Any) -> None:
    patcher.eject_model()


def _prepare_clone(_: Any, clone: Any) -> None:
    clone.is_injected = False
    if clone.is_dynamic():
        return
    # ComfyUI's compile node asks for weights that lie where they are; it does not ask our parts.
    parts = clone.get_additional_models_with_key(KEY)
    static = [part.clone(disable_dynamic=True) if part.is_dynamic() else part for part in parts]
    clone.set_additional_models(KEY, static)


class Report:
    """What stands under the node that linearized a MODEL; attached to it, for later nodes.

    header: of the applied file; times: what layers took, in words, once that was measured. What the
    MODEL is sampled with is found later, while other nodes run; a graph may sample it several
    times, and all that was found in one run of it is shown.
    """

    def __init__(
        self,
        header: ArtifactHeader,
        match: WeightsMatch,
        strength: float,
        keep_first_steps: int,
        node_id: str | None,
    ) -> None:
        """match: of the weights; the others are `linearize`'s own."""
        self.header = header
        self.times: Sequence[str] = ()
        self._lines = [f"{title(header)}, strength {strength:g}", str(match)]
        if keep_first_steps:
            self._lines.append(
                f"the first {keep_first_steps} steps of each sampling run the model as it came in, "
                "as slow as it was"
            )
        self._keep_first_steps = keep_first_steps
        self._node_id = node_id
        self._prompt_id: str | None = None
        self._sampled: dict[str, None] = {}

    def add_kernel(self, device: torch.device, head_dim: int, dtype: torch.dtype) -> None:
        """Say why fused kernels will not compute a linear layer; a CPU has none."""
        reason, kind = why_plain(self.header, device, head_dim, dtype), self.header.form.kind
        if reason and device.type != "cpu":
            self._lines.append(f"plain PyTorch computes the {kind} layers, more slowly: {reason}")

    @property
    def text(self) -> str:
        """What the node says now, a line each."""
        # Sentences, because ComfyUI's newer design shows the lines as one.
        lines = [*self._lines, *self.times, *self._sampled]
        return "\n".join(f"{line[:1].upper()}{line[1:]}." for line in lines)

    def show(self) -> None:
        """Show what the node says."""
        show_words(self.text, self._node_id)

    def add_warning(self, line: str) -> None:
        """Show and log what was found while a MODEL is sampled."""
        logger.warning("LinVideo: %s", line)
        self._sampled.pop(_AS_MADE, None)
        self._sampled[f"sampled: {line}"] = None
        self.show()

    def compare(
        self,
        executor: Any,
        noise: Any,
        latent_image: Any,
        sampler: Any,
        sigmas: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Show how a sampling differs from how the file wants to be used, then sample.

        ComfyUI's wrapper around every sampling of a model.
        """
        shape = (kwargs.get("latent_shapes") or [noise.shape])[0]
        levels = tuple(sigmas.float().tolist())
        found = _read_sampling(executor.class_obj, tuple(shape), sampler, self.header.family)
        differences = find_differences(self.header, found, levels)
        if self._keep_first_steps >= len(levels) - 1:
            differences.append("every step as the model came in: lower keep_first_steps")
        self._add_sampling(differences)
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

    def _add_sampling(self, differences: Sequence[str]) -> None:
        context = get_executing_context()
        prompt_id = None if context is None else context.prompt_id
        if prompt_id != self._prompt_id or prompt_id is None:
            self._prompt_id, self._sampled = prompt_id, {}
        found = dict.fromkeys(f"sampled: {each}" for each in differences)
        for line in found:
            _log_once(line)
        self._sampled.pop(_AS_MADE, None)
        self._sampled |= found
        if self.header.usage.said and not self._sampled:
            self._sampled[_AS_MADE] = None
        self.show()


def show_words(text: str, node_id: str | None) -> None:
    """Show lines under a node, in place of those before; nothing where nothing shows them."""
    # Looked up, not imported: ComfyUI's models also run, and are measured, without its server.
    module = sys.modules.get("server")
    server = getattr(getattr(module, "PromptServer", None), "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id, server.client_id)


@functools.cache
def _log_once(line: str) -> None:
    logger.info("LinVideo: %s", line)


def _read_sampling(guider: Any, shape: tuple[int, ...], sampler: Any, family_name: str) -> Usage:
    """Return how a guider is about to sample latents; what cannot be found out is left out.

    shape: [B, C, F, H, W], which a family may measure in its own way.
    """
    model = guider.model_patcher
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
    found = {
        "guidance_scale": _find_guidance(guider),
        "shift": getattr(model.get_model_object("model_sampling"), "shift", None),
        "sampler": name.removeprefix(_SAMPLE) if name.startswith(_SAMPLE) else None,
    }
    if len(shape) == 5:
        size = host_family(family_name).video.measure(shape[1:])
        size = size or pixels_of(model.model.latent_format, shape[2:])
        found |= zip(("num_frames", "height", "width"), size, strict=True)
    try:
        return Usage(**found)
    except ArtifactError:
        # Numbers that no file can have, such as a guidance that is not finite.
        return Usage()


def _find_guidance(guider: Any) -> float | None:
    """Return the cfg of a guider that computes guidance as ComfyUI's own does."""
    own, kind = comfy.samplers.CFGGuider, type(guider)
    if kind.predict_noise is not own.predict_noise or kind.set_cfg is not own.set_cfg:
        return None
    has_negative = guider.original_conds.get("negative") is not None
    return float(guider.cfg) if has_negative else 1.0
