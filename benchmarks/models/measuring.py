"""Our own Wan with random weights: variants checked against plain ones, timed, turned into rows."""

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from linvideo_core.flow import TIMESTEP_SCALE, bind_guided, make_sigmas, sample_euler
from linvideo_core.kernels.tiles import TokenGrid
from linvideo_core.models.attention_sites import (
    AttentionSite,
    compiled_blocks,
    install,
    restore,
    shapes_of,
)
from linvideo_core.models.config import LinearForm
from linvideo_core.models.families import identify
from linvideo_core.run import memory

from ..kernels import hybrid
from ..kernels.agreement import check_contenders, first_line, relative_error
from ..kernels.contenders import Attend, Contender, Setting, find_public, make_contenders
from ..kernels.timing import extra_mb, median_of_runs, time_once
from .random_models import count_bytes, draw_inputs, make_random_linear, make_random_wan
from .sizes import GUIDANCE_SCALE, SIZES, VIDEO_STEPS, Size, count_flops, find_peak

METHOD = "median of calls, each until the device is done with it; first call excluded"
SAMPLED, COMPUTED = "sampled", "computed"
BACKENDS = {"fa2": "fa2", "cudnn": "cudnn", "default": "sdpa", "sage": "sage"}
"""Name of a softmax backend in the record -> in `benchmarks.kernels`."""
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}

# Noise level of the call that is timed; all levels take as long.
_SIGMA = 0.7
_LENGTHS, _HEADS = (1000,), 2
# Of a shrunk model's self-attention: without it bf16 rounds about as much of the velocity as a
# hybrid layer that forgets its tile changes, which with it is 0.04 and more.
_LOUDNESS = 16
# Relative norms of differences.
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
_BRANCHES = 2
_RUNS = {
    "cpu": {"runs": 5, "seconds": 0.2},
    "cuda": {"runs": 5, "seconds": 2.0, "fewest": 2},
}
_MEGABYTE, _GIGABYTE = 2**20, 2**30

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to compute a model.

    layers: those that are not softmax, counted from 0.
    tile: they are hybrid, with softmax within such tiles; none: they are linear.
    kept: the softmax backend of all others; none: there are no others.
    is_compiled: whether the blocks are compiled.
    """

    layers: tuple[int, ...]
    kept: str | None
    tile: str | None = None
    is_compiled: bool = False

    @property
    def fields(self) -> Row:
        """Return what a row says of it: how many layers are not softmax, not which."""
        fields = dataclasses.asdict(self)
        return {"num_linear": len(fields.pop("layers")), **fields}


def find_softmax(device: str) -> tuple[dict[str, Contender], list[str]]:
    """Return the softmax backends that a device has, and a sentence for what is absent.

    On a CPU PyTorch has the default alone.
    """
    public, absent = find_public() if device == "cuda" else ([], [])
    known = {contender.name: contender for contender in [*make_contenders(), *public]}
    wanted = BACKENDS if device == "cuda" else {"default": BACKENDS["default"]}
    found = {name: known[kernel] for name, kernel in wanted.items() if kernel in known}
    return found, [sentence for sentence in absent if not sentence.startswith("fla ")]


def plan_variants(
    size: Size, softmax: Sequence[str], *, compiled: bool = False, every_layer: bool = False
) -> list[Variant]:
    """List what is measured: with each backend all layers softmax, then some of them linear.

    Pairs that are compared stand side by side, so that a card that grows warm burdens both.
    compiled: whether all of it is measured with compiled blocks, too.
    every_layer: whether also models without softmax layers are measured, beside the first backend:
        every layer linear, and hybrid with each of the size's tiles.
    """
    every = tuple(range(size.config.num_layers))
    variants = []
    for is_compiled in (False, True) if compiled else (False,):
        pairs = [
            Variant(layers=layers, kept=kept, is_compiled=is_compiled)
            for kept in softmax
            for layers in ((), size.layers)
        ]
        whole = [
            Variant(layers=every, kept=None, tile=tile, is_compiled=is_compiled)
            for tile in (None, *size.tiles)
        ]
        variants += [*pairs[:2], *(whole if every_layer else ()), *pairs[2:]]
    return variants


class BackendAttention(nn.Module):
    """Softmax attention by one of the kernels' contenders."""

    def __init__(self, contender: Contender) -> None:
        super().__init__()
        self._attend = contender.attend

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, grid: TokenGrid | None = None
    ) -> Tensor:
        """Attend over all keys; query, key, value and the result are [B, L, N, D]."""
        return self._attend(query, key, value)


