"""What is stored is the teacher's own trajectory, whatever interrupted the sampling."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from linvideo_core.flow import euler_step, guide, make_sigmas
from linvideo_core.run.context import Run
from linvideo_core.teacher.config import TrajectoryConfig
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.teacher.trajectories import Trajectories, collect, count_bytes
from tests.conftest import TEXT_DIM, Recorder

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


def sample(teacher: Teacher, settings: TrajectoryConfig, root: Path, **how: Any) -> Trajectories:
    """Collect trajectories below a folder."""
    settings = dataclasses.replace(settings, teacher_folder=root)
    return collect(teacher, settings, Run(folder=root, **{"seed": 1, **how}))


def shards_in(root: Path) -> list[Path]:
    return sorted(root.glob("*/videos-*.safetensors"))


def read(root: Path) -> Shards:
    return [load_file(path) for path in shards_in(root)]


def read_bytes(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in shards_in(root)}


def test_shards_hold_every_video_once(teacher: Teacher, tmp_path: Path) -> None:
    trajectories = sample(teacher, SETTINGS, tmp_path)
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
    sample(teacher, settings, tmp_path)
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
    sample(teacher, dataclasses.replace(settings, shard_size=40), tmp_path)
    noise = read(tmp_path)[0]["latents"][:, 0].float()
    assert float(noise.mean()) == pytest.approx(0, abs=4 * noise.numel() ** -0.5)
    assert float(noise.std()) == pytest.approx(1, abs=4 * (2 * noise.numel()) ** -0.5)


def test_keeping_fewer_states_keeps_states_of_the_same_trajectory(
    teacher: Teacher, tmp_path: Path
) -> None:
    sample(teacher, SETTINGS, tmp_path / "few")
    every = dataclasses.replace(SETTINGS, states_per_trajectory=7)
    sample(teacher, every, tmp_path / "all")
    for few, full in zip(read(tmp_path / "few"), read(tmp_path / "all"), strict=True):
        assert torch.equal(few["prompt"], full["prompt"])
        for video, steps in enumerate(few["step"]):
            for name in ("latents", "conditional", "unconditional"):
                assert torch.equal(few[name][video], full[name][video, steps])


def test_kept_states_are_spread_over_the_noise_levels(teacher: Teacher, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, num_trajectories=63, shard_size=63)
    sample(teacher, settings, tmp_path)
    steps = read(tmp_path)[0]["step"]
    strata = [(0, 1), (2, 3, 4), (5, 6)]
    for column, stratum in zip(steps.T, strata, strict=True):
        assert set(column.tolist()) == set(stratum)


@pytest.mark.parametrize("damage", ["lost", "empty", "junk", "cut"])
def test_a_lost_or_damaged_shard_is_sampled_again_to_the_same_bytes(
    damage: str, teacher: Teacher, tmp_path: Path
) -> None:
    sample(teacher, SETTINGS, tmp_path)
    whole = read_bytes(tmp_path)
    path = shards_in(tmp_path)[1]
    content = {"empty": b"", "junk": b"junk", "cut": path.read_bytes()[:-5]}
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(content[damage])
    sample(teacher, SETTINGS, tmp_path)
    assert read_bytes(tmp_path) == whole


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
    sample(teacher, SETTINGS, tmp_path)
    before = read_bytes(tmp_path)
    change = dict(OTHERS[name])
    how = {key: change.pop(key) for key in ("seed", "precision") if key in change}
    own = {key: change.pop(key) for key in list(change) if hasattr(teacher, key)}
    other = dataclasses.replace(teacher, **own)
    sample(other, dataclasses.replace(SETTINGS, **change), tmp_path, **how)
    after = read_bytes(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert len(after) == 2 * len(before) and after.items() >= before.items()


def count_videos(teacher: Teacher, settings: TrajectoryConfig, root: Path) -> int:
    """Return how many videos are sampled when they are asked for."""
    sizes: list[int] = []

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sizes.append(len(args[0]) // 2)

    hook = teacher.model.register_forward_pre_hook(see)
    sample(teacher, settings, root)
    hook.remove()
    return sum(sizes) // settings.sampler_steps


def states_of(trajectories: Trajectories) -> dict[str, Tensor]:
    states = trajectories.take(torch.arange(len(trajectories)), "cpu")
    return dataclasses.asdict(states)


@pytest.mark.parametrize("size", [1, 3, 5, 8])
def test_a_video_is_the_same_whatever_number_is_sampled_together(
    size: int, teacher: Teacher, tmp_path: Path
) -> None:
    expected = states_of(sample(teacher, SETTINGS, tmp_path / "two"))
    settings = dataclasses.replace(SETTINGS, shard_size=size)
    found = states_of(sample(teacher, settings, tmp_path / "other"))
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
    expected = states_of(sample(teacher, more, tmp_path / "at once"))
    found = states_of(sample(teacher, more, tmp_path))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **HALF)
    assert read_bytes(tmp_path).items() >= {n: first[n] for n in list(first)[:1]}.items()


def test_what_two_runs_sampled_twice_is_read_once(teacher: Teacher, tmp_path: Path) -> None:
    """As when both began together, with other shard sizes."""
    expected = states_of(sample(teacher, SETTINGS, tmp_path))
    other = dataclasses.replace(SETTINGS, shard_size=3)
    sample(teacher, other, tmp_path / "other")
    folder = shards_in(tmp_path)[0].parent
    for path in shards_in(tmp_path / "other"):
        path.rename(folder / path.name)
    assert len(shards_in(tmp_path)) == 5
    assert count_videos(teacher, SETTINGS, tmp_path) == 0
    found = sample(teacher, SETTINGS, tmp_path)
    assert len(found) == 15
    for name, tensor in states_of(found).items():
        torch.testing.assert_close(tensor, expected[name], **HALF)


def test_a_shard_that_another_run_made_meanwhile_is_not_sampled_again(
    teacher: Teacher, tmp_path: Path
) -> None:
    sample(teacher, SETTINGS, tmp_path / "theirs")
    theirs = shards_in(tmp_path / "theirs")

    class Deliver(Recorder):
        def on_step_end(self, done: int, **metrics: float) -> None:
            mine = tmp_path / "mine" / theirs[1].parent.name
            if mine.exists() and theirs[1].exists():
                theirs[1].rename(mine / theirs[1].name)

    sizes: list[int] = []
    teacher.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0]) // 2))
    sample(teacher, SETTINGS, tmp_path / "mine", callbacks=Deliver())
    assert sum(sizes) == 3 * SETTINGS.sampler_steps


def test_a_file_of_something_else_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    sample(teacher, SETTINGS, tmp_path)
    path = shards_in(tmp_path)[1]
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="sampled with other settings; delete") as caught:
        sample(teacher, SETTINGS, tmp_path)
    assert path.exists() and "\n" not in str(caught.value)


def test_samples_that_the_disk_cannot_hold_are_refused_before_one_is_made(
    teacher: Teacher, tmp_path: Path
) -> None:
    huge = dataclasses.replace(teacher, latent_shape=(4, 10**6, 10**4, 10**4))
    with pytest.raises(ValueError, match=r"samples take .* --teacher-folder on another") as caught:
        sample(huge, SETTINGS, tmp_path / "new")
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


def test_the_room_that_samples_are_said_to_take_is_what_they_take(
    teacher: Teacher, tmp_path: Path
) -> None:
    sample(teacher, SETTINGS, tmp_path)
    found = sum(path.stat().st_size for path in shards_in(tmp_path))
    told = count_bytes(SETTINGS, teacher.latent_shape)
    assert told < found < told + 4096 * len(shards_in(tmp_path))


def test_samples_lie_beside_the_run_or_where_they_are_wanted(tmp_path: Path) -> None:
    assert SETTINGS.folder_beside(tmp_path / "runs" / "a") == tmp_path / "runs" / "teacher"
    elsewhere = dataclasses.replace(SETTINGS, teacher_folder=tmp_path / "x")
    assert elsewhere.folder_beside(tmp_path / "runs" / "a") == tmp_path / "x"


def test_an_interruption_costs_the_shard_in_the_making_alone(
    teacher: Teacher, tmp_path: Path
) -> None:
    stop = Recorder(stop_at=("sampling_teacher", 3))
    with pytest.raises(KeyboardInterrupt):
        sample(teacher, SETTINGS, tmp_path / "broken", callbacks=stop)
    names = [path.name for path in shards_in(tmp_path / "broken")]
    assert names == ["videos-000000-000001.safetensors"]
    rest, whole = Recorder(), Recorder()
    sample(teacher, SETTINGS, tmp_path / "broken", callbacks=rest)
    sample(teacher, SETTINGS, tmp_path / "unbroken", callbacks=whole)
    assert read_bytes(tmp_path / "broken") == read_bytes(tmp_path / "unbroken")
    for recorder, first in ((rest, 2), (whole, 0)):
        assert recorder.totals == {"sampling_teacher": 5}
        done = [done for _, done in recorder.seen]
        assert done == sorted(done) and set(done) == set(range(first, 6))
    # Once at the start, then at each of the sampler's steps and after each of three shards.
    assert len(whole.seen) == 1 + 3 * (SETTINGS.sampler_steps + 1)


def small(teacher: Teacher, folder: Path) -> Trajectories:
    settings = dataclasses.replace(SETTINGS, num_trajectories=3, states_per_trajectory=2)
    return sample(teacher, settings, folder)


def test_draw_is_uniform_over_states_of_uneven_shards(teacher: Teacher, tmp_path: Path) -> None:
    trajectories = small(teacher, tmp_path)
    assert len(trajectories) == 6
    picks = trajectories.pick(3000, torch.Generator().manual_seed(0))
    latents = trajectories.take(picks, "cpu").latents
    _, counts = latents.flatten(1).sum(1).unique(return_counts=True)
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
    picks = trajectories.pick(4000, torch.Generator().manual_seed(0), weights)
    shares = trajectories.steps()[picks].bincount(minlength=len(density)) / 4000
    torch.testing.assert_close(shares, density, rtol=0, atol=0.04)


def test_what_is_drawn_belongs_together(teacher: Teacher, tmp_path: Path) -> None:
    trajectories = small(teacher, tmp_path)
    drawn = trajectories.take(trajectories.pick(63, torch.Generator().manual_seed(0)), "cpu")
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
