"""How many operations a denoiser call takes, and how many the card could make in that time.

Matrix products alone are counted, two operations for each multiply and add, as is the custom for a
share of the peak ("MFU"): norms, rotations and activations are work that it does not see.
"""

import math

from .sizes import Size

# Dense bf16 with fp32 accumulation, TFLOP/s, by a part of the device's name; longer names first.
_PEAKS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H200": 989.4,
    "GH200": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def find_peak(device_name: str) -> float | None:
    """Return a card's peak of dense bf16 operations a second; none for an unknown device."""
    for part in sorted(_PEAKS, key=len, reverse=True):
        if part in device_name.split() or (" " in part and part in device_name):
            return 1e12 * _PEAKS[part]
    return None


def count_flops(size: Size, num_linear: int) -> int:
    """Return the operations of one call at batch 1, `num_linear` layers with M = D features."""
    config, L, S = size.config, size.tokens, size.prompt_tokens
    softmax = (config.num_layers - num_linear) * softmax_flops(L, config.dim)
    linear = num_linear * linear_flops(L, config.dim, config.dim // config.num_heads)
    block = _projections(L, S, config.dim) + 4 * L * S * config.dim
    block += 2 * 2 * L * config.dim * config.ffn_dim
    return softmax + linear + config.num_layers * block + _ends(size)


def softmax_flops(L: int, dim: int) -> int:
    """Return the operations of softmax attention: q k^T and its product with v."""
    return 2 * 2 * L * L * dim


def linear_flops(L: int, dim: int, features: int) -> int:
    """Return the operations of linear attention: two maps [D, M/2], sums over keys, outputs."""
    maps = 2 * 2 * L * dim * features // 2
    return maps + 2 * 2 * L * dim * features


def _projections(L: int, S: int, dim: int) -> int:
    """Return those of q, k, v, o of self-attention, and of cross-attention to S prompt tokens."""
    return 4 * 2 * L * dim * dim + 2 * 2 * L * dim * dim + 2 * 2 * S * dim * dim


def _ends(size: Size) -> int:
    """Return those of what stands before and behind the blocks."""
    config, L, S = size.config, size.tokens, size.prompt_tokens
    patch = math.prod(config.patch_size)
    patches = 2 * L * patch * config.dim * (config.in_channels + config.out_channels)
    prompt = 2 * S * config.dim * (config.text_dim + config.dim)
    time = 2 * config.dim * (config.freq_dim + 7 * config.dim)
    return patches + prompt + time
