"""LinVideo Export Prompts.

The CLIP is a tiny random UMT5 in ComfyUI's own classes, with a tokenizer made here.
"""

import functools
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.text_encoders.wan
import torch
from comfy_extras.nodes_wan import WanImageToVideo
from linvideo_pack.linvideo_core.flow import bind_guided
from linvideo_pack.linvideo_core.prompts import NEGATIVE_PROMPT, default_prompts
from linvideo_pack.linvideo_core.prompts.embeddings import read_embeds
from linvideo_pack.linvideo_core.prompts.text_encoder import cut, open_tokenizer, read_encoder
from linvideo_pack.linvideo_core.teacher.config import TeacherConfig
from linvideo_pack.linvideo_core.teacher.teacher import load_teacher
from linvideo_pack.nodes.export_prompts import LinVideoExportPrompts, read_images
from safetensors.torch import save_file
from stage import TOLERANCES, assert_close, device, made_with_weights, own_folders
from stage import complaint as _complaint
from torch import Tensor
from variants import build, random_tensor

TEXTS = ["A red kite dives and climbs.", "a boat", "Two hands fold a crane, slowly."]
_WIDTH, _VOCABULARY = 16, 90


@functools.cache
def _pieces() -> bytes:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(default_prompts()), model_writer=model, vocab_size=_VOCABULARY,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


class _Target:
    """What ComfyUI's loader makes of a UMT5 file of type wan."""

    params: dict[str, Any] = {}  # noqa: RUF012
    clip = comfy.text_encoders.wan.te(dtype_t5=torch.float32)
    tokenizer = comfy.text_encoders.wan.WanT5Tokenizer


@functools.cache
def _clip() -> Any:
    sizes = {"d_model": _WIDTH, "d_kv": 4, "d_ff": 24, "num_layers": 3, "num_heads": 2}
    with made_with_weights():
        clip = comfy.sd.CLIP(
            _Target,
            tokenizer_data={"spiece_model": torch.tensor(list(_pieces()), dtype=torch.uint8)},
            model_options={"umt5xxl_model_config": {**sizes, "vocab_size": _VOCABULARY}},
        )
    generator = torch.Generator().manual_seed(4)
    for parameter in clip.cond_stage_model.parameters():
        if parameter.ndim:
            weight = 0.5 * torch.randn(parameter.shape, generator=generator)
            parameter.data = weight.to(parameter.device)
    return clip


