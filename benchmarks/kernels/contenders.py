"""Who is compared: the fused kernels, the definition eager and compiled, softmax, public packages.

All take query, key, value [B, L, N, D] and both maps [N, D, M/2], which softmax passes over, and
return [B, L, N, D]. A module goes from the projected q, k, v, before qk-norm and rotation, to the
output projection's input.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from linvideo_core.kernels import linear_attention, norm_rotary, reference
from linvideo_core.kernels.softmax import (
    DENSITY,
    check_density,
    softmax_attention,
    sparse_attention,
)
from linvideo_core.models.wan import rotary_embedding
from linvideo_core.run.errors import SettingError

Attend = Callable[..., Tensor]

HEAD_DIM = 128
RATIOS = (1, 2)
KITCHEN = "module, comfy-kitchen RoPE"

# Largest error of value or gradient that is timed, for tensors in bf16.
TOLERANCE = 1e-2

# Name in the tables -> of the kernel; PyTorch's own FlashAttention is the second.
_SOFTMAX = {"sdpa": "default", "fa2": "flash", "cudnn": "cudnn"}
_EPS = 1e-6

MODULES = {"module, eager norm and RoPE": "reference", "module": "triton"}
"""Pass of the record -> backend of norm and rotation; the first is what rivals have too."""


class Shape(NamedTuple):
    """Tokens and heads of a video model's self-attention."""

    tokens: int
    heads: int

    def __str__(self) -> str:
        return f"{self.tokens} x {self.heads}"


class Setting(NamedTuple):
    """Where everything is measured, and for how many seconds each call is repeated."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    seconds: float = 0.4


def on_gpu(seconds: float) -> Setting:
    """Return the setting of this machine's GPU; raise SettingError where there is none."""
    if not torch.cuda.is_available():
        raise SettingError("no GPU was found, and kernels of one are timed: run it on a GPU")
    return Setting(torch.device("cuda"), seconds=seconds)


def make_inputs(shape: Shape, ratio: int, setting: Setting) -> list[Tensor]:
    """Return random query, key, value [1, L, N, D] and maps [N, D, M/2], projections near 1.

    ratio: M / D; 0 where features do not matter.
    """
    generator = torch.Generator(setting.device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=setting.dtype, device=setting.device)

    tokens = [normal(1, shape.tokens, shape.heads, HEAD_DIM) for _ in range(3)]
    half = max(ratio, 1) * HEAD_DIM // 2
    return [*tokens, *(normal(shape.heads, HEAD_DIM, half) * HEAD_DIM**-0.5 for _ in range(2))]


@dataclasses.dataclass(frozen=True)
class Contender:
    """An implementation; `kind` names its definition: linear, softmax, or causal.

    definition: another one, where that of its kind is not what it computes.
    """

    name: str
    kind: str
    attend: Attend
    is_differentiable: bool = True
    tolerance: float = TOLERANCE
    definition: Attend | None = None

    @property
    def has_maps(self) -> bool:
        """Whether the feature maps matter to it."""
        return self.kind != "softmax"


def make_contenders(backend: str = "triton") -> list[Contender]:
    """Return what PyTorch and we have, the fused kernels first.

    backend: of the door, for the contender "fused".
    """
    softmax = [
        Contender(name, "softmax", functools.partial(_attend_softmax, kernel))
        for name, kernel in _SOFTMAX.items()
    ]
    return [
        Contender("fused", "linear", functools.partial(linear_attention, backend=backend)),
        Contender("eager", "linear", reference.linear_attention),
        Contender("compile", "linear", _make_compiled(reference.linear_attention)),
        # Forward alone: every further compilation takes longer than all measurements of its shape.
        Contender(
            "compile_half", "linear", _make_compiled(_attend_in_own_dtype), is_differentiable=False
        ),
        *softmax,
    ]


def find_public() -> tuple[list[Contender], list[str]]:
    """Return the public packages that can be loaded, and a sentence for each that cannot."""
    found, absent = [], []
    for name, make in _PUBLIC.items():
        try:
            found.append(make())
        except ModuleNotFoundError as error:
            absent.append(f"{name} is not compared: {error}")
        except Exception as error:
            # Installed, but not for this PyTorch, Triton or card: it may fail in any way.
            absent.append(f"{name} is not compared: it cannot be loaded, {error!r}")
    return found, absent


