"""Wan 2.2's two experts: one trajectory, two students, each at its own noise levels."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from linvideo_core import artifact
from linvideo_core.evaluate.compare import read_evaluation
from linvideo_core.flow import TIMESTEP_SCALE, bind, bind_guided, make_sigmas, sample_euler
from linvideo_core.models.experts import HIGH, LOW, SIDES, Experts
from linvideo_core.run.config import override
from linvideo_core.run.context import Run
from linvideo_core.teacher.config import TrajectoryConfig
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.teacher.trajectories import collect
from linvideo_core.transfer import command as transfer
from linvideo_core.transfer.config import ObjectiveConfig, TransferConfig
from linvideo_core.transfer.experts import EXPERT_NAMES, OwnStates, linearize_experts
from linvideo_core.transfer.objective import Batch, Batches, adm_loss
from tests.conftest import TEXT_DIM, Recorder, make_wan, small_transfer

BOUNDARY = 0.8
SETTINGS = TrajectoryConfig(
    num_trajectories=4, states_per_trajectory=4, sampler_steps=12, shift=3.0, shard_size=2
)


@pytest.fixture
def experts() -> Experts:
    models = [make_wan(seed=seed).eval().requires_grad_(False) for seed in (1, 2)]
    return Experts(*models, BOUNDARY)


@pytest.fixture
def pair(teacher: Teacher, experts: Experts) -> Teacher:
    return dataclasses.replace(teacher, name="pair", model=experts)


def test_each_sample_goes_to_the_expert_of_its_noise_level(experts: Experts) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 4, 2, 6, 4, generator=generator)
    prompts = torch.randn(4, 5, TEXT_DIM, generator=generator)
    sigma = torch.tensor([1.0, BOUNDARY, BOUNDARY - 1e-3, 0.1])
    found = bind(experts, prompts)(latents, sigma)
    for i, side in enumerate((HIGH, HIGH, LOW, LOW)):
        one = slice(i, i + 1)
        expected = bind(getattr(experts, side), prompts[one])(latents[one], sigma[one])
        torch.testing.assert_close(found[one], expected)


def test_a_trajectory_changes_experts_at_the_boundary(pair: Teacher, tmp_path: Path) -> None:
    collect(pair, SETTINGS, Run(folder=tmp_path / "run", seed=3))
    paths = sorted((tmp_path / "teacher").glob("*/video-*.safetensors"))[:2]
    videos = [load_file(path) for path in paths]
    noise = []
    for video in range(2):
        generator = torch.Generator().manual_seed(3 * 1_000_003 + video)
        torch.randint(3, (), generator=generator)
        noise.append(torch.randn(pair.latent_shape, generator=generator))
    sigmas = make_sigmas(SETTINGS.sampler_steps, SETTINGS.shift)
    velocities = {
        side: bind_guided(
            getattr(pair.model, side),
            pair.prompt_embeds[torch.stack([video["prompt"] for video in videos])],
            pair.negative_embeds.expand(2, -1, -1),
            SETTINGS.guidance_scale,
        )
        for side in SIDES
    }
    met: dict[int, Tensor] = {}
    sample_euler(
        lambda x, s: velocities[HIGH if s[0] >= BOUNDARY else LOW](x, s),
        torch.stack(noise),
        sigmas,
        on_step=lambda i, latents, _: met.update({i: latents}),
    )
    for video in range(2):
        for state, step in zip(videos[video]["latents"], videos[video]["step"], strict=True):
            expected = met[int(step)][video].half()
            torch.testing.assert_close(state, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("side", SIDES)
def test_an_expert_has_the_states_of_its_own_levels_and_meets_no_others(
    side: str, pair: Teacher, tmp_path: Path
) -> None:
    whole = collect(pair, SETTINGS, Run(folder=tmp_path / "run", seed=3))
    states = OwnStates(whole, side, BOUNDARY)
    own = [s for s in whole.sigmas[:-1].tolist() if (s >= BOUNDARY) == (side == HIGH)]
    assert states.sigmas[:-1].tolist() == own and states.sigmas[-1] < own[-1]
    sigmas = whole.sigmas[whole.steps()]
    picks = ((sigmas >= BOUNDARY) == (side == HIGH)).nonzero().squeeze(1)
    taken = states.take(torch.arange(len(states)), "cpu")
    assert torch.equal(taken.latents, whole.take(picks, "cpu").latents)
    assert torch.equal(states.sigmas[taken.step], sigmas[picks])
    assert torch.equal(taken.step, states.steps())
    asked: list[Tensor] = []

    def velocity(latents: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        asked.append(sigma)
        return latents * 0.5

    asks = dict.fromkeys(("student", "student_guided", "teacher"), velocity)
    batches = Batches(pair, states, ObjectiveConfig(objective="adm", max_jump=9), 8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        adm_loss(batches.draw(generator), states.sigmas, **asks)
    assert set(torch.cat(asked).tolist()) <= set(own)


def config_of(folder: Path, **changes: Any) -> TransferConfig:
    """Return a transfer of seconds of two experts in files of a folder, into its folder `run`."""
    values = {
        "low_noise_model": folder / "low.safetensors",
        "num_trajectories": 4,
        "states_per_trajectory": 4,
        "sampler_steps": 12,
        "shard_size": 2,
        "boundary": BOUNDARY,
        "target": 2,
        "steps": 5,
        **changes,
    }
    return small_transfer(folder / "high.safetensors", **values)


def test_each_student_meets_its_own_noise_levels_only_and_its_file_says_which(
    pair: Teacher, tmp_path: Path
) -> None:
    met: dict[str, list[Tensor]] = {side: [] for side in SIDES}
    for side in SIDES:
        # The student is the expert's own model.
        hook = lambda _, args, side=side: met[side].append(args[1])  # noqa: E731
        getattr(pair.model, side).register_forward_pre_hook(hook)
    names = {side: f"my_{side}" for side in SIDES}
    before = {n: p.clone() for n, p in pair.model.state_dict().items()}
    config = config_of(tmp_path)
    told = Recorder()
    linearize_experts(pair, names, config, Run(folder=config.out, callbacks=told))
    per_expert = ["warm_start", "training"]
    assert told.stages == [
        "sampling_teacher",
        *(f"{side.replace('_', ' ')}: {stage}" for side in SIDES for stage in per_expert),
    ]
    timesteps = {side: torch.cat(found) for side, found in met.items()}
    assert bool((timesteps[HIGH] >= TIMESTEP_SCALE * BOUNDARY).all())
    assert bool((timesteps[LOW] < TIMESTEP_SCALE * BOUNDARY).all())
    for name, parameter in pair.model.state_dict().items():
        assert torch.equal(parameter, before[name])
    for side, above, below in ((HIGH, 1.0, BOUNDARY), (LOW, BOUNDARY, 0.0)):
        header = artifact.load(config.out / EXPERT_NAMES[side]).header
        assert (header.usage.sigma_from, header.usage.sigma_to) == (above, below)
        assert header.usage.steps == config.trajectories.sampler_steps
        assert header.provenance["expert"] == side
        assert header.provenance["model"] == names[side]
        assert len(header.linear_layers) == 2
    digests = {
        artifact.load(config.out / name).header.weights_digest for name in EXPERT_NAMES.values()
    }
    assert len(digests) == 2


@pytest.fixture
def files(tmp_path: Path) -> None:
    """Both experts, in files of the temporary folder."""
    for name, seed in (("high", 1), ("low", 2)):
        save_file(make_wan(seed=seed).state_dict(), tmp_path / f"{name}.safetensors")


def test_one_command_makes_both_files_and_continues_where_it_stopped(
    files: None, tmp_path: Path
) -> None:
    class StopSecond(Recorder):
        def on_step_end(self, done: int, **metrics: float) -> None:
            if self.stages[-1] == "low noise: training" and done == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer.run(config_of(tmp_path), StopSecond())
    assert (tmp_path / "run" / EXPERT_NAMES[HIGH]).exists()
    assert not (tmp_path / "run" / EXPERT_NAMES[LOW]).exists()
    config = config_of(tmp_path)
    transfer.run(config)
    whole = config_of(tmp_path, out=tmp_path / "whole")
    transfer.run(whole)
    for name in EXPERT_NAMES.values():
        found, expected = (load_file(config.out / name) for config in (config, whole))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    rows = read_evaluation(whole.out)["rows"]
    assert [row["model"] for row in rows] == ["teacher", "swapped", "student"]
    assert [(row["linear_layers"], row["layers"]) for row in rows] == [(0, 6), (4, 6), (4, 6)]
    summary = transfer.summarize(whole)
    assert "of the high_noise expert" in summary and "of the low_noise expert" in summary
    told = Recorder()
    transfer.run(whole, told)
    assert told.stages == []


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a boundary that no level is below": ({"boundary": 0.05}, "--boundary 0.05 given; of 12"),
    "too few states for both": ({"states_per_trajectory": 1}, "--states-per-trajectory"),
    "a missing expert": ({"low_noise_model": Path("none.safetensors")}, "none.safetensors"),
    "a target beyond the layers": ({"target": 4}, "--target 4 given"),
    "two architectures": ({"low_noise_model": Path("deep.safetensors")}, "differ in architecture"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_one_sentence_before_anything_is_made(
    name: str, files: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, words = BAD[name]
    monkeypatch.chdir(tmp_path)
    save_file(make_wan(num_layers=4).state_dict(), tmp_path / "deep.safetensors")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        transfer.run(config_of(tmp_path, **changes))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_second_expert_without_the_first_is_refused() -> None:
    for values, words in (
        ({"low_noise_model": Path("low.safetensors")}, "--low-noise-model was given without --mod"),
        ({"boundary": 1.0}, "--boundary 1.0 given"),
    ):
        with pytest.raises(ValueError, match=words):
            override(TransferConfig(), values)
