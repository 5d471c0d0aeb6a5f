"""What is stored is the teacher's own trajectory, whatever interrupted the sampling."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from linvideo_core.flow import euler_step, guide, make_sigmas
from linvideo_core.subject import Subject
from linvideo_core.trajectories import Trajectories, TrajectoryConfig, collect

SETTINGS = TrajectoryConfig(
    num_trajectories=5,
    states_per_trajectory=3,
    sampler_steps=7,
    guidance_scale=2.5,
    shift=3.0,
    shard_size=2,
)
HALF = {"rtol": 2e-3, "atol": 4e-3}  # stored in fp16
Shards = list[dict[str, Tensor]]


def read(folder: Path) -> Shards:
    return [load_file(path) for path in sorted(folder.glob("shard-*.safetensors"))]


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_hold_every_video_once(subject: Subject, tmp_path: Path) -> None:
    trajectories = collect(subject, SETTINGS, tmp_path, seed=1)
    shards = read(tmp_path)
    assert [len(shard["prompt"]) for shard in shards] == [2, 2, 1]
    assert len(trajectories) == 5 * 3
    for shard in shards:
        size = len(shard["prompt"])
        for name in ("latents", "conditional", "unconditional"):
            assert shard[name].shape == (size, 3, *subject.latent_shape)
            assert shard[name].dtype == torch.float16
        assert shard["step"].shape == (size, 3)
        assert bool((shard["step"].diff(dim=1) > 0).all())
        assert int(shard["step"].min()) >= 0
        assert int(shard["step"].max()) < 7


@torch.no_grad()
def test_stored_states_lie_on_the_teachers_own_euler_trajectory(
    subject: Subject, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SETTINGS, states_per_trajectory=7)
    collect(subject, settings, tmp_path, seed=1)
    sigmas = make_sigmas(7, 3.0)
    for shard in read(tmp_path):
        size = len(shard["prompt"])
        embeds = subject.prompt_embeds[shard["prompt"]]
        negative = subject.negative_embeds.expand_as(embeds)
        assert torch.equal(shard["step"], torch.arange(7).expand(size, 7))
        # Sampled again from the stored noise alone, not from state to state.
        latents = shard["latents"][:, 0].float()
        for step in range(7):
            sigma, sigma_next = (s.expand(size) for s in sigmas[step : step + 2])
            conditional = subject.model(latents, 1000 * sigma, embeds)
            unconditional = subject.model(latents, 1000 * sigma, negative)
            for name, tensor in (
                ("latents", latents),
                ("conditional", conditional),
                ("unconditional", unconditional),
            ):
                torch.testing.assert_close(shard[name][:, step].float(), tensor, **HALF)
            velocity = guide(conditional, unconditional, 2.5)
            latents = euler_step(latents, velocity, sigma, sigma_next)


def test_a_trajectory_starts_at_standard_noise(subject: Subject, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, num_trajectories=40, states_per_trajectory=7)
    collect(subject, dataclasses.replace(settings, shard_size=40), tmp_path, seed=1)
    noise = read(tmp_path)[0]["latents"][:, 0].float()
    assert float(noise.mean()) == pytest.approx(0, abs=4 * noise.numel() ** -0.5)
    assert float(noise.std()) == pytest.approx(1, abs=4 * (2 * noise.numel()) ** -0.5)


def test_keeping_fewer_states_keeps_states_of_the_same_trajectory(
    subject: Subject, tmp_path: Path
) -> None:
    collect(subject, SETTINGS, tmp_path / "few", seed=1)
    every = dataclasses.replace(SETTINGS, states_per_trajectory=7)
    collect(subject, every, tmp_path / "all", seed=1)
    for few, full in zip(read(tmp_path / "few"), read(tmp_path / "all"), strict=True):
        assert torch.equal(few["prompt"], full["prompt"])
        for video, steps in enumerate(few["step"]):
            for name in ("latents", "conditional", "unconditional"):
                assert torch.equal(few[name][video], full[name][video, steps])


def test_kept_states_are_spread_over_the_noise_levels(subject: Subject, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, num_trajectories=63, shard_size=63)
    collect(subject, settings, tmp_path, seed=1)
    steps = read(tmp_path)[0]["step"]
    strata = [(0, 1), (2, 3, 4), (5, 6)]
    for column, stratum in zip(steps.T, strata, strict=True):
        assert set(column.tolist()) == set(stratum)


@pytest.mark.parametrize("lost", [(0,), (1, 2), (0, 1, 2)])
def test_lost_shards_are_sampled_again_to_the_same_bytes(
    lost: tuple[int, ...], subject: Subject, tmp_path: Path
) -> None:
    collect(subject, SETTINGS, tmp_path, seed=1)
    whole = read_bytes(tmp_path)
    for i in lost:
        (tmp_path / f"shard-{i:05d}.safetensors").unlink()
    collect(subject, SETTINGS, tmp_path, seed=1)
    assert read_bytes(tmp_path) == whole


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_a_damaged_shard_is_sampled_again_to_the_same_bytes(
    damage: bytes | None, subject: Subject, tmp_path: Path
) -> None:
    collect(subject, SETTINGS, tmp_path, seed=1)
    whole = read_bytes(tmp_path)
    path = tmp_path / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-5] if damage is None else damage)
    collect(subject, SETTINGS, tmp_path, seed=1)
    assert read_bytes(tmp_path) == whole


def test_whole_shards_are_not_sampled_again(subject: Subject, tmp_path: Path) -> None:
    collect(subject, SETTINGS, tmp_path, seed=1)
    calls: list[int] = []
    subject.model.register_forward_hook(lambda *_: calls.append(1))
    collect(subject, SETTINGS, tmp_path, seed=1)
    assert calls == []


def test_interruption_at_any_step_changes_nothing(subject: Subject, tmp_path: Path) -> None:
    collect(subject, SETTINGS, tmp_path / "unbroken", seed=1)

    class Stopped(Exception):
        pass

    for num_calls in (3, 10, 5):
        calls: list[int] = []

        def stop(*_: object, calls: list[int] = calls, limit: int = num_calls) -> None:
            calls.append(1)
            if len(calls) == limit:
                raise Stopped

        hook = subject.model.register_forward_hook(stop)
        with pytest.raises(Stopped):
            collect(subject, SETTINGS, tmp_path / "broken", seed=1)
        hook.remove()
    collect(subject, SETTINGS, tmp_path / "broken", seed=1)
    assert read_bytes(tmp_path / "broken") == read_bytes(tmp_path / "unbroken")


@pytest.mark.parametrize(
    "change", [{"guidance_scale": 2.0}, {"shift": 5.0}, {"sampler_steps": 8}, {"seed": 2}]
)
def test_shards_of_other_settings_are_refused(
    change: dict[str, float], subject: Subject, tmp_path: Path
) -> None:
    collect(subject, SETTINGS, tmp_path, seed=1)
    whole = read_bytes(tmp_path)
    change = dict(change)
    seed = change.pop("seed", 1)
    with pytest.raises(ValueError, match="sampled with other settings"):
        collect(subject, dataclasses.replace(SETTINGS, **change), tmp_path, seed=seed)
    assert read_bytes(tmp_path) == whole


def test_shards_of_another_teacher_are_refused(subject: Subject, tmp_path: Path) -> None:
    collect(subject, SETTINGS, tmp_path, seed=1)
    other = dataclasses.replace(subject, name="other")
    with pytest.raises(ValueError, match="sampled with other settings"):
        collect(other, SETTINGS, tmp_path, seed=1)


def test_a_foreign_tensor_file_in_a_shards_place_is_refused(
    subject: Subject, tmp_path: Path
) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "shard-00000.safetensors")
    with pytest.raises(ValueError, match="sampled with other settings"):
        collect(subject, SETTINGS, tmp_path, seed=1)


def test_progress_counts_videos_up_to_all_and_is_said_at_every_step(
    subject: Subject, tmp_path: Path
) -> None:
    seen: list[int] = []

    def progress(stage: str, done: int, total: int, **metrics: float) -> None:
        assert total == 5
        seen.append(done)

    collect(subject, SETTINGS, tmp_path, seed=1, progress=progress)
    assert seen == sorted(seen) and set(seen) == {0, 1, 2, 3, 4, 5}
    # Three shards, each said once before its first step, and the end.
    assert len(seen) == 3 * (1 + SETTINGS.sampler_steps) + 1


def test_an_interruption_costs_the_shard_in_the_making_alone(
    subject: Subject, tmp_path: Path
) -> None:
    class Interruption(BaseException):
        pass

    def interrupt(stage: str, done: int, total: int, **metrics: float) -> None:
        if done == 3:
            raise Interruption

    with pytest.raises(Interruption):
        collect(subject, SETTINGS, tmp_path / "broken", seed=1, progress=interrupt)
    assert [path.name for path in (tmp_path / "broken").iterdir()] == ["shard-00000.safetensors"]
    collect(subject, SETTINGS, tmp_path / "broken", seed=1)
    collect(subject, SETTINGS, tmp_path / "unbroken", seed=1)
    for path in sorted((tmp_path / "unbroken").iterdir()):
        assert (tmp_path / "broken" / path.name).read_bytes() == path.read_bytes()


def small(subject: Subject, folder: Path) -> Trajectories:
    settings = dataclasses.replace(SETTINGS, num_trajectories=3, states_per_trajectory=2)
    return collect(subject, settings, folder, seed=1)


def test_draw_is_uniform_over_states_of_uneven_shards(subject: Subject, tmp_path: Path) -> None:
    trajectories = small(subject, tmp_path)
    assert len(trajectories) == 6
    drawn = trajectories.draw(3000, torch.Generator().manual_seed(0), "cpu")
    _, counts = drawn.latents.flatten(1).sum(1).unique(return_counts=True)
    assert len(counts) == 6
    # Five standard deviations of a binomial count.
    assert float((counts - 500).abs().max()) < 5 * (3000 / 6 * 5 / 6) ** 0.5


def test_levels_are_drawn_by_their_density_however_many_states_they_have(
    subject: Subject, tmp_path: Path
) -> None:
    trajectories = small(subject, tmp_path)
    kept = trajectories.steps().unique()
    density = torch.zeros(SETTINGS.sampler_steps)
    density[kept] = torch.arange(1.0, len(kept) + 1)
    density /= density.sum()
    weights = trajectories.weigh(density)
    drawn = trajectories.draw(4000, torch.Generator().manual_seed(0), "cpu", weights=weights)
    shares = drawn.step.bincount(minlength=len(density)) / 4000
    torch.testing.assert_close(shares, density, rtol=0, atol=0.04)


def test_what_is_drawn_belongs_together(subject: Subject, tmp_path: Path) -> None:
    drawn = small(subject, tmp_path).draw(63, torch.Generator().manual_seed(0), "cpu")
    stored = {}
    for shard in read(tmp_path):
        for video, prompt in enumerate(shard["prompt"]):
            for state, step in enumerate(shard["step"][video]):
                row = [shard[n][video, state] for n in ("conditional", "unconditional")]
                key = float(shard["latents"][video, state].float().sum())
                stored[key] = (int(prompt), int(step), *row)
    for i in range(63):
        prompt, step, conditional, unconditional = stored[float(drawn.latents[i].sum())]
        assert (int(drawn.prompt[i]), int(drawn.step[i])) == (prompt, step)
        assert torch.equal(drawn.conditional[i], conditional.float())
        assert torch.equal(drawn.unconditional[i], unconditional.float())
    assert drawn.latents.dtype == torch.float32
    assert drawn.step.dtype == torch.int64


def test_states_are_numbered_video_by_video_through_falling_noise(
    subject: Subject, tmp_path: Path
) -> None:
    trajectories = small(subject, tmp_path)
    states = trajectories.take(torch.arange(len(trajectories)), "cpu")
    by_video = states.step.view(-1, trajectories.states_per_trajectory)
    assert (by_video.diff(dim=1) > 0).all()
    assert (states.prompt.view(by_video.shape).diff(dim=1) == 0).all()
    some = trajectories.take(torch.tensor([3, 0]), "cpu")
    assert torch.equal(some.latents, states.latents[[3, 0]])


def test_the_generator_alone_decides_a_draw(subject: Subject, tmp_path: Path) -> None:
    trajectories = small(subject, tmp_path)
    first, again, other = (
        trajectories.draw(20, torch.Generator().manual_seed(seed), "cpu") for seed in (0, 0, 1)
    )
    assert torch.equal(first.latents, again.latents)
    assert not torch.equal(first.latents, other.latents)


@pytest.mark.parametrize(
    "options",
    [
        {"num_trajectories": 0},
        {"sampler_steps": 0},
        {"shard_size": -1},
        {"shift": 0.0},
        {"states_per_trajectory": 51},
    ],
)
def test_impossible_settings_are_refused_by_flag(options: dict[str, float]) -> None:
    flag = "--" + next(iter(options)).replace("_", "-")
    with pytest.raises(ValueError, match=flag):
        TrajectoryConfig(**options)
