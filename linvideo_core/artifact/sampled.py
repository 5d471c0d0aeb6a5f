"""What differs between how a file wants to be used and how its model is being sampled."""

import math
from collections.abc import Iterator, Sequence

from ..flow import make_sigmas
from .header import ArtifactHeader
from .summary import describe_size
from .usage import Usage

_NEAR_LEVEL = 2e-3
# A host cuts two experts' schedules between two steps, not at the boundary itself.
_NEAR_RANGE = 0.03
_FEW = 4


def find_differences(
    header: ArtifactHeader, sampled: Usage, sigmas: Sequence[float] = ()
) -> list[str]:
    """Say what differs from how a file wants to be used, one short sentence each.

    sampled: how its model is sampled, as far as that is known; a guidance of 1 is none.
    sigmas: noise levels of this sampling, or of a part of one; each but the last is a step.

    What the file does not say, and what is not known of the sampling, is passed over.
    """
    usage = header.usage
    return [
        *_compare_size(usage, sampled),
        *_compare_guidance(usage.guidance_scale, sampled.guidance_scale),
        *_compare_shift(usage.shift, sampled.shift),
        *_compare_levels(header, sampled.sampler, sigmas),
        *_compare_steps(header, sigmas),
        *_compare_range(usage, sigmas),
    ]


def _compare_size(usage: Usage, sampled: Usage) -> Iterator[str]:
    names = usage.said.keys() & sampled.said.keys() & {"width", "height", "num_frames"}
    if any(getattr(usage, name) != getattr(sampled, name) for name in names):
        yield f"{describe_size(sampled)}, but the file was made at {describe_size(usage)}"


def _compare_guidance(made: float | None, found: float | None) -> Iterator[str]:
    if _is_like(made, found):
        return
    if made == 1:
        yield f"cfg {found:g}, but guidance is trained into the file: set cfg to 1"
    elif found == 1:
        yield f"no guidance (cfg 1), but the file was made at cfg {made:g}"
    else:
        yield f"cfg {found:g}, but the file was made at {made:g}"


def _compare_shift(made: float | None, found: float | None) -> Iterator[str]:
    if not _is_like(made, found):
        yield f"shift {found:g}, but the file was made at {made:g}"


def _compare_levels(
    header: ArtifactHeader, sampler: str | None, sigmas: Sequence[float]
) -> Iterator[str]:
    """Compare with the few levels and the sampler that a distilled file is bound to."""
    if not header.sigmas:
        return
    if any(min(abs(level - s) for level in header.sigmas) > _NEAR_LEVEL for s in sigmas):
        yield (
            f"other noise levels than the {len(header.sigmas) - 1} steps that the file was "
            "distilled for: LinVideo Few-Step Sampler has them"
        )
    made = header.usage.sampler
    if made is not None and sampler is not None and made != sampler:
        yield f"sampler {sampler}, but the file was distilled for {made}"


def _compare_steps(header: ArtifactHeader, sigmas: Sequence[float]) -> Iterator[str]:
    """Tell of a file that was not distilled and is sampled in few steps all the same."""
    usage, steps = header.usage, len(sigmas) - 1
    if header.sigmas or usage.steps is None or usage.shift is None or steps < 1:
        return
    grid = make_sigmas(usage.steps, usage.shift)[:-1]
    made = int(((grid > sigmas[-1]) & (grid <= sigmas[0] + _NEAR_LEVEL)).sum())
    if _FEW * steps <= made:
        yield f"{steps} steps, but the file was made in {made} and not distilled for few"


def _compare_range(usage: Usage, sigmas: Sequence[float]) -> Iterator[str]:
    if usage.sigma_from is None or usage.sigma_to is None:
        return
    low, high = usage.sigma_to - _NEAR_RANGE, usage.sigma_from + _NEAR_RANGE
    if outside := sum(not low <= sigma <= high for sigma in sigmas[:-1]):
        yield (
            f"{outside} of {len(sigmas) - 1} steps at noise levels that the file was not made "
            f"for: its own go from {usage.sigma_from:g} to {usage.sigma_to:g}"
        )


def _is_like(made: float | None, found: float | None) -> bool:
    return made is None or found is None or math.isclose(made, found, rel_tol=0.01)
