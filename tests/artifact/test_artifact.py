import copy
import dataclasses
import json
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from linvideo_core import artifact
from linvideo_core.artifact import Artifact, ArtifactError, ArtifactHeader, Usage
from linvideo_core.models import attention_sites, lora
from linvideo_core.models.attention import LinearAttention, MixedAttention
from linvideo_core.models.base_weights import weights_digest
from linvideo_core.models.families import identify
from linvideo_core.models.wan import WanModel
from tests.conftest import make_wan

LINEAR_LAYERS = (0, 2)
FEATURE_DIM = 64
PARAMETERS = ("full", "lora", "feature_maps")
PROVENANCE = {"date": "2024-05-01", "preset": "tiny; ünïcode", "lr": 1e-4, "seed": 3}
FP16_TOLERANCE = {"rtol": 2e-3, "atol": 2e-3}
Tensors = dict[str, Tensor]
Entries = dict[str, str]


def make_teacher(*, num_heads: int = 2, num_layers: int = 3, seed: int = 0) -> WanModel:
    return make_wan(num_heads=num_heads, num_layers=num_layers, seed=seed)


@torch.no_grad()
def make_student(teacher: WanModel, parameters: str) -> WanModel:
    """Return a teacher's copy with layer 0 linear, 1 hardened to softmax, 2 hardened to linear."""
    student = copy.deepcopy(teacher)
    _, sites = identify(attention_sites.shapes_of(student))
    torch.manual_seed(1)

    def make(site: attention_sites.AttentionSite) -> nn.Module:
        linear = LinearAttention(site.num_heads, site.head_dim, FEATURE_DIM)
        linear.key_map += 0.02 * torch.randn_like(linear.key_map)
        if site.layer == 0:
            return linear
        mixed = MixedAttention(linear, 0.5)
        mixed.mode = "linear" if site.layer in LINEAR_LAYERS else "softmax"
        return mixed

    attention_sites.install(student, sites, make)
    if parameters == "full":
        for name, parameter in student.named_parameters():
            if name.startswith("blocks.") and ".attention." not in name:
                parameter += 0.02 * torch.randn_like(parameter)
    if parameters == "lora":
        for change in lora.attach(student, "blocks.", rank=4, seed=2).values():
            change.up.normal_(std=0.02)
    return student


def make_artifact(parameters: str = "full") -> tuple[WanModel, WanModel, Artifact]:
    teacher = make_teacher()
    student = make_student(teacher, parameters)
    made = artifact.extract(
        student,
        teacher,
        parameters=parameters,
        objective="dmd",
        steps=12,
        provenance=PROVENANCE,
        sigmas=(1, 0.75, 0.3, 0.0),
    )
    return teacher, student, made


def make_small(parameters: str = "full") -> Artifact:
    """Return an artifact of a few hundred bytes, for tests that need no model."""
    torch.manual_seed(3)
    return Artifact(
        header=ArtifactHeader(
            family="wan",
            fingerprint="wan, 3 layers, 2 heads of 128",
            weights_digest="0123456789abcdef",
            linear_layers=LINEAR_LAYERS,
            site_names=("blocks.0.self_attn", "blocks.2.self_attn"),
            num_layers=3,
            feature_dim=6,
            parameters=parameters,
            lora_rank=2 if parameters == "lora" else 0,
            objective="velocity",
            steps=5,
            sigmas=(1.0, 0.75, 0.3, 0.0),
            provenance=PROVENANCE,
        ),
        linear={
            layer: {name: torch.randn(2, 4, 3) for name in ("query_map", "key_map")}
            for layer in LINEAR_LAYERS
        },
        deltas={
            "blocks.0.self_attn.q.weight": torch.randn(3, 2),
            "blocks.0.self_attn.q.bias": torch.randn(3),
            "blocks.0.modulation": torch.randn(1, 6, 2),
        }
        if parameters == "full"
        else {},
        low_rank={"blocks.0.self_attn.q": (torch.randn(2, 5), torch.randn(4, 2))}
        if parameters == "lora"
        else {},
    )


