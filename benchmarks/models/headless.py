"""Our own Wan with random weights, some layers linear, and a softmax backend for the others."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from linvideo_core.flow import TIMESTEP_SCALE, bind_guided, make_sigmas, sample_euler
from linvideo_core.models.attention import LinearAttention
from linvideo_core.models.attention_sites import (
    AttentionSite,
    attention_at,
    compiled_blocks,
    install,
    shapes_of,
)
from linvideo_core.models.families import identify

from ..kernels.baselines import Contender, find_public, make_contenders
from .random_models import count_bytes, draw_inputs, make_random_maps, make_random_wan
from .sizes import GUIDANCE_SCALE, VIDEO_STEPS, Size

SIGMA = 0.7
"""Noise level of the call that is timed; all levels take as long."""

BACKENDS = {"fa2": "fa2", "cudnn": "cudnn", "default": "sdpa", "sage": "sage"}
"""Name of a softmax backend in the record -> in `benchmarks.kernels`."""

T = TypeVar("T")
Call = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where a model stands, in which dtype, and from which seed its weights come."""

    device: torch.device
    dtype: torch.dtype
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to compute a model.

    num_linear: linear layers; kept: the softmax backend of all others.
    is_compiled: whether the blocks are compiled.
    """

    num_linear: int
    kept: str
    is_compiled: bool = False


def find_softmax(wanted: Sequence[str], device_type: str) -> tuple[dict[str, Contender], list[str]]:
    """Return the softmax backends that can be tried, and a sentence for what is absent.

    wanted: names of BACKENDS; on a CPU PyTorch has the default alone.
    """
    public, absent = find_public() if "sage" in wanted else ([], [])
    known = {contender.name: contender for contender in [*make_contenders(), *public]}
    found = {}
    for name in wanted:
        if device_type != "cuda" and name != "default":
            absent.append(f"{name} is not compared: it needs a CUDA device")
        elif BACKENDS[name] in known:
            found[name] = known[BACKENDS[name]]
    return found, [sentence for sentence in absent if not sentence.startswith("fla ")]


def plan_variants(softmax: Sequence[str], num_linear: int, *, compiled: bool) -> list[Variant]:
    """List what is measured: with each backend all layers softmax, then some of them linear.

    Pairs that are compared stand side by side, so that a card that grows warm burdens both.
    compiled: whether all of it is measured with compiled blocks, too.
    """
    return [
        Variant(num_linear=n, kept=kept, is_compiled=is_compiled)
        for is_compiled in ((False, True) if compiled else (False,))
        for kept in softmax
        for n in (0, num_linear)
    ]


class BackendAttention(nn.Module):
    """Softmax attention by one of the kernels' contenders."""

    def __init__(self, contender: Contender) -> None:
        super().__init__()
        self._attend = contender.attend

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend over all keys; query, key, value and the result are [B, L, N, D]."""
        return self._attend(query, key, value)


class RandomTeacher:
    """Our own Wan with random weights."""

    def __init__(self, size: Size, softmax: Mapping[str, Contender], setting: Setting) -> None:
        self.size, self._softmax = size, softmax
        self.model = make_random_wan(size, setting.device, setting.dtype, setting.seed)
        _, self._sites = identify(shapes_of(self.model))
        self._linear = {
            site.layer: _make_linear(site, setting)
            for site in self._sites
            if site.layer in size.layers
        }
        self._inputs = draw_inputs(size, setting.device, setting.seed)

    def with_call(self, variant: Variant, use: Callable[[Call], T]) -> T:
        """Hand a call [1, C, F, H, W] of the arranged model to `use`."""
        with self._arranged(variant):
            return use(self.call_model)

    def call_model(self) -> Tensor:
        """Return the velocity of the model as it stands."""
        latents, prompt, _ = self._inputs
        timesteps = torch.full((1,), TIMESTEP_SCALE * SIGMA, device=latents.device)
        return self.model(latents, timesteps, prompt)

    def with_video(self, variant: Variant, use: Callable[[Call], T]) -> T:
        """Hand the sampling of a video to `use`: both branches in one call, as in a transfer."""
        latents, prompt, negative = self._inputs
        velocity = bind_guided(self.model, prompt, negative, GUIDANCE_SCALE)
        sigmas = make_sigmas(VIDEO_STEPS, self.size.shift)
        with self._arranged(variant):
            return use(lambda: sample_euler(velocity, latents, sigmas))

    def weight_bytes(self, variant: Variant) -> int:
        """Return the bytes of the weights, feature maps included where layers are linear."""
        maps = self._linear.values() if variant.num_linear else ()
        return count_bytes([self.model, *maps])

    @contextlib.contextmanager
    def _arranged(self, variant: Variant) -> Iterator[None]:
        def make(site: AttentionSite) -> nn.Module:
            if variant.num_linear and site.layer in self._linear:
                return self._linear[site.layer]
            return BackendAttention(self._softmax[variant.kept])

        # What stands there between variants must be plain: installing adds nothing to the weights.
        plain = {site.layer: attention_at(self.model, site) for site in self._sites}
        install(self.model, self._sites, make)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.inference_mode())
                if variant.is_compiled:
                    torch._dynamo.reset()
                    stack.enter_context(compiled_blocks([self.model], self._sites))
                yield
        finally:
            install(self.model, self._sites, lambda site: plain[site.layer])


def _make_linear(site: AttentionSite, setting: Setting) -> LinearAttention:
    with torch.device("meta"):
        linear = LinearAttention(1, 2, 2)
    shape = (site.layer, site.num_heads, site.head_dim)
    query_map, key_map = make_random_maps(*shape, setting.device, setting.seed)
    linear.query_map, linear.key_map = (
        nn.Parameter(x, requires_grad=False) for x in (query_map, key_map)
    )
    return linear
