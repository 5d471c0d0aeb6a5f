"""What is read from CONDITIONING."""

import functools
from typing import Any

import comfy.conds
import comfy.ldm.wan.model
import comfy.sd
import torch
from comfy_extras.nodes_wan import WanPhantomSubjectToVideo, WanSoundImageToVideo
from linvideo_pack.nodes.patching.families import Video
from linvideo_pack.nodes.transfer.conditioning import read_conditions
from stage import MODEL_OF_SHAPES, complaint
from torch import Tensor

_VIDEO = Video((16, 3, 8, 8))
_SIZE = {"width": 64, "height": 64, "length": 9, "batch_size": 1}


@functools.cache
def _base_model(class_name: str, **settings: Any) -> Any:
    """Return ComfyUI's model around a small Wan of zeros, by way of its loader."""
    sizes = {"dim": 256, "ffn_dim": 96, "num_heads": 2, "num_layers": 3}
    model_class = getattr(comfy.ldm.wan.model, class_name)
    empty = model_class(**sizes, **settings, **MODEL_OF_SHAPES)
    weights = {name: torch.zeros(weight.shape) for name, weight in empty.state_dict().items()}
    base = comfy.sd.load_diffusion_model_state_dict(weights, {"dtype": torch.float32}).model
    assert type(base.diffusion_model) is model_class
    return base


def _prompt(seed: int, **options: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, 6, 4096, generator=generator), options]]


class _Vae:
    """An autoencoder of Wan's sizes, of which only the shape of its latents matters."""

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.full((1, 16, (len(pixels) - 1) // 4 + 1, 8, 8), float(pixels.mean()))


def _refusal(base: Any, positive: list[Any], negative: list[Any]) -> str:
    return complaint(ValueError, read_conditions, base, positive, negative, _VIDEO)


def test_speech_is_told_of_its_audio_and_takes_positive_outputs_alone() -> None:
    audio = {"encoded_audio_all_layers": [torch.randn(1, 30, 1024) for _ in range(25)]}
    image = torch.rand(1, 64, 64, 3)

    def sound(seed: int) -> tuple[list[Any], list[Any]]:
        settings = {**_SIZE, "vae": _Vae(), "audio_encoder_output": audio, "ref_image": image}
        return WanSoundImageToVideo.execute(_prompt(seed), _prompt(9), **settings).result[:2]

    base = _base_model("WanModel_S2V")
    message = _refusal(base, *sound(1))
    assert "different audio," in message and "image" not in message
    found = read_conditions(base, sound(1)[0], sound(2)[0], _VIDEO)
    assert {"audio_embed", "reference_latent", "control_video"} <= found.inputs.keys()


def test_what_differs_is_named_as_an_artist_knows_it() -> None:
    base = _base_model("WanModel")
    settings = {**_SIZE, "vae": _Vae(), "images": torch.rand(2, 64, 64, 3)}
    nodes = WanPhantomSubjectToVideo.execute(_prompt(1), _prompt(2), **settings)
    positive, _, negative, _ = nodes.result
    assert "different reference images" in _refusal(base, positive, negative)
    base = _base_model("VaceWanModel", vace_layers=3, vace_in_dim=96)
    vace = {"vace_frames": [torch.randn(1, 32, 3, 8, 8)], "vace_strength": [1.0]}
    others = {
        "control video, mask or reference image": {"vace_frames": [torch.randn(1, 32, 3, 8, 8)]},
        "strength of VACE": {"vace_strength": [0.5]},
    }
    for words, changes in others.items():
        message = _refusal(base, _prompt(1, **vace), _prompt(2, **{**vace, **changes}))
        assert f"different {words}" in message, message


def test_what_nobody_has_words_for_is_named_and_is_no_image() -> None:
    class _Base:
        def extra_conds(self, cross_attn: Tensor, marvel: Tensor, **_: Any) -> dict[str, Any]:
            given = {"c_crossattn": cross_attn, "marvel": marvel}
            return {name: comfy.conds.CONDRegular(value) for name, value in given.items()}

    prompts = [_prompt(seed, marvel=torch.full((1, 2), float(seed))) for seed in (1, 2)]
    message = _refusal(_Base(), *prompts)
    assert "different values of 'marvel'" in message and "image" not in message