def run(model: WanModel) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    dtype = model.patch_embedding.weight.dtype
    latents = torch.randn(2, 4, 3, 6, 10, generator=generator).to(dtype)
    prompt_embeds = torch.randn(2, 7, 16, generator=generator).to(dtype)
    with torch.no_grad():
        return model(latents, torch.tensor([300.0, 900.0]), prompt_embeds)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def snapshot(model: nn.Module) -> tuple[dict[str, bytes], list[int]]:
    """Return every parameter's bits, and which modules stand in the model."""
    parameters = {name: bits(value.flatten()) for name, value in model.named_parameters()}
    return parameters, [id(module) for module in model.modules()]


def tensors_of(made: Artifact) -> Tensors:
    pairs = {name: {"down": down, "up": up} for name, (down, up) in made.low_rank.items()}
    groups = {**made.linear, **pairs}
    flat = {f"{owner}/{name}": x for owner, group in groups.items() for name, x in group.items()}
    return {**flat, **made.deltas}


def assert_same(left: Artifact, right: Artifact, dtype: torch.dtype) -> None:
    assert left.header == right.header
    ours, theirs = tensors_of(left), tensors_of(right)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert theirs[name].dtype == dtype
        assert torch.equal(ours[name].to(dtype), theirs[name]), name


def assert_refused(made: Artifact, model: nn.Module, sentence: str, **how: object) -> None:
    with pytest.raises(ArtifactError, match=sentence), artifact.apply(made, model, **how):
        pass


