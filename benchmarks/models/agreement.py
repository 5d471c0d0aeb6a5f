"""Agreement before speed: kernels against fp64, arranged models against the plain one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.agreement import relative_error
from ..kernels.baselines import Contender, make_contenders
from ..kernels.speed import Setting as KernelSetting
from ..kernels.speed import check_contenders
from .sizes import Size
from .teachers import HeadlessSubject, Setting, Teacher
from .variants import Variant, plan_variants

_LENGTHS, _HEADS = (1000,), 2
# Relative norms of differences, for models of bf16; a CPU computes in fp32.
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}

Row = dict[str, Any]


def check_kernels(
    softmax: Mapping[str, Contender], setting: Setting
) -> tuple[dict[str, Contender], list[Row], list[str]]:
    """Compare the fused linear path and all softmax backends with their definitions in fp64.

    Returns the backends that agree, all errors, and a sentence for each that was left out.
    Raises RuntimeError where the linear path is wrong: its speed would mean nothing.
    """
    own = make_contenders("triton" if setting.device.type == "cuda" else "reference")[0]
    kernel_setting = KernelSetting(None, setting.device, setting.dtype, setting.seed)
    contenders = [own, *softmax.values()]
    agreeing, rows, left_out = check_contenders(contenders, kernel_setting, _LENGTHS, _HEADS)
    names = {contender.name for contender in agreeing}
    return {k: c for k, c in softmax.items() if c.name in names}, rows, left_out


def shrink(size: Size) -> Size:
    """Return a size of the same width with two layers, one of them linear, and few tokens."""
    config = dataclasses.replace(size.config, num_layers=2)
    return dataclasses.replace(
        size, config=config, layers=(1,), num_frames=5, height=128, width=192
    )


def check_headless(
    size: Size, softmax: Mapping[str, Contender], setting: Setting, *, compiled: bool = False
) -> list[Row]:
    """Check arranged models of a size's width, two layers deep; compiled: with and without that."""
    teacher = HeadlessSubject(shrink(size), softmax, setting)
    return check_subject(teacher, list(softmax), setting, compiled=compiled)


def check_subject(
    teacher: Teacher, softmax: Sequence[str], setting: Setting, *, compiled: bool = False
) -> list[Row]:
    """Compare a shrunk teacher's variants with our plain model and with linear layers in fp32.

    All layers softmax must give what the plain model gives, whatever backend computes them; linear
    layers must give what the plain PyTorch definition gives in our model of the same weights.

    Returns the error of each variant.
    Raises RuntimeError for a variant that is wrong.
    """
    expected = _compute_expected(teacher.size, setting)
    rows = []
    for variant in plan_variants(softmax, len(teacher.size.layers), compiled=compiled):
        try:
            found = teacher.with_call(variant, lambda call: call())
        except Exception:
            # What cannot be compiled is named when it is to be timed.
            if not variant.is_compiled:
                raise
            continue
        error = relative_error(found, expected[variant.num_linear].to(found.device))
        rows.append({"where": teacher.where, **dataclasses.asdict(variant), "error": error})
        if not error < _TOLERANCE[setting.dtype]:
            raise RuntimeError(
                f"{teacher.where}: {variant} differs from the plain model by {error:.1e}; "
                "nothing was timed"
            )
    return rows


@torch.inference_mode()
def _compute_expected(size: Size, setting: Setting) -> dict[int, Tensor]:
    """Return the plain model's velocity, and in fp32 that of the model with its linear layers."""
    softmax = {"default": next(c for c in make_contenders() if c.name == "sdpa")}
    teacher = HeadlessSubject(size, softmax, setting)
    plain = teacher.call_model()
    # At this head dim the definition in plain PyTorch computes fp32, on every device.
    teacher.model.float()
    variant = Variant(num_linear=len(size.layers), kept="default")
    return {0: plain, variant.num_linear: teacher.with_call(variant, lambda call: call())}
