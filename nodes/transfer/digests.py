"""Digests that tell whether two runs learn from the same model and the same conditions."""

from typing import Any

import torch
from torch import Tensor


def add(digest: Any, value: Any) -> None:
    """Take a value into a hashlib digest: tensors, numbers, text, adapters, lists and dicts."""
    if torch.is_tensor(value):
        digest.update(str((value.dtype, tuple(value.shape))).encode())
        if not value.is_meta:
            digest.update(_plain(value).cpu().contiguous().numpy().tobytes())
    elif isinstance(value, list | tuple):
        for part in value:
            add(digest, part)
    elif isinstance(value, dict):
        for name in sorted(value):
            add(digest, name)
            add(digest, value[name])
    elif hasattr(value, "weights"):
        add(digest, value.weights)
    elif value is None or isinstance(value, str | int | float):
        digest.update(repr(value).encode())


def _plain(tensor: Tensor) -> Tensor:
    """Return what a tensor holds as numbers that numpy knows: quantised ones are made wide."""
    tensor = tensor.detach()
    if hasattr(tensor, "_layout_cls"):
        tensor = tensor.dequantize()
    tensor = tensor.as_subclass(Tensor)
    return tensor.float() if tensor.is_floating_point() else tensor