def rewrite(path: Path, change: Callable[[Tensors, Entries], object]) -> None:
    """Change a file's tensors and header entries by hand."""
    with safe_open(path, framework="pt") as file:
        entries = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors, entries)
    save_file(tensors, path, metadata=entries or None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_round_trip_keeps_everything(tmp_path: Path, parameters: str, dtype: torch.dtype) -> None:
    made = make_small(parameters)
    artifact.save(made, tmp_path / "a.safetensors", dtype=dtype)
    assert_same(made, artifact.load(tmp_path / "a.safetensors"), dtype)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_tensors_have_names_that_lora_loaders_read_and_the_header_is_json(
    tmp_path: Path,
) -> None:
    names = set()
    for parameters in ("full", "lora"):
        artifact.save(make_small(parameters), tmp_path / "a.safetensors")
        names |= set(load_file(tmp_path / "a.safetensors"))
    assert names == {
        "linvideo.blocks.0.self_attn.query_map",
        "linvideo.blocks.0.self_attn.key_map",
        "linvideo.blocks.2.self_attn.query_map",
        "linvideo.blocks.2.self_attn.key_map",
        "diffusion_model.blocks.0.self_attn.q.diff",
        "diffusion_model.blocks.0.self_attn.q.diff_b",
        "diffusion_model.blocks.0.modulation.diff",
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight",
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight",
    }
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        entries = file.metadata()
    assert entries["linvideo.layers"] == "[0, 2]"
    assert json.loads(entries["linvideo.provenance"]) == PROVENANCE


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_applied_model_is_the_student(tmp_path: Path, parameters: str) -> None:
    teacher, student, made = make_artifact(parameters)
    artifact.save(made, tmp_path / "a.safetensors")
    before, expected = run(teacher), run(student)
    with artifact.apply(artifact.load(tmp_path / "a.safetensors"), teacher) as applied:
        torch.testing.assert_close(run(applied), expected, **FP16_TOLERANCE)
    assert (before - expected).abs().max() > 10 * FP16_TOLERANCE["atol"]


@pytest.mark.parametrize(
    ("parameters", "dtype"),
    [
        ("full", torch.float32),
        ("full", torch.float16),
        ("lora", torch.bfloat16),
        ("feature_maps", torch.float32),
    ],
)
def test_afterwards_the_model_is_bit_for_bit_what_it_was(
    parameters: str, dtype: torch.dtype
) -> None:
    teacher, _, made = make_artifact(parameters)
    teacher.to(dtype)
    teacher.blocks[0].self_attn.q.bias.data.fill_(-0.0)
    before, output = snapshot(teacher), run(teacher)
    for _ in range(2):
        with artifact.apply(made, teacher, strength=0.7):
            assert snapshot(teacher) != before
            assert teacher.blocks[0].self_attn.q.weight.dtype == dtype
            assert teacher.blocks[0].self_attn.attention.query_map.dtype == torch.float32
            assert not torch.equal(run(teacher), output)
        assert snapshot(teacher) == before
    assert torch.equal(run(teacher), output)


@pytest.mark.parametrize("strength", [0, 0.5, 2.0])
@pytest.mark.parametrize("parameters", ["full", "lora"])
def test_strength_scales_the_weight_changes_alone(parameters: str, strength: float) -> None:
    teacher, _, made = make_artifact(parameters)
    name = "blocks.1.ffn.0.weight"
    if parameters == "full":
        change = made.deltas[name]
    else:
        down, up = made.low_rank["blocks.1.ffn.0"]
        change = up @ down
    expected = teacher.get_parameter(name).detach() + strength * change
    with artifact.apply(made, teacher, strength=strength):
        torch.testing.assert_close(teacher.get_parameter(name).detach(), expected)
        maps = teacher.blocks[2].self_attn.attention
        assert torch.equal(maps.key_map, made.linear[2]["key_map"])


def test_apply_leaves_random_numbers_alone() -> None:
    teacher, _, made = make_artifact("full")
    before = torch.get_rng_state()
    with artifact.apply(made, teacher):
        assert torch.equal(torch.get_rng_state(), before)


def test_impossible_strength_is_refused() -> None:
    teacher, _, made = make_artifact("feature_maps")
    for strength in (-0.1, 2.1, float("nan"), float("inf"), "1", None):
        assert_refused(made, teacher, "strength", strength=strength)


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_its_repr_is_short(parameters: str) -> None:
    shown = repr(make_small(parameters))
    assert "wan, 3 layers" in shown and "tensor(" not in shown


def test_applying_twice_is_refused() -> None:
    teacher, _, made = make_artifact("full")
    with artifact.apply(made, teacher):
        for model in (teacher, make_student(make_teacher(), "feature_maps")):
            before = snapshot(model)
            assert_refused(made, model, "is linear already")
            assert snapshot(model) == before


def test_failure_half_way_leaves_the_model_as_it_was() -> None:
    teacher, _, made = make_artifact("full")
    teacher.half()
    last = list(made.deltas)[-1]
    overflowing = dataclasses.replace(
        made, deltas={**made.deltas, last: torch.full_like(made.deltas[last], 1e5)}
    )
    before = snapshot(teacher)
    assert_refused(overflowing, teacher, f"{last} overflows")
    assert snapshot(teacher) == before


def test_other_weights_of_the_same_architecture_are_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, _, made = make_artifact("full")
    with caplog.at_level(logging.WARNING):
        with artifact.apply(made, make_teacher()):
            assert not caplog.records
        with artifact.apply(made, make_teacher(seed=9)):
            pass
    assert "off those that the file was made from: another finetune" in caplog.text


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (make_teacher(num_heads=1), "2 heads of 128.* but .*wan, 3 layers, 1 heads of 128"),
        (make_teacher(num_layers=4), "wan, 3 layers.* but .*wan, 4 layers, 2 heads of 128"),
        (nn.Linear(2, 2), r"made for wan, 3 layers.* known family"),
    ],
)
def test_a_wrong_model_is_refused_with_both_names(model: nn.Module, sentence: str) -> None:
    assert_refused(make_artifact("feature_maps")[2], model, sentence)


