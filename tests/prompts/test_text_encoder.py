"""Prompts become what Wan's own text encoder makes of them, once, from files that people have."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from linvideo_core.models.wan import WanModel
from linvideo_core.prompts import NEGATIVE_PROMPT, default_prompts
from linvideo_core.prompts.config import PromptConfig
from linvideo_core.prompts.embeddings import read_embeds
from linvideo_core.prompts.sources import EMBEDS_NAME, find_source
from linvideo_core.prompts.text_encoder import MAX_TOKENS, clean, cut, open_encoder, open_tokenizer
from linvideo_core.teacher.config import TeacherConfig
from linvideo_core.teacher.teacher import Teacher, open_teacher
from linvideo_core.transfer import command as transfer
from tests.conftest import Recorder, save_inputs, small_transfer
from tests.test_kills import OWN, TRANSFER, assert_kills_change_nothing

transformers = pytest.importorskip(
    "transformers", reason="encoding prompts needs the extra packages transformers, sentencepiece"
)
for name in ("sentencepiece", "ftfy"):
    pytest.importorskip(name, reason=f"encoding prompts needs the extra package {name}")

TEXT_DIM = 16
TEXTS = ["A red kite dives &amp; climbs,\n  again", "a boat"]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 90 pieces, numbered as UMT5's: pad 0, end 1, unknown 2."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("pieces")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(default_prompts()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "spiece"), vocab_size=90, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return folder / "spiece.model"


def make_umt5(**sizes: int) -> nn.Module:
    torch.manual_seed(0)
    usual = {"vocab_size": 90, "d_kv": 4, "d_ff": 24, "num_layers": 3, "num_heads": 2}
    config = transformers.UMT5Config(**usual, **sizes)
    model = transformers.UMT5EncoderModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(scope="module")
def umt5() -> nn.Module:
    return make_umt5(d_model=TEXT_DIM)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del tensors["encoder.embed_tokens.weight"]
    return tensors


@pytest.fixture(scope="module")
def pipeline(
    umt5: nn.Module, sentencepiece_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A diffusers pipeline's folder, as far as text goes, saved by `transformers` in shards."""
    folder = tmp_path_factory.mktemp("pipeline")
    umt5.save_pretrained(folder / "text_encoder", max_shard_size="4KB")
    assert len(list((folder / "text_encoder").glob("*.safetensors"))) > 1
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(sentencepiece_model.read_bytes())
    return folder


