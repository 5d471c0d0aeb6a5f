"""The comparison measures what it claims, on a tiny random Wan and on the shipped demo."""

import contextlib
import copy
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from linvideo_core import artifact
from linvideo_core.demo.codec import LATENT_SHAPE, decode_latents
from linvideo_core.demo.prompts import TEXT_DIM, encode_prompts
from linvideo_core.evaluate import cli as evaluate_cli
from linvideo_core.evaluate import command as evaluate
from linvideo_core.evaluate import sampler
from linvideo_core.evaluate.compare import CompareConfig, compare, compare_kernels, swap
from linvideo_core.evaluate.config import EvaluateConfig
from linvideo_core.evaluate.metrics import frechet_distance_of, pixel_error
from linvideo_core.flow import TIMESTEP_SCALE, add_noise
from linvideo_core.models.attention import LinearAttention
from linvideo_core.models.attention_sites import attention_at, install, shapes_of
from linvideo_core.models.config import LinearForm, SoftmaxConfig
from linvideo_core.models.families import identify
from linvideo_core.models.wan import WanConfig, WanModel
from linvideo_core.run.callbacks import Callbacks
from linvideo_core.run.tables import show_table
from linvideo_core.teacher.config import TeacherConfig
from linvideo_core.teacher.teacher import Teacher
from tests.conftest import make_teacher, make_wan, save_inputs

SETTINGS = CompareConfig(num_samples=5, sampler_steps=3, batch_size=2)
SAME = contextlib.nullcontext


@pytest.fixture
def teacher() -> Teacher:
    """A tiny teacher of videos that are large enough for measures of motion."""
    return dataclasses.replace(
        make_teacher(make_wan()),
        latent_shape=(4, 4, 4, 6),
        decode=lambda latents: latents.mean(dim=1).sigmoid(),
    )


@pytest.fixture
def own_files(teacher: Teacher, tmp_path: Path) -> dict[str, Path]:
    """Return flags with files as a user has them: a model, its prompts, its LINVIDEO file."""
    paths = {**save_inputs(teacher, tmp_path), "--artifact": tmp_path / "artifact.safetensors"}
    student = copy.deepcopy(teacher.model)
    _, sites = identify(shapes_of(student))
    install(student, sites[:2], lambda site: LinearAttention(site.num_heads, site.head_dim, 128))
    settings = {"parameters": "feature_maps", "objective": "adm", "steps": 0, "provenance": {}}
    made = artifact.extract(student, teacher.model, **settings)
    artifact.save(made, paths["--artifact"])
    return paths


def test_a_student_that_is_the_teacher_is_measured_as_perfect(teacher: Teacher) -> None:
    stages: dict[str, list[tuple[int, int]]] = {}

    class Told(Callbacks):
        def on_stage(self, stage: str, total: int, done: int = 0, detail: str = "") -> None:
            self.now, self.total = detail, total

        def on_step_end(self, done: int, **metrics: float) -> None:
            stages.setdefault(self.now, []).append((done, self.total))

    students = {"student": SAME(teacher.model)}
    found = compare(teacher, students, SETTINGS, seed=0, callbacks=Told())
    perfect = {
        "distance_to_teacher": 0, "frechet_to_teacher": 0, "velocity_error": 0,
        "velocity_cosine": 1, "motion_ratio": 1, "motion_energy": 1, "frechet_teacher_features": 0,
        "spatial_spectrum_db": 0, "temporal_spectrum_db": 0, "diversity": 1,
    }  # fmt: skip
    for row in found.rows:
        assert {k: row[k] for k in perfect} == pytest.approx(perfect, abs=1e-5)
        assert row["seconds"] > 0
        # Without a judge its measures are left out.
        assert not {"digit", "motion", "frechet"} & set(row)
    assert len(found.rows) == 2
    every = [(done, 9) for done in range(1, 10)]
    assert stages == {"teacher": every, "student": every}
    sigmas = [row["sigma"] for row in found.velocity_rows]
    assert len(sigmas) == SETTINGS.sampler_steps
    assert sigmas[0] == 1 and sigmas == sorted(sigmas, reverse=True)


