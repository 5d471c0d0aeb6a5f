"""crowd: clips are what their captions say, measures find the truth, training trains."""

import copy
import dataclasses
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.record import read_part, read_record, write_part
from linvideo_core import artifact, flow
from linvideo_core.evaluate import metrics
from linvideo_core.evaluate.compare import swap
from linvideo_core.evaluate.config import CompareConfig
from linvideo_core.evaluate.sampler import count_layers
from linvideo_core.flow import bind, bind_guided
from linvideo_core.models.checkpoint import load_wan
from linvideo_core.models.wan import WanConfig, WanModel
from linvideo_core.run.config import to_flags
from linvideo_core.run.context import Run
from linvideo_core.run.errors import SettingError
from linvideo_core.run.files import write_tensors
from linvideo_core.run.folder import read_metrics
from linvideo_core.run.process_group import SINGLE_PROCESS
from linvideo_core.teacher.config import TeacherConfig
from linvideo_core.teacher.teacher import load_teacher
from research.crowd import captions, clips, errors, evaluate, fitting, judge, picture, tracks, train
from research.crowd import rows as crowd_rows
from research.crowd.config import CrowdConfig, StoredModelConfig
from tests.conftest import Recorder

TINY = WanConfig(
    dim=128, num_heads=1, num_layers=2, ffn_dim=64, text_dim=captions.TEXT_DIM, freq_dim=32
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scenes() -> clips.Scenes:
    """Eight scenes, six of them with a sprite that goes behind the bar."""
    drawn = clips.draw_scenes(60, seeded(0))
    crosses = drawn.labels.crosses.any(dim=1)
    rows = torch.cat([crosses.nonzero()[:6, 0], (~crosses).nonzero()[:2, 0]])
    return drawn.take(rows)


@pytest.fixture(scope="module")
def rendered(scenes: clips.Scenes) -> clips.Clips:
    return clips.render(scenes)


def test_the_codec_is_exact(rendered: clips.Clips) -> None:
    latents = clips.encode_frames(rendered.frames)
    assert latents.shape[1:] == clips.LATENT_SHAPE
    torch.testing.assert_close(clips.decode_latents(latents), rendered.frames)


def test_latents_have_unit_variance() -> None:
    latents = clips.encode_frames(clips.render(clips.draw_scenes(32, seeded(3))).frames)
    assert latents.std() == pytest.approx(1, abs=0.1)
    assert latents.mean() == pytest.approx(0, abs=0.15)


def test_a_seed_gives_a_scene_again_and_a_window_is_part_of_its_clip(
    scenes: clips.Scenes, rendered: clips.Clips
) -> None:
    window = clips.all_times(len(scenes.labels))[:, 20:36]
    part = clips.render(scenes, window)
    torch.testing.assert_close(part.frames, rendered.frames[:, 20:36])
    first, again = (clips.draw_scenes(60, seeded(0)) for _ in range(2))
    assert first.texture.equal(again.texture) and first.labels.shape.equal(again.labels.shape)


def test_one_caption_in_ten_is_held_out_and_never_drawn_for_training() -> None:
    assert not clips.draw_scenes(500, seeded(1)).labels.is_held_out.any()
    assert clips.draw_scenes(500, seeded(1), is_held_out=True).labels.is_held_out.all()
    drawn = clips._draw_labels(20_000, seeded(1)).is_held_out
    assert drawn.float().mean() == pytest.approx(0.1, abs=0.01)


def test_sprites_stay_on_the_canvas_and_move_as_their_labels_say() -> None:
    drawn = clips.draw_scenes(200, seeded(2))
    labels = drawn.labels
    centres = clips.find_centres(drawn, clips.all_times(200))
    half = clips.values_of(clips.SIZES, labels.size)[..., None, None] / 2
    assert (centres >= half - 1e-3).all() and (centres <= clips.SIDE - half + 1e-3).all()
    step = centres[:, :, 1:] - centres[:, :, :-1]
    speed = clips.values_of(clips.SPEEDS, labels.speed)
    torch.testing.assert_close(step.norm(dim=-1).median(dim=-1).values, speed, rtol=2e-3, atol=0)
    for motion, way in enumerate([(1, 0), (-1, 0), (0, -1), (0, 1)]):
        chosen = labels.is_there & (labels.motion == motion)
        assert ((step[chosen] * torch.tensor(way)).sum(dim=-1) > 0).all()
    radius = centres - clips.SIDE / 2
    turn = radius[:, :, 0, 0] * step[:, :, 0, 1] - radius[:, :, 0, 1] * step[:, :, 0, 0]
    assert (turn[labels.is_there & (labels.motion == 4)] > 0).all()
    assert (turn[labels.is_there & (labels.motion == 5)] < 0).all()


def test_what_crosses_is_hidden_in_between_and_comes_back_with_its_texture(
    scenes: clips.Scenes, rendered: clips.Clips
) -> None:
    labels = scenes.labels
    crosses = labels.crosses
    cover = rendered.cover[crosses]
    assert (cover.amax(dim=1) > 0.95).all()
    assert (cover[:, 0] == 0).all() and (cover[:, -1] == 0).all()
    clear = tracks.is_clear(labels, rendered.centres)
    truth = tracks.Tracks(
        centres=rendered.centres, correlation=torch.ones_like(rendered.cover), is_seen=clear
    )
    recall = tracks.texture_recall(rendered.frames, labels, truth)[crosses]
    assert recall.median() > 0.95


def test_captions_are_read_back_and_embedded_alike() -> None:
    labels = clips.draw_scenes(50, seeded(4)).labels
    texts = captions.describe(labels)
    again = captions.parse(texts)
    assert all(getattr(again, name).equal(value) for name, value in vars(labels).items())
    *sprites, bar, pan = texts[0].split(", ")
    turned = captions.parse([", ".join([*sprites[::-1], bar, pan])])
    assert captions.embed(turned)[0].equal(captions.embed(labels)[0])
    codes = captions.embed(captions.parse(sorted(set(texts)))).flatten(1)
    assert len(codes.unique(dim=0)) == len(set(texts))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no bar, background still",
        "small slow cat bouncing, no bar, background still",
        "small slow disc bouncing, large fast disc moving up, no bar, background still",
    ],
)
def test_a_caption_of_other_words_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a bar and a background are needed"):
        captions.parse([text])


