"""How a ComfyUI MODEL is linearized by an artifact and given back.

A clone carries everything: weight changes as ComfyUI's own patches, feature maps as a model of
their own that ComfyUI loads and offloads with it, and the hook that works while it samples. The
MODEL that came in stays as it was.
"""

import dataclasses
import uuid
from typing import Any

import comfy.model_patcher
import comfy.ops
import torch
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor, nn

from ..linvideo_core import adapters
from ..linvideo_core.artifact import (
    Artifact,
    ArtifactError,
    ArtifactHeader,
    check,
    warn_of_other_weights,
)
from .families import host_family
from .feature_maps import FeatureMaps
from .hook import KEY, eject, inject
from .watch import watch_call

_PREFIX = "diffusion_model."


@dataclasses.dataclass(frozen=True)
class Linearized:
    """What was done to a MODEL, attached to it for later nodes."""

    header: ArtifactHeader
    strength: float


def linearize(model: Any, artifact: Artifact, *, strength: float = 1.0) -> Any:
    """Return a clone of a ModelPatcher whose chosen layers are linear.

    strength: scales the weight changes; the feature maps are as trained at any strength.

    Raises ArtifactError, in one sentence, when the artifact does not fit the model or one is
    applied already.
    """
    if model.get_attachment(KEY) is not None:
        raise ArtifactError(
            "this model is linearized already: connect the model from before the first LinVideo "
            "Linearize"
        )
    diffusion_model = getattr(model.model, "diffusion_model", None)
    if diffusion_model is None:
        raise ArtifactError("this is no diffusion model: connect a video model's MODEL output")
    sites = check(artifact, adapters.shapes_of(diffusion_model))
    family = host_family(artifact.header.family)
    for site in sites:
        family.check(diffusion_model.get_submodule(site.name))
    _warn_of_other_weights(artifact, model, diffusion_model)

    linearized = model.clone()
    _add_weight_changes(linearized, artifact, strength)
    maps = make_maps_patcher(artifact, model.load_device, model.offload_device)
    linearized.set_additional_models(KEY, [maps])
    linearized.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, watch_call)
    linearized.set_injections(KEY, [PatcherInjection(inject, eject)])
    for moment, action in (
        # ComfyUI would leave the model injected until another patcher of it is loaded.
        (CallbacksMP.ON_CLEANUP, _eject_all),
        # A clone is told that it is injected if its parent is, and would eject it on its way out.
        (CallbacksMP.ON_CLONE, _mark_ejected),
        # Injections are undone in the order they were done in, so one may put ours back.
        (CallbacksMP.ON_EJECT_MODEL, eject),
    ):
        linearized.add_callback_with_key(moment, KEY, action)
    linearized.set_attachments(KEY, Linearized(artifact.header, strength))
    linearized.patches_uuid = uuid.uuid4()
    return linearized


def make_maps_patcher(
    artifact: Artifact,
    load_device: torch.device,
    offload_device: torch.device,
    *,
    disable_dynamic: bool = False,
) -> Any:
    """Return an artifact's feature maps in a ModelPatcher of their own."""
    patcher_class = comfy.model_patcher.ModelPatcher
    if not disable_dynamic:
        patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", patcher_class)
    maps = FeatureMaps(artifact, operations=comfy.ops.manual_cast, device=offload_device)
    maps.eval()
    patcher = patcher_class(maps, load_device=load_device, offload_device=offload_device)
    is_dynamic = getattr(patcher, "is_dynamic", None)
    maps.load(artifact, assign=bool(is_dynamic and is_dynamic()))
    # ComfyUI makes a patcher anew for another GPU, or to hold ordinary weights.
    patcher.cached_patcher_init = (make_maps_patcher, (artifact, load_device, offload_device))
    return patcher


def _warn_of_other_weights(artifact: Artifact, model: Any, diffusion_model: nn.Module) -> None:
    """Log when the weights are not those that the artifact was trained from."""
    _, sites = adapters.identify(adapters.shapes_of(diffusion_model))
    ends = [diffusion_model.get_submodule(sites[i].name) for i in (0, -1)]
    weights = [parameter for end in ends for parameter in end.parameters()]
    is_plain = all(type(w) is nn.Parameter and w.device.type != "meta" for w in weights)
    # With a backup there, weight changes are merged in; quantised weights have another digest.
    if model.backup or not is_plain:
        return
    warn_of_other_weights(artifact, diffusion_model, sites)


def _add_weight_changes(linearized: Any, artifact: Artifact, strength: float) -> None:
    """Hand every weight change to ComfyUI, which merges it wherever the weight then is."""
    patches: dict[str, Any] = {}
    for name, delta in artifact.deltas.items():
        if _is_patched_by_host(linearized.model.diffusion_model, name):
            patches[_PREFIX + name] = ("diff", (delta,))
        else:
            _replace_parameter(linearized, _PREFIX + name, strength * delta.float())
    for name, (down, up) in artifact.low_rank.items():
        # up, down, alpha (none: the rank), Tucker's middle factor, DoRA's scale, a new shape
        weights = (up, down, None, None, None, None)
        patches[f"{_PREFIX}{name}.weight"] = LoRAAdapter(set(), weights)
    applied = set(linearized.add_patches(patches, strength))
    if missing := sorted(patches.keys() - applied):
        raise ArtifactError(
            f"this model has no weight {missing[0]!a} that the file changes: load the model with "
            "ComfyUI's own loader"
        )


def _is_patched_by_host(diffusion_model: nn.Module, name: str) -> bool:
    """Say whether ComfyUI merges patches of a parameter: only weights and biases of leaf modules.

    It takes patches of others (Wan's modulations) and, without a word, never merges them.
    """
    owner, _, parameter = name.rpartition(".")
    is_leaf = not any(diffusion_model.get_submodule(owner).children())
    return is_leaf and parameter in ("weight", "bias")


def _replace_parameter(linearized: Any, key: str, change: Tensor) -> None:
    """Put a changed copy in a parameter's place for as long as the clone is loaded."""
    parameter = linearized.get_model_object(key)
    total = parameter.float() + change.to(parameter.device)
    replacement = nn.Parameter(total.to(parameter.dtype), requires_grad=False)
    linearized.add_object_patch(key, replacement)


def _eject_all(patcher: Any) -> None:
    patcher.eject_model()


def _mark_ejected(_: Any, clone: Any) -> None:
    clone.is_injected = False
