"""What LinVideo Linearize says under itself, when it has run and whenever its model is sampled."""

import dataclasses
import functools
import logging
import sys
from collections.abc import Sequence
from typing import Any

import comfy.samplers
from comfy_execution.utils import get_executing_context

from ...linvideo_core.artifact import ArtifactError, ArtifactHeader, Usage
from ...linvideo_core.artifact.summary import find_differences
from .families import Video, host_family, pixels_of

_AS_MADE = "sampled as the file was made"
_SAMPLE = "sample_"

logger = logging.getLogger(__name__)


class Report:
    """The lines under one node of a graph.

    What its model is sampled with is found later, while other nodes run; a graph may sample it
    several times, and all that was found in one run of the graph is shown.
    """

    def __init__(self, lines: Sequence[str], node_id: str | None) -> None:
        """lines: what is known when the node runs; node_id: None where nothing shows them."""
        self._lines = tuple(lines)
        self._node_id = node_id
        self._prompt_id: str | None = None
        self._sampled: dict[str, None] = {}

    @property
    def text(self) -> str:
        """What the node says now, a line each."""
        # Sentences, because ComfyUI's newer design shows the lines as one.
        lines = [*self._lines, *self._sampled]
        return "\n".join(f"{line[:1].upper()}{line[1:]}." for line in lines)

    def show(self) -> None:
        """Show what the node says."""
        show_words(self.text, self._node_id)

    def add_sampling(self, differences: Sequence[str], *, is_known: bool) -> None:
        """Show how a sampling differs from how the file wants to be used.

        is_known: the file says how; if nothing differs, that is shown, too.
        """
        context = get_executing_context()
        prompt_id = None if context is None else context.prompt_id
        if prompt_id != self._prompt_id or prompt_id is None:
            self._prompt_id, self._sampled = prompt_id, {}
        found = dict.fromkeys(f"sampled: {each}" for each in differences)
        for line in found:
            _log_once(line)
        self._sampled.pop(_AS_MADE, None)
        self._sampled |= found
        if is_known and not self._sampled:
            self._sampled[_AS_MADE] = None
        self.show()


def show_words(text: str, node_id: str | None) -> None:
    """Show lines under a node, in place of those before; nothing where nothing shows them."""
    # Looked up, not imported: ComfyUI's models also run, and are measured, without its server.
    module = sys.modules.get("server")
    server = getattr(getattr(module, "PromptServer", None), "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id, server.client_id)


@functools.cache
def _log_once(line: str) -> None:
    logger.info("LinVideo: %s", line)


@dataclasses.dataclass(frozen=True)
class CompareSampling:
    """ComfyUI's wrapper around every sampling of a model: its node's report says what differs."""

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
    """Return how a guider is about to sample; what cannot be found out is left out.

    shape: of the latents, [B, C, F, H, W]; video: the family's, which may measure them its own way.
    """
    model = guider.model_patcher
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
    found = {
        "guidance_scale": _find_guidance(guider),
        "shift": getattr(model.get_model_object("model_sampling"), "shift", None),
        "sampler": name.removeprefix(_SAMPLE) if name.startswith(_SAMPLE) else None,
    }
    if len(shape) == 5:
        size = video.measure(shape[1:]) or pixels_of(model.model.latent_format, shape[2:])
        found |= zip(("num_frames", "height", "width"), size, strict=True)
    try:
        return Usage(**found)
    except ArtifactError:
        # Numbers that no file can have, such as a guidance that is not finite.
        return Usage()


def _find_guidance(guider: Any) -> float | None:
    """Return the cfg of a guider that computes guidance as ComfyUI's own does."""
    own, kind = comfy.samplers.CFGGuider, type(guider)
    if kind.predict_noise is not own.predict_noise or kind.set_cfg is not own.set_cfg:
        return None
    has_negative = guider.original_conds.get("negative") is not None
    return float(guider.cfg) if has_negative else 1.0
