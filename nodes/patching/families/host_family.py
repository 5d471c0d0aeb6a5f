"""What the hook must know of each model family's code in ComfyUI: what all families share."""

import dataclasses
import importlib
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from ....linvideo_core.artifact import ArtifactError
from .video import Video


def _run_nothing(*_: Any, **__: Any) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class HostFamily:
    """A model family as ComfyUI computes it.

    attention_module, attention_class: the class whose forward makes the one attention call. A
        subclass may never call forward, or keep a cache that linear attention has not: only the
        class itself will do.
    find_joining_inputs: (diffusion_model, names of the inputs of a model call) -> those whose
        tokens join the video's in self-attention, which files are not made with.
    run_fused: (attention, attend, its forward's arguments) -> what its class's own forward gives,
        computed with fewer passes; None where only that forward will do. in_training: also where a
        gradient is wanted.
    video: how the model is called for the videos that a transfer learns with.
    refines_prompts: whether ComfyUI sends prompts through weights of the model before it samples.
    prepare_for_training: changes a twin of the model, which nothing else uses, so that a gradient
        passes through its blocks.
    """

    name: str
    attention_module: str
    attention_class: str
    find_joining_inputs: Callable[[nn.Module, Collection[str]], list[str]]
    run_fused: Callable[..., Tensor | None] = _run_nothing
    video: type[Video] = Video
    refines_prompts: bool = False
    prepare_for_training: Callable[[nn.Module], None] = _run_nothing

    def check(self, attention: nn.Module) -> None:
        """Raise ArtifactError when a layer is not of the class that the hook knows."""
        expected = getattr(importlib.import_module(self.attention_module), self.attention_class)
        if type(attention) is not expected:
            raise ArtifactError(
                f"this kind of {self.name} model keeps its attention in "
                f"{type(attention).__name__}, which LinVideo cannot make linear; use a model whose "
                f"layers are {self.attention_class}"
            )