class RandomTeacher:
    """Our own Wan with random weights, on a device in the dtype that `DTYPES` has for it."""

    def __init__(self, size: Size, softmax: Mapping[str, Contender], device: str) -> None:
        self.size, self._softmax, self._device = size, softmax, device
        self.model = make_random_wan(size, device, DTYPES[device])
        _, self._sites = identify(shapes_of(self.model))
        self._inputs = draw_inputs(size, device)

    def call_model(self) -> Tensor:
        """Return the velocity [1, C, F, H, W] of the model as it stands."""
        latents, prompt, _ = self._inputs
        timesteps = torch.full((1,), TIMESTEP_SCALE * _SIGMA, device=latents.device)
        return self.model(latents, timesteps, prompt)

    def sample_video(self) -> Tensor:
        """Return a sampled video: both branches in one call, as in a transfer."""
        latents, prompt, negative = self._inputs
        velocity = bind_guided(self.model, prompt, negative, GUIDANCE_SCALE)
        return sample_euler(velocity, latents, make_sigmas(VIDEO_STEPS, self.size.shift))

    def weight_bytes(self) -> int:
        """Return the bytes of the weights of the model as it stands, those of linear layers too."""
        return count_bytes([self.model])

    @contextlib.contextmanager
    def arranged(self, variant: Variant) -> Iterator[Callable[[], Tensor]]:
        """Compute the model as a variant for a while; yields `call_model`."""
        form = LinearForm(tile=variant.tile)

        def make(site: AttentionSite) -> nn.Module:
            if site.layer in variant.layers:
                return make_random_linear(site, form, self._device)
            return BackendAttention(self._softmax[variant.kept])

        # What stands there between variants must be plain: installing adds nothing to the weights.
        plain = install(self.model, self._sites, make)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.inference_mode())
                if variant.is_compiled:
                    torch._dynamo.reset()
                    stack.enter_context(compiled_blocks([self.model], self._sites))
                yield self.call_model
        finally:
            restore(self.model, self._sites, plain)


def shrink(size: Size) -> Size:
    """Return a size of the same width with two layers, one of them linear, and few tokens.

    Its tile is cut off at the edges, and small: the fewer keys, the more softmax within it shows.
    """
    config = dataclasses.replace(size.config, num_layers=2)
    video = {"num_frames": 5, "height": 128, "width": 192, "tiles": ("1x5x7",)}
    return dataclasses.replace(size, config=config, layers=(1,), **video)


def check_kernels(
    softmax: Mapping[str, Contender], device: str
) -> tuple[dict[str, Contender], list[Row], list[str]]:
    """Compare the fused linear path and all softmax backends with their definitions in fp64.

    Returns the backends that agree, all errors, and a sentence for each that was left out.
    Raises RuntimeError where the linear path is wrong: its speed would mean nothing.
    """
    own = make_contenders("triton" if device == "cuda" else "reference")[0]
    setting = Setting(torch.device(device), DTYPES[device])
    agreeing, rows, left_out = check_contenders([own, *softmax.values()], setting, _LENGTHS, _HEADS)
    return {name: c for name, c in softmax.items() if c in agreeing}, rows, left_out


def check_tiles(device: str) -> Row:
    """Compare the fused hybrid path with its definition in fp64; return its largest error.

    Raises RuntimeError where it is wrong: its speed would mean nothing.
    """
    setting = Setting(torch.device(device), DTYPES[device])
    backend = "triton" if device == "cuda" else "reference"
    how = {"backend": backend, "is_differentiable": False}
    return {"contender": "hybrid", "forward": hybrid.check(hybrid.CHECKED, _HEADS, setting, **how)}


