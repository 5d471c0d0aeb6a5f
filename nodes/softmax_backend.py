"""LinVideo Softmax Backend: what computes the layers that stay softmax."""

from typing import Any

from comfy_api.latest import io

from ..linvideo_core.kernels.softmax import DENSITY
from .patching.softmax_kernels import (
    KERNELS,
    SparseSettings,
    add_words,
    parse_layers,
    use_fastest,
    use_kernel,
    use_sparse,
)
from .schema import checked, make_input, make_schema

AUTO, DEFAULT, SPARSE = "auto", "default", "sparse (Sol-Attn)"


class LinVideoSoftmaxBackend(io.ComfyNode):
    """MODEL -> the same model, its softmax self-attention computed by the chosen kernel."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="LinVideoSoftmaxBackend",
            display_name="LinVideo Softmax Backend",
            description="Makes softmax attention faster: all of a video model's, or where LinVideo "
            "Linearize stands before or after it, what that leaves softmax. Sparse attention needs "
            "no file and no training. Attention to the prompt stays as it is. The node says how "
            "long each sampling took.",
            search_aliases=[
                "cudnn attention",
                "attention backend",
                "flash attention",
                "sparse attention",
                "sol-attn",
                "speed up",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A video model, linearized or not."),
                io.DynamicCombo.Input(
                    "backend",
                    options=[
                        *(io.DynamicCombo.Option(name, []) for name in (AUTO, DEFAULT, *KERNELS)),
                        io.DynamicCombo.Option(SPARSE, _sparse_inputs()),
                    ],
                    tooltip="auto: the fastest of the next three on this card, measured once; they "
                    "change the video by rounding alone. default: what ComfyUI takes. sparse: "
                    "fastest for long videos, which change a little.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            outputs=[io.Model.Output("MODEL", tooltip="The model; the one put in is unchanged.")],
        )

    @classmethod
    @checked
    def execute(cls, model: Any, backend: dict[str, Any] | None = None) -> io.NodeOutput:
        """Put the kernel where ComfyUI looks for a model's own attention; the last one wins."""
        chosen, name = model.clone(), backend["backend"]
        words = add_words(chosen, cls.hidden and cls.hidden.unique_id)
        if name == AUTO:
            use_fastest(chosen, words)
        elif name in KERNELS:
            use_kernel(chosen, name)
        elif name == SPARSE:
            fields = {key: backend[key] for key in ("density", "start_percent", "end_percent")}
            layers = parse_layers(backend["dense_layers"])
            use_sparse(chosen, SparseSettings(**fields, dense_layers=layers), words)
        return io.NodeOutput(chosen)


def _sparse_inputs() -> list[io.Input]:
    share = {"min": 0.0, "max": 1.0, "step": 0.01}
    return [
        make_input(
            io.Float,
            "density",
            {"default": DENSITY, **share, "min": 0.01},
            "The share of attention that is computed exactly, block by block; the rest is averaged "
            "first. Lower is faster, higher is closer to the original video; 1 is all of it.",
        ),
        make_input(
            io.Float,
            "start_percent",
            {"default": 0.2, **share},
            "Where in the sampling sparse attention begins. The first steps decide what is where "
            "in the video, and stay dense.",
        ),
        make_input(
            io.Float,
            "end_percent",
            {"default": 1.0, **share, "advanced": True},
            "Where in the sampling sparse attention ends.",
        ),
        make_input(
            io.String,
            "dense_layers",
            {"default": "", "advanced": True, "placeholder": "such as 0, 1, 28-29"},
            "Layers that stay dense, by number from 0.",
        ),
    ]