def test_what_slows_a_student_makes_its_videos_take_longer_than_the_teachers(
    teacher: Teacher,
) -> None:
    @contextlib.contextmanager
    def slowed() -> Iterator[nn.Module]:
        hook = teacher.model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
        yield teacher.model
        hook.remove()

    few = dataclasses.replace(SETTINGS, num_samples=2, sampler_steps=2)
    own, slow = compare(teacher, {"slow": slowed()}, few, seed=0).rows
    assert own["speedup"] == 1 and slow["speedup"] < 0.9
    assert own["seconds_per_video"] < slow["seconds_per_video"] > 2 * 0.05
    assert slow["seconds_per_video"] * slow["speedup"] == pytest.approx(own["seconds_per_video"])


def test_a_table_names_the_kinds_of_layers_that_a_model_has(teacher: Teacher) -> None:
    for tile, named, other in ((None, "linear layers", "hybrid"), ("1x2x2", "hybrid", "linear")):
        students = {"swapped": swap(teacher.model, (0, 2), 128, LinearForm(tile=tile))}
        rows = compare(teacher, students, SETTINGS, seed=0).rows
        counts = [(row["linear_layers"] + row["hybrid_layers"], row["layers"]) for row in rows]
        assert counts == [(0, 3), (2, 3)]
        shown = show_table(rows)
        assert named in shown and other not in shown


def test_a_swapped_model_differs_and_gives_the_teacher_back(teacher: Teacher) -> None:
    before = copy.deepcopy(teacher.model.state_dict())
    students = {"swapped": swap(teacher.model, (0, 2), 128)}
    swapped = compare(teacher, students, SETTINGS, seed=0).rows[1]
    assert (swapped["model"], swapped["linear_layers"], swapped["layers"]) == ("swapped", 2, 3)
    assert swapped["distance_to_teacher"] > 1e-4
    assert swapped["velocity_error"] > 1e-4
    assert swapped["frechet_teacher_features"] > 1e-9
    assert swapped["velocity_cosine"] < 1
    after = teacher.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_results_do_not_depend_on_the_batch_size(teacher: Teacher) -> None:
    frames = []
    for batch_size in (1, 5):
        settings = dataclasses.replace(SETTINGS, batch_size=batch_size)
        frames.append(compare(teacher, {}, settings, seed=3).frames["teacher"])
    torch.testing.assert_close(*(x.short() for x in frames), rtol=0, atol=1)


def test_more_samples_begin_with_the_same_ones_and_use_every_prompt_in_turn() -> None:
    few, many = (sampler.draw_noise((4, 2, 3, 5), count, 7) for count in (2, 5))
    assert torch.equal(few, many[:2])
    chosen = sampler.draw_prompts(4, 10, 0)
    assert chosen[:5] == sampler.draw_prompts(4, 5, 0)
    assert sorted(chosen[:4]) == sorted(chosen[4:8]) == [0, 1, 2, 3]
    twice = sampler.draw_prompts(4, 10, 0, repeats=2)
    assert twice == [prompt for prompt in chosen[:5] for _ in range(2)]


