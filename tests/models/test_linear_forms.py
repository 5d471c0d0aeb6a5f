"""Every form of linear attention, hybrid ones too, is its definition, and fits a file."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from linvideo_core import artifact, kernels
from linvideo_core.artifact import Artifact, ArtifactError
from linvideo_core.artifact.summary import count_bytes, describe
from linvideo_core.evaluate.compare import CompareConfig, compare_artifact
from linvideo_core.kernels.hybrid_reference import initial_weights
from linvideo_core.kernels.tiles import TokenGrid
from linvideo_core.models.attention import LinearAttention, window_attention
from linvideo_core.models.config import ATTENTION_MASSES, FEATURE_MAPS, LinearForm
from linvideo_core.models.wan import WanModel
from linvideo_core.run.context import Run
from linvideo_core.run.errors import SettingError
from linvideo_core.teacher.config import TrajectoryConfig
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.teacher.trajectories import Trajectories, collect
from linvideo_core.training.config import TrainingConfig
from linvideo_core.training.trainer import fit, seed_step
from linvideo_core.transfer.config import ObjectiveConfig, SelectionConfig, StudentConfig
from linvideo_core.transfer.student import Student, TransferTask
from linvideo_core.transfer.warm_start import feature_maps
from tests.kernels.test_hybrid import define

PARTS = {
    "joint": {"feature_map": "hedgehog_joint"},
    "shared": {"map_sharing": "shared"},
    "gate": {"output_gate": True},
    "window": {"window": 5},
}
FORMS = {
    "plain": LinearForm(),
    **{name: LinearForm(**part) for name, part in PARTS.items()},
    "all": LinearForm(**{k: v for part in PARTS.values() for k, v in part.items()}),
    "tile": LinearForm(tile="1x2x3"),
    "frame": LinearForm(tile="1x0x0", attention_mass="moments", map_sharing="shared"),
}
# By their number of tokens; of two, some lie beside the video's.
GRIDS = {
    1: TokenGrid((1, 1, 1)),
    4: TokenGrid((1, 1, 2), before=None, after=1),
    63: TokenGrid((3, 4, 5), before=1, after=None),
}
NEW_FORMS = [name for name in FORMS if name != "plain"]
# Relative error of the whole tensor against fp64.
TOLERANCE = 1e-5
SIDES = ("query_map", "key_map")
N, D = 3, 16


def make_linear(
    form: LinearForm, *, feature_dim: int = D, is_trained: bool = True
) -> LinearAttention:
    """Return linear attention whose every part is at work if it is trained."""
    linear = LinearAttention(N, D, feature_dim, form)
    generator = torch.Generator().manual_seed(1)
    linear.init_weights(generator)
    if is_trained:
        for parameter in linear.parameters():
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return linear


def make_tokens(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, N, D, generator=generator) for _ in range(3)]


def features(x: Tensor, feature_map: Tensor, kind: str) -> Tensor:
    """Return the features of one head's tokens [B, L, D] as the form's definition has them."""
    projected = x @ feature_map
    if kind == "hedgehog":
        return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], dim=-1)
    signs = torch.cat([projected, -projected], dim=-1).exp()
    return signs / signs.sum(dim=-1, keepdim=True)


def definition(
    form: LinearForm, query: Tensor, key: Tensor, value: Tensor, state: dict[str, Tensor]
) -> Tensor:
    """Compute a form head by head, with whole attention matrices."""
    L = query.shape[1]
    if form.tile:
        inputs = {"query": query, "key": key, "value": value, **state}
        inputs |= {side: state[side].expand(N, -1, -1) for side in SIDES}
        return define(inputs, GRIDS[L].tiles(form.tile_size, L), form.attention_mass)
    heads = []
    for n in range(N):
        q, k, v = (x[:, :, n] for x in (query, key, value))
        maps = (state[side][0 if form.map_sharing == "shared" else n] for side in SIDES)
        q_features, k_features = (
            features(x, w, form.feature_map) for x, w in zip((q, k), maps, strict=True)
        )
        matrix = q_features @ k_features.transpose(1, 2)
        matrix = matrix / matrix.sum(dim=-1, keepdim=True)
        if form.window:
            block = torch.arange(L) // form.window
            logits = q @ k.transpose(1, 2) / math.sqrt(D)
            local = logits.masked_fill(block[:, None] != block, -math.inf).softmax(-1)
            share = state["window_mix"][n].tanh()
            matrix = (1 - share) * matrix + share * local
        out = matrix @ v
        if form.output_gate:
            out = out * 2 / (1 + (-(q @ state["gate"][n])).exp()).unsqueeze(-1)
        heads.append(out)
    return torch.stack(heads, dim=2)


@pytest.mark.parametrize("length", GRIDS)
@pytest.mark.parametrize("feature_dim", [D, 2 * D])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_form_is_its_definition_in_value_and_gradient(
    form: LinearForm, feature_dim: int, length: int
) -> None:
    linear = make_linear(form, feature_dim=feature_dim)
    tokens = [x.requires_grad_(True) for x in make_tokens(length)]
    exact_tokens = [x.detach().double().requires_grad_(True) for x in tokens]
    state = {n: p.detach().double().requires_grad_(True) for n, p in linear.named_parameters()}
    expected = definition(form, *exact_tokens, state)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    expected.backward(upstream.double())
    found = linear(*tokens, GRIDS[length])
    found.backward(upstream)

    difference = (found.detach().double() - expected.detach()).norm()
    assert float(difference) <= TOLERANCE * float(expected.detach().norm())
    pairs = [(x.grad, exact.grad) for x, exact in zip(tokens, exact_tokens, strict=True)]
    pairs += [(p.grad, state[name].grad) for name, p in linear.named_parameters()]
    # With one token, or tile, the output is its own: other gradients vanish and have no scale.
    is_one = length == 1 or (form.tile is not None and length == 4)
    scale = max(float(exact.norm()) for _, exact in pairs) if is_one else 0.0
    for index, (gradient, exact) in enumerate(pairs):
        difference = float((gradient.double() - exact).norm())
        assert difference <= TOLERANCE * max(float(exact.norm()), scale), index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", ["gate", "window"])
def test_gate_and_window_start_as_if_they_were_not_there(part: str, dtype: torch.dtype) -> None:
    tokens = [x.to(dtype) for x in make_tokens(63)]
    plain, added = (make_linear(FORMS[name], is_trained=False) for name in ("plain", part))
    assert torch.equal(added(*tokens), plain(*tokens))
    added(*tokens).float().square().sum().backward()
    for parameter in added.parameters():
        assert float(parameter.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", ["tile", "frame"])
def test_a_hybrid_layer_starts_as_its_definition_says(name: str) -> None:
    linear = make_linear(FORMS[name], is_trained=False)
    starts = initial_weights(FORMS[name].attention_mass, N, D)
    found = dict(linear.named_parameters())
    assert found.keys() == {*SIDES, *starts}
    assert all(torch.equal(found[weight], start) for weight, start in starts.items())


def test_a_hybrid_layer_must_be_told_its_tokens() -> None:
    linear = make_linear(FORMS["tile"])
    with pytest.raises(ValueError, match="was not told where the video's tokens lie"):
        linear(*make_tokens(4))
    with pytest.raises(ValueError, match="of 5, 5, 5 tokens given; the tiles have 4"):
        linear(*make_tokens(5), TokenGrid((1, 2, 2)))
    with pytest.raises(ValueError, match="-1 tokens before"):
        linear(*make_tokens(3), TokenGrid((1, 2, 2), before=None))


def test_a_hybrid_layer_looks_up_no_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled in Python 3.12, a lookup replays what it threw out of re's cache, and may fail."""
    linear = make_linear(LinearForm(tile="1x2x2"))
    monkeypatch.delattr(re, "fullmatch")
    linear(*make_tokens(12), TokenGrid((1, 3, 4)))


