"""LinVideo Softmax Backend: which of PyTorch's kernels computes the layers that stay softmax."""

import functools
from typing import Any

from comfy_api.latest import io

from ..linvideo_core.kernels.softmax import softmax_attention
from .patching.attention_override import override_self_attention
from .schema import make_schema

_KERNELS = {"cuDNN": "cudnn", "FlashAttention": "flash"}


class LinVideoSoftmaxBackend(io.ComfyNode):
    """MODEL -> the same model, its softmax self-attention computed by the chosen kernel."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="LinVideoSoftmaxBackend",
            display_name="LinVideo Softmax Backend",
            description="Chooses which of PyTorch's own kernels computes the layers that LinVideo "
            "leaves softmax. Nothing is installed, and the video changes by rounding alone. The "
            "linear layers, and attention to the prompt, stay as they are.",
            search_aliases=["cudnn attention", "attention backend", "flash attention", "speed up"],
            inputs=[
                io.Model.Input("model", tooltip="A video model, linearized or not."),
                io.Combo.Input(
                    "backend",
                    options=list(_KERNELS),
                    tooltip="On an H100 a whole model ran 1.3 times as fast with cuDNN as with "
                    "FlashAttention, which ComfyUI takes first. On your card, try both.",
                ),
            ],
            outputs=[io.Model.Output("MODEL", tooltip="The model; the one put in is unchanged.")],
        )

    @classmethod
    def execute(cls, model: Any, backend: str) -> io.NodeOutput:
        """Put the kernel where ComfyUI looks for a model's own attention; the last one wins."""
        chosen = model.clone()
        attend = functools.partial(softmax_attention, kernel=_KERNELS[backend])
        override = override_self_attention(attend, f"PyTorch's {backend}")
        options = chosen.model_options.setdefault("transformer_options", {})
        options["optimized_attention_override"] = override
        return io.NodeOutput(chosen)
