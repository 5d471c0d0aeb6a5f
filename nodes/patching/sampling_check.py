"""How a linearized model is sampled in ComfyUI, compared with how its file wants to be used."""

import dataclasses
from typing import Any

import comfy.samplers

from ...linvideo_core.artifact import ArtifactError, ArtifactHeader, Usage
from ...linvideo_core.artifact.summary import find_differences
from ...linvideo_core.demo.codec import TIME_PATCH
from ..demo import DemoLatents
from .families import host_family
from .families.video import Video
from .report import Report

_SAMPLE = "sample_"


@dataclasses.dataclass(frozen=True)
class CompareSampling:
    """ComfyUI's wrapper around every sampling of a model: tells its node's report what differs."""

    header: ArtifactHeader
    keep_first_steps: int
    report: Report

    def __call__(
        self,
        executor: Any,
        noise: Any,
        latent_image: Any,
        sampler: Any,
        sigmas: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Compare, then sample."""
        shape = (kwargs.get("latent_shapes") or [noise.shape])[0]
        levels = tuple(sigmas.float().tolist())
        video = host_family(self.header.family).video
        found = read_sampling(executor.class_obj, tuple(shape), sampler, video)
        differences = find_differences(self.header, found, levels)
        if self.keep_first_steps >= len(levels) - 1:
            differences.append("every step as the model came in: lower keep_first_steps")
        self.report.add_sampling(differences, is_known=bool(self.header.usage.said))
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)


def read_sampling(
    guider: Any, shape: tuple[int, ...], sampler: Any, video: type[Video] = Video
) -> Usage:
    """Return how a guider is about to sample; what cannot be told is left out.

    shape: of the latents, [B, C, F, H, W]; video: the family's, which may measure them its own way.
    """
    model = guider.model_patcher
    said = {
        "guidance_scale": _find_guidance(guider),
        "shift": getattr(model.get_model_object("model_sampling"), "shift", None),
        "sampler": _find_name(sampler),
        **_find_size(model.model.latent_format, shape, video),
    }
    try:
        return Usage(**said)
    except ArtifactError:
        # Numbers that no file can have, such as a guidance that is not finite.
        return Usage()


def _find_guidance(guider: Any) -> float | None:
    """Return the cfg of a guider that computes guidance as ComfyUI's own does."""
    own = comfy.samplers.CFGGuider
    if (
        type(guider).predict_noise is not own.predict_noise
        or type(guider).set_cfg is not own.set_cfg
    ):
        return None
    has_negative = guider.original_conds.get("negative") is not None
    return float(guider.cfg) if has_negative else 1.0


def _find_name(sampler: Any) -> str | None:
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
    return name.removeprefix(_SAMPLE) if name.startswith(_SAMPLE) else None


def _find_size(latent_format: Any, shape: tuple[int, ...], video: type[Video]) -> dict[str, int]:
    if len(shape) != 5:
        return {}
    if (size := video.measure(shape[1:])) is not None:
        return dict(zip(("num_frames", "height", "width"), size, strict=True))
    F, H, W = shape[2:]
    time_ratio = getattr(latent_format, "temporal_downscale_ratio", 4)
    space_ratio = getattr(latent_format, "spacial_downscale_ratio", 8)
    is_demo = isinstance(latent_format, DemoLatents)
    num_frames = TIME_PATCH * F if is_demo else time_ratio * (F - 1) + 1
    return {"width": space_ratio * W, "height": space_ratio * H, "num_frames": num_frames}