@pytest.mark.parametrize(
    ("parameters", "change", "sentence"),
    [
        ("full", {"deltas": {"blocks.7.x.weight": torch.ones(2)}}, "blocks.7.x.weight has no"),
        ("full", {"deltas": {"blocks.0.ffn.0.bias": torch.ones(2)}}, r"shape \[2\].* needs \[96\]"),
        (
            "lora",
            {"low_rank": {"blocks.0.ffn.9": (torch.ones(4, 2), torch.ones(2, 4))}},
            "LoRA of blocks.0.ffn.9 has no",
        ),
        (
            "lora",
            {"low_rank": {"blocks.0.ffn.0": (torch.ones(4, 2), torch.ones(2, 4))}},
            r"shape \[2, 2\].* needs \[96, 256\]",
        ),
        (
            "feature_maps",
            {
                "linear": {
                    layer: dict.fromkeys(("query_map", "key_map"), torch.ones(1, 128, 32))
                    for layer in LINEAR_LAYERS
                }
            },
            r"shape \[1, 128, 32\].* needs \[2, 128, 32\]",
        ),
        ("feature_maps", {"site_names": ("blocks.0.attn", "blocks.2.attn")}, "no self-attention"),
        ("feature_maps", {"family": "hunyuan"}, "family 'hunyuan'.*family 'wan'"),
        ("feature_maps", {"num_layers": 30}, "30 layers.*3 layers"),
    ],
)
def test_an_artifact_that_does_not_fit_is_refused(
    parameters: str, change: dict, sentence: str
) -> None:
    teacher, _, made = make_artifact(parameters)
    header_fields = {field.name for field in dataclasses.fields(ArtifactHeader)}
    if change.keys() <= header_fields:
        change = {"header": dataclasses.replace(made.header, **change)}
    before = snapshot(teacher)
    assert_refused(dataclasses.replace(made, **change), teacher, sentence)
    assert snapshot(teacher) == before


def test_extract_describes_the_student() -> None:
    teacher, _, made = make_artifact("lora")
    _, sites = identify(attention_sites.shapes_of(teacher))
    header = made.header
    assert (header.linear_layers, header.num_layers) == (LINEAR_LAYERS, 3)
    assert (header.parameters, header.lora_rank, header.feature_dim) == ("lora", 4, FEATURE_DIM)
    assert header.weights_digest == weights_digest(teacher, sites)
    assert header.sigmas == (1.0, 0.75, 0.3, 0.0)
    assert header.provenance == PROVENANCE


SETTINGS = {"objective": "adm", "steps": 1, "provenance": {}}


def test_extract_leaves_out_unchanged_weights_and_warns_of_changes_that_no_file_keeps(
    caplog: pytest.LogCaptureFixture,
) -> None:
    teacher = make_teacher()
    student = make_student(teacher, "feature_maps")
    student.blocks[1].modulation.data.add_(1)
    student.head.head.bias.data.add_(1)
    made = artifact.extract(student, teacher, parameters="full", **SETTINGS)
    assert list(made.deltas) == ["blocks.1.modulation"]
    assert "first: head.head.bias" in caplog.text


def _undecided(student: WanModel) -> None:
    student.blocks[1].self_attn.attention.mode = "mixed"


def _all_softmax(student: WanModel) -> None:
    for block in student.blocks:
        block.self_attn.attention = make_teacher().blocks[0].self_attn.attention


@pytest.mark.parametrize(
    ("trained", "parameters", "spoil", "sentence"),
    [
        ("feature_maps", "feature_maps", _undecided, "still a mixture"),
        ("feature_maps", "feature_maps", _all_softmax, "no linear layer"),
        ("feature_maps", "lora", lambda student: None, "has no LoRA"),
        ("lora", "full", lambda student: None, "has LoRA"),
        ("feature_maps", "all", lambda student: None, "parameters is 'all'"),
    ],
)
def test_extract_refuses_a_student_that_is_not_ready(
    trained: str, parameters: str, spoil: Callable[[WanModel], None], sentence: str
) -> None:
    teacher = make_teacher()
    student = make_student(teacher, trained)
    spoil(student)
    with pytest.raises(ArtifactError, match=sentence):
        artifact.extract(student, teacher, parameters=parameters, **SETTINGS)


def test_extract_refuses_another_teacher() -> None:
    student = make_student(make_teacher(), "feature_maps")
    with pytest.raises(ArtifactError, match=r"3 layers.* 4 layers"):
        artifact.extract(student, make_teacher(num_layers=4), parameters="full", **SETTINGS)
    for teacher, parameters in ((student, "full"), (copy.deepcopy(student), "feature_maps")):
        with pytest.raises(ArtifactError, match="teacher has linear layers"):
            artifact.extract(student, teacher, parameters=parameters, **SETTINGS)


