"""The prompts that come with LinVideo, and embeddings in a file."""

import itertools
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from linvideo_core.prompts import NEGATIVE_PROMPT, default_prompts, read_prompts
from linvideo_core.prompts.embeddings import encode_once, identity_of, read_embeds
from linvideo_core.prompts.text_encoder import open_encoder

# A few of the verbs of motion, by their stem.
MOTIONS = {
    *("run", "walk", "jump", "leap", "spin", "whirl", "twist", "roll", "tumble", "slide", "glide"),
    *("drift", "float", "fly", "dive", "plunge", "climb", "crawl", "race", "gallop", "trot", "hop"),
    *("bounce", "swing", "sway", "shake", "splash", "pour", "drip", "burst", "crash", "tilt"),
    *("sweep", "circle", "orbit", "rotate", "flap", "dart", "chase", "lunge", "kick", "throw"),
    *("toss", "hurl", "catch", "push", "pull", "drag", "lift", "drop", "fall", "rise", "fold"),
    *("unfold", "stretch", "shoot", "swim", "paddle", "skate", "ride", "march", "dance", "stamp"),
    *("clap", "wave", "turn", "skip", "vault", "weave", "swerve", "accelerate", "shatter"),
    *("scatter", "swirl", "billow", "ripple", "stream", "flow", "churn", "hammer", "pound"),
}


def words(text: str) -> set[str]:
    return set(re.findall("[a-z]+", text.lower()))


def moves(prompt: str, motion: str) -> bool:
    stem = motion.removesuffix("e")
    return any(re.fullmatch(f"{stem}{stem[-1]}?(e|s|es|ed|ing)?", word) for word in words(prompt))


def test_there_are_hundreds_of_prompts_of_a_sentence_or_two() -> None:
    prompts = default_prompts()
    assert len(prompts) >= 300
    for prompt in prompts:
        assert 50 <= len(prompt) <= 200 and prompt.isascii(), prompt
        assert prompt[0].isupper() and prompt.endswith("."), prompt
        assert prompt.count(". ") <= 1, prompt


def test_no_prompt_is_nearly_another() -> None:
    prompts = default_prompts()
    assert len({prompt.lower() for prompt in prompts}) == len(prompts)
    for left, right in itertools.combinations(prompts, 2):
        shared = len(words(left) & words(right)) / len(words(left) | words(right))
        assert shared < 0.4, (left, right)
    starts = [tuple(prompt.lower().split()[:4]) for prompt in prompts]
    assert all(starts.count(start) <= 3 for start in starts)


def test_the_prompts_move_in_many_ways() -> None:
    prompts = default_prompts()
    used = {motion for motion in MOTIONS if sum(moves(prompt, motion) for prompt in prompts) >= 2}
    assert len(used) >= 60, sorted(MOTIONS - used)
    subjects = ("hands", "camera", "water", "crowd", "snow", "train", "night", "stop-motion")
    for subject in (*subjects, "slow"):
        assert sum(subject in prompt.lower() for prompt in prompts) >= 3, subject
    assert {"frozen", "blurry", "watermark", "hands", "quality"} <= words(NEGATIVE_PROMPT)


def test_empty_lines_are_no_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n  a boat\t\r\n\n a kite\n", encoding="utf-8")
    assert read_prompts(path) == ["a boat", "a kite"]
    path.write_text(" \n\n")
    with pytest.raises(ValueError, match="holds no prompts; write one a line"):
        read_prompts(path)


TEXTS = [f"prompt {i}" + i * "!" for i in range(80)]