@pytest.fixture(scope="module")
def single(
    umt5: nn.Module, sentencepiece_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """ComfyUI's one file, with the tokenizer in it."""
    path = tmp_path_factory.mktemp("single") / "umt5_xxl_fp16.safetensors"
    pieces = torch.frombuffer(bytearray(sentencepiece_model.read_bytes()), dtype=torch.uint8)
    save_file(tensors_of(umt5) | {"spiece_model": pieces}, path)
    return path


def round_to_fp8(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights as ComfyUI's fp8_scaled file holds them, and what they stand for."""
    stored = tensors | {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    meant = dict(tensors)
    for name in (n for n in tensors if "SelfAttention" in n or "DenseReluDense" in n):
        if "relative_attention_bias" in name:
            continue
        scale = tensors[name].abs().max() / 448
        stored[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        stored[name.replace("weight", "scale_weight")] = scale
        meant[name] = stored[name].float() * scale
    return stored, meant


def test_comfyuis_fp8_scaled_file_is_the_encoder_that_it_stands_for(
    sentencepiece_model: Path, single: Path, tmp_path: Path
) -> None:
    umt5 = make_umt5(d_model=TEXT_DIM)
    stored, meant = round_to_fp8(tensors_of(umt5))
    umt5.load_state_dict(meant | {"encoder.embed_tokens.weight": meant["shared.weight"]})
    path = tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    save_file(stored | {"spiece_model": load_file(single)["spiece_model"]}, path)
    encoder = open_encoder(path)
    tokens = cut(open_tokenizer(encoder.tokenizer)("a boat"))
    with encoder.load("cpu") as embed:
        torch.testing.assert_close(embed(tokens), as_wan_does(umt5, tokens), **TOLERANCE)


def as_wan_does(umt5: nn.Module, tokens: list[int]) -> Tensor:
    """Return Wan's own way: padded to 512 with a mask, cut to the real length, zeros after."""
    ids = torch.zeros(1, MAX_TOKENS, dtype=torch.long)
    ids[0, : len(tokens)] = torch.tensor(tokens)
    mask = (torch.arange(MAX_TOKENS) < len(tokens)).long()[None]
    with torch.no_grad():
        embeds = umt5(input_ids=ids, attention_mask=mask).last_hidden_state[0]
    return embeds * mask[0].unsqueeze(1)


@pytest.mark.parametrize("form", ["pipeline", "single"])
def test_embeddings_are_the_encoders_own_output_with_zeros_after_the_text(
    form: str,
    umt5: nn.Module,
    sentencepiece_model: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A red kite dives &amp;  climbs\n\na boat\n", encoding="utf-8")
    config = PromptConfig(text_encoder=request.getfixturevalue(form), negative_prompt="")
    found = find_source(prompts, config).read(tmp_path, device="cpu")
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    expected = [
        as_wan_does(umt5, [*pieces.encode(text), 1])
        for text in ("A red kite dives & climbs", "a boat", "")
    ]
    assert found.prompts == ["A red kite dives &amp;  climbs", "a boat"]
    torch.testing.assert_close(found.prompt_embeds, torch.stack(expected[:2]), **TOLERANCE)
    torch.testing.assert_close(found.negative_embeds, expected[2], **TOLERANCE)
    assert torch.equal(found.prompt_embeds == 0, torch.stack(expected[:2]) == 0)


def test_a_fast_tokenizer_says_what_its_library_says(pipeline: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "boat": 4}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast.enable_truncation(3)
    fast.enable_padding(length=8)
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenize = open_tokenizer(open_encoder(pipeline, tmp_path).tokenizer)
    assert cut(tokenize("a boat a kite")) == [3, 4, 3, 2, 1]


def test_a_text_is_cleaned_and_cut_as_in_wans_pipeline() -> None:
    assert clean("  a &amp;amp; b\u00a0\n c ") == "a & b c"
    assert clean("â€œquotedâ€\x9d") == '"quoted"'
    assert cut([5, 6, 1]) == cut([5, 6]) == [5, 6, 1]
    assert cut([]) == [1]
    long = cut([7] * 600 + [1])
    assert len(long) == MAX_TOKENS and long[-2:] == [7, 1]


def test_prompts_are_encoded_once_for_an_encoder_and_its_words(
    pipeline: Path, single: Path, tmp_path: Path
) -> None:
    def read(**changes: object) -> Recorder:
        config = PromptConfig(**{"text_encoder": pipeline, "negative_prompt": "", **changes})
        recorder = Recorder()
        find_source(words, config).read(tmp_path, device="cpu", callbacks=recorder)
        return recorder

    words = tmp_path / "words.txt"
    words.write_text("one\ntwo\n")
    first = read()
    assert first.seen == [("encoding_prompts", done) for done in range(4)]
    assert first.totals == {"encoding_prompts": 3}
    assert read().seen == []
    assert read(negative_prompt="still").seen
    assert read(negative_prompt="still\n\nblurred\n").totals == {"encoding_prompts": 4}
    assert len(read_embeds(tmp_path / EMBEDS_NAME).negative_embeds) == 2
    words.write_text("one\nthree\n")
    assert read(negative_prompt="still").seen
    assert {path.name for path in tmp_path.iterdir()} == {"words.txt", EMBEDS_NAME}


def test_without_a_file_the_prompts_and_the_negative_are_linvideos_own(
    pipeline: Path,
) -> None:
    source = find_source(None, PromptConfig(text_encoder=pipeline))
    assert source.prompts == default_prompts() and source.negative == NEGATIVE_PROMPT


def test_a_transfer_encodes_into_its_folder_before_the_model_is_read(
    wan: WanModel, pipeline: Path, tmp_path: Path
) -> None:
    save_file(wan.state_dict(), tmp_path / "wan.safetensors")
    words = tmp_path / "words.txt"
    words.write_text("a dog runs\na cat jumps\n")
    own = {"prompts": words, "text_encoder": pipeline, "evaluate_samples": 0, "steps": 1}
    recorder = Recorder()
    transfer.run(small_transfer(tmp_path / "wan.safetensors", **own), recorder)
    assert recorder.stages[0] == "encoding_prompts"
    embeds = read_embeds(tmp_path / "run" / EMBEDS_NAME)
    assert embeds.prompts == ["a dog runs", "a cat jumps"]
    assert embeds.prompt_embeds.shape == (2, MAX_TOKENS, TEXT_DIM)
    stored = load_file(tmp_path / "run" / EMBEDS_NAME)["prompt_embeds"]
    assert stored.shape[1] < MAX_TOKENS, "the padding is not stored"


def sentence(config: TeacherConfig) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        open_teacher(config)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 500
    return message


def test_an_encoder_that_does_not_fit_is_refused_by_its_headers(
    wan: WanModel, umt5: nn.Module, pipeline: Path, single: Path, tmp_path: Path
) -> None:
    save_file(wan.state_dict(), tmp_path / "wan.safetensors")

    def refuse(encoder: Path, **changes: object) -> str:
        text = PromptConfig(text_encoder=encoder, **changes)
        return sentence(TeacherConfig(model=tmp_path / "wan.safetensors", text=text))

    def write(name: str, tensors: dict[str, Tensor]) -> Path:
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    pickled = tmp_path / "models_t5_umt5-xxl-enc-bf16.pth"
    pickled.write_bytes(b"\x80\x04")
    assert "pickle" in refuse(pickled) and "umt5_xxl_fp16.safetensors" in refuse(pickled)
    assert "does not exist" in refuse(tmp_path / "none")
    tensors = tensors_of(umt5)
    assert "--tokenizer" in refuse(write("bare.safetensors", tensors))
    bias = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    t5 = {name: tensor for name, tensor in tensors.items() if name != bias}
    assert "T5 is another encoder" in refuse(write("t5.safetensors", t5))
    assert "not a UMT5 encoder" in refuse(tmp_path / "wan.safetensors")
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    rounded = tensors | {name: tensors[name].to(torch.int8)}
    assert "q.weight is stored in int8; give diffusers'" in refuse(
        write("int8.safetensors", rounded)
    )
    pieces = load_file(single)["spiece_model"]
    wide = tensors_of(make_umt5(d_model=24)) | {"spiece_model": pieces}
    assert "gives embeddings of width 24" in refuse(write("wide.safetensors", wide))
    index = pipeline / "text_encoder" / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    names["weight_map"]["more"] = "model-00009-of-00009.safetensors"
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / index.name).write_text(json.dumps(names))
    assert "shards are missing" in refuse(copy)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows kills in another way")
def test_a_transfer_that_is_killed_while_it_encodes_ends_in_the_same_files(
    single: Path, teacher: Teacher, one_thread: None, tmp_path: Path
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("".join(f"a boat, number {number}\n" for number in range(300)))
    paths = {"model": save_inputs(teacher, tmp_path)["--model"], "prompts": words, "text": single}
    command = f"{TRANSFER} {OWN} --text-encoder {{text}}"
    found = assert_kills_change_nothing(command, paths, tmp_path, 20)
    assert EMBEDS_NAME in found