def _attend_in_own_dtype(
    query: Tensor, key: Tensor, value: Tensor, query_map: Tensor, key_map: Tensor
) -> Tensor:
    """Return linear attention whose matrix products are made in value's dtype, not in fp32."""

    def map_features(x: Tensor, feature_map: Tensor) -> Tensor:
        projected = torch.einsum("blnd,ndm->blnm", x, feature_map.to(x.dtype)).float()
        features = [projected.softmax(dim=-1), (-projected).softmax(dim=-1)]
        return torch.cat(features, dim=-1).to(value.dtype)

    query, key = map_features(query, query_map), map_features(key, key_map)
    # As in the definition: averages cannot overflow.
    state = torch.einsum("blnm,blnd->bnmd", key, value / key.shape[1])
    normaliser = key.float().mean(dim=1)
    numerator = torch.einsum("blnm,bnmd->blnd", query, state)
    denominator = torch.einsum("blnm,bnm->bln", query.float(), normaliser)
    return (numerator / denominator.unsqueeze(-1)).to(value.dtype)


def _make_compiled(attend_eagerly: Attend) -> Attend:
    compiled = torch.compile(attend_eagerly, dynamic=False)

    def attend(*inputs: Tensor) -> Tensor:
        # A backward pass that is repeated must not write over what the forward pass kept for it.
        with torch._functorch.config.patch(donated_buffer=False):
            return compiled(*inputs)

    return attend


def _attend_softmax(kernel: str, query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> Tensor:
    return softmax_attention(query, key, value, kernel)


def _make_fla() -> Contender:
    """Return flash-linear-attention's chunked kernel: causal, not normalised, Hedgehog in PyTorch.

    It has no kernel that is not causal.
    """
    from fla.ops.linear_attn import chunk_linear_attn

    def attend(
        query: Tensor, key: Tensor, value: Tensor, query_map: Tensor, key_map: Tensor
    ) -> Tensor:
        features = (reference.hedgehog(query, query_map), reference.hedgehog(key, key_map))
        query, key = (x.to(value.dtype) for x in features)
        return chunk_linear_attn(query, key, value, scale=1.0, normalize=False)[0]

    return Contender("fla", "causal", attend, is_differentiable=False)


def _make_sage() -> Contender:
    """Return SageAttention's softmax on 8-bit tensor cores."""
    from sageattention import sageattn

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> Tensor:
        return sageattn(query, key, value, tensor_layout="NHD", is_causal=False)

    # It rounds queries, keys and weights to 8 bits.
    return Contender("sage", "softmax", attend, is_differentiable=False, tolerance=3e-2)


def make_sparse(density: float = DENSITY) -> Contender:
    """Return Sol-Attn's sparse softmax; density: see `sparse_attention`.

    Raises ValueError where it is none.
    """
    check_density(density)

    def attend(*tensors: Tensor, backend: str = "auto") -> Tensor:
        return sparse_attention(*tensors[:3], density, backend=backend)

    # It rounds to 8 bits, and may take another one of two blocks whose scores nearly tie.
    settings = {"is_differentiable": False, "tolerance": 0.1}
    define = functools.partial(attend, backend="reference")
    return Contender("sol-attn", "softmax", attend, **settings, definition=define)


_PUBLIC = {"fla": _make_fla, "sageattention": _make_sage}


def find_modules() -> tuple[list[str], list[str]]:
    """Return all modules that can be measured, and a sentence for what is absent."""
    try:
        import comfy_kitchen  # noqa: F401
    except ImportError as error:
        return list(MODULES), [f"ComfyUI's norm and rotation are not compared: {error}"]
    return [*MODULES, KITCHEN], []


def make_module(
    name: str, contender: Contender, inputs: Sequence[Tensor], setting: Setting
) -> Callable[[], Tensor]:
    """Return a call of a contender behind a module's norm and rotation; its result is [1, L, N D].

    inputs: see `make_inputs`; query and key are taken as they come from their projections.
    """
    _, tokens, heads, _ = inputs[0].shape
    weight = 1 + 0.1 * torch.randn(heads * HEAD_DIM, generator=torch.Generator().manual_seed(0))
    weight = weight.to(torch.bfloat16).to(setting.device, setting.dtype)
    rotary = rotary_embedding((tokens, 1, 1), HEAD_DIM, setting.device)
    if name == KITCHEN:
        from comfy_kitchen import apply_rope1

        cos, sin = rotary
        turn = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))[None, :, None]

        def rotate(x: Tensor) -> Tensor:
            # As ComfyUI does it for Wan: PyTorch's norm, then a kernel that rotates.
            normed = F.rms_norm(x, weight.shape, weight, _EPS)
            return apply_rope1(normed.unflatten(2, (heads, HEAD_DIM)), turn)
    else:
        settings = {"num_heads": heads, "eps": _EPS, "backend": MODULES[name]}
        rotate = functools.partial(norm_rotary, weight=weight, rotary=rotary, **settings)
    query, key = (x.flatten(2) for x in inputs[:2])
    attend = contender.attend
    return torch.no_grad()(lambda: attend(rotate(query), rotate(key), *inputs[2:]).flatten(2))