def check_size(
    size: Size, softmax: Mapping[str, Contender], device: str, **plan: bool
) -> list[Row]:
    """Compare the variants of a shrunk model with the plain one and with linear layers in fp32.

    All layers softmax must give what the plain model gives, whatever backend computes them, or one
    by the backend's own definition; linear and hybrid layers must give what their definition in
    plain PyTorch gives in a model of the same weights.

    plan: `compiled` and `every_layer` of `plan_variants`.

    Returns the error of each variant.
    Raises RuntimeError for a variant that is wrong.
    """
    size = shrink(size)
    teacher = _make_loud(size, softmax, device)
    variants = plan_variants(size, list(softmax), **plan)
    contenders = {None: _find_default(), **softmax}
    definitions = {contenders[variant.kept].definition for variant in variants}
    expected = {x: _compute_expected(size, variants, x, device) for x in definitions}
    rows = []
    for variant in variants:
        try:
            with teacher.arranged(variant) as call:
                found = call()
        except Exception:
            # What cannot be compiled is named when it is to be timed.
            if not variant.is_compiled:
                raise
            continue
        kept = contenders[variant.kept]
        error = relative_error(found, expected[kept.definition][variant.layers, variant.tile])
        rows.append({**variant.fields, "error": error})
        if not error < (kept.tolerance if kept.definition else _TOLERANCE[DTYPES[device]]):
            raise RuntimeError(
                f"{variant} differs from the plain model by {error:.1e}; nothing was timed"
            )
    return rows


def _make_loud(size: Size, softmax: Mapping[str, Contender], device: str) -> RandomTeacher:
    teacher = RandomTeacher(size, softmax, device)
    for block in teacher.model.blocks:
        block.self_attn.o.weight.mul_(_LOUDNESS)
    return teacher


def _find_default() -> Contender:
    return next(c for c in make_contenders() if c.name == BACKENDS["default"])


@torch.inference_mode()
def _compute_expected(
    size: Size, variants: Sequence[Variant], define: Attend | None, device: str
) -> dict[tuple[tuple[int, ...], str | None], Tensor]:
    """Return what models should give, by `layers` and `tile` of their variants.

    That of softmax layers alone is the plain model's; the others are computed in fp32.

    define: computes the softmax layers; none: as the model does by itself.
    """
    kept = _find_default()
    if define is not None:
        kept = dataclasses.replace(kept, attend=define)
    teacher = _make_loud(size, {"default": kept}, device)
    with teacher.arranged(Variant(layers=(), kept="default")) as call:
        expected = {((), None): call()}
    # At this head dim the definition in plain PyTorch computes fp32, on every device.
    teacher.model.float()
    for layers, tile in {(variant.layers, variant.tile) for variant in variants if variant.layers}:
        with teacher.arranged(Variant(layers=layers, kept="default", tile=tile)) as call:
            expected[layers, tile] = call()
    return expected


def measure(teacher: RandomTeacher, variant: Variant, video_seconds: float, device: str) -> Row:
    """Measure one variant; its first call, which may compile, gives the memory and no time.

    video_seconds: a video is sampled if that should take no longer.

    Returns the variant's fields, `seconds` of a call, `peak_gb` (2^30 bytes: the weights and all
    that is allocated during a call), `video_seconds`, and `video`: whether those were "sampled",
    or "computed" as that many calls.
    Raises RuntimeError where its output is not finite: such numbers are computed at another speed.
    """
    where = torch.device(device)
    outputs: list[Tensor] = []
    with teacher.arranged(variant) as call:

        def keep_output() -> Tensor:
            outputs[:] = [call()]
            return outputs[0]

        weights = teacher.weight_bytes()
        allocated = extra_mb(keep_output, where) * _MEGABYTE
        seconds = median_of_runs(keep_output, where, **_RUNS[device]) / 1000
        if not outputs.pop().isfinite().all():
            raise RuntimeError(f"{teacher.size.name}: {variant} gives no finite output")
        # One pair of videos shows whether calls add up to them: that of the default path.
        computed, how = _BRANCHES * VIDEO_STEPS * seconds, COMPUTED
        if variant.kept == "default" and not variant.is_compiled and computed <= video_seconds:
            computed, how = time_once(teacher.sample_video, where) / 1000, SAMPLED
    return {
        **variant.fields,
        "seconds": seconds,
        "peak_gb": (weights + allocated) / _GIGABYTE,
        "video_seconds": computed,
        "video": how,
    }