def test_diversity_takes_samples_of_one_prompt(teacher: Teacher) -> None:
    for seeds in (1, 2):
        settings = dataclasses.replace(SETTINGS, num_samples=3, seeds_per_prompt=seeds)
        (row,) = compare(teacher, {}, settings, seed=0).rows
        assert (row["diversity"] is not None) == (seeds == 2)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--num-samples", "1"], "a whole number from 2 to"),
        (["--sampler-steps", "0"], "a whole number from 1 to"),
        (["--plain-steps", "8;4"], "numbers such as"),
        (["--model", "wan.safetensors"], "--artifact"),
        (["--kernels", "fast"], "--kernels fast given, and fast is none: default, flash, cudnn"),
        (["--kernels", "sparse:2"], "--kernels sparse:2 given, and sparse:2 is none"),
        (["--kernels", "sparse:x,flash"], "and sparse:x is none"),
        (["--kernels", "flash:0.1"], "and flash:0.1 is none"),
        (["--kernels", ","], "--kernels , given, and '' is none"),
        (["--kernels", "flash", "--distilled", "a.safetensors"], "--kernels flash and --distilled"),
        (["--kernels", "flash", "--softmax-kernel", "sparse"], "and --softmax-kernel sparse given"),
        (["--kernels", "flash", "--dense-share", "2"], "--dense-share 2.0 given; a number from 0"),
    ],
)
def test_bad_arguments_end_with_one_sentence_and_exit_code_2(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluate_cli.main(arguments)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert reason in message and len(message.splitlines()) == 1


def test_the_command_writes_tables_and_pictures_of_a_model_of_ones_own(
    own_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    size = ["--num-frames", "9", "--height", "16", "--width", "32"]
    few = ["--num-samples", "3", "--sampler-steps", "2", "--batch-size", "2", "--device", "cpu"]
    files = [str(word) for pair in own_files.items() for word in pair]
    evaluate_cli.main([*files, *size, *few, "--out", str(out)])
    names = {"config.json", "evaluation.json", "README.md", "samples.png", "samples.gif"}
    names.add("velocity_error.png")
    assert {path.name for path in out.iterdir()} == names
    rows = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    assert [row["model"] for row in rows] == ["teacher", "swapped", "student"]
    shown = capsys.readouterr().out
    assert "distance to teacher" in shown and "student" in shown
    assert f"hf upload YOU/REPO {own_files['--artifact']}" in shown


def test_kernels_are_compared_alone_and_beside_linear_layers(
    own_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("comfy_kitchen")
    out = tmp_path / "out"
    # Six blocks of 64 tokens: some are not exact. Default is the teacher's own.
    size = ["--num-frames", "21", "--height", "128", "--width", "128", "--device", "cpu"]
    few = ["--num-samples", "2", "--sampler-steps", "4", "--batch-size", "2", "--out", str(out)]
    kernels = ["--kernels", "sparse:0.1,sparse:1,default", "--dense-share", "0.5"]
    files = [str(word) for pair in own_files.items() for word in pair]
    evaluate_cli.main([*files, *size, *few, *kernels])
    rows = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["model"], row["density"], row["linear_layers"]) for row in rows] == [
        ("teacher", 1, 0), ("sparse 0.1", 0.1, 0), ("sparse 1", 1, 0),
        ("linear, default", 1, 2), ("linear, sparse 0.1", 0.1, 2), ("linear, sparse 1", 1, 2),
    ]  # fmt: skip
    _, sparse, dense, linear, both, _ = (row["distance_to_teacher"] for row in rows)
    assert 10 * dense < sparse < both and dense < linear < both
    assert not any("pixel_error" in row for row in rows) and not (out / "README.md").exists()
    shown = capsys.readouterr().out
    assert "linear, sparse 0.1" in shown and "temporal spectrum" in shown
    no_file = [
        word for word in files if word not in map(str, ("--artifact", own_files["--artifact"]))
    ]
    evaluate_cli.main([*no_file, *size, *few, *kernels[:2]])
    rows = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    assert [row["linear_layers"] for row in rows] == [0, 0, 0]
    # Of four steps two were dense before, and one in five is now.
    assert rows[1]["distance_to_teacher"] > 1.1 * sparse


def test_sparse_kernels_leave_the_first_steps_dense_and_the_teacher_as_it_was(
    teacher: Teacher,
) -> None:
    pytest.importorskip("comfy_kitchen")
    teacher = dataclasses.replace(teacher, latent_shape=(4, 6, 16, 16))
    calls: list[tuple[float, str]] = []
    layer = attention_at(teacher.model, identify(shapes_of(teacher.model))[1][0])

    def watch(model: object, args: tuple[Tensor, ...]) -> None:
        site = identify(shapes_of(teacher.model))[1][0]
        calls.append((args[1].max().item(), attention_at(teacher.model, site).kernel))

    settings = CompareConfig(num_samples=2, sampler_steps=5, batch_size=2, shift=3.0)
    kernels = [SoftmaxConfig(softmax_kernel="sparse", density=0.1)]
    hook = None

    class Told(Callbacks):
        def on_stage(self, stage: str, total: int, done: int = 0, detail: str = "") -> None:
            nonlocal hook
            if detail == "sparse 0.1":
                # Behind the hook that chooses the kernel.
                hook = teacher.model.register_forward_pre_hook(watch)

    compare_kernels(teacher, None, kernels, settings, dense_share=0.4, seed=0, callbacks=Told())
    hook.remove()
    # The call before the first step, the steps, and the noise levels at which velocities are
    # compared: the same five again; both models' turns of what is timed, one call first; then the
    # teacher's own features.
    steps = ["default", "default", "sparse", "sparse", "sparse"]
    student, teachers = ["default", *steps], 6 * ["default"]
    assert [kernel for _, kernel in calls] == [*student, *steps, *student, *teachers, "default"]
    assert attention_at(teacher.model, identify(shapes_of(teacher.model))[1][0]) is layer
    assert not teacher.model._forward_pre_hooks


def test_of_shown_pixels_the_error_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("comfy_kitchen")
    config = EvaluateConfig(
        comparison=CompareConfig(num_samples=2, sampler_steps=2, batch_size=2),
        kernels="flash,sparse",
        dense_share=0.0,
        out=tmp_path,
        device="cpu",
    )
    rows = {row["model"]: row for row in evaluate.run(config)["rows"]}
    assert rows["teacher"]["pixel_error"] == 0 and rows["flash"]["pixel_error"] < 1
    assert 1 < rows["sparse 0.1"]["pixel_error"] < 255
    assert rows["linear, default"]["linear_layers"] == 5


def test_the_pixel_error_is_the_root_mean_square() -> None:
    frames = torch.tensor([[0, 255], [10, 20]], dtype=torch.uint8)
    other = torch.tensor([[3, 251], [10, 20]], dtype=torch.uint8)
    assert pixel_error(frames, frames) == 0
    assert pixel_error(frames, other) == pixel_error(other, frames) == pytest.approx(2.5)


def distil(path: Path, out: Path, **changes: object) -> Path:
    """Write a file as `distill` makes it from a linearized one, without any training."""
    first = artifact.load(path)
    changes = {"sigmas": (1.0, 0.6, 0.0), "provenance": {"stages": 2}} | changes
    header = dataclasses.replace(first.header, **changes)
    artifact.save(dataclasses.replace(first, header=header), out)
    return out


def few_step_config(own_files: dict[str, Path], *distilled: Path) -> EvaluateConfig:
    files = {"model": own_files["--model"], "prompts": own_files["--prompts"]}
    return EvaluateConfig(
        teacher=TeacherConfig(**files, num_frames=9, height=16, width=16),
        comparison=CompareConfig(num_samples=2, sampler_steps=4, batch_size=2, seeds_per_prompt=2),
        artifact=own_files["--artifact"],
        distilled=",".join(map(str, distilled)),
        plain_steps="3, 2",
        out=own_files["--model"].parent / "out",
        device="cpu",
    )


def test_steps_are_compared_with_quality_in_one_run(
    own_files: dict[str, Path], tmp_path: Path
) -> None:
    two = distil(own_files["--artifact"], tmp_path / "two.safetensors")
    one = distil(own_files["--artifact"], tmp_path / "one.safetensors", provenance={"stages": 1})
    config = few_step_config(own_files, two, one)
    rows = evaluate.run(config)["rows"]
    by_name = {row["model"]: row for row in rows}
    assert {name: row["steps"] for name, row in by_name.items()} == {
        "teacher": 4, "linearized": 4, "linearized_3_plain": 3, "teacher_3_plain": 3,
        "linearized_2_plain": 2, "teacher_2_plain": 2, "distilled_2": 2, "single_stage_2": 2,
    }  # fmt: skip
    assert (config.out / "steps.png").exists()
    # Same weights, same steps, yet another sampler: fresh noise instead of Euler's line.
    assert by_name["distilled_2"]["distance_to_teacher"] > 1e-4
    assert all(row["diversity"] > 0 and row["seconds_per_video"] > 0 for row in rows)


def test_a_file_that_cannot_be_compared_is_refused_before_anything_is_written(
    own_files: dict[str, Path], tmp_path: Path
) -> None:
    first, plain = own_files["--artifact"], few_step_config(own_files)
    two = distil(first, tmp_path / "two.safetensors")
    none = tmp_path / "none.safetensors"
    for config, reason in (
        (few_step_config(own_files, first), "is not distilled; give a file that `distill` made"),
        (few_step_config(own_files, two, two), "is a second distilled_2"),
        (dataclasses.replace(plain, artifact=two), "is distilled already"),
        (dataclasses.replace(plain, artifact=none), "does not exist"),
    ):
        with pytest.raises(ValueError, match=reason):
            evaluate.run(config)
    save_file(make_wan(num_layers=2).state_dict(), own_files["--model"])
    with pytest.raises(ValueError, match="made for"):
        evaluate.run(plain)
    assert not plain.out.exists()


def test_the_demo_is_judged_and_its_labels_are_read_from_the_prompts(teacher: Teacher) -> None:
    assert sampler.read_labels(["a"]) is None
    prompts = ["a two moving up"]
    size = WanConfig(dim=128, num_heads=1, num_layers=3, ffn_dim=32, text_dim=TEXT_DIM, freq_dim=32)
    model = WanModel(size).eval().requires_grad_(False)
    model.init_weights()
    demo = dataclasses.replace(
        teacher,
        model=model,
        prompts=prompts,
        prompt_embeds=encode_prompts(prompts),
        negative_embeds=encode_prompts([""])[0],
        latent_shape=LATENT_SHAPE,
        decode=decode_latents,
        is_demo=True,
    )
    settings = CompareConfig(num_samples=2, sampler_steps=1, batch_size=2)
    (row,) = compare(demo, {}, settings, seed=0).rows
    assert row["frechet"] > 0
    assert {"digit", "motion", "frechet", "frechet_to_teacher", "seconds"} <= row.keys()


def draw(teacher: Teacher, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *teacher.latent_shape, generator=generator)


def test_features_are_the_middle_layers_attention_averaged_over_tokens(teacher: Teacher) -> None:
    latents, noise = draw(teacher, 2, 0), draw(teacher, 2, 1)
    features = sampler.teacher_features(teacher.model, latents, noise, teacher.negative_embeds)
    _, sites = identify(shapes_of(teacher.model))
    seen: list[Tensor] = []
    middle = attention_at(teacher.model, sites[1])
    hook = middle.register_forward_hook(lambda module, args, output: seen.append(output))
    sigma = torch.full((2,), sampler.FEATURE_SIGMA)
    with torch.no_grad():
        embeds = teacher.negative_embeds.expand(2, -1, -1)
        teacher.model(add_noise(latents, noise, sigma), TIMESTEP_SCALE * sigma, embeds)
    hook.remove()
    _, tokens, heads, dim = seen[0].shape
    expected = torch.stack([clip.view(tokens, heads * dim).mean(dim=0) for clip in seen[0]])
    assert (heads, dim) == (sites[1].num_heads, sites[1].head_dim)
    torch.testing.assert_close(features, expected)
    assert not middle._forward_hooks


def test_bf16_changes_features_far_less_than_other_videos_do(teacher: Teacher) -> None:
    noise = draw(teacher, 6, 1)

    def describe(seed: int, precision: str) -> Tensor:
        latents = draw(teacher, 6, seed)
        embeds = teacher.negative_embeds
        return sampler.teacher_features(teacher.model, latents, noise, embeds, precision=precision)

    exact, rounded, other = describe(0, "fp32"), describe(0, "bf16"), describe(2, "fp32")
    assert rounded.dtype == torch.float32
    near, far = (frechet_distance_of(features, exact) for features in (rounded, other))
    assert near < 0.02 * far


def test_features_of_a_student_are_refused_and_no_hook_is_left(teacher: Teacher) -> None:
    latents, refused = draw(teacher, 2, 0), "the model has linear layers"
    with swap(teacher.model, (0,), 128) as model, pytest.raises(ValueError, match=refused):
        sampler.teacher_features(model, latents, latents, teacher.negative_embeds)
    less = latents[:, :1]
    with pytest.raises(ValueError, match="this model takes"):
        sampler.teacher_features(teacher.model, less, less, teacher.negative_embeds)
    assert not any(module._forward_hooks for module in teacher.model.modules())