def test_tracks_find_the_truth(scenes: clips.Scenes, rendered: clips.Clips) -> None:
    part, frames = scenes.labels.take(slice(0, 4)), rendered.frames[:4]
    found = tracks.find_tracks(frames, part)
    clear = tracks.is_clear(part, rendered.centres[:4])
    error = (found.centres - rendered.centres[:4]).norm(dim=-1)[clear]
    assert error.median() < 0.3
    assert (error < 1.5).float().mean() > 0.9
    measures = tracks.measure_tracks(rendered.frames, scenes.labels)
    assert measures["recall"].nanmedian() > 0.95
    assert measures["position_error"].nanmedian() < 0.5
    assert measures["speed_ratio"].nanmedian() == pytest.approx(1, abs=0.05)


def test_a_texture_swapped_behind_the_bar_lowers_recall(
    scenes: clips.Scenes, rendered: clips.Clips
) -> None:
    part = scenes.take(slice(0, 6))
    other = dataclasses.replace(part, texture=part.texture.flip(0).roll(1, dims=2))
    cover = torch.where(part.labels.crosses[..., None], rendered.cover[:6], -1).amax(dim=1)
    is_late = torch.arange(clips.NUM_FRAMES) > cover.argmax(dim=1, keepdim=True)
    frames = torch.where(is_late[..., None, None], clips.render(other).frames, rendered.frames[:6])
    recall = tracks.measure_tracks(frames, part.labels)["recall"]
    assert recall.nanmedian() < 0.6