ABSURD = {
    "family": ["", "wan\x1b[31m"],
    "fingerprint": ["x" * 1000],
    "weights_digest": ["not hexadecimal!"],
    "linear_layers": [(), (0, 0), (2, 0), (0, 3), (-1, 0), (0, 10**30), (0, 1.0), [0, 2]],
    "site_names": [("blocks.0.self_attn",), ("blocks.0.self_attn",) * 2],
    "num_layers": [10**30, None],
    "feature_map": ["relu"],
    "feature_dim": [7, 2**40],
    "parameters": [["full"]],
    "lora_rank": [4],
    "steps": [-1, 1.5],
    "sigmas": [
        *((1.0,), (1.0, 0.5), (0.5, 0.7, 0.0), (1.0, 1.0, 0.0)),
        *((float("nan"), 0.0), (10**400, 0), ("1", 0)),
    ],
    "usage": [{"width": 832}],
    "weights_sketch": [
        *((0.1,) * 63, [0.1] * 64),
        *((0.1,) * 63 + (last,) for last in (float("nan"), 1.5, True)),
    ],
    "provenance": ["by hand", {"loss": float("inf")}, {"config": {"nested": 1}}, {3: "x"}],
}


@pytest.mark.parametrize("field", ABSURD)
def test_absurd_header_values_are_refused_by_name(field: str) -> None:
    header = make_small().header
    for value in ABSURD[field]:
        with pytest.raises(ArtifactError, match=field):
            dataclasses.replace(header, **{field: value})


def _rename(old: str, new: str) -> Callable[[Tensors, Entries], None]:
    return lambda tensors, _: tensors.update({new: tensors.pop(old)})


def _drop(*names: str) -> Callable[[Tensors, Entries], None]:
    return lambda tensors, entries: [tensors.pop(n, entries.pop(n, None)) for n in names]


def _put(**items: str | Tensor) -> Callable[[Tensors, Entries], None]:
    """Set header entries to texts, and the tensors called by an alias below to tensors."""

    def change(tensors: Tensors, entries: Entries) -> None:
        for name, value in items.items():
            if isinstance(value, Tensor):
                tensors[ALIASES[name]] = value
            else:
                entries[f"linvideo.{name}"] = value

    return change