class Encoder:
    """Embeds a text as its letters, padded to 200, and may stop before one of them."""

    def __init__(self, stop_before: int | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.asked: list[str] = []
        self.stop_before = stop_before
        self.dtype = dtype

    def __call__(self, text: str) -> Tensor:
        if len(self.asked) == self.stop_before:
            raise KeyboardInterrupt
        self.asked.append(text)
        codes = torch.tensor([ord(letter) for letter in text], dtype=self.dtype)
        padded = torch.nn.functional.pad(codes, (0, 200 - len(codes)))
        return padded[:, None] * torch.tensor([1.0, -0.5], dtype=self.dtype)


def encode(path: Path, encoder: Encoder, texts: list[str] = TEXTS, negative: str = "no") -> bool:
    identity = identity_of(texts, negative, "letters")
    return encode_once(path, texts, negative.splitlines(), encoder, identity=identity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_read_is_what_was_encoded_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "embeds.safetensors"
    assert encode(path, encoder := Encoder(dtype=dtype))
    found = read_embeds(path)
    assert found.prompts == TEXTS and encoder.asked == ["no", *TEXTS]
    assert found.prompt_embeds.dtype == found.negative_embeds.dtype == dtype
    expected = torch.stack([Encoder(dtype=dtype)(text) for text in TEXTS])
    assert torch.equal(found.prompt_embeds, expected)
    assert torch.equal(found.negative_embeds, Encoder(dtype=dtype)("no"))
    longest = max(map(len, TEXTS))
    assert load_file(path)["prompt_embeds"].shape == (80, longest, 2)


def flip(path: Path) -> None:
    """Flip a bit of the file's last number."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x01
    path.write_bytes(data)


def test_a_flipped_byte_is_told_and_encoded_again(tmp_path: Path) -> None:
    path = tmp_path / "embeds.safetensors"
    encode(path, Encoder())
    whole = {name: tensor.clone() for name, tensor in load_file(path).items()}
    flip(path)
    with pytest.raises(ValueError, match=f"{path} is damaged, .* encode or copy them once more"):
        read_embeds(path)
    assert encode(path, Encoder())
    assert all(torch.equal(found, whole[name]) for name, found in load_file(path).items())
    with pytest.raises(KeyboardInterrupt):
        encode(path, Encoder(5), TEXTS[:9])
    flip(path.with_name("embeds.unfinished.safetensors"))
    encode(path, again := Encoder(), TEXTS[:9])
    assert again.asked == ["no", *TEXTS[:9]]


def test_a_file_may_hold_several_negative_prompts(tmp_path: Path) -> None:
    path = tmp_path / "embeds.safetensors"
    with pytest.raises(KeyboardInterrupt):
        encode(path, Encoder(2), negative="no\nnever\nnot")
    encode(path, rest := Encoder(), negative="no\nnever\nnot")
    assert rest.asked == ["not", *TEXTS]
    found = read_embeds(path)
    expected = torch.stack([Encoder()(text) for text in ("no", "never", "not")])
    assert torch.equal(found.negative_embeds, expected)
    assert len(found.prompt_embeds) == len(TEXTS) == len(found.prompts)


def test_the_same_words_are_not_encoded_again_and_others_are(tmp_path: Path) -> None:
    path = tmp_path / "embeds.safetensors"
    encode(path, Encoder())
    assert not encode(path, again := Encoder()) and again.asked == []
    assert encode(path, Encoder(), TEXTS[:-1])
    assert read_embeds(path).prompts == TEXTS[:-1]
    assert encode(path, Encoder(), TEXTS[:-1], "nothing")


@pytest.mark.parametrize("stop_before", [1, 40, 80])
def test_an_interrupted_encoding_goes_on_where_it_stopped(stop_before: int, tmp_path: Path) -> None:
    path = tmp_path / "embeds.safetensors"
    with pytest.raises(KeyboardInterrupt):
        encode(path, Encoder(stop_before))
    assert not path.exists()
    encode(path, rest := Encoder())
    assert rest.asked == ["no", *TEXTS][stop_before:]
    whole = tmp_path / "whole.safetensors"
    encode(whole, Encoder())
    found, expected = (load_file(file) for file in (path, whole))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert {file.name for file in tmp_path.iterdir()} == {path.name, whole.name}


def test_embeddings_that_cannot_be_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "embeds.safetensors"

    def refuse(match: str, **tensors: Tensor) -> None:
        save_file(tensors, path)
        with pytest.raises(ValueError, match=match) as caught:
            read_embeds(path)
        assert "\n" not in str(caught.value)

    one = torch.zeros(2, 3, 4)
    refuse("negative_embeds", prompt_embeds=one)
    refuse(r"\[S, T\] are needed", prompt_embeds=one, negative_embeds=torch.zeros(2, 4))
    refuse("are needed", prompt_embeds=one, negative_embeds=one[:0].clone())
    refuse("are needed", prompt_embeds=one, negative_embeds=torch.zeros(1, 2, 3, 4))
    refuse("none of them 0", prompt_embeds=one[:0], negative_embeds=one[0].clone())
    refuse("no finite", prompt_embeds=one / 0, negative_embeds=one[0].clone())
    refuse("no finite", prompt_embeds=one.int(), negative_embeds=one[0].int())
    narrow = one.to(torch.float8_e4m3fn)
    refuse("no finite", prompt_embeds=narrow, negative_embeds=narrow[0].clone())
    refuse("no finite", prompt_embeds=one.cfloat(), negative_embeds=one[0].cfloat())
    tensors = {"prompt_embeds": one, "negative_embeds": one[0].clone()}
    for length in ("2", "many", "513", "65536", "9" * 5000, "²"):
        save_file(tensors, path, {"padded_to": length})
        with pytest.raises(ValueError, match="padded_to"):
            read_embeds(path)
    uneven = iter([torch.ones(4, 2), torch.ones(5, 2)])
    with pytest.raises(ValueError, match="shorten the prompt"):
        encode_once(path, ["a"], ["b"], lambda text: next(uneven), identity="x")


def test_a_missing_package_is_one_sentence_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ValueError, match="pip install transformers sentencepiece ftfy") as caught:
        open_encoder(tmp_path)
    assert "ftfy, not installed here" in str(caught.value) and "\n" not in str(caught.value)
