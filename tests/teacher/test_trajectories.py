"""What is stored is the teacher's own trajectory, whatever interrupted the sampling."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from linvideo_core.flow import euler_step, guide, make_sigmas
from linvideo_core.teacher.config import TrajectoryConfig
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.teacher.trajectories import Trajectories, collect, count_bytes
from tests.conftest import TEXT_DIM

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


def shards_in(root: Path) -> list[Path]:
    return sorted(root.glob("*/videos-*.safetensors"))


def read(root: Path) -> Shards:
    return [load_file(path) for path in shards_in(root)]


def read_bytes(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in shards_in(root)}


def test_shards_hold_every_video_once(teacher: Teacher, tmp_path: Path) -> None:
    trajectories = collect(teacher, SETTINGS, tmp_path, seed=1)
    shards = read(tmp_path)
    assert [len(shard["prompt"]) for shard in shards] == [2, 2, 1]
    assert len(trajectories) == 5 * 3
    for shard in shards:
        size = len(shard["prompt"])
        for name in ("latents", "conditional", "unconditional"):
            assert shard[name].shape == (size, 3, *teacher.latent_shape)
            assert shard[name].dtype == torch.float16
        assert shard["step"].shape == (size, 3)
        assert bool((shard["step"].diff(dim=1) > 0).all())
        assert int(shard["step"].min()) >= 0
        assert int(shard["step"].max()) < 7


@torch.no_grad()
def test_stored_states_lie_on_the_teachers_own_euler_trajectory(
    teacher: Teacher, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SETTINGS, states_per_trajectory=7)
    collect(teacher, settings, tmp_path, seed=1)
    sigmas = make_sigmas(7, 3.0)
    for shard in read(tmp_path):
        size = len(shard["prompt"])
        embeds = teacher.prompt_embeds[shard["prompt"]]
        negative = teacher.negative_embeds.expand_as(embeds)
        assert torch.equal(shard["step"], torch.arange(7).expand(size, 7))
        # Sampled again from the stored noise alone, not from state to state.
        latents = shard["latents"][:, 0].float()
        for step in range(7):
            sigma, sigma_next = (s.expand(size) for s in sigmas[step : step + 2])
            conditional = teacher.model(latents, 1000 * sigma, embeds)
            unconditional = teacher.model(latents, 1000 * sigma, negative)
            for name, tensor in (
                ("latents", latents),
                ("conditional", conditional),
                ("unconditional", unconditional),
            ):
                torch.testing.assert_close(shard[name][:, step].float(), tensor, **HALF)
            velocity = guide(conditional, unconditional, 2.5)
            latents = euler_step(latents, velocity, sigma, sigma_next)


def test_a_trajectory_starts_at_standard_noise(teacher: Teacher, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, num_trajectories=40, states_per_trajectory=7)
    collect(teacher, dataclasses.replace(settings, shard_size=40), tmp_path, seed=1)
    noise = read(tmp_path)[0]["latents"][:, 0].float()
    assert float(noise.mean()) == pytest.approx(0, abs=4 * noise.numel() ** -0.5)
    assert float(noise.std()) == pytest.approx(1, abs=4 * (2 * noise.numel()) ** -0.5)


def test_keeping_fewer_states_keeps_states_of_the_same_trajectory(
    teacher: Teacher, tmp_path: Path
) -> None:
    collect(teacher, SETTINGS, tmp_path / "few", seed=1)
    every = dataclasses.replace(SETTINGS, states_per_trajectory=7)
    collect(teacher, every, tmp_path / "all", seed=1)
    for few, full in zip(read(tmp_path / "few"), read(tmp_path / "all"), strict=True):
        assert torch.equal(few["prompt"], full["prompt"])
        for video, steps in enumerate(few["step"]):
            for name in ("latents", "conditional", "unconditional"):
                assert torch.equal(few[name][video], full[name][video, steps])


def test_kept_states_are_spread_over_the_noise_levels(teacher: Teacher, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, num_trajectories=63, shard_size=63)
    collect(teacher, settings, tmp_path, seed=1)
    steps = read(tmp_path)[0]["step"]
    strata = [(0, 1), (2, 3, 4), (5, 6)]
    for column, stratum in zip(steps.T, strata, strict=True):
        assert set(column.tolist()) == set(stratum)


@pytest.mark.parametrize("lost", [(0,), (1, 2), (0, 1, 2)])
def test_lost_shards_are_sampled_again_to_the_same_bytes(
    lost: tuple[int, ...], teacher: Teacher, tmp_path: Path
) -> None:
    collect(teacher, SETTINGS, tmp_path, seed=1)
    whole = read_bytes(tmp_path)
    for i in reversed(lost):
        shards_in(tmp_path)[i].unlink()
    collect(teacher, SETTINGS, tmp_path, seed=1)
    assert read_bytes(tmp_path) == whole


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_a_damaged_shard_is_sampled_again_to_the_same_bytes(
    damage: bytes | None, teacher: Teacher, tmp_path: Path
) -> None:
    collect(teacher, SETTINGS, tmp_path, seed=1)
    whole = read_bytes(tmp_path)
    path = shards_in(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:-5] if damage is None else damage)
    collect(teacher, SETTINGS, tmp_path, seed=1)
    assert read_bytes(tmp_path) == whole


def test_whole_shards_are_not_sampled_again(teacher: Teacher, tmp_path: Path) -> None:
    collect(teacher, SETTINGS, tmp_path, seed=1)
    calls: list[int] = []
    teacher.model.register_forward_hook(lambda *_: calls.append(1))
    collect(teacher, SETTINGS, tmp_path, seed=1)
    assert calls == []


def test_interruption_at_any_step_changes_nothing(teacher: Teacher, tmp_path: Path) -> None:
    collect(teacher, SETTINGS, tmp_path / "unbroken", seed=1)

    class Stopped(Exception):
        pass

    for num_calls in (3, 10, 5):
        calls: list[int] = []

        def stop(*_: object, calls: list[int] = calls, limit: int = num_calls) -> None:
            calls.append(1)
            if len(calls) == limit:
                raise Stopped

        hook = teacher.model.register_forward_hook(stop)
        with pytest.raises(Stopped):
            collect(teacher, SETTINGS, tmp_path / "broken", seed=1)
        hook.remove()
    collect(teacher, SETTINGS, tmp_path / "broken", seed=1)
    assert read_bytes(tmp_path / "broken") == read_bytes(tmp_path / "unbroken")


OTHERS: dict[str, dict[str, Any]] = {
    "guidance": {"guidance_scale": 2.0},
    "shift": {"shift": 5.0},
    "steps": {"sampler_steps": 8},
    "states": {"states_per_trajectory": 2},
    "seed": {"seed": 2},
    "precision": {"precision": "bf16"},
    "name": {"name": "other"},
    "weights held otherwise": {"sampled_as": "fp8"},
    "prompts": {"prompt_embeds": torch.zeros(3, 5, TEXT_DIM)},
    "size": {"latent_shape": (4, 3, 6, 4)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_decides_the_samples_gets_a_folder_of_its_own(
    name: str, teacher: Teacher, tmp_path: Path
) -> None:
    collect(teacher, SETTINGS, tmp_path, seed=1)
    before = read_bytes(tmp_path)
    change = dict(OTHERS[name])
    how = {"seed": 1, "precision": "fp32"}
    how = {key: change.pop(key, value) for key, value in how.items()}
    of_subject = {key: change.pop(key) for key in list(change) if hasattr(teacher, key)}
    other = dataclasses.replace(teacher, **of_subject)
    collect(other, dataclasses.replace(SETTINGS, **change), tmp_path, **how)
    after = read_bytes(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert len(after) == 2 * len(before) and after.items() >= before.items()


def count_videos(teacher: Teacher, settings: TrajectoryConfig, root: Path) -> int:
    """Return how many videos are sampled when they are asked for."""
    sizes: list[int] = []

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sizes.append(len(args[0]) // 2)

    hook = teacher.model.register_forward_pre_hook(see)
    collect(teacher, settings, root, seed=1)
    hook.remove()
    return sum(sizes) // settings.sampler_steps


def states_of(trajectories: Trajectories) -> dict[str, Tensor]:
    states = trajectories.take(torch.arange(len(trajectories)), "cpu")
    return dataclasses.asdict(states)


@pytest.mark.parametrize("size", [1, 3, 5, 8])
def test_a_video_is_the_same_whatever_number_is_sampled_together(
    size: int, teacher: Teacher, tmp_path: Path
) -> None:
    expected = states_of(collect(teacher, SETTINGS, tmp_path / "two", seed=1))
    settings = dataclasses.replace(SETTINGS, shard_size=size)
    found = states_of(collect(teacher, settings, tmp_path / "other", seed=1))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **HALF)
    assert torch.equal(found["step"], expected["step"])
    assert torch.equal(found["prompt"], expected["prompt"])


def test_after_a_smaller_shard_size_or_more_videos_all_that_is_there_is_kept(
    teacher: Teacher, tmp_path: Path
) -> None:
    assert count_videos(teacher, SETTINGS, tmp_path) == 5
    first = read_bytes(tmp_path)
    shards_in(tmp_path)[1].unlink()
    one_each = dataclasses.replace(SETTINGS, shard_size=1)
    assert count_videos(teacher, one_each, tmp_path) == 2
    fewer = dataclasses.replace(SETTINGS, num_trajectories=3, shard_size=7)
    assert count_videos(teacher, fewer, tmp_path) == 0
    more = dataclasses.replace(SETTINGS, num_trajectories=9, shard_size=3)
    assert count_videos(teacher, more, tmp_path) == 4
    names = [path.name.removesuffix(".safetensors") for path in shards_in(tmp_path)]
    assert [name.removeprefix("videos-") for name in names] == [
        "000000-000001",
        "000002-000002",
        "000003-000003",
        "000004-000004",
        "000005-000007",
        "000008-000008",
    ]
    expected = states_of(collect(teacher, more, tmp_path / "at once", seed=1))
    found = states_of(collect(teacher, more, tmp_path, seed=1))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **HALF)
    assert read_bytes(tmp_path).items() >= {n: first[n] for n in list(first)[:1]}.items()


def test_what_two_runs_sampled_twice_is_read_once(teacher: Teacher, tmp_path: Path) -> None:
    """As when both began together, with other shard sizes."""
    expected = states_of(collect(teacher, SETTINGS, tmp_path, seed=1))
    other = dataclasses.replace(SETTINGS, shard_size=3)
    collect(teacher, other, tmp_path / "other", seed=1)
    folder = shards_in(tmp_path)[0].parent
    for path in shards_in(tmp_path / "other"):
        path.rename(folder / path.name)
    assert len(shards_in(tmp_path)) == 5
    assert count_videos(teacher, SETTINGS, tmp_path) == 0
    found = collect(teacher, SETTINGS, tmp_path, seed=1)
    assert len(found) == 15
    for name, tensor in states_of(found).items():
        torch.testing.assert_close(tensor, expected[name], **HALF)


def test_a_shard_that_another_run_made_meanwhile_is_not_sampled_again(
    teacher: Teacher, tmp_path: Path
) -> None:
    collect(teacher, SETTINGS, tmp_path / "theirs", seed=1)
    theirs = shards_in(tmp_path / "theirs")

    def deliver(stage: str, done: int, total: int, **metrics: float) -> None:
        mine = tmp_path / "mine" / theirs[1].parent.name
        if mine.exists() and theirs[1].exists():
            theirs[1].rename(mine / theirs[1].name)

    sizes: list[int] = []
    teacher.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0]) // 2))
    collect(teacher, SETTINGS, tmp_path / "mine", seed=1, progress=deliver)
    assert sum(sizes) == 3 * SETTINGS.sampler_steps


def test_a_file_of_something_else_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    collect(teacher, SETTINGS, tmp_path, seed=1)
    path = shards_in(tmp_path)[1]
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="sampled with other settings; delete") as caught:
        collect(teacher, SETTINGS, tmp_path, seed=1)
    assert path.exists() and "\n" not in str(caught.value)


def test_samples_that_the_disk_cannot_hold_are_refused_before_one_is_made(
    teacher: Teacher, tmp_path: Path
) -> None:
    huge = dataclasses.replace(teacher, latent_shape=(4, 10**6, 10**4, 10**4))
    with pytest.raises(ValueError, match=r"samples take .* --teacher-folder on another") as caught:
        collect(huge, SETTINGS, tmp_path / "new", seed=1)
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


def test_the_room_that_samples_are_said_to_take_is_what_they_take(
    teacher: Teacher, tmp_path: Path
) -> None:
    collect(teacher, SETTINGS, tmp_path, seed=1)
    found = sum(path.stat().st_size for path in shards_in(tmp_path))
    told = count_bytes(SETTINGS, teacher.latent_shape)
    assert told < found < told + 4096 * len(shards_in(tmp_path))


def test_samples_lie_beside_the_run_or_where_they_are_wanted(tmp_path: Path) -> None:
    assert SETTINGS.folder_beside(tmp_path / "runs" / "a") == tmp_path / "runs" / "teacher"
    elsewhere = dataclasses.replace(SETTINGS, teacher_folder=tmp_path / "x")
    assert elsewhere.folder_beside(tmp_path / "runs" / "a") == tmp_path / "x"


def test_progress_counts_videos_up_to_all_and_is_said_at_every_step(
    teacher: Teacher, tmp_path: Path
) -> None:
    seen: list[int] = []

    def progress(stage: str, done: int, total: int, **metrics: float) -> None:
        assert total == 5
        seen.append(done)

    collect(teacher, SETTINGS, tmp_path, seed=1, progress=progress)
    assert seen == sorted(seen) and set(seen) == {0, 1, 2, 3, 4, 5}
    # Three shards, each said once before its first step, and the end.
    assert len(seen) == 3 * (1 + SETTINGS.sampler_steps) + 1


def test_an_interruption_costs_the_shard_in_the_making_alone(
    teacher: Teacher, tmp_path: Path
) -> None:
    class Interruption(BaseException):
        pass

    def interrupt(stage: str, done: int, total: int, **metrics: float) -> None:
        if done == 3:
            raise Interruption

    with pytest.raises(Interruption):
        collect(teacher, SETTINGS, tmp_path / "broken", seed=1, progress=interrupt)
    assert [path.name for path in shards_in(tmp_path / "broken")] == [
        "videos-000000-000001.safetensors"
    ]
    collect(teacher, SETTINGS, tmp_path / "broken", seed=1)
    collect(teacher, SETTINGS, tmp_path / "unbroken", seed=1)
    assert read_bytes(tmp_path / "broken") == read_bytes(tmp_path / "unbroken")


def small(teacher: Teacher, folder: Path) -> Trajectories:
    settings = dataclasses.replace(SETTINGS, num_trajectories=3, states_per_trajectory=2)
    return collect(teacher, settings, folder, seed=1)


def test_draw_is_uniform_over_states_of_uneven_shards(teacher: Teacher, tmp_path: Path) -> None:
    trajectories = small(teacher, tmp_path)
    assert len(trajectories) == 6
    drawn = trajectories.draw(3000, torch.Generator().manual_seed(0), "cpu")
    _, counts = drawn.latents.flatten(1).sum(1).unique(return_counts=True)
    assert len(counts) == 6
    # Five standard deviations of a binomial count.
    assert float((counts - 500).abs().max()) < 5 * (3000 / 6 * 5 / 6) ** 0.5


def test_levels_are_drawn_by_their_density_however_many_states_they_have(
    teacher: Teacher, tmp_path: Path
) -> None:
    trajectories = small(teacher, tmp_path)
    kept = trajectories.steps().unique()
    density = torch.zeros(SETTINGS.sampler_steps)
    density[kept] = torch.arange(1.0, len(kept) + 1)
    density /= density.sum()
    weights = trajectories.weigh(density)
    drawn = trajectories.draw(4000, torch.Generator().manual_seed(0), "cpu", weights=weights)
    shares = drawn.step.bincount(minlength=len(density)) / 4000
    torch.testing.assert_close(shares, density, rtol=0, atol=0.04)


def test_what_is_drawn_belongs_together(teacher: Teacher, tmp_path: Path) -> None:
    drawn = small(teacher, tmp_path).draw(63, torch.Generator().manual_seed(0), "cpu")
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
    teacher: Teacher, tmp_path: Path
) -> None:
    trajectories = small(teacher, tmp_path)
    states = trajectories.take(torch.arange(len(trajectories)), "cpu")
    by_video = states.step.view(-1, trajectories.states_per_trajectory)
    assert (by_video.diff(dim=1) > 0).all()
    assert (states.prompt.view(by_video.shape).diff(dim=1) == 0).all()
    some = trajectories.take(torch.tensor([3, 0]), "cpu")
    assert torch.equal(some.latents, states.latents[[3, 0]])


def test_the_generator_alone_decides_a_draw(teacher: Teacher, tmp_path: Path) -> None:
    trajectories = small(teacher, tmp_path)
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
