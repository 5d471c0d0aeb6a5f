"""How a file's weight changes reach a MODEL: merged by ComfyUI, or computed beside the layers.

A change is merged into weights of 16 or 32 bits, together with the user's LoRAs. Merged into a
quantised weight it would round that weight a second time: on the embedded model in fp8 the latents
are then 14 % off, the change being 77 %, against 3e-6 beside the layer, where low-rank changes are
therefore computed. Whole weights have no such place and are merged, which is said in the log.
"""

import logging
from typing import Any

import torch
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor, nn

from ...linvideo_core.artifact import Artifact, ArtifactError
from .lora_bypass import Bypassed

logger = logging.getLogger(__name__)

_PREFIX = "diffusion_model."
_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def add_weight_changes(
    linearized: Any, artifact: Artifact, strength: float, *, must_rest: bool
) -> Bypassed | None:
    """Hand to ComfyUI every change that it can merge, and return the others.

    linearized: a clone of the user's ModelPatcher; its weights are not touched.
    must_rest: merge nothing, so that the changes can be taken out of single steps.

    Raises ArtifactError when the model lacks a weight, or when whole weights must rest.
    """
    patches: dict[str, Any] = {}
    bypassed: dict[str, tuple[Tensor, Tensor]] = {}
    if artifact.deltas:
        _check_full_changes(linearized, artifact, must_rest=must_rest)
    for name, delta in artifact.deltas.items():
        if _is_patched_by_host(linearized.model.diffusion_model, name):
            patches[_PREFIX + name] = ("diff", (delta,))
        else:
            _replace_parameter(linearized, name, strength * delta.float())
    for name, (down, up) in artifact.low_rank.items():
        if must_rest or not _is_kept_plain(linearized, f"{name}.weight"):
            bypassed[name] = (down, up)
            continue
        # up, down, alpha (none: the rank), Tucker's middle factor, DoRA's scale, a new shape
        weights = (up, down, None, None, None, None)
        patches[f"{_PREFIX}{name}.weight"] = LoRAAdapter(set(), weights)
    applied = set(linearized.add_patches(patches, strength))
    if missing := sorted(patches.keys() - applied):
        raise _missing(missing[0])
    return Bypassed(low_rank=bypassed, strength=strength) if bypassed else None


def check_merged(patcher: Any) -> None:
    """Raise RuntimeError when ComfyUI has lost weight changes of a loaded ModelPatcher.

    A block compiled in place (an object patch) gives its weights other names, under which ComfyUI
    finds no changes, ours or a LoRA's, and says nothing.
    """
    if are_blocks_compiled(patcher.model):
        names = {name for name, _ in patcher.model.named_parameters()}
        if any(key not in names and not _is_merged(patcher, key) for key in patcher.patches):
            raise RuntimeError(
                "the node that compiles this model's blocks makes ComfyUI lose LinVideo's weight "
                "changes and all LoRAs: use ComfyUI's TorchCompileModel node instead"
            )


def are_blocks_compiled(model: nn.Module) -> bool:
    """Say whether a live model holds modules that another node has compiled in place."""
    # By name: the class behind it takes a second to import.
    return any("_orig_mod" in module._modules for module in model.modules())


def _is_merged(patcher: Any, key: str) -> bool:
    owner, _, parameter = key.rpartition(".")
    layer = patcher.model.get_submodule(owner)
    # Merged into the loaded weight, or by a function that runs when the weight comes to a call.
    functions = (f"{parameter}_function", f"{parameter}_lowvram_function")
    return key in patcher.backup or any(getattr(layer, name, None) for name in functions)


def is_plain(weight: Tensor) -> bool:
    """Say whether a weight is kept as numbers of 16 or 32 bits, not quantised in any way."""
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype in _PLAIN_DTYPES


def _find_weight(linearized: Any, name: str) -> Tensor:
    try:
        return linearized.get_model_object(_PREFIX + name)
    except AttributeError:
        raise _missing(_PREFIX + name) from None


def _is_kept_plain(linearized: Any, name: str) -> bool:
    """Say whether ComfyUI will keep a weight plain: until it is used, it may be as in its file."""
    weight = _find_weight(linearized, name)
    return is_plain(weight) and _find_kept_dtype(linearized, name, weight) in _PLAIN_DTYPES


def _find_kept_dtype(linearized: Any, name: str, weight: Tensor) -> torch.dtype:
    owner, _, parameter = (_PREFIX + name).rpartition(".")
    layer = linearized.get_model_object(owner)
    return getattr(layer, f"{parameter}_comfy_model_dtype", None) or weight.dtype


def _missing(key: str) -> ArtifactError:
    return ArtifactError(
        f"this model has no weight {key!a} that the file changes: load the model with ComfyUI's "
        "own loader"
    )


def _check_full_changes(linearized: Any, artifact: Artifact, *, must_rest: bool) -> None:
    if must_rest:
        raise ArtifactError(
            "this file changes whole weights, which cannot be taken out of single steps: set "
            "keep_first_steps to 0, or use a file that was trained with LoRA"
        )
    if not all(_is_kept_plain(linearized, name) for name in artifact.deltas):
        logger.warning(
            "LinVideo: this file changes whole weights and the model's are quantised, so they are "
            "rounded once more; a file trained with LoRA, or a bf16 model, keeps them exact"
        )


def _is_patched_by_host(diffusion_model: nn.Module, name: str) -> bool:
    """Say whether ComfyUI merges patches of a parameter: only weights and biases of leaf modules.

    It takes patches of others (Wan's modulations) and, without a word, never merges them.
    """
    owner, _, parameter = name.rpartition(".")
    is_leaf = not any(diffusion_model.get_submodule(owner).children())
    return is_leaf and parameter in ("weight", "bias")


def _replace_parameter(linearized: Any, name: str, change: Tensor) -> None:
    """Put a changed copy in a parameter's place for as long as the clone is loaded."""
    parameter = _find_weight(linearized, name)
    total = parameter.float() + change.to(parameter.device)
    dtype = torch.bfloat16
    if _is_kept_plain(linearized, name):
        dtype = _find_kept_dtype(linearized, name, parameter)
    replacement = nn.Parameter(total.to(dtype), requires_grad=False)
    linearized.add_object_patch(_PREFIX + name, replacement)
