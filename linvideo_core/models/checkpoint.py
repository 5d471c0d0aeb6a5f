"""Read published Wan checkpoints: the architecture off the tensors' shapes, then the weights.

Official and ComfyUI-repackaged safetensors differ in a prefix alone.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .wan import WanConfig, WanModel

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_NOT_TEXT_TO_VIDEO = {
    "img_emb.": "image-to-video",
    "vace_blocks.": "VACE",
    "control_adapter.": "camera control",
    "casual_audio_encoder.": "speech-to-video",
    "face_adapter.": "animate",
}


def infer_config(shapes: dict[str, tuple[int, ...]]) -> WanConfig:
    """Read the architecture off parameter shapes (names without prefix).

    Raises ValueError when the tensors are not those of a Wan text-to-video model.
    """
    for marker, variant in _NOT_TEXT_TO_VIDEO.items():
        if any(name.startswith(marker) for name in shapes):
            raise ValueError(f"a Wan {variant} checkpoint was given; a text-to-video one is needed")
    try:
        num_layers = 1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("blocks."))
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
        )
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            "not a Wan diffusion transformer (the tensors patch_embedding, text_embedding, "
            "blocks.* and head.* were expected); give the diffusion model's own safetensors file"
        ) from error
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"a Wan image-to-video or control checkpoint was given ({config.in_channels} channels "
            f"in, {config.out_channels} out); a text-to-video one is needed"
        )
    return config


def load_wan(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> WanModel:
    """Load a Wan text-to-video safetensors file, official or repackaged for ComfyUI.

    Raises FileNotFoundError or ValueError, in one sentence, for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"model file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            prefix = next(p for p in _PREFIXES if any(n.startswith(p + "blocks.") for n in names))
            names = [n for n in names if n.startswith(prefix)]
            shapes = {n[len(prefix) :]: tuple(file.get_slice(n).get_shape()) for n in names}
            config = infer_config(shapes)
            state = {n[len(prefix) :]: file.get_tensor(n).to(dtype) for n in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    except StopIteration:
        raise ValueError(f"{path} holds no Wan model: no tensor named blocks.*") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    with torch.device("meta"):
        model = WanModel(config)
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if shapes != needed:
        names = [n for n in {**needed, **shapes} if shapes.get(n) != needed.get(n)]
        raise ValueError(
            f"{path} does not fit a Wan model of width {config.dim}: missing, unexpected or of "
            f"another shape are {names[:3]}"
        )
    model.load_state_dict(state, assign=True)
    return model.to(device)