@pytest.mark.parametrize("window", [2, 7, 63, 64, 1000])
def test_a_window_sees_its_own_block_alone(window: int) -> None:
    query, key, value = make_tokens(63)
    found = window_attention(query, key, value, window)
    key[:, 40], value[:, 40] = -key[:, 40], 5.0
    changed = window_attention(query, key, value, window)
    is_changed = (found != changed).any(dim=-1).any(dim=-1).any(dim=0)
    block = torch.arange(63) // window
    assert torch.equal(is_changed, block == block[40])


def test_a_window_needs_as_many_keys_as_queries() -> None:
    with pytest.raises(ValueError, match="5 queries and 7 keys"):
        window_attention(make_tokens(5)[0], *make_tokens(7)[1:], 3)


@pytest.mark.parametrize("window", [-3, 1])
def test_an_impossible_window_is_refused_by_flag(window: int) -> None:
    with pytest.raises(ValueError, match=f"--window {window} given"):
        LinearForm(window=window)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tile": "1x4"}, "--tile 1x4 given; frames x height x width in tokens"),
        ({"tile": ""}, "--tile '' given"),
        ({"tile": "01x2x4"}, "--tile 01x2x4 given"),
        ({"tile": "0x0x0"}, "0 to 9999 each and not all 0"),
        ({"tile": "1x-2x4"}, "--tile 1x-2x4 given"),
        ({"tile": "1x2x4", "window": 5}, "--tile 1x2x4 and --window 5 given"),
        ({"tile": "1x2x4", "output_gate": True}, "--output-gate True given"),
        ({"tile": "1x2x4", "feature_map": "hedgehog_joint"}, "--feature-map hedgehog_joint given"),
        ({"attention_mass": "moments"}, "--attention-mass moments given without a --tile"),
        ({"tile": "1x2x4", "attention_mass": "features"}, "one of query, moments is needed"),
    ],
)
def test_an_impossible_tile_is_refused_by_flag(settings: dict[str, object], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        LinearForm(**settings)


def test_shared_maps_are_one_a_layer_and_give_heads_their_own_features() -> None:
    shared, single = make_linear(FORMS["shared"]), make_linear(FORMS["plain"])
    assert shared.query_map.shape == (1, D, D // 2)
    for side in SIDES:
        getattr(single, side).data[:] = getattr(shared, side).detach()
    tokens = make_tokens(63)
    assert torch.equal(shared(*tokens), single(*tokens))


@pytest.fixture
def wide_teacher(teacher: Teacher, wide_wan: WanModel) -> Teacher:
    """A teacher of two heads: shared maps differ from one a head."""
    return dataclasses.replace(teacher, model=wide_wan.eval().requires_grad_(False))


def make_student(teacher: Teacher, form: LinearForm, parameters: str = "feature_maps") -> Student:
    """Return a student whose layers 0 and 2 are linear, every part at work."""
    config = StudentConfig(parameters=parameters, lora_rank=4, form=form)
    student = Student(teacher, config, seed=0)
    generator = torch.Generator().manual_seed(2)
    for layer, mixed in student.mixed.items():
        mixed.mode = "softmax" if layer == 1 else "linear"
        for parameter in mixed.linear.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return student


def extract(student: Student, teacher: Teacher) -> Artifact:
    settings = {"objective": "adm", "steps": 3, "provenance": {}}
    return artifact.extract(
        student.model, teacher.model, parameters=student.config.parameters, **settings
    )


def make_file(teacher: Teacher, form: LinearForm, parameters: str = "feature_maps") -> Artifact:
    """Return the file of a student that is gone: the teacher's model is as it was."""
    with make_student(teacher, form, parameters) as student:
        return extract(student, teacher)


@pytest.mark.parametrize("name", FORMS)
def test_a_saved_form_gives_the_students_velocity_and_has_what_it_asks_for(
    name: str, wide_teacher: Teacher, inputs: tuple[Tensor, ...], tmp_path: Path
) -> None:
    before, path = wide_teacher.model(*inputs), tmp_path / "a.safetensors"
    with make_student(wide_teacher, FORMS[name]) as student:
        expected = student.model(*inputs)
        artifact.save(extract(student, wide_teacher), path, dtype=torch.float32)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["linvideo.format_version"] == "3"
        # As files had them before there were tiles.
        assert ("linvideo.tile" in file.metadata()) == bool(FORMS[name].tile)
        suffixes = {entry.rpartition(".")[2] for entry in file.keys()}
    added = {
        "gate": {"gate"},
        "window": {"window_mix"},
        "all": {"gate", "window_mix"},
        "tile": {"mass_bias", "mass_gate"},
        "frame": {"mass_moments"},
    }
    assert suffixes == {*SIDES, *added.get(name, set())}
    loaded = artifact.load(path)
    assert loaded.header.form == FORMS[name]
    with artifact.apply(loaded, wide_teacher.model) as model:
        assert torch.equal(model(*inputs), expected)
    assert torch.equal(wide_teacher.model(*inputs), before)
    assert not torch.allclose(before, expected)


@pytest.mark.parametrize("name", NEW_FORMS)
def test_a_file_says_its_form_and_counts_its_bytes(name: str, wide_teacher: Teacher) -> None:
    made = make_file(wide_teacher, FORMS[name])
    plain = extract(make_student(wide_teacher, LinearForm()), wide_teacher)
    assert describe(made)["feature maps"] != describe(plain)["feature maps"]
    per_layer = {"joint": 0, "shared": -2 * 128 * 64, "gate": 2 * 128, "window": 2}
    expected = {
        **per_layer,
        "all": sum(per_layer.values()),
        "tile": 2 + 2 * 128,
        "frame": per_layer["shared"] + 3 * 2,
    }[name]
    difference = count_bytes(made)["feature maps"] - count_bytes(plain)["feature maps"]
    assert difference == 2 * 4 * expected


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format_version": "2"}, "format_version is 2; this LinVideo reads 3"),
        ({"format_version": "[2]"}, "format_version is"),
        ({"map_sharing": '"per_layer"'}, "map_sharing is 'per_layer'; one of per_head, shared"),
        ({"map_sharing": '"per_head"'}, r"\[2, 128\]; \[N, D\] is expected with N = 1, D = 128"),
        ({"feature_map": '"relu"'}, "feature_map is 'relu'"),
        ({"output_gate": "1"}, "output_gate is 1; true or false"),
        ({"output_gate": "false"}, "'gate' of layer 0 is there, yet"),
        ({"window": "0"}, "'window_mix' of layer 0 is there, yet"),
        ({"window": "1"}, "window is 1; 0 or a whole number from 2"),
        ({"window": "-5"}, "window is -5"),
        ({"window": "true"}, "window is True"),
        ({"window": "1e99"}, "window is 1e"),
        ({"window": None}, "'linvideo.window' is missing"),
        ({"gate": None}, "'gate' of layer 0 is missing"),
        ({"window_mix": None}, "'window_mix' of layer 0 is missing"),
        ({"gate": torch.zeros(2)}, r"shape \[2\]; \[N, D\] is expected"),
        ({"window_mix": torch.zeros(2, 1)}, r"shape \[2, 1\]; \[N\] is expected"),
        ({"gate": torch.zeros(2, 64)}, r"\[2, 64\]; \[N, D\] is expected with D = 128, N = 2"),
        ({"window_mix": torch.zeros(3)}, r"\[3\]; \[N\] is expected with D = 128, N = 2"),
        ({"gate": torch.full((2, 128), math.nan)}, "gate' holds NaN"),
        ({"query_map": torch.zeros(2, 128, 64)}, r"\[1, D, 64\] is expected.* shared"),
        ({"attention_mass": '"query"'}, "'linvideo.tile' is missing"),
    ],
)
def test_a_defect_of_a_form_is_named_in_one_sentence(
    changes: dict[str, str | Tensor | None],
    sentence: str,
    wide_teacher: Teacher,
    tmp_path: Path,
) -> None:
    check_defect(FORMS["all"], changes, sentence, wide_teacher, tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tile": '"1x2"'}, "tile is '1x2'; frames x height x width in tokens"),
        ({"tile": '"0x0x0"'}, "tile is '0x0x0'; frames"),
        ({"tile": "[1, 2, 3]"}, r"tile is \(1, 2, 3\); frames"),
        ({"tile": '"99999x1x1"'}, "tile is '99999x1x1'; frames"),
        ({"tile": "null"}, "'mass_bias' of layer 0 is there, yet"),
        ({"tile": None}, "'linvideo.tile' is missing"),
        ({"attention_mass": None}, "'linvideo.attention_mass' is missing"),
        ({"attention_mass": '"features"'}, "attention_mass is 'features'; one of query, moments"),
        ({"attention_mass": '"moments"'}, "'mass_bias' of layer 0 is there, yet"),
        ({"window": "5"}, "tile 1x2x3 and window 5 given; they do not work together"),
        ({"output_gate": "true"}, "tile 1x2x3 and output_gate True given"),
        ({"mass_gate": None}, "'mass_gate' of layer 0 is missing"),
        ({"mass_gate": torch.zeros(2, 64)}, r"shape \[2, 64\]; \[N, D\] is expected"),
        ({"mass_bias": torch.zeros(3)}, r"shape \[3\]; \[N\] is expected"),
        ({"mass_bias": torch.full((2,), math.inf)}, "mass_bias' holds NaN or infinity"),
    ],
)
def test_a_defect_of_tiles_is_named_in_one_sentence(
    changes: dict[str, str | Tensor | None],
    sentence: str,
    wide_teacher: Teacher,
    tmp_path: Path,
) -> None:
    check_defect(FORMS["tile"], changes, sentence, wide_teacher, tmp_path)


