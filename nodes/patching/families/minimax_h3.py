"""MiniMax-H3 as ComfyUI computes it: one sequence a call, never a mask, references in a payload.

Every token sees every other: text, references, audio and video are one sequence of one sample, so
linear attention runs over all of it. The payload's references are part of how the model is used.
"""

from .host_family import HostFamily
from .minimax_h3_training import prepare_for_training, run_attention
from .minimax_h3_video import SoundVideo

FAMILY = HostFamily(
    name="minimax_h3",
    attention_module="comfy.ldm.minimax.model",
    attention_class="Attention",
    find_joining_inputs=lambda diffusion_model, inputs: [],
    run_fused=run_attention,
    video=SoundVideo,
    refines_prompts=True,
    prepare_for_training=prepare_for_training,
)