def measure_size(
    size: Size,
    softmax: Mapping[str, Contender],
    video_seconds: float,
    device: str,
    *,
    compiled: bool = False,
    every_layer: bool = False,
) -> Row:
    """Check agreement, then measure all variants of a size; see `plan_variants`.

    A softmax backend that cannot run is left out and named; what the default or a model without
    softmax layers cannot do is raised.

    Returns `rows` of `measure`, and how they came about.
    """
    softmax, kernels, left_out = check_kernels(softmax, device)
    if every_layer:
        kernels.append(check_tiles(device))
    plan = {"compiled": compiled, "every_layer": every_layer}
    models = check_size(size, softmax, device, **plan)
    free_memory()
    teacher = RandomTeacher(size, softmax, device)
    rows = []
    for variant in tqdm(plan_variants(size, list(softmax), **plan), size.name):
        try:
            rows.append(measure(teacher, variant, video_seconds, device))
        except Exception as error:
            # Whatever a rival cannot do, the others can still be measured.
            if variant.kept in ("default", None) and not variant.is_compiled:
                raise
            left_out.append(f"{size.name}, {variant.kept}: {first_line(error)}")
        free_memory()
    return {
        "size": size.name,
        "where": "headless",
        "method": METHOD,
        "agreement": [*kernels, *models],
        "left_out": left_out,
        "rows": rows,
    }


def free_memory() -> None:
    """Give back what dropped models held."""
    gc.collect()
    torch.cuda.empty_cache()


def check_memory(size: Size, device: str) -> None:
    """Raise SettingError where a device cannot hold a size's weights and a call.

    The estimate of a call: two tensors as wide as the feed-forward layer, and twelve of the width.
    """
    config, itemsize = size.config, DTYPES[device].itemsize
    block = 8 * config.dim**2 + 2 * config.dim * config.ffn_dim
    call = size.tokens * (2 * config.ffn_dim + 12 * config.dim)
    needs = [
        memory.Need(f"the weights of {size.name}", config.num_layers * block * itemsize),
        memory.Need("a call", call * itemsize),
    ]
    memory.check_memory(needs, device, "leave that size out, or free the device")


def to_rows(run: Mapping[str, Any]) -> list[Row]:
    """Turn what `measure_size` returns, with its `device`, into the record's rows.

    Each baseline, the softmax model by one backend, has a row of its own, one of the linearized
    model whose kept layers it computes, and one where the fastest backend computes them. Compiled
    models are compared with compiled ones.
    """
    size, peak = SIZES[run["size"]], find_peak(run["device"])
    rows = []
    for is_compiled in (False, True):
        alike = [row for row in run["rows"] if row["is_compiled"] == is_compiled]
        linear = [row for row in alike if row["num_linear"]]
        best = min(linear, key=lambda row: row["seconds"], default=None)
        for baseline in (row for row in alike if not row["num_linear"]):
            same = [row for row in linear if row["kept"] == baseline["kept"] or row is best]
            for row in (baseline, *same):
                rows.append({**_to_row(size, row, baseline, peak), "where": run["where"]})
    return rows


def _to_row(size: Size, found: Row, baseline: Row, peak: float | None) -> Row:
    flops = count_flops(size, found["num_linear"])
    return {
        "model": size.model,
        "resolution": size.resolution,
        "what": "denoise",
        "linear_layers": found["num_linear"],
        "baseline": baseline["kept"],
        "kept_layers": found["kept"],
        "compiled": found["is_compiled"],
        "speedup": baseline["seconds"] / found["seconds"],
        "seconds": found["seconds"],
        "peak_gb": found["peak_gb"],
        "mfu": flops / found["seconds"] / peak if peak else None,
        "video_seconds": found["video_seconds"],
        "video": found["video"],
        "gpus": 1,
    }
