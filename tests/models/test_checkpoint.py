"""Every published form of a Wan checkpoint is the same model; anything else is one sentence."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from linvideo_core.artifact import Artifact, save
from linvideo_core.distill import cli as distill
from linvideo_core.evaluate import cli as evaluate
from linvideo_core.models.attention_sites import shapes_of
from linvideo_core.models.base_weights import weights_digest
from linvideo_core.models.checkpoint import from_diffusers, load_wan, official_names, open_wan
from linvideo_core.models.families import identify
from linvideo_core.models.quantized import Float8Linear
from linvideo_core.models.wan import WanConfig, WanModel
from linvideo_core.teacher.config import TeacherConfig
from linvideo_core.teacher.teacher import Teacher, load_teacher
from linvideo_core.transfer import cli as transfer
from tests.conftest import save_inputs

Tensors = dict[str, Tensor]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STEM = "diffusion_pytorch_model"


def diffusers_names(num_layers: int) -> list[str]:
    """Return the parameters of diffusers' WanTransformer3DModel, text-to-video, spelled out."""
    embedder = "condition_embedder"
    layers = [
        f"{embedder}.time_embedder.linear_1",
        f"{embedder}.time_embedder.linear_2",
        f"{embedder}.time_proj",
        f"{embedder}.text_embedder.linear_1",
        f"{embedder}.text_embedder.linear_2",
        "patch_embedding",
        "proj_out",
    ]
    bare = ["scale_shift_table"]
    for block in (f"blocks.{i}" for i in range(num_layers)):
        for attention in (f"{block}.attn1", f"{block}.attn2"):
            layers += [f"{attention}.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")]
            bare += [f"{attention}.norm_q.weight", f"{attention}.norm_k.weight"]
        layers += [f"{block}.norm2", f"{block}.ffn.net.0.proj", f"{block}.ffn.net.2"]
        bare.append(f"{block}.scale_shift_table")
    return bare + [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


def as_official(wan: WanModel) -> Tensors:
    return {name: tensor.clone() for name, tensor in wan.state_dict().items()}


def as_comfyui(wan: WanModel, prefix: str = "model.diffusion_model.") -> Tensors:
    own = {f"{prefix}{name}": tensor for name, tensor in as_official(wan).items()}
    return own | {"vae.decoder.bias": torch.zeros(3)}


def as_diffusers(wan: WanModel) -> Tensors:
    tensors = as_official(wan)
    return {n: tensors[from_diffusers(n)] for n in diffusers_names(wan.config.num_layers)}


FORMS: dict[str, Callable[[WanModel], Tensors]] = {
    "official": as_official,
    "comfyui": as_comfyui,
    "comfyui, short": lambda wan: as_comfyui(wan, "diffusion_model."),
    "diffusers": as_diffusers,
}


def write_shards(folder: Path, tensors: Tensors, *, count: int = 3) -> Path:
    """Write a checkpoint in shards, each tensor in any of them, with its index; return that."""
    names = sorted(tensors)
    weight_map = {}
    for i in range(count):
        file = f"{STEM}-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::count]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / f"{STEM}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def find_single(folder: Path, tensors: Tensors) -> Path:
    save_file(tensors, folder / "wan.safetensors")
    return folder / "wan.safetensors"


def find_folder(folder: Path, tensors: Tensors) -> Path:
    find_single(folder, tensors)
    return folder


def find_pipeline(folder: Path, tensors: Tensors) -> Path:
    for name in ("transformer", "vae"):
        (folder / name).mkdir()
    save_file({"decoder.bias": torch.zeros(3)}, folder / "vae" / f"{STEM}.safetensors")
    write_shards(folder / "transformer", tensors)
    return folder


def find_sharded_folder(folder: Path, tensors: Tensors) -> Path:
    write_shards(folder, tensors)
    return folder


def find_shards_without_index(folder: Path, tensors: Tensors) -> Path:
    write_shards(folder, tensors).unlink()
    return folder


def find_any_shard(folder: Path, tensors: Tensors) -> Path:
    return write_shards(folder, tensors).with_name(f"{STEM}-00002-of-00003.safetensors")


PLACES = (
    find_folder,
    find_pipeline,
    write_shards,
    find_sharded_folder,
    find_shards_without_index,
    find_any_shard,
)


@pytest.mark.parametrize(
    ("form", "place"),
    [*((form, find_single) for form in FORMS), *(("diffusers", place) for place in PLACES)],
)
def test_every_form_and_every_place_is_the_same_velocity(
    form: str,
    place: Callable[[Path, Tensors], Path],
    wan: WanModel,
    inputs: tuple[Tensor, ...],
    tmp_path: Path,
) -> None:
    loaded = load_wan(place(tmp_path, FORMS[form](wan)))
    assert loaded.config == wan.config
    torch.testing.assert_close(loaded(*inputs), wan(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize("num_layers", [30, 40])
def test_diffusers_names_map_one_to_one_onto_every_parameter(num_layers: int) -> None:
    with torch.device("meta"):
        needed = set(WanModel(WanConfig(num_layers=num_layers)).state_dict())
    theirs = diffusers_names(num_layers)
    assert len(theirs) == len(needed)
    assert set(official_names(theirs).values()) == needed
    assert not needed & set(theirs) - {"patch_embedding.weight", "patch_embedding.bias"}


def test_loading_keeps_no_second_copy_of_a_file_that_needs_no_cast(
    wan: WanModel, tmp_path: Path
) -> None:
    path = find_single(tmp_path, as_official(wan))
    model = load_wan(path)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [[int(x, 16) for x in m[0].split("-")] for m in maps if m[-1] == str(path)]
    for name, parameter in model.named_parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in spans), name


def _remove(*numbers: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for number in numbers:
            (folder / f"{STEM}-{number:05d}-of-00003.safetensors").unlink()

    return change


def _damage_index(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / f"{STEM}.safetensors.index.json").write_text(text) and None


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "one shard missing": (_remove(2), r"1 of 3 shards are missing in .*-00002-of-00003"),
    "two shards missing": (_remove(1, 3), r"2 of 3 .*-00001-of-00003.*-00003-of-00003"),
    "an index that is none": (_damage_index("[]"), "is not an index of shards"),
    "an index of nothing": (_damage_index('{"weight_map": {}}'), "is not an index of shards"),
    "an index without end": (_damage_index("[" * 10**5 + "]" * 10**5), "is nested too deep"),
    "an index of no names": (_damage_index('{"weight_map": {"a": 1}}'), "names no files beside it"),
    "an index that is cut": (_damage_index('{"weight_map": {"a"'), "is not an index of shards"),
    "an index that leads out": (
        _damage_index('{"weight_map": {"a": "../b.safetensors"}}'),
        "is not an index of shards",
    ),
    "a shard of another checkpoint": (
        lambda folder: save_file(
            {"head.modulation": torch.zeros(1, 2, 128), "x": torch.zeros(1)},
            folder / f"{STEM}-00002-of-00003.safetensors",
        ),
        "head.modulation|does not fit",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_shards_are_named_in_one_sentence(name: str, wan: WanModel, tmp_path: Path) -> None:
    change, words = BROKEN[name]
    write_shards(tmp_path, as_official(wan))
    change(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        open_wan(tmp_path)
    assert "\n" not in str(caught.value)


def test_several_checkpoints_in_a_folder_are_named(wan: WanModel, tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file(as_official(wan), tmp_path / name)
    with pytest.raises(ValueError, match=r"holds a\.safetensors, b\.safetensors"):
        open_wan(tmp_path)


def test_a_folder_of_two_experts_asks_for_one(wan: WanModel, tmp_path: Path) -> None:
    for names in (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2")):
        folder = tmp_path / names[0]
        for name in names:
            (folder / name).mkdir(parents=True)
            save_file(as_official(wan), folder / name / "wan.safetensors")
        with pytest.raises(ValueError, match=f"folders of safetensors, {', '.join(names)}"):
            open_wan(folder)


FP8 = torch.float8_e4m3fn
MATRIX = re.compile(r"(.*\.)?blocks\..*\.weight")


def as_fp8(
    tensors: Tensors, scale: str, dtype: torch.dtype = FP8, rows: int = 1
) -> tuple[Tensors, Tensors]:
    """Return a checkpoint whose blocks' matrices are fp8, and what it stands for.

    scale: the name of a scale beside its weight; "": none. rows: 1 for one scale a tensor.
    """
    stored, meant = dict(tensors), dict(tensors)
    for name in (n for n, t in tensors.items() if MATRIX.fullmatch(n) and t.ndim == 2):
        stem, count = name.removesuffix("weight"), rows and len(tensors[name])
        factor = torch.linspace(0.003, 0.017, count).view(-1, 1) if count else torch.tensor(0.0123)
        factor = factor if scale else torch.ones(())
        stored[name] = (tensors[name] / factor).to(dtype)
        meant[name] = stored[name].float() * factor
        if scale:
            stored[stem + scale] = factor
            stored[stem + scale.replace("weight", "input")] = torch.ones(())
    return stored, meant


FP8_FORMS: dict[str, Callable[[Tensors], tuple[Tensors, Tensors]]] = {
    "e4m3": lambda tensors: as_fp8(tensors, ""),
    "e5m2": lambda tensors: as_fp8(tensors, "", torch.float8_e5m2),
    "scaled, first naming": lambda tensors: as_fp8(tensors, "scale_weight", rows=0),
    "scaled, second naming": lambda tensors: as_fp8(tensors, "weight_scale", rows=0),
    "scaled by row": lambda tensors: as_fp8(tensors, "weight_scale"),
    "scaled e5m2": lambda tensors: as_fp8(tensors, "scale_weight", torch.float8_e5m2, rows=0),
}
MARKERS = {
    "model.diffusion_model.scaled_fp8": torch.zeros(2, dtype=FP8),
    "model.diffusion_model.blocks.0.self_attn.q.comfy_quant": torch.zeros(9, dtype=torch.uint8),
}


@pytest.mark.parametrize("form", FP8_FORMS)
def test_fp8_checkpoints_are_the_model_that_they_stand_for(
    form: str, wan: WanModel, inputs: tuple[Tensor, ...], tmp_path: Path
) -> None:
    stored, meant = FP8_FORMS[form](as_comfyui(wan))
    path = find_single(tmp_path, stored | MARKERS)
    assert any(t.itemsize == 1 for t in stored.values())
    wan.load_state_dict({name: meant[f"model.diffusion_model.{name}"] for name in wan.state_dict()})
    loaded = load_wan(path)
    torch.testing.assert_close(loaded(*inputs), wan(*inputs), rtol=0, atol=0)
    _, sites = identify(shapes_of(wan))
    assert weights_digest(loaded, sites) == weights_digest(wan, sites)
    for name, parameter in load_wan(path, frozen="bf16").named_parameters():
        assert torch.equal(parameter, wan.get_parameter(name).bfloat16()), name


def test_scaled_weights_of_which_one_lacks_its_scale_are_refused(
    wan: WanModel, tmp_path: Path
) -> None:
    stored, _ = FP8_FORMS["scaled, first naming"](as_official(wan))
    del stored["blocks.0.ffn.0.scale_weight"]
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn\.0\.weight is stored in fp8 without its"):
        load_wan(find_single(tmp_path, stored))


@pytest.mark.parametrize("form", [form for form in FP8_FORMS if "e5m2" not in form])
def test_fp8_that_is_held_as_fp8_is_rounded_no_second_time(
    form: str, wan: WanModel, inputs: tuple[Tensor, ...], tmp_path: Path
) -> None:
    stored, meant = FP8_FORMS[form](as_official(wan))
    held = load_wan(find_single(tmp_path, stored), frozen="fp8").requires_grad_(False)
    layers = {n: m for n, m in held.named_modules() if isinstance(m, Float8Linear)}
    assert len(layers) == 10 * wan.config.num_layers
    for name, layer in layers.items():
        wide = layer.weight.float() * layer.scale
        assert torch.equal(wide, meant[f"{name}.weight"]), name
        x = torch.randn(3, layer.in_features, requires_grad=True)
        expected = (x.bfloat16() @ wide.bfloat16().T).float() + layer.bias.float()
        found = layer(x.bfloat16())
        torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
        found.sum().backward()
        torch.testing.assert_close(x.grad, wide.sum(0).expand(3, -1), rtol=0.02, atol=0.05)
        if "scaled" in form:
            assert torch.equal(
                layer.weight.view(torch.uint8), stored[f"{name}.weight"].view(torch.uint8)
            )
    wan.load_state_dict(meant)
    expected = wan.requires_grad_(False)(*inputs)
    assert (held(*inputs) - expected).norm() <= 0.02 * expected.norm()


QUANTISED = {
    "int8": (torch.int8, (), torch.float32),
    "4-bit form such as nvfp4": (torch.uint8, (128, 8), FP8),
    "mxfp8": (FP8, (128, 4), torch.uint8),
}


@pytest.mark.parametrize("form", QUANTISED)
def test_other_quantised_files_are_named_and_refused_before_they_are_read(
    form: str, wan: WanModel, tmp_path: Path
) -> None:
    dtype, scale_shape, scale_dtype = QUANTISED[form]
    tensors = as_comfyui(wan)
    name = "model.diffusion_model.blocks.0.self_attn.q.weight"
    tensors[name] = tensors[name].to(dtype)
    tensors[f"{name}_scale"] = torch.zeros(scale_shape).to(scale_dtype)
    words = f"q.weight is stored in.*{form}.*give the fp16.*inside ComfyUI, with LinVideo Linearize"
    with pytest.raises(ValueError, match=words) as caught:
        open_wan(find_single(tmp_path, tensors))
    assert "\n" not in str(caught.value)


def test_a_file_larger_than_the_computers_memory_is_opened_and_read_tensor_by_tensor(
    tmp_path: Path,
) -> None:
    config = WanConfig(dim=25600, num_heads=200, num_layers=16, ffn_dim=96)
    with torch.device("meta"):
        shapes = shapes_of(WanModel(config))
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 8 * math.prod(shape)
        header[name] = {"dtype": "F64", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        file.seek(8 + len(text) + header["blocks.3.norm3.bias"]["data_offsets"][0])
        file.write(torch.arange(25600, dtype=torch.float64).numpy().tobytes())
    assert end > 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    checkpoint = open_wan(path)
    assert checkpoint.config == config
    model = checkpoint.load(under=["blocks.3.norm3."])
    assert torch.equal(model.blocks[3].norm3.bias, torch.arange(25600.0))
    prompts = {"prompt_embeds": torch.ones(1, 1, 4096), "negative_embeds": torch.ones(1, 4096)}
    save_file(prompts, tmp_path / "prompts.safetensors")
    teacher = TeacherConfig(model=path, prompts=tmp_path / "prompts.safetensors")
    with pytest.raises(ValueError, match=r"free memory .*the model while it is read") as caught:
        load_teacher(teacher)
    assert "--frozen fp8" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin", ".gguf"])
def test_pickles_and_gguf_are_refused_unread(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"wan{suffix}"
    path.write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="safetensors"):
        open_wan(path)


def diffusers_image_names(num_layers: int) -> dict[str, str]:
    """Return what diffusers' image-to-video models have beside `diffusers_names`, and our names."""
    embedder = {"norm1": 0, "ff.net.0.proj": 1, "ff.net.2": 3, "norm2": 4}
    layers = {
        f"condition_embedder.image_embedder.{n}": f"img_emb.proj.{i}" for n, i in embedder.items()
    }
    names = {}
    for block in (f"blocks.{i}" for i in range(num_layers)):
        layers |= {f"{block}.attn2.add_{x}_proj": f"{block}.cross_attn.{x}_img" for x in "kv"}
        norm = "cross_attn.norm_k_img.weight"
        names[f"{block}.attn2.norm_added_k.weight"] = f"{block}.{norm}"
    return names | {f"{n}.{x}": f"{o}.{x}" for n, o in layers.items() for x in ("weight", "bias")}


@pytest.mark.parametrize("image_dim", [1280, 0])
def test_image_to_video_checkpoints_are_read_in_official_and_diffusers_naming(
    image_dim: int, wan: WanModel, tmp_path: Path
) -> None:
    config = dataclasses.replace(wan.config, in_channels=12, image_dim=image_dim)
    model = WanModel(config)
    official = as_official(model)
    theirs = {n: official[from_diffusers(n)] for n in diffusers_names(config.num_layers)}
    if image_dim:
        names = diffusers_image_names(config.num_layers)
        assert {n: from_diffusers(n) for n in names} == names
        theirs |= {name: official[ours] for name, ours in names.items()}
        theirs["blocks.0.attn2.norm_added_q.weight"] = torch.ones(128)
    for tensors in (official, theirs):
        loaded = load_wan(find_single(tmp_path, tensors))
        assert loaded.config == config
        for name, parameter in loaded.named_parameters():
            assert torch.equal(parameter, official[name]), name


VARIANTS = {
    "vace_patch_embedding.weight": "VACE",
    "control_adapter.conv.weight": "camera control",
    "casual_audio_encoder.encoder.final_linear.weight": "speech-to-video",
    "audio_proj.audio_proj_glob_1.layer.bias": "HuMo",
    "face_adapter.fuser_blocks.0.k_norm.weight": "Animate",
    "patch_embedding_mask.weight": "SCAIL 2",
    "patch_embedding_pose.weight": "SCAIL",
    "patch_embedding_global.weight": "WanDancer",
    "ref_conv.weight": "Fun control with a reference image",
    "img_emb.emb_pos": "first-and-last-frame",
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_other_variant_is_named_and_says_where_it_can_be_trained(
    name: str, prefix: str, wan: WanModel, tmp_path: Path
) -> None:
    tensors = as_official(wan) | {name: torch.zeros(1)}
    path = find_single(tmp_path, {prefix + n: tensor for n, tensor in tensors.items()})
    words = f"a Wan {re.escape(VARIANTS[name])}.* checkpoint was given; .*run the transfer now"
    with pytest.raises(ValueError, match=words) as caught:
        open_wan(path)
    assert "\n" not in str(caught.value)


STRANGERS = {
    "linvideo.blocks.0.self_attn.query_map": "a LINVIDEO file",
    "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": "a LoRA",
    "prompt_embeds": "prompt embeddings",
    "blocks.0.attn.qkv_proj.weight audio_patch_proj.weight": "MiniMax-H3",
    "token_embedding.weight blocks.0.attn.q.weight": "T5 text encoder",
    "decoder.conv1.weight": "video autoencoder",
    "double_blocks.0.img_mod.lin.weight": "another family",
    "something.weight": "its tensors are called 'something.weight'",
}


@pytest.mark.parametrize("names", STRANGERS)
def test_a_file_of_another_family_is_called_by_its_name(names: str, tmp_path: Path) -> None:
    path = find_single(tmp_path, {name: torch.zeros(2) for name in names.split()})
    with pytest.raises(ValueError, match=re.escape(STRANGERS[names])) as caught:
        open_wan(path)
    assert "known are Wan 2.1 and 2.2" in str(caught.value)
    assert "\n" not in str(caught.value)


def update(name: str, *shape: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


CHANGES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "control": (
        update("patch_embedding.weight", 128, 9, 1, 2, 2),
        "control .*9 channels in, 4 out",
    ),
    "half an image embedder": (update("img_emb.proj.0.bias", 3), "img_emb.proj.0.bias"),
    "a missing tensor": (lambda t: t.pop("blocks.1.ffn.0.bias"), "blocks.1.ffn.0.bias"),
    "a missing layer": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("blocks.1.")],
        "blocks.1.",
    ),
    "a million layers": (update("blocks.999999.x", 1), r"blocks\.3\. is missing"),
    "a layer of 190 digits": (update(f"blocks.{'9' * 190}.x", 1), r"blocks\.3\. is missing"),
    "a thousand layers more": (
        lambda t: t.update({f"blocks.{i}.x": torch.zeros(1) for i in range(3, 1500)}),
        "it has 1500 blocks, and a whole number from 1 to 1000",
    ),
    "an absurd name": (update("x" * 100_000, 1), "which is no model's tensor"),
    "an extra tensor": (update("other", 3), "other"),
    "a shape of another width": (update("blocks.2.ffn.2.bias", 7), "blocks.2.ffn.2.bias"),
    "no patch embedding": (lambda t: t.pop("patch_embedding.weight"), "not a Wan"),
    "a flat patch embedding": (update("patch_embedding.weight", 128, 4), "not a Wan"),
    "a head without shape": (update("head.head.weight"), "not a Wan"),
    "layers without numbers": (update("blocks.x.bias", 3), "not a whole model"),
    "a narrow model": (update("patch_embedding.weight", 64, 4, 1, 2, 2), "not a Wan"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_model_is_refused_in_one_sentence(name: str, wan: WanModel, tmp_path: Path) -> None:
    change, words = CHANGES[name]
    tensors = as_official(wan)
    change(tensors)
    path = find_single(tmp_path, tensors)
    with pytest.raises(ValueError, match=words) as caught:
        load_wan(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a model",
        b"\xff" * 200,
        (2**40).to_bytes(8, "little") + b"{}",
        len(b"{}").to_bytes(8, "little") + b"{}",
        len(b"[1]").to_bytes(8, "little") + b"[1]",
        b"PK\x03\x04" + b"\0" * 100,
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.safetensors") as caught:
        load_wan(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [[0, 2**62], [2**62, 0], [0] * 9])
def test_a_size_that_the_file_does_not_hold_is_refused(
    shape: list[int], wan: WanModel, tmp_path: Path
) -> None:
    tensors = {**as_official(wan), "text_embedding.0.weight": torch.zeros(0, 4096)}
    path = find_single(tmp_path, tensors)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["text_embedding.0.weight"]["shape"] = shape
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    with pytest.raises(ValueError, match=r"no model's tensor|not a readable"):
        open_wan(path)


def test_a_cut_file_is_refused_in_one_sentence(wan: WanModel, tmp_path: Path) -> None:
    path = find_single(tmp_path, as_official(wan))
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    assert json.loads(whole[8:header])
    for size in (4, 8, header // 2, header, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a readable safetensors file") as caught:
            load_wan(path)
        assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none.safetensors", "exist"), (tmp_path, "without a safetens")):
        with pytest.raises(FileNotFoundError, match=words):
            load_wan(path)


def test_half_precision_files_load_in_the_dtype_that_is_asked_for(
    wan: WanModel, tmp_path: Path
) -> None:
    path = tmp_path / "wan.safetensors"
    save_file({n: t.half() for n, t in wan.state_dict().items()}, path)
    assert {p.dtype for p in load_wan(path).parameters()} == {torch.float32}
    assert {p.dtype for p in load_wan(path, frozen="bf16").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_with_its_tensor(
    dtype: torch.dtype, number: float, wan: WanModel, tmp_path: Path
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in as_official(wan).items()}
    weight = tensors["blocks.1.ffn.0.weight"]
    weight[3, 5] = torch.finfo(dtype).max
    path = tmp_path / "wan.safetensors"
    save_file(tensors, path)
    load_wan(path)
    # E4M3 has no infinity.
    weight[3, 5] = math.nan if dtype == torch.float8_e4m3fn else number
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.0\.weight in .* holds NaN or inf"):
        load_wan(path)


@pytest.mark.parametrize("command", [transfer, distill, evaluate])
def test_every_command_refuses_such_weights_before_it_begins(
    command: ModuleType, teacher: Teacher, linearized: Artifact, tmp_path: Path
) -> None:
    teacher.model.get_parameter("blocks.1.ffn.0.weight")[3, 5] = math.nan
    files = save_inputs(teacher, tmp_path)
    if command is not transfer:
        save(linearized, tmp_path / "linearized.safetensors")
        files["--artifact"] = tmp_path / "linearized.safetensors"
    size = ["--num-frames", "5", "--height", "48", "--width", "32", "--device", "cpu"]
    words = [str(word) for pair in files.items() for word in pair]
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        command.main([*words, *size, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
