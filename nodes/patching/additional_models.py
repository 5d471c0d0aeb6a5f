"""A file's tensors as a model beside the user's: ComfyUI loads, counts and offloads it as one."""

from typing import Any

import comfy.model_patcher
import comfy.ops
import torch
from torch import nn


def make_parts_patcher(
    kind: type[nn.Module],
    contents: Any,
    load_device: torch.device,
    offload_device: torch.device,
    *,
    disable_dynamic: bool = False,
) -> Any:
    """Return `kind(contents, operations=, device=)`, its tensors loaded, in a ModelPatcher."""
    patcher_class = comfy.model_patcher.ModelPatcher
    if not disable_dynamic:
        patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", patcher_class)
    parts = kind(contents, operations=comfy.ops.manual_cast, device=offload_device)
    parts.eval()
    patcher = patcher_class(parts, load_device=load_device, offload_device=offload_device)
    is_dynamic = getattr(patcher, "is_dynamic", None)
    parts.load(contents, assign=bool(is_dynamic and is_dynamic()))
    # ComfyUI makes a patcher anew for another GPU, or to hold ordinary weights.
    arguments = (kind, contents, load_device, offload_device)
    patcher.cached_patcher_init = (make_parts_patcher, arguments)
    return patcher