def test_doubled_speed_shows(scenes: clips.Scenes) -> None:
    times = 2 * clips.all_times(len(scenes.labels))[:, :32]
    measures = tracks.measure_tracks(clips.render(scenes, times).frames, scenes.labels)
    assert measures["speed_ratio"].nanmedian() == pytest.approx(2, abs=0.1)
    assert measures["position_error"].nanmedian() > 3


def test_the_judge_learns_and_a_right_answer_counts(tmp_path: Path) -> None:
    config = judge.JudgeConfig(
        fit=fitting.FitConfig(
            steps=24, learning_rate=6e-3, warmup_steps=4, ema_decay=0.7, log_every=1
        ),
        batch_size=8,
        num_measured=16,
    )
    measures = judge.train_judge(config, Run(folder=tmp_path), channels=(16, 16, 32))
    losses = [row["loss"] for row in read_metrics(tmp_path / fitting.METRICS_NAME)]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    assert measures["bar"] > 0.5
    assert set(measures) == set(judge.QUESTIONS)
    made = judge.load_judge(tmp_path / "judge.safetensors", "cpu")
    latents = torch.randn(3, *clips.LATENT_SHAPE)
    assert made(latents).features.shape == (3, 64)


def perfect_answers(labels: clips.Labels) -> judge.Answers:
    one_hot = nn.functional.one_hot
    sprites = {}
    for name, count in (("motion", 7), ("speed", 2), ("size", 2)):
        table = torch.zeros(len(labels), clips.NO_SHAPE + 1, count)
        rows = torch.arange(len(labels))[:, None]
        table[rows, labels.shape] = one_hot(getattr(labels, name), count).float()
        sprites[name] = table[:, : clips.NO_SHAPE]
    return judge.Answers(
        shape=judge.presence(labels).float(),
        bar=one_hot(labels.bar, 3).float(),
        pan=one_hot(labels.pan, 5).float(),
        features=torch.zeros(len(labels), 2),
        **sprites,
    )


def test_accuracy_is_one_for_the_truth_and_lower_for_other_captions() -> None:
    labels = clips.draw_scenes(40, seeded(5)).labels
    truth = perfect_answers(labels)
    assert all(right.mean() == pytest.approx(1) for right in judge.is_right(truth, labels).values())
    others = judge.is_right(truth, labels.take(torch.arange(39, -1, -1)))
    assert all(right.mean() < 0.8 for right in others.values())


def linear_loss(model: nn.Module, fails_at: int, steps: list[int]) -> fitting.Loss:
    def loss_fn(done: float, generator: torch.Generator) -> tuple[Tensor, int]:
        steps.append(len(steps))
        if len(steps) > fails_at:
            raise KeyboardInterrupt
        x = torch.randn(4, 3, generator=generator)
        return (model(x) - x.sum(dim=1, keepdim=True)).square().mean(), 4

    return loss_fn


def test_a_training_that_was_stopped_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    config = fitting.FitConfig(steps=9, warmup_steps=2, checkpoint_every=4, log_every=1)
    models, reached = {}, {}
    for name, stops in (("unbroken", [99]), ("stopped", [6, 99])):
        for fails_at in stops:
            torch.manual_seed(0)
            model = models[name] = nn.Linear(3, 1)
            run = Run(folder=tmp_path / name, seed=3)
            loss_fn = linear_loss(model, fails_at, [])
            if fails_at == 6:
                with pytest.raises(KeyboardInterrupt):
                    fitting.fit(model, loss_fn, config, run)
            else:
                reached[name] = fitting.fit(model, loss_fn, config, run)
    assert models["unbroken"].weight.equal(models["stopped"].weight)
    assert reached["stopped"]["clips"] == reached["unbroken"]["clips"] == 36
    rows = [read_metrics(tmp_path / name / fitting.METRICS_NAME) for name in models]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