class _Counted:
    """A CLIP that counts what it encodes, and may have the user interrupt it."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.count = 0
        self.interrupt_at = interrupt_at

    def tokenize(self, text: str) -> Any:
        return _clip().tokenize(text)

    def encode_from_tokens_scheduled(self, tokens: Any) -> Any:
        self.count += 1
        if self.count == self.interrupt_at:
            comfy.model_management.interrupt_current_processing()
        return _clip().encode_from_tokens_scheduled(tokens)


class _OneEncoding:
    """A CLIP to which every text is the same."""

    def __init__(self) -> None:
        self._encoding = _clip().encode_from_tokens_scheduled(_clip().tokenize("no"))

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> Any:
        return self._encoding


def _export(clip: Any, texts: list[str], name: str = "mine", *, overwrite: bool = False) -> Path:
    words = "\n\n".join(texts)
    return Path(LinVideoExportPrompts.execute(clip, words, "no", name, overwrite).result[0])


def _host(text: str) -> Tensor:
    (entry,) = _clip().encode_from_tokens_scheduled(_clip().tokenize(text))
    assert entry[0].shape == (1, 512, _WIDTH) and entry[1]["pooled_output"] is None
    return entry[0][0]


def test_what_is_stored_is_what_the_hosts_wan_receives() -> None:
    with own_folders() as folder:
        path = _export(_clip(), TEXTS)
        assert path == folder / "output" / "linvideo" / "mine.safetensors"
        found = read_embeds(path)
    assert found.prompts == TEXTS
    assert torch.equal(found.prompt_embeds, torch.stack([_host(text) for text in TEXTS]))
    assert torch.equal(found.negative_embeds, _host("no"))
    assert not found.prompt_embeds[:, -1].any() and found.prompt_embeds[:, 0].all()


def test_the_headless_encoder_agrees_with_the_host() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise unittest.SkipTest("needs transformers") from None
    prefix = "umt5xxl.transformer."
    tensors = {
        name.removeprefix(prefix): tensor.cpu().clone().contiguous()
        for name, tensor in _clip().cond_stage_model.state_dict().items()
        if name.startswith(prefix)
    }
    tensors["spiece_model"] = torch.frombuffer(bytearray(_pieces()), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "umt5.safetensors")
        save_file(tensors, path)
        encoder = read_encoder(path)
        tokenize = open_tokenizer(encoder.tokenizer)
        with encoder.load("cpu") as embed:
            for text in [*TEXTS, "", " ".join(TEXTS)]:
                found = embed(cut(tokenize(text)))
                torch.testing.assert_close(found, _host(text), rtol=1e-4, atol=1e-4)


class _Wide:
    """A CLIP of the width that Wan takes, whose embeddings are random."""

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> Any:
        embeds = torch.nn.functional.pad(random_tensor(1, 5, 4096, seed=len(text)), (0, 0, 0, 3))
        return [[embeds, {"pooled_output": None}]]


class _Vae:
    """An autoencoder that says of each image which it was."""

    def encode(self, pixels: Tensor) -> Tensor:
        seed = int(1000 * pixels[0].mean())
        return random_tensor(1, 16, (len(pixels) - 1) // 4 + 1, 8, 8, seed=seed)


_IMAGES = {
    "Wan 2.1": {"model_type": "i2v", "in_dim": 36},
    "Wan 2.2": {"in_dim": 36},
}


def _image_model(kind: str) -> Any:
    sizes = {"dim": 256, "ffn_dim": 96, "num_heads": 2, "num_layers": 2, "cross_attn_norm": True}
    return build("comfy.ldm.wan.model", "WanModel", {**sizes, **_IMAGES[kind]})


def _start(text: str, seed: int, kind: str) -> tuple[list[Any], list[Any]]:
    """Return the conditioning, positive and negative, of videos that start from an image."""
    clip_embeds = SimpleNamespace(penultimate_hidden_states=random_tensor(1, 257, 1280, seed=seed))
    settings = {"vae": _Vae(), "width": 64, "height": 64, "length": 9, "batch_size": 1}
    settings["start_image"] = torch.full((1, 64, 64, 3), seed / 10)
    settings |= {"clip_vision_output": clip_embeds} if kind == "Wan 2.1" else {}
    encoded = [_Wide().encode_from_tokens_scheduled(words) for words in (text, "no")]
    return WanImageToVideo.execute(*encoded, **settings).result[:2]


def test_a_headless_model_is_given_the_images_that_the_host_gives_its_own() -> None:
    for kind, count in (("Wan 2.1", 1), ("Wan 2.2", len(TEXTS)), ("Wan 2.1", len(TEXTS))):
        model = _image_model(kind)
        images = [_start(TEXTS[n], n + 1, kind) for n in range(count)]
        positives = [entry for positive, _ in images for entry in positive]
        with own_folders() as folder:
            words = "\n".join(TEXTS)
            inputs = {"images": positives, "model": model}
            found = LinVideoExportPrompts.execute(_Wide(), words, "no", "mine", False, **inputs)
            path, weights = Path(found.result[0]), folder / "wan.safetensors"
            other = {"images": _start(TEXTS[0], 7, kind)[0], "model": model}
            arguments = (_Wide(), words, "no", "mine", False)
            message = _complaint(ValueError, LinVideoExportPrompts.execute, *arguments, **other)
            assert "other images" in message
            state = model.model.diffusion_model.state_dict()
            save_file({name: x.cpu().contiguous() for name, x in state.items()}, weights)
            size = {"num_frames": 9, "height": 64, "width": 64}
            config = TeacherConfig(model=weights, prompts=path, **size)
            teacher = load_teacher(config).to(device())
        for number, text in enumerate(TEXTS):
            positive, negative = _start(text, min(number, count - 1) + 1, kind)
            noise = random_tensor(1, 16, 3, 8, 8, seed=9)
            settings = (1, 3.0, "euler", "simple", positive, negative, torch.zeros_like(noise))
            theirs = comfy.sample.sample(model, noise, *settings, disable_pbar=True, seed=1)
            prompts = teacher.prompt_embeds[number : number + 1].float()
            negatives = teacher.negatives_for(prompts)
            velocity = bind_guided(teacher.model, prompts, negatives, 3.0)
            with torch.no_grad():
                x0 = noise.to(device()) - velocity(
                    noise.to(device()), torch.ones(1, device=device())
                )
            assert_close(
                model.model.process_latent_out(x0).cpu(), theirs, TOLERANCES[torch.float32]
            )


def test_images_that_cannot_be_exported_are_one_sentence() -> None:
    def refuse(images: list[Any], model: Any) -> str:
        return _complaint(ValueError, read_images, model, images, len(TEXTS))

    model, positive = _image_model("Wan 2.2"), _start("a", 1, "Wan 2.2")[0]
    assert "connect the image-to-video model" in refuse(positive, None)
    assert "2 images for 3 prompts" in refuse(2 * positive, model)
    assert "no start image" in refuse(_Wide().encode_from_tokens_scheduled("a"), model)
    sizes = {"dim": 256, "ffn_dim": 96, "num_heads": 2, "num_layers": 2, "cross_attn_norm": True}
    text_to_video = build("comfy.ldm.wan.model", "WanModel", sizes)
    assert "has no effect on it" in refuse(positive, text_to_video)
    reference = [
        [positive[0][0], {**positive[0][1], "time_dim_concat": torch.zeros(1, 16, 1, 8, 8)}]
    ]
    assert "time_dim_concat" in refuse(reference, model)


def test_an_empty_list_stands_for_linvideos_own_prompts() -> None:
    with own_folders():
        found = read_embeds(_export(_OneEncoding(), []))
    assert found.prompts == default_prompts()
    schema = LinVideoExportPrompts.define_schema()
    assert {entry.id: getattr(entry, "default", None) for entry in schema.inputs}[
        "negative"
    ] == NEGATIVE_PROMPT


def test_the_same_inputs_are_not_encoded_again() -> None:
    with own_folders():
        path = _export(_Counted(), TEXTS)
        before = path.stat().st_mtime_ns
        _export(again := _Counted(), TEXTS)
        assert again.count == 1 and path.stat().st_mtime_ns == before


def test_an_interrupted_export_goes_on_where_it_stopped() -> None:
    with own_folders() as folder:
        try:
            _export(_Counted(interrupt_at=3), TEXTS)
        except comfy.model_management.InterruptProcessingException:
            pass
        else:
            raise AssertionError("nothing was interrupted")
        assert not list((folder / "output" / "linvideo").glob("mine.safetensors"))
        path = _export(rest := _Counted(), TEXTS)
        assert rest.count < 1 + len(TEXTS)
        assert torch.equal(read_embeds(path).prompt_embeds[2], _host(TEXTS[2]))


def test_a_file_with_other_prompts_is_replaced_only_when_asked() -> None:
    with own_folders():
        path = _export(_clip(), TEXTS)
        message = _complaint(ValueError, _export, _clip(), TEXTS[:2])
        assert "switch overwrite on" in message
        assert read_embeds(path).prompts == TEXTS
        _export(_clip(), TEXTS[:2], overwrite=True)
        assert read_embeds(path).prompts == TEXTS[:2]


def test_what_cannot_be_exported_is_one_sentence() -> None:
    class _Other(_Counted):
        def encode_from_tokens_scheduled(self, tokens: Any) -> Any:
            return [[torch.zeros(1, 77, 768), {"pooled_output": torch.zeros(1, 768)}]]

    with own_folders() as folder:
        assert "type wan" in _complaint(ValueError, _export, _Other(), TEXTS)
        long = " ".join(300 * ["kite"])
        assert "shorten the prompt" in _complaint(ValueError, _export, _clip(), [long])
        assert "filename" in _complaint(ValueError, _export, _clip(), TEXTS, "../out")
        assert not (folder / "output" / "linvideo" / "mine.safetensors").exists()
