"""LinVideo Demo and LinVideo Demo Decode: a tiny video model that comes with the pack."""

from typing import Any

import comfy.latent_formats
import comfy.sd
import comfy.utils
import torch
from comfy_api.latest import io
from einops import repeat

from ..linvideo_core.demo import DEMO_GUIDANCE_SCALE, DEMO_SHIFT, weights_path
from ..linvideo_core.demo.codec import FRAME_MEAN, FRAME_SCALE, LATENT_SHAPE, decode_latents
from ..linvideo_core.demo.prompts import DIGIT_WORDS, DIRECTION_WORDS, encode_prompts, make_prompt
from .schema import checked, make_schema

_CHANNELS = LATENT_SHAPE[0]


class DemoLatents(comfy.latent_formats.LatentFormat):
    """The demo's latents as they are: Wan's own format would shift and scale each channel."""

    latent_channels = _CHANNELS
    latent_dimensions = 3
    spacial_downscale_ratio = 2
    temporal_downscale_ratio = 4
    # The preview is the mean of a latent pixel's 16 video pixels, [0, 1] drawn as [-1, 1].
    latent_rgb_factors = [[2 * FRAME_SCALE / _CHANNELS] * 3] * _CHANNELS
    latent_rgb_factors_bias = [2 * FRAME_MEAN - 1] * 3


def load_demo_model(**settings: Any) -> Any:
    """Return the embedded model in a ModelPatcher; settings are ComfyUI's loader's own."""
    tensors = comfy.utils.load_torch_file(str(weights_path("model.safetensors")))
    # With dynamic video memory ComfyUI keeps a file's own dtype, and in a copy for compiling or
    # training forgets to cast it.
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    options = {"dtype": torch.float32}
    patcher = comfy.sd.load_diffusion_model_state_dict(tensors, options, **settings)
    patcher.model.latent_format = DemoLatents()
    patcher.model.model_sampling.set_parameters(shift=DEMO_SHIFT)
    # ComfyUI loads a model anew for training or another GPU: it must come out like this one.
    patcher.cached_patcher_init = (load_demo_model, ())
    return patcher


class LinVideoDemo(io.ComfyNode):
    """The embedded model, a prompt in its words and empty latents of its size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="LinVideoDemo",
            display_name="LinVideo Demo",
            description="A tiny video model that comes with LinVideo and needs no download: "
            "handwritten digits that move. Sample it with euler, the simple scheduler and cfg "
            f"{DEMO_GUIDANCE_SCALE:g}, then show it with LinVideo Demo Decode.",
            search_aliases=["demo", "example", "moving digits", "mnist", "linear attention"],
            inputs=[
                io.Combo.Input(
                    "digit",
                    options=list(DIGIT_WORDS),
                    default="seven",
                    tooltip="The digit that the video shows.",
                ),
                io.Combo.Input(
                    "direction",
                    options=list(DIRECTION_WORDS),
                    default="up-right",
                    tooltip="Where the digit moves.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="How many videos to make at once.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="The tiny video model."),
                io.Conditioning.Output("positive", tooltip="The prompt, for the sampler."),
                io.Conditioning.Output("negative", tooltip="The empty prompt, for the sampler."),
                io.Latent.Output("LATENT", tooltip="Empty latents of the right size."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, digit: str, direction: str, batch_size: int) -> io.NodeOutput:
        """Load the model and look the prompt's words up."""
        prompt = make_prompt(DIGIT_WORDS.index(digit), DIRECTION_WORDS.index(direction))
        positive, negative = ([[encode_prompts([text]), {}]] for text in (prompt, ""))
        latents = torch.zeros(batch_size, *LATENT_SHAPE)
        return io.NodeOutput(load_demo_model(), positive, negative, {"samples": latents})


class LinVideoDemoDecode(io.ComfyNode):
    """The demo's latents -> frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="LinVideoDemoDecode",
            display_name="LinVideo Demo Decode",
            description="Turns the latents of LinVideo Demo into video frames.",
            search_aliases=["demo decode", "moving digits", "vae decode"],
            inputs=[
                io.Latent.Input("samples", tooltip="What was sampled with LinVideo Demo."),
                io.Int.Input(
                    "upscale",
                    default=8,
                    min=1,
                    max=32,
                    tooltip="Draw each pixel this many times larger; the video itself is 32 x 32.",
                ),
            ],
            outputs=[io.Image.Output("IMAGE", tooltip="The frames, one video after another.")],
        )

    @classmethod
    @checked
    def execute(cls, samples: dict[str, Any], upscale: int) -> io.NodeOutput:
        """Decode and enlarge without smoothing."""
        latents = samples["samples"]
        if latents.ndim != 5 or latents.shape[1] != _CHANNELS:
            raise ValueError(
                f"latents of shape {list(latents.shape)} given, but LinVideo Demo's are "
                f"[videos, {_CHANNELS}, frames, height, width]: connect a sampler that uses its "
                "MODEL and LATENT"
            )
        frames = decode_latents(latents.float().cpu())
        sizes = {"p": upscale, "q": upscale}
        return io.NodeOutput(repeat(frames, "b f h w -> (b f) (h p) (w q) c", c=3, **sizes))
