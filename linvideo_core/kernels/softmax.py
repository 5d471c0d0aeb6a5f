"""Softmax attention by a kernel of PyTorch that is asked for by name."""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
"""Name -> PyTorch's kernel; by default PyTorch chooses one."""

# How PyTorch says that the one kernel it may use cannot compute these tensors.
_REFUSALS = ("No available kernel", "No viable backend")


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, kernel: str = "default") -> Tensor:
    """Attend over all keys, scaled by 1/sqrt(D); query, key, value and the result are [B, L, N, D].

    kernel: of KERNELS.

    Raises ValueError, in one sentence, where that kernel cannot compute these tensors.
    """
    by_head = (x.transpose(1, 2) for x in (query, key, value))
    if KERNELS[kernel] is None:
        return F.scaled_dot_product_attention(*by_head).transpose(1, 2)
    try:
        with sdpa_kernel(KERNELS[kernel]):
            return F.scaled_dot_product_attention(*by_head).transpose(1, 2)
    except RuntimeError as error:
        if not str(error).startswith(_REFUSALS):
            raise
        dtype = str(query.dtype).removeprefix("torch.")
        raise ValueError(
            f"PyTorch's {kernel} attention cannot compute {dtype} with head dim "
            f"{query.shape[-1]} on {query.device}; choose another attention backend"
        ) from error