def test_a_training_ends_at_its_time_limit(tmp_path: Path) -> None:
    config = fitting.FitConfig(minutes=0.002, log_every=1)
    model = nn.Linear(3, 1)
    reached = fitting.fit(model, linear_loss(model, 10**6, []), config, Run(folder=tmp_path))
    assert 0 < reached["steps"] < config.steps
    assert reached["seconds"] >= 60 * config.minutes


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny teacher that saw a few short clips."""
    folder = tmp_path_factory.mktemp("crowd")
    config = train.TrainConfig(
        fit=fitting.FitConfig(steps=9, learning_rate=8e-3, warmup_steps=2, log_every=1),
        batch_size=1,
        short_share=0.95,
        num_prompts=6,
    )
    train.train_teacher(config, Run(folder=folder), TINY)
    return folder


def test_the_teacher_learns(teacher: Path) -> None:
    losses = [row["loss"] for row in read_metrics(teacher / fitting.METRICS_NAME)]
    assert losses[0] == pytest.approx(2, abs=0.5)
    assert sum(losses[-3:]) / 3 < 1.3


def test_commands_take_the_teacher_and_its_prompts(teacher: Path) -> None:
    for name, is_held_out in (("prompts", False), ("held_out", True)):
        made = load_teacher(
            TeacherConfig(
                model=teacher / "model.safetensors",
                prompts=teacher / f"{name}.safetensors",
                num_frames=61,
                height=256,
                width=256,
            )
        )
        assert made.latent_shape == clips.LATENT_SHAPE
        labels = captions.parse(made.prompts)
        assert (labels.is_held_out == is_held_out).all()
        torch.testing.assert_close(made.prompt_embeds.float(), captions.embed(labels))
    latents = torch.zeros(1, *clips.LATENT_SHAPE)[:, :, :2]
    velocity = bind(made.model, made.prompt_embeds[:1].float())(latents, torch.ones(1))
    assert velocity.isfinite().all()


def test_the_stored_teacher_and_judge_know_clips_and_train_on(tmp_path: Path) -> None:
    weights = Path(train.__file__).with_name("weights")
    generator, sigma = seeded(0), torch.tensor([0.5])
    scenes = clips.draw_scenes(1, generator, is_held_out=True)
    x0 = clips.encode_frames(clips.render(scenes).frames)
    noise = torch.randn(x0.shape, generator=generator)
    velocity_fn = bind(load_wan(weights / "model.safetensors"), captions.embed(scenes.labels))
    with torch.no_grad():
        velocity = velocity_fn(flow.add_noise(x0, noise, sigma), sigma)
    # What is to be found has a mean square of 2.
    assert F.mse_loss(velocity, noise - x0) < 0.06
    answers = judge.load_judge(weights / "judge.safetensors", "cpu")(x0)
    assert all(float(right) == 1 for right in judge.is_right(answers, scenes.labels).values())
    config = train.TrainConfig(
        fit=fitting.FitConfig(steps=1, learning_rate=1e-5, log_every=1),
        batch_size=1,
        short_share=1.0,
        start=weights / "model.safetensors",
        num_prompts=2,
    )
    train.train_teacher(config, Run(folder=tmp_path))
    loss = read_metrics(tmp_path / fitting.METRICS_NAME)[0]["loss"]
    assert loss < 0.7


def save_student(model_path: Path, path: Path, *layers: int) -> None:
    """Write the file of a student with linear layers, which was not trained."""
    model = load_wan(model_path).requires_grad_(False)
    with swap(model, [*layers], 128) as student:
        made = artifact.extract(
            student,
            load_wan(model_path),
            parameters="feature_maps",
            objective="adm",
            steps=0,
            provenance={},
        )
    artifact.save(made, path)


def test_an_evaluation_has_floors_continues_and_is_recorded(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    folder = teacher / "judge"
    made = judge.Judge((8, 8, 8))
    folder.mkdir()
    write_tensors(folder / "judge.safetensors", made.state_dict())
    config = CrowdConfig(
        comparison=CompareConfig(
            num_samples=4, seeds_per_prompt=2, sampler_steps=2, batch_size=2, shift=train.SHIFT
        ),
        model=teacher / "model.safetensors",
        prompts=teacher / "held_out.safetensors",
        judge=folder / "judge.safetensors",
        artifacts=f"{teacher / 'student.safetensors'},{teacher / 'all.safetensors'}",
        densities="0.1",
        keep_first_steps="1",
        student_guidance="4",
        out=teacher / "evaluation",
    )
    save_student(config.model, teacher / "student.safetensors", 1)
    save_student(config.model, teacher / "all.safetensors", 0, 1)
    for module in (evaluate, crowd_rows):
        monkeypatch.setattr(module, "RESULTS_FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate", *shlex.split(to_flags(config)), "--record"])
    # What is refused at once leaves the folder to others.
    save_student(config.model, teacher / "student-first-1.safetensors", 1)
    alike = f"{config.artifacts},{teacher / 'student-first-1.safetensors'}"
    for files, words in ((alike, "would be called"), (str(teacher / "none.safetensors"), "none")):
        with pytest.raises(ValueError, match=words):
            evaluate.compare(dataclasses.replace(config, artifacts=files), Run())
        assert not config.out.exists()
    # A file stands where the last model's folder is to be.
    measures = config.out / "-".join(["of", *evaluate.digests_of(config).values()])
    digest = evaluate.digest_of(teacher / "student.safetensors")
    blocked = measures / f"{teacher.name}-student-sparse-0.1-{digest}"
    measures.mkdir(parents=True)
    blocked.touch()
    with pytest.raises(FileExistsError):
        evaluate.main(SINGLE_PROCESS)
    early, _ = read_part(tmp_path / "crowd.json", "evaluation_4")
    blocked.unlink()
    rows = evaluate.compare(config, Run(callbacks=(recorder := Recorder())))
    assert recorder.stages[0] == "real: evaluation" and len(recorder.stages) == 12
    # What was made before counts as done.
    assert recorder.seen[:3] == 3 * [("evaluation", 2)]
    assert recorder.seen[-3:] == [("evaluation", number) for number in range(3)]
    # Where all layers are linear nothing is left to be sparse.
    real, own, student, every, kept, guided, _, _, sparse, both = rows
    assert [row["videos"] for row in rows] == [4] * 10
    assert (guided["model"], guided["guidance_scale"]) == (student["model"], 4)
    assert 0 < guided["fidelity"] != student["fidelity"]
    assert (kept["model"], kept["keep_first_steps"]) == (student["model"], 1)
    assert 0 < kept["fidelity"] != student["fidelity"]
    assert (every["linear_layers"], every["softmax_backend"], every["density"]) == (2, None, None)
    assert sparse["model"] == "teacher" and sparse["fidelity"] > 0
    assert (both["model"], both["softmax_backend"], both["density"]) == (
        student["model"],
        "sparse",
        0.1,
    )
    assert (student["linear_layers"], student["layers"], student["density"]) == (1, 2, 1.0)
    assert (student["hybrid_layers"], student["tile"], student["attention_mass"]) == (0, None, None)
    assert (student["steps"], student["guidance_scale"]) == (2, config.comparison.guidance_scale)
    assert student["file"] == both["file"] and own["file"] is None
    assert both["fidelity"] != student["fidelity"]
    assert real["recall"] != own["recall"] and student["fidelity"] > 0
    assert {"frechet_teacher", "frechet_real", "temporal_spectrum_db", "diversity"} <= set(own)
    assert (config.out / "crowd.png").exists()
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("*.safetensors")}
    evaluate.main(SINGLE_PROCESS)
    part, _ = read_part(tmp_path / "crowd.json", "evaluation_4")
    # Shares of a teacher that answers nothing are not finite, and null in a file.
    stored = json.loads(json.dumps(rows), parse_constant=lambda _: None)
    assert part == [{"what": "evaluation_4", **row} for row in stored] and early == part[:-1]
    assert before == {path: path.stat().st_mtime_ns for path in config.out.rglob("*.safetensors")}
    settings = evaluate.settings_of(config)
    for change in ({"seed": 1}, {"compile": True}, {"prompts": teacher / "prompts.safetensors"}):
        assert evaluate.settings_of(dataclasses.replace(config, **change)) != settings
    name = "benchmarks.record.describe_device"
    monkeypatch.setattr(name, lambda _: "another")
    with pytest.raises(ValueError, match="has rows of evaluation_4 measured on CPU"):
        evaluate.main(SINGLE_PROCESS)


def test_a_picture_shows_teacher_and_student_and_their_seconds(
    teacher: Path, tmp_path: Path
) -> None:
    save_student(teacher / "model.safetensors", tmp_path / "student.safetensors", 1)
    files = {
        "model": teacher / "model.safetensors",
        "artifact": tmp_path / "student.safetensors",
        "out": tmp_path / "picture",
    }
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    counts = ["--num-samples", "2", "--sampler-steps", "2", "--keep-first-steps", "1"]
    picture.main([*words, *counts, "--device", "cpu"])
    own, student, after = read_record(tmp_path / "picture" / "crowd_picture.json")["rows"]
    assert [row["linear_layers"] for row in (own, student, after)] == [0, 1, 1]
    assert (after["model"], after["keep_first_steps"]) == ("after 1", 1)
    assert len(own["turns"]) == len(student["turns"]) == 2
    ratios = [x / y for x, y in zip(own["turns"], student["turns"], strict=True)]
    assert min(ratios) <= student["speedup"] <= max(ratios)
    assert (tmp_path / "picture" / "crowd.webp").stat().st_size > 1000
    with pytest.raises(SettingError, match="--batch-size 2 given; 1 is needed"):
        picture.PictureConfig(comparison=CompareConfig(batch_size=2, seeds_per_prompt=1))


def test_a_distilled_file_is_drawn_in_its_own_steps(teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "few.safetensors"
    save_student(teacher / "model.safetensors", path, 1)
    made = artifact.load(path)
    header = dataclasses.replace(made.header, sigmas=(1.0, 0.9, 0.6, 0.0))
    artifact.save(dataclasses.replace(made, header=header), path)
    comparison = CompareConfig(
        num_samples=2, seeds_per_prompt=1, sampler_steps=1, batch_size=1, shift=train.SHIFT
    )
    config = StoredModelConfig(
        comparison=comparison, model=teacher / "model.safetensors", out=tmp_path, device="cpu"
    )
    sampling = evaluate.open_with_captions(config)
    with pytest.raises(SettingError, match="was distilled"):
        picture.sample_in_turns(sampling, path, [1])
    latents, _ = picture.sample_in_turns(sampling, path)
    with artifact.apply(made, sampling.teacher.model):
        recipe = sampling.recipe_of(header)
        expected = sampling.sample(sampling.teacher.model, sampling.parts()[1], 1, 0, recipe)
    torch.testing.assert_close(latents["student"][1], expected)


def test_a_student_is_asked_at_every_state_of_the_teacher(teacher: Path, tmp_path: Path) -> None:
    path, model = tmp_path / "student.safetensors", teacher / "model.safetensors"
    save_student(model, path, 1)
    files = {"model": model, "artifacts": path, "out": tmp_path / "errors", "device": "cpu"}
    counts = {"num-samples": 3, "batch-size": 2, "sampler-steps": 2, "keep-first-steps": 1}
    words = [word for name, value in (files | counts).items() for word in (f"--{name}", str(value))]
    errors.main(words)
    rows = read_record(tmp_path / "errors" / "crowd_errors.json")["rows"]
    *levels, alone, kept = rows
    assert [row["step"] for row in levels] == [0, 1]
    assert (alone["keep_first_steps"], kept["keep_first_steps"]) == (0, 1)
    assert all(row["linear_layers"] == 1 and row["videos"] == 3 for row in rows)
    assert all(row["model"] == f"{tmp_path.name}-student" for row in rows)
    # Three videos, of batches of two and one, count alike.
    comparison = CompareConfig(
        num_samples=3, seeds_per_prompt=1, sampler_steps=2, shift=train.SHIFT, batch_size=2
    )
    config = StoredModelConfig(
        comparison=comparison, model=model, out=tmp_path / "captions", device="cpu"
    )
    sampling = evaluate.open_with_captions(config)
    first, made = copy.deepcopy(sampling.teacher.model), artifact.load(path)
    student, sizes = sampling.teacher.model, []
    distances: list[list[torch.Tensor]] = [[], []]
    for number, part in enumerate(sampling.parts()):
        expected = sampling.sample(first, part, number, 0)
        noise = sampling.draw_noise(part, number, 0)
        embeds = sampling.teacher.prompt_embeds[sampling.index[part]]
        prompts = (embeds, sampling.teacher.negatives_for(embeds), 3.0)
        guided = [bind_guided(first, *prompts)(noise, torch.ones(len(noise)))]
        with artifact.apply(made, student):
            guided.append(bind_guided(student, *prompts)(noise, torch.ones(len(noise))))
            for steps, found in enumerate(distances):
                how = {"first": first, "first_steps": steps}
                videos = sampling.sample(student, part, number, 0, **how)
                found.append(metrics.sample_distance(videos, expected))
        target, own = (x.double().square().sum().item() for x in guided)
        wrong = (guided[1] - guided[0]).double().square().sum().item()
        sizes.append((target, own, wrong))
    for row, found in zip((alone, kept), distances, strict=True):
        assert row["fidelity"] == pytest.approx(torch.cat(found).mean().item(), rel=1e-5)
    assert 0 < kept["fidelity"] != alone["fidelity"]
    target, own, wrong = (sum(each) for each in zip(*sizes, strict=True))
    assert levels[0]["energy"] == pytest.approx(own / target, rel=1e-5)
    assert levels[0]["guided_error"] == pytest.approx(wrong / target, rel=1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"keep_first_steps": "2"}, "--keep-first-steps 2 given; each must be 1 and"),
        ({"keep_first_steps": "1,1"}, "stand there once, with commas between"),
        ({"keep_first_steps": "9" * 5000}, "given; each must be 1"),
        ({"artifacts": " ,"}, "--artifacts names no file"),
        ({"artifacts": "a/b.safetensors, a/b.safetensors"}, "two rows would be called a-b"),
    ],
)
def test_what_is_asked_of_students_must_be_there(given: dict[str, str], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        errors.ErrorsConfig(comparison=CompareConfig(sampler_steps=2), **given)


def test_a_distilled_file_is_not_asked_at_levels_that_it_does_not_know(
    teacher: Path, tmp_path: Path
) -> None:
    path = tmp_path / "few.safetensors"
    save_student(teacher / "model.safetensors", path, 1)
    made = artifact.load(path)
    header = dataclasses.replace(made.header, sigmas=(1.0, 0.9, 0.6, 0.0))
    artifact.save(dataclasses.replace(made, header=header), path)
    with pytest.raises(SettingError, match="which was distilled"):
        errors.load_students(errors.ErrorsConfig(artifacts=str(path)))


def test_the_errors_of_both_branches_are_weighed_as_guidance_does() -> None:
    generator = torch.Generator().manual_seed(0)
    conditional, unconditional, error = torch.randn(3, 1, 2, 3, 4, 4, generator=generator)
    theirs = (conditional, unconditional)

    def measure(*own: torch.Tensor) -> dict[str, float]:
        return errors.describe(errors.square(own, theirs, 3.0))

    whole = (3 * conditional - 2 * unconditional).square().mean().item()
    alike = measure(conditional + error, unconditional + error)
    assert alike["correlation"] == pytest.approx(1)
    one = alike["conditional_error"]
    assert one == pytest.approx(error.square().mean().item() / whole, rel=1e-5)
    assert alike["guided_error"] == pytest.approx(one, rel=1e-5)
    opposed = measure(conditional + error, unconditional - error)
    assert opposed["correlation"] == pytest.approx(-1)
    assert opposed["guided_error"] == pytest.approx(25 * one, rel=1e-5)
    assert measure(conditional / 2, unconditional / 2)["energy"] == pytest.approx(0.25, rel=1e-5)


def test_the_stored_student_is_of_the_stored_teacher() -> None:
    weights = Path(train.__file__).with_name("weights")
    model = load_wan(weights / "model.safetensors")
    with artifact.apply(artifact.load(weights / "half_long.safetensors"), model):
        assert count_layers(model)["hybrid_layers"] == 6


def test_shares_are_of_the_teacher_and_the_least_counts() -> None:
    names = (*judge.QUESTIONS, "found", "recall", "frechet_teacher")
    best = dict.fromkeys(names, 0.8)
    row = {**best, "motion": 0.4, "recall": 0.6, "frechet_teacher": 1.2}
    assert crowd_rows.find_shares(row, best) == pytest.approx(
        {"share_of_teacher": 0.5, "recall_share": 0.75, "frechet_over_floor": 1.5}
    )


def test_rows_that_were_measured_otherwise_do_not_stay_in_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crowd_rows, "RESULTS_FOLDER", tmp_path)
    path, table = tmp_path / "crowd.json", {"what": "hybrid", "recall": 1.0}
    write_part(path, "hybrid", title="other", command="experiments", rows=[table], device="cpu")

    def record(
        recall: float, steps: int, *densities: float, file: str = "a"
    ) -> list[tuple[float, float]]:
        model = {"model": "student", "file": file, "softmax_backend": "sparse", "recall": recall}
        rows = [{**model, "density": density} for density in densities]
        settings = {"num_samples": 8, "sampler_steps": steps}
        crowd_rows.record(rows, settings, command=f"evaluate {recall}", device="cpu")
        found, _ = read_part(path, "evaluation_8")
        return [(row["density"], row["recall"]) for row in found]

    assert record(0.5, 20, 0.1, 0.2) == [(0.1, 0.5), (0.2, 0.5)]
    assert record(0.6, 20, 0.2, 0.4) == [(0.2, 0.6), (0.4, 0.6), (0.1, 0.5)]
    assert read_part(path, "evaluation_8")[1]["command"] == "evaluate 0.5 && evaluate 0.6"
    assert record(0.7, 30, 0.2) == [(0.2, 0.7)]
    assert record(0.8, 30, 0.1, file="b") == [(0.1, 0.8)]
    assert read_part(path, "hybrid")[0] == [table]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"artifacts": "a/x/l.safetensors,b/x/l.safetensors"}, "would be called x-l"),
        ({"densities": "0.1,0.1000001"}, "stand there once"),
    ],
)
def test_rows_of_one_name_are_refused(settings: dict[str, str], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        CrowdConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        *(({"densities": each}, "a number above 0 to 1") for each in ("0", "0.1,1.5", "a tenth")),
        *(
            ({"artifacts": "a.safetensors", "student_guidance": each}, "a number from 1 to 100")
            for each in ("0", "3.2,", "3.2,3.20", "1e1")
        ),
        ({"artifacts": "a.safetensors", "student_guidance": "3.2,3"}, "3 is the teacher's"),
        ({"num_frames": 5}, "--num-frames 5 given; 9 are needed"),
    ],
)
def test_numbers_that_are_none_are_refused(settings: dict[str, str | int], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        CrowdConfig(**settings)


def test_the_cost_is_that_of_the_products() -> None:
    model = WanModel(TINY)
    C, _, H, W = clips.LATENT_SHAPE
    inputs = torch.zeros(1, C, 1, H, W), torch.ones(1), torch.zeros(1, 6, TINY.text_dim)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs).sum().backward()
    assert train.count_flops(TINY, 4) == pytest.approx(counter.get_total_flops(), rel=0.15)
    predicted = train.predict_steps(train.TrainConfig(), train.CROWD, 4)
    assert predicted["short"] > predicted["whole"] > 1000
    assert json.dumps(predicted)
