"""What published files call Wan's tensors, and what a file without Wan's tensors is.

Ours are the official names. ComfyUI's repackaged files put a prefix before them; diffusers has
names of its own, and numbers a block's norms in the order of their use.
"""

import re
from collections.abc import Collection

KNOWN = (
    "known are Wan 2.1 and 2.2 text-to-video diffusion models as safetensors in official, "
    "ComfyUI or diffusers naming"
)
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")

_DIFFUSERS = "condition_embedder."
_OUTSIDE_BLOCKS = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder": "img_emb",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
_IN_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
_IN_BLOCK = {
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
    **{
        f"{theirs}.{part}": f"{ours}.{_IN_ATTENTION.get(part, part)}"
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for part in (*_IN_ATTENTION, "norm_q", "norm_k")
    },
}
_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")

# The first that matches any tensor's name wins.
_STRANGERS = (
    (r"linvideo\.", "a LINVIDEO file, which is made from a model"),
    (r".*(\.lora_|\.lokr_|\.hada_)", "a LoRA"),
    (r"(prompt|negative)_embeds", "prompt embeddings"),
    (r"(.*\.)?audio_patch_proj\.", "MiniMax-H3"),
    (r"(.*\.)?txt_in\.individual_token_refiner\.", "HunyuanVideo"),
    (r"(.*\.)?double_blocks\.", "Flux or a relative of it"),
    (r"(.*\.)?patchify_proj\.", "LTX-Video"),
    (r"(.*\.)?joint_blocks\.", "Stable Diffusion 3"),
    (r"(.*\.)?blocks\.\d+\.attn\.qkv_x\.", "Mochi"),
    (r"(.*\.)?blocks\.\d+\.self_attn\.q_proj\.", "Cosmos"),
    (r"(.*\.)?(input_blocks|down_blocks)\.", "a U-Net, such as Stable Diffusion's"),
    (r"(.*\.)?(shared|token_embedding)\.weight|encoder\.block\.", "a T5 text encoder"),
    (r"(.*\.)?vision_model\.", "a CLIP vision model"),
    (r"(encoder|decoder|conv1)\.", "a video autoencoder (VAE)"),
    (r"(.*\.)?transformer_blocks\.", "a transformer of another family in diffusers' naming"),
)


def official_names(names: Collection[str]) -> dict[str, str]:
    """Return the official name of every tensor of a Wan model, by its name in the file.

    Tensors beside the diffusion model, such as a bundled autoencoder's, are left out.

    Raises ValueError saying what the tensors are where no `blocks.*` are among them.
    """
    for prefix in PREFIXES:
        own = {n: n[len(prefix) :] for n in names if n.startswith(prefix)}
        if any(name.startswith("blocks.") for name in own.values()):
            break
    else:
        raise ValueError(f"it holds no Wan model: {describe_stranger(names)}; {KNOWN}")
    if any(name.startswith(_DIFFUSERS) for name in own.values()):
        return {stored: from_diffusers(name) for stored, name in own.items()}
    return own


def from_diffusers(name: str) -> str:
    """Return the official name of a parameter that diffusers calls `name`."""
    if match := _BLOCK.fullmatch(name):
        return match[1] + _translate(match[2], _IN_BLOCK)
    return _translate(name, _OUTSIDE_BLOCKS)


def describe_stranger(names: Collection[str]) -> str:
    """Say what a file without a Wan model is, as far as its tensors' names tell."""
    for pattern, what in _STRANGERS:
        if any(re.match(pattern, name) for name in names):
            return f"it is {what}"
    shown = ", ".join(repr(name[:60]) for name in sorted(names)[:2])
    return f"its tensors are called {shown}" if names else "it has no tensors"


def _translate(name: str, table: dict[str, str]) -> str:
    for theirs, ours in table.items():
        if name == theirs or name.startswith(theirs + "."):
            return ours + name[len(theirs) :]
    return name
