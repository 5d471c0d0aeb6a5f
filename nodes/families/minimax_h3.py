"""MiniMax-H3 as ComfyUI computes it: one sequence a call, never a mask, references in a payload.

Every token sees every other: text, references, audio and video are one sequence of one sample, so
linear attention runs over all of it. The payload's references are part of how the model is used.
"""

from . import HostFamily

FAMILY = HostFamily(
    name="minimax_h3",
    attention_module="comfy.ldm.minimax.model",
    attention_class="Attention",
    find_joining_inputs=lambda diffusion_model, inputs: [],
    is_trainable=False,
)