ALIASES = {
    "query": "linvideo.blocks.0.self_attn.query_map",
    "key": "linvideo.blocks.0.self_attn.key_map",
    "other_site": "linvideo.blocks.1.self_attn.query_map",
    "delta": "diffusion_model.blocks.0.self_attn.q.diff",
    "bare": "diffusion_model.blocks.0.modulation.diff",
    "down": "diffusion_model.blocks.0.self_attn.q.lora_down.weight",
    "up": "diffusion_model.blocks.0.self_attn.q.lora_up.weight",
    "stranger": "text_encoders.t5.weight",
}
NAN = torch.full((3, 2), float("nan"))
DEFECTS = {
    "checkpoint": (lambda t, e: (t.clear(), e.clear(), t.update(w=NAN)), "not a LinVideo file"),
    "no tensors": (lambda t, e: (t.clear(), e.clear()), "not a LinVideo file"),
    "plain LoRA": (
        lambda t, e: ([t.pop(name) for name in list(t) if "linvideo" in name], e.clear()),
        "plain LoRA",
    ),
    "header stripped": (lambda t, e: e.clear(), "header is gone"),
    "newer version": (_put(format_version="4"), "update LinVideo"),
    "older version": (_put(format_version="2"), "make the file again"),
    "newer version, other fields": (
        lambda t, e: (e.clear(), e.update({"linvideo.format_version": "7"})),
        "update LinVideo",
    ),
    "version true": (_put(format_version="true"), "format_version is True"),
    "entry missing": (_drop("linvideo.layers"), "linvideo.layers' is missing"),
    "entry unknown": (_put(surprise="1"), "linvideo.surprise' is unknown"),
    "entry not JSON": (_put(layers="[0, 2"), "linvideo.layers is not valid JSON"),
    "entry NaN": (_put(steps="NaN"), "linvideo.steps is not valid JSON"),
    "entry repeats": (_put(provenance='{"a": 1, "a": 2}'), "provenance is not valid JSON"),
    "entry deep": (_put(layers="[" * 100_000), "linvideo.layers is not valid JSON"),
    "entry long": (_put(objective=json.dumps("x" * 2**21)), "linvideo.objective.* too long"),
    "entry infinite": (_put(steps="1e999"), "steps is inf"),
    "entry of another type": (_put(layers='{"0": 2}'), "linear_layers is"),
    "layer out of range": (_put(layers="[0, 3]"), "has no layer 3"),
    "mask without maps": (_drop(ALIASES["query"], ALIASES["key"]), "of layer 0 is missing"),
    "one map missing": (_drop(ALIASES["key"]), "'key_map' of layer 0 is missing"),
    "map of another layer": (_rename(ALIASES["query"], ALIASES["other_site"]), "is unknown"),
    "unknown tensor": (_put(stranger=torch.ones(2)), "text_encoders.t5.weight' is unknown"),
    "map of two dimensions": (_put(query=torch.ones(2, 4)), r"\[2, 4\]; \[N, D, 3\] is expected"),
    "map of other features": (_put(query=torch.ones(2, 4, 5)), r"feature_dim is 6"),
    "feature_dim lies": (_put(feature_dim="8"), r"\[N, D, 4\] is expected.* feature_dim is 8"),
    "maps differ": (_put(query=torch.ones(1, 4, 3)), r"key_map of layer 0 has .*with N = 1"),
    "map empty": (_put(query=torch.ones(0, 4, 3)), "is empty"),
    "NaN": (_put(delta=NAN), "q.diff' holds NaN"),
    "infinity": (_put(key=torch.full((2, 4, 3), float("inf"))), "key_map' holds NaN or inf"),
    "integers": (_put(delta=torch.ones(3, 2, dtype=torch.int16)), "q.diff' holds I16"),
    "8 bits": (_put(delta=torch.ones(3, 2).to(torch.float8_e4m3fn)), "q.diff' holds F8_E4M3"),
    "bare missing": (_drop(ALIASES["bare"]), "blocks.0.modulation.diff' is missing"),
    "bare not a list": (_put(bare_parameters="3"), "bare_parameters is not a list"),
    "bare is a bias": (_put(bare_parameters='["q.bias"]'), "bare_parameters is not a list"),
    "LoRA in a full file": (_put(down=torch.ones(2, 5), up=torch.ones(4, 2)), "yet LoRA tensors"),
    "full is feature_maps": (_put(parameters='"feature_maps"'), "yet full weight changes"),
}
LORA_DEFECTS = {
    "up without down": (_drop(ALIASES["down"]), "lora_down.weight' is missing"),
    "down without up": (_drop(ALIASES["up"]), "lora_up.weight' is missing"),
    "ranks differ": (_put(down=torch.ones(3, 5)), r"\[3, 5\] and \[4, 2\].* lora_rank is 2"),
    "rank lies": (_put(lora_rank="3"), "lora_rank is 3"),
    "rank of zero": (_put(lora_rank="0"), "lora_rank is 0"),
    "LoRA missing": (_drop(ALIASES["down"], ALIASES["up"]), "yet LoRA tensors are missing"),
    "full weights in a LoRA file": (_put(delta=torch.ones(3, 2)), "yet full weight changes"),
}


@pytest.mark.parametrize(
    ("parameters", "change", "sentence"),
    [
        *(pytest.param("full", *defect, id=name) for name, defect in DEFECTS.items()),
        *(pytest.param("lora", *defect, id=name) for name, defect in LORA_DEFECTS.items()),
    ],
)
def test_a_defect_is_named_in_one_sentence(
    tmp_path: Path,
    parameters: str,
    change: Callable[[Tensors, Entries], object],
    sentence: str,
) -> None:
    path = tmp_path / "a.safetensors"
    artifact.save(make_small(parameters), path)
    rewrite(path, change)
    with pytest.raises(ArtifactError, match=sentence) as caught:
        artifact.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"\x10\x00", "cut short"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{", "cut short"),
        (b"PK\x03\x04 a pickle in a zip archive", "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
    ],
)
def test_a_file_of_another_kind_or_none_is_named(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    path = tmp_path / "a.safetensors"
    for missing in (path, tmp_path):
        with pytest.raises(ArtifactError, match="does not exist"):
            artifact.load(missing)
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=sentence):
        artifact.load(path)


