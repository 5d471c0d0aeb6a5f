"""LinVideo Export Prompts.

The CLIP is a tiny random UMT5 in ComfyUI's own classes, with a tokenizer made here.
"""

import functools
import tempfile
import unittest
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.text_encoders.wan
import torch
from linvideo_pack.linvideo_core.prompts import NEGATIVE_PROMPT, default_prompts
from linvideo_pack.linvideo_core.prompts.embeddings import read_embeds
from linvideo_pack.linvideo_core.prompts.text_encoder import cut, open_tokenizer, read_encoder
from linvideo_pack.nodes.export_prompts import LinVideoExportPrompts
from safetensors.torch import save_file
from stage import complaint as _complaint
from stage import made_with_weights, own_folders
from torch import Tensor

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
