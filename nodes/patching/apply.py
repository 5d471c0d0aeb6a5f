"""How a ComfyUI MODEL is linearized by an artifact and given back.

A clone carries everything: weight changes as ComfyUI's own patches, feature maps as a model of
their own that ComfyUI loads and offloads with it, and the hook that works while it samples. The
MODEL that came in stays as it was.
"""

import dataclasses
import logging
import uuid
from typing import Any

import comfy.model_management
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP
from torch import nn

from ...linvideo_core.artifact import Artifact, ArtifactError, ArtifactHeader, check
from ...linvideo_core.artifact.summary import title
from ...linvideo_core.models import attention_sites
from .additional_models import FeatureMaps, LowRankChanges, is_dynamic, make_patcher
from .families import host_family
from .injection import KEY, eject, inject
from .model_calls import KeepFirstSteps, check_call
from .report import CompareSampling, Report
from .weights import add_weight_changes, are_blocks_compiled, compare_base

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Linearized:
    """What was done to a MODEL, attached to it for later nodes.

    report: what its node says of it, such as whether it is the model that the file was made from.
    """

    header: ArtifactHeader
    strength: float
    keep_first_steps: int
    report: Report


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
    sites = check(artifact, attention_sites.shapes_of(diffusion_model))
    family = host_family(artifact.header.family)
    for site in sites:
        family.check(diffusion_model.get_submodule(site.name))
    report = Report(_describe(artifact.header, model, strength, keep_first_steps), node_id)

    linearized = model.clone()
    must_rest = keep_first_steps > 0
    bypassed = add_weight_changes(linearized, artifact, strength, must_rest=must_rest)
    devices = (model.load_device, model.offload_device)
    settings = {"disable_dynamic": not _may_be_dynamic(model)}
    patchers = [make_patcher(FeatureMaps, artifact, *devices, **settings)]
    if bypassed is not None:
        patchers.append(make_patcher(LowRankChanges, bypassed, *devices, **settings))
    linearized.set_additional_models(KEY, patchers)
    linearized.set_injections(KEY, [PatcherInjection(inject, eject)])
    if must_rest:
        keep = KeepFirstSteps(KEY, keep_first_steps)
        linearized.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, keep)
    linearized.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, check_call)
    compare = CompareSampling(artifact.header, keep_first_steps, report)
    linearized.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, compare)
    for moment, action in (
        # ComfyUI would leave the model injected until another patcher of it is loaded.
        (CallbacksMP.ON_CLEANUP, _eject_all),
        # A clone inherits its parent's mark of being injected, and would eject on its way out.
        (CallbacksMP.ON_CLONE, _prepare_clone),
        # Injections are undone in the order they were done in, so one may put ours back.
        (CallbacksMP.ON_EJECT_MODEL, eject),
    ):
        linearized.add_callback_with_key(moment, KEY, action)
    done = Linearized(artifact.header, strength, keep_first_steps, report)
    linearized.set_attachments(KEY, done)
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


def _describe(
    header: ArtifactHeader, model: Any, strength: float, keep_first_steps: int
) -> list[str]:
    """Return what the node says before anything is sampled, a line each."""
    match = compare_base(header, model)
    if match.kind == "other":
        logger.warning("LinVideo: %s", match)
    lines = [f"{title(header)}, strength {strength:g}", str(match)]
    if keep_first_steps:
        lines.append(
            f"the first {keep_first_steps} steps of each sampling run the model as it came in, as "
            "slow as it was"
        )
    return lines


def _eject_all(patcher: Any) -> None:
    patcher.eject_model()


def _prepare_clone(_: Any, clone: Any) -> None:
    clone.is_injected = False
    if _may_be_dynamic(clone):
        return
    # ComfyUI's compile node asks for weights that lie where they are; it does not ask our parts.
    parts = clone.get_additional_models_with_key(KEY)
    static = [part.clone(disable_dynamic=True) if is_dynamic(part) else part for part in parts]
    clone.set_additional_models(KEY, static)


def _may_be_dynamic(patcher: Any) -> bool:
    """Say whether weights beside this model's may come to video memory when they are used."""
    return not hasattr(patcher, "is_dynamic") or patcher.is_dynamic()