def check_defect(
    form: LinearForm,
    changes: dict[str, str | Tensor | None],
    sentence: str,
    wide_teacher: Teacher,
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.safetensors"
    artifact.save(make_file(wide_teacher, form), path)
    with safe_open(path, framework="pt") as file:
        entries = file.metadata()
    tensors = load_file(path)
    for name, value in changes.items():
        tensor_name = f"linvideo.blocks.0.self_attn.{name}"
        if isinstance(value, str):
            entries[f"linvideo.{name}"] = value
        elif value is None:
            tensors.pop(tensor_name, None)
            entries.pop(f"linvideo.{name}", None)
        else:
            tensors[tensor_name] = value
    save_file(tensors, path, metadata=entries)
    with (
        pytest.raises(ArtifactError, match=sentence) as caught,
        artifact.apply(artifact.load(path), wide_teacher.model),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_a_student_of_two_forms_is_refused(wide_teacher: Teacher) -> None:
    student = make_student(wide_teacher, LinearForm())
    student.mixed[2].linear.form = FORMS["joint"]
    with pytest.raises(ArtifactError, match="differ in form"):
        extract(student, wide_teacher)


@pytest.fixture
def trajectories(wide_teacher: Teacher, tmp_path: Path) -> Trajectories:
    settings = TrajectoryConfig(
        num_trajectories=2, states_per_trajectory=2, sampler_steps=4, shard_size=2
    )
    return collect(wide_teacher, settings, Run(folder=tmp_path / "run"))


@pytest.mark.parametrize("name", NEW_FORMS)
def test_every_part_of_a_form_is_trained(
    name: str, wide_teacher: Teacher, trajectories: Trajectories, tmp_path: Path
) -> None:
    training = TrainingConfig(steps=2, batch_size=2, warmup_steps=0)
    config = StudentConfig(parameters="feature_maps", form=FORMS[name])
    run = Run(folder=tmp_path / "run")
    task = TransferTask(
        Student(wide_teacher, config, seed=0),
        wide_teacher,
        trajectories,
        selection=SelectionConfig(target=2, choice="alternate"),
        objective=ObjectiveConfig(),
        training=training,
        run=run,
        linear_layers=(0, 2),
    )
    before = {n: p.detach().clone() for n, p in feature_maps(task.student.mixed).items()}
    assert {n.partition(".")[2] for n in before} == {
        n for n, _ in make_linear(FORMS[name]).named_parameters()
    }
    loss, _ = task.loss(0, seed_step(0, 0))
    assert bool(torch.isfinite(loss))
    fit(task, training, run.below("training"))
    for parameter_name, parameter in feature_maps(task.student.mixed).items():
        is_linear = not parameter_name.startswith("1.")
        assert torch.equal(parameter, before[parameter_name]) != is_linear, parameter_name


def test_the_students_row_has_the_bytes_of_its_tensors(wide_teacher: Teacher) -> None:
    made = make_file(wide_teacher, FORMS["all"], "lora")
    settings = CompareConfig(num_samples=2, sampler_steps=2, batch_size=2)
    teacher, swapped, student = compare_artifact(wide_teacher, made, settings, seed=0).rows
    assert student["bytes"] == sum(count_bytes(made).values())
    assert "bytes" not in teacher and "bytes" not in swapped


def test_settings_know_the_feature_maps_and_attention_masses_of_the_kernels() -> None:
    assert FEATURE_MAPS == kernels.FEATURE_MAPS
    assert ATTENTION_MASSES == kernels.ATTENTION_MASSES
