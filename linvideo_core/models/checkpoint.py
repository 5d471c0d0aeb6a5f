"""Read published Wan checkpoints: the architecture off the tensors' shapes, then the weights.

Our names are the official ones. ComfyUI's repackaged files put a prefix before them; diffusers has
names of its own, and numbers a block's norms in the order of their use. Headers alone decide
whether a checkpoint fits, so one that does not is refused before a weight is read.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from .quantized import place
from .shards import KNOWN_FORMS, StoredTensor, count_blocks, find_quantised, find_tensors
from .wan import WanConfig, WanModel

_OTHER_VARIANTS = {
    "img_emb.emb_pos": "first-and-last-frame",
    "vace_": "VACE",
    "control_adapter.": "camera control",
    "casual_audio_encoder.": "speech-to-video (S2V)",
    "audio_proj.": "HuMo",
    "face_adapter.": "Animate",
    "face_encoder.": "Animate",
    "patch_embedding_mask.": "SCAIL 2",
    "patch_embedding_pose.": "SCAIL",
    "patch_embedding_global.": "WanDancer",
    "ref_conv.": "Fun control with a reference image",
}
_INSTEAD = (
    "a text- or image-to-video one is needed here; inside ComfyUI, LinVideo Linearize trains other "
    "variants ('run the transfer now')"
)
_KNOWN = (
    "known are Wan 2.1 and 2.2 text- and image-to-video diffusion models as safetensors in "
    "official, ComfyUI or diffusers naming"
)
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")

_DIFFUSERS = "condition_embedder."
_OUTSIDE_BLOCKS = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
_IN_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
_IN_ATTENTION |= {"add_k_proj": "k_img", "add_v_proj": "v_img", "norm_added_k": "norm_k_img"}
# Published image-to-video models have it, and no code uses it.
_UNUSED = ".norm_added_q.weight"
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
    (r"(.*\.)?(shared|token_embedding)\.weight|encoder\.block\.", "a T5 text encoder"),
    (r"(encoder|decoder|conv1)\.", "a video autoencoder (VAE)"),
    (
        r"(.*\.)?(double_blocks|joint_blocks|transformer_blocks|patchify_proj|down_blocks)\.",
        "a diffusion model of another family",
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A Wan checkpoint whose headers were read and fit; `load` reads the weights.

    tensors: parameter name in our model -> where it lies.
    """

    path: Path
    config: WanConfig
    tensors: Mapping[str, StoredTensor]

    def load(
        self,
        *,
        device: torch.device | str = "cpu",
        frozen: str = "fp32",
        under: Sequence[str] = ("",),
    ) -> WanModel:
        """Return the model; each tensor goes from its file to its place, one at a time.

        frozen: as which it is held, of `quantized.FROZEN`; at most one tensor is in fp32 at a time.
        under: prefixes of the parameters that are read; the others stay on the meta device.
        """
        with torch.device("meta"):
            model = WanModel(self.config)
        wanted = [item for item in self.tensors.items() if item[0].startswith(tuple(under))]
        for name, tensor in sorted(wanted, key=lambda item: (item[1].path, item[1].offset)):
            place(model, name, tensor.read(device), frozen, tensor.read_scale(device))
        return model


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> WanConfig:
    """Read the architecture off parameter shapes (official names).

    Raises ValueError when the tensors are not those of a text- or image-to-video Wan.
    """
    for marker, variant in _OTHER_VARIANTS.items():
        if any(name.startswith(marker) for name in shapes):
            raise ValueError(f"a Wan {variant} checkpoint was given; {_INSTEAD}")
    num_layers = count_blocks(shapes, "blocks.")
    try:
        dim, in_channels, *patch_size = shapes["patch_embedding.weight"]
        pt, ph, pw = patch_size
        head_rows = shapes["head.head.weight"][0]
        config = WanConfig(
            dim=dim,
            num_heads=dim // 128,
            num_layers=num_layers,
            ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
            text_dim=shapes["text_embedding.0.weight"][1],
            freq_dim=shapes["time_embedding.0.weight"][1],
            in_channels=in_channels,
            out_channels=head_rows // (pt * ph * pw),
            patch_size=(pt, ph, pw),
            image_dim=shapes.get("img_emb.proj.0.weight", (0,))[0],
        )
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"not a Wan diffusion transformer: {describe_stranger(shapes)}; {_KNOWN}"
        ) from error
    # A mask of 4 channels, and an image's latents.
    if config.condition_channels not in (0, 4 + config.out_channels):
        raise ValueError(
            f"a Wan control checkpoint was given ({config.in_channels} channels in, "
            f"{config.out_channels} out); {_INSTEAD}"
        )
    return config


def open_wan(path: str | Path) -> Checkpoint:
    """Read the headers of a Wan checkpoint: a file, an index, a shard of several or a folder.

    Raises FileNotFoundError or ValueError, in one sentence, for anything else.
    """
    path = Path(path)
    stored = find_tensors(path)
    try:
        names = official_names(stored)
        tensors = {name: stored[there] for there, name in names.items()}
        if quantised := find_quantised(tensors):
            raise ValueError(f"{quantised}; {KNOWN_FORMS}")
        config = infer_config({name: tensor.shape for name, tensor in tensors.items()})
        _check_shapes(tensors, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Checkpoint(path=path, config=config, tensors=tensors)


def load_wan(
    path: str | Path, *, device: torch.device | str = "cpu", frozen: str = "fp32"
) -> WanModel:
    """Load a Wan checkpoint; see `open_wan` and `Checkpoint.load`."""
    return open_wan(path).load(device=device, frozen=frozen)


def _check_shapes(tensors: Mapping[str, StoredTensor], config: WanConfig) -> None:
    # One block stands for all: what is made is no larger for a file that claims many.
    with torch.device("meta"):
        model = WanModel(dataclasses.replace(config, num_layers=1))
    needed = {
        name.replace("blocks.0.", f"blocks.{number}."): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        for number in range(config.num_layers if name.startswith("blocks.") else 1)
    }
    given = {name: tensor.shape for name, tensor in tensors.items()}
    if given != needed:
        names = [n for n in {**needed, **given} if given.get(n) != needed.get(n)]
        raise ValueError(
            f"it does not fit a Wan model of width {config.dim}: missing, unexpected or of "
            f"another shape are {names[:3]}"
        )


def official_names(names: Collection[str]) -> dict[str, str]:
    """Return the official name of every tensor of a Wan model, by its name in the file.

    Tensors beside the diffusion model, such as a bundled autoencoder's, are left out.

    Raises ValueError saying what the tensors are where no `blocks.*` are among them.
    """
    for prefix in _PREFIXES:
        own = {n: n[len(prefix) :] for n in names if n.startswith(prefix)}
        if any(name.startswith("blocks.") for name in own.values()):
            break
    else:
        raise ValueError(f"it holds no Wan model: {describe_stranger(names)}; {_KNOWN}")
    if any(name.startswith(_DIFFUSERS) for name in own.values()):
        kept = {stored: name for stored, name in own.items() if not name.endswith(_UNUSED)}
        return {stored: from_diffusers(name) for stored, name in kept.items()}
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
