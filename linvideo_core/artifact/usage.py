"""How a model is used: its video's size and its sampling; a file says at which it was made."""

import dataclasses
from typing import Any

from .fields import check_integer, check_number, check_text, refuse

_MAX_SIDE, _MAX_FRAMES, _MAX_STEPS, _MAX_SCALE = 2**16, 2**20, 10**6, 1000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """What a file was made at, or how a model is sampled; None is what is not said or known.

    width, height, num_frames: of the video, in pixels and frames.
    guidance_scale: classifier-free guidance; 1 is none (a distilled file has it trained in).
    shift: warp of the noise levels. steps, sampler: "euler", or "lcm" for a distilled file.
    sigma_from, sigma_to: noise levels that its model works at, such as 1 and 0.875 for Wan 2.2's
        high-noise expert.

    Raises ArtifactError naming the field that is wrong.
    """

    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    steps: int | None = None
    sampler: str | None = None
    sigma_from: float | None = None
    sigma_to: float | None = None

    def __post_init__(self) -> None:
        said = self.said
        for name, high in (
            ("width", _MAX_SIDE),
            ("height", _MAX_SIDE),
            ("num_frames", _MAX_FRAMES),
            ("steps", _MAX_STEPS),
        ):
            if name in said:
                check_integer(f"usage's {name}", said[name], 1, high)
        for name in ("guidance_scale", "shift"):
            if name in said:
                check_number(f"usage's {name}", said[name], 0, _MAX_SCALE)
        if self.shift == 0:
            refuse("usage's shift", self.shift, "a number greater than 0 is expected")
        if self.sampler is not None:
            check_text("usage's sampler", self.sampler)
        self._check_sigmas()

    @property
    def said(self) -> dict[str, Any]:
        """Return what the file says, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def _check_sigmas(self) -> None:
        given = (self.sigma_from, self.sigma_to)
        if given == (None, None):
            return
        for name, value in zip(("sigma_from", "sigma_to"), given, strict=True):
            check_number(f"usage's {name}", value, 0, 1)
        if not self.sigma_from > self.sigma_to:
            refuse("usage's sigma_to", self.sigma_to, "less than sigma_from is expected")


def read_usage(value: object) -> Usage:
    """Return the usage that a file's header holds as a JSON object.

    Raises ArtifactError for anything else.
    """
    known = {field.name for field in dataclasses.fields(Usage)}
    if not isinstance(value, dict) or not value.keys() <= known:
        refuse("usage", value, f"an object of {', '.join(sorted(known))} is expected")
    return Usage(**value)