def test_a_tensor_larger_than_the_file_is_refused_before_it_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    artifact.save(make_small(), path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    claim = header[ALIASES["delta"]]
    claim["shape"] = [2**30, 2**30]
    for end in (2**61, claim["data_offsets"][1]):
        claim["data_offsets"][1] = end
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
        with pytest.raises(ArtifactError, match="cut short or damaged"):
            artifact.load(path)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A path to write damaged files to, and the bytes of an intact one that says all it can."""
    path = tmp_path_factory.mktemp("damaged") / "a.safetensors"
    small = make_small()
    usage = Usage(width=832, height=480, guidance_scale=5.0, sigma_from=1.0, sigma_to=0.9)
    told = {"usage": usage, "weights_sketch": 64 * (0.1,)}
    header = dataclasses.replace(small.header, **told)
    artifact.save(dataclasses.replace(small, header=header), path)
    return path, path.read_bytes()


def assert_valid_or_refused(path: Path) -> None:
    try:
        made = artifact.load(path)
    except ArtifactError as error:
        str(error).encode()
        return
    assert all(tensor.isfinite().all() for tensor in tensors_of(made).values())
    artifact.save(made, path, dtype=torch.float32)
    assert tensors_of(artifact.load(path)).keys() == tensors_of(made).keys()


def test_an_error_is_named_by_the_place_that_it_is_imported_from() -> None:
    error = ArtifactError("a sentence")
    assert f"{ArtifactError.__module__}.{ArtifactError.__qualname__}" == (
        "linvideo_core.artifact.ArtifactError"
    )
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is ArtifactError and str(back) == "a sentence"


def test_a_file_cut_anywhere_is_refused(intact: tuple[Path, bytes]) -> None:
    path, content = intact
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError):
            artifact.load(path)


FUZZ = settings(
    max_examples=150,
    deadline=5000,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@FUZZ
@given(data=st.data())
def test_flipped_bytes_are_refused_or_harmless(
    intact: tuple[Path, bytes], data: st.DataObject
) -> None:
    path, content = intact
    damaged = bytearray(content)
    positions = st.integers(0, len(content) - 1)
    for position in data.draw(st.lists(positions, min_size=1, max_size=4)):
        damaged[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    assert_valid_or_refused(path)


@FUZZ
@given(
    field=st.sampled_from(
        [f.name for f in dataclasses.fields(ArtifactHeader)] + ["bare_parameters"]
    ),
    text=JSON.map(json.dumps) | st.text(st.characters(codec="utf-8")),
)
def test_any_header_value_is_refused_or_harmless(
    intact: tuple[Path, bytes], field: str, text: str
) -> None:
    path, content = intact
    path.write_bytes(content)
    rewrite(path, _put(**{field: text}))
    assert_valid_or_refused(path)


def test_a_loaded_artifact_outlives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    made = make_small()
    artifact.save(made, path, dtype=torch.float32)
    loaded = artifact.load(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert_same(made, loaded, torch.float32)


@pytest.mark.parametrize(
    ("deltas", "sentence"),
    [
        ({"x.weight": torch.tensor([1.0, float("nan")])}, "x.diff holds NaN"),
        ({"x.weight": torch.tensor([1e6])}, "too large for torch.float16"),
        ({"x.weight": torch.ones(2), "x": torch.ones(2)}, "two weight changes are called"),
    ],
)
def test_a_refused_save_keeps_the_earlier_file(
    tmp_path: Path, deltas: Tensors, sentence: str
) -> None:
    path = tmp_path / "a.safetensors"
    artifact.save(make_small(), path)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match=sentence):
        artifact.save(dataclasses.replace(make_small(), deltas=deltas), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match="does not exist"):
        artifact.save(make_small(), tmp_path / "missing" / "a.safetensors")
    with pytest.raises(ArtifactError, match="could not write"):
        artifact.save(make_small(), tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]
