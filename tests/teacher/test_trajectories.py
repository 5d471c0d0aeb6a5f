"""What is stored is the teacher's own trajectory, whatever interrupted the sampling."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from linvideo_core.flow import euler_step, guide, make_sigmas
from linvideo_core.run.context import Run
from linvideo_core.teacher.config import TrajectoryConfig
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.teacher.trajectories import Trajectories, collect, count_bytes, count_missing
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
KEPT = ("latents", "conditional", "unconditional")


def sample(
    teacher: Teacher, root: Path, how: dict[str, Any] | None = None, **changes: Any
) -> Trajectories:
    """Collect trajectories below a folder; how: of the run."""
    settings = dataclasses.replace(SETTINGS, teacher_folder=root, **changes)
    return collect(teacher, settings, Run(folder=root, **{"seed": 1, **(how or {})}))


def files_in(root: Path) -> list[Path]:
    return sorted(root.glob("*/video-*.safetensors"))


def read(root: Path) -> dict[str, Tensor]:
    """Return what the files hold, stacked over videos."""
    videos = [load_file(path) for path in files_in(root)]
    return {name: torch.stack([video[name] for video in videos]) for name in videos[0]}


def read_bytes(root: Path) -> dict[str, tuple[dict[str, Any], bytes]]:
    """Return each file's header, whose order is free, and the bytes behind it."""
    found = {}
    for path in files_in(root):
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        found[str(path.relative_to(root))] = json.loads(data[8:end]), data[end:]
    return found


def count_calls(teacher: Teacher) -> list[int]:
    """Return a list that gets the number of videos of every call of the teacher from now on."""
    sizes: list[int] = []
    teacher.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0]) // 2))
    return sizes


@torch.no_grad()
def test_stored_states_lie_on_the_teachers_own_euler_trajectory(
    teacher: Teacher, tmp_path: Path
) -> None:
    assert len(sample(teacher, tmp_path, states_per_trajectory=7)) == 5 * 7
    videos, sigmas = read(tmp_path), make_sigmas(7, 3.0)
    for name in KEPT:
        assert videos[name].shape == (5, 7, *teacher.latent_shape)
        assert videos[name].dtype == torch.float16
    embeds = teacher.prompt_embeds[videos["prompt"]]
    negative = teacher.negative_embeds.expand_as(embeds)
    assert torch.equal(videos["step"], torch.arange(7).expand(5, 7))
    # Sampled again from the stored noise alone, not from state to state.
    latents = videos["latents"][:, 0].float()
    for step in range(7):
        sigma, sigma_next = (s.expand(5) for s in sigmas[step : step + 2])
        conditional = teacher.model(latents, 1000 * sigma, embeds)
        unconditional = teacher.model(latents, 1000 * sigma, negative)
        for name, tensor in zip(KEPT, (latents, conditional, unconditional), strict=True):
            torch.testing.assert_close(videos[name][:, step].float(), tensor, **HALF)
        latents = euler_step(latents, guide(conditional, unconditional, 2.5), sigma, sigma_next)
    torch.testing.assert_close(videos["end"].float(), latents, **HALF)


def test_a_trajectory_starts_at_standard_noise(teacher: Teacher, tmp_path: Path) -> None:
    sample(teacher, tmp_path, num_trajectories=40, states_per_trajectory=7, shard_size=40)
    noise = read(tmp_path)["latents"][:, 0].float()
    assert float(noise.mean()) == pytest.approx(0, abs=4 * noise.numel() ** -0.5)
    assert float(noise.std()) == pytest.approx(1, abs=4 * (2 * noise.numel()) ** -0.5)


def test_fewer_states_are_states_of_the_same_trajectory_spread_over_its_levels(
    teacher: Teacher, tmp_path: Path
) -> None:
    many = {"num_trajectories": 63, "shard_size": 63}
    sample(teacher, tmp_path / "few", **many)
    sample(teacher, tmp_path / "all", **many, states_per_trajectory=7)
    few, full = read(tmp_path / "few"), read(tmp_path / "all")
    assert torch.equal(few["prompt"], full["prompt"])
    for name in KEPT:
        assert torch.equal(few[name], full[name][torch.arange(63).unsqueeze(1), few["step"]])
    for column, stratum in zip(few["step"].T, [(0, 1), (2, 3, 4), (5, 6)], strict=True):
        assert set(column.tolist()) == set(stratum)


@pytest.mark.parametrize("damage", ["lost", "empty", "junk", "cut"])
def test_a_lost_or_damaged_file_is_sampled_again_to_the_same_bytes(
    damage: str, teacher: Teacher, tmp_path: Path
) -> None:
    sample(teacher, tmp_path)
    whole = read_bytes(tmp_path)
    path = files_in(tmp_path)[1]
    content = {"empty": b"", "junk": b"junk", "cut": path.read_bytes()[:-5]}
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(content[damage])
    sample(teacher, tmp_path)
    assert read_bytes(tmp_path) == whole


@pytest.mark.parametrize(
    "place", ["identity", "digest", "names", "latents", "step", "prompt", "end"]
)
def test_a_flipped_byte_is_told_and_the_video_sampled_again_to_the_same_bytes(
    place: str, teacher: Teacher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sample(teacher, tmp_path)
    whole = read_bytes(tmp_path)
    path = files_in(tmp_path)[1]
    header, _ = whole[str(path.relative_to(tmp_path))]
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    in_header = {"identity": b"weights", "digest": b'"digest"', "names": b'"latents"'}
    if place in in_header:
        data[data.index(in_header[place]) + 2] ^= 0x01
    else:
        data[8 + length + header[place]["data_offsets"][0]] ^= 0x01
    path.write_bytes(data)
    with caplog.at_level("WARNING"):
        sample(teacher, tmp_path)
    assert [record.args[0] for record in caplog.records] == [path]
    assert "is damaged and will be sampled again" in caplog.text
    assert read_bytes(tmp_path) == whole


@pytest.mark.parametrize(
    ("change", "how", "own"),
    [
        ({"guidance_scale": 2.0}, {}, {}),
        ({"shift": 5.0}, {}, {}),
        ({"sampler_steps": 8}, {}, {}),
        ({"states_per_trajectory": 2}, {}, {}),
        ({}, {"seed": 2}, {}),
        ({}, {"precision": "bf16"}, {}),
        ({}, {}, {"name": "other"}),
        ({}, {}, {"sampled_as": "fp8"}),
        ({}, {}, {"prompt_embeds": torch.zeros(3, 5, TEXT_DIM)}),
        ({}, {}, {"latent_shape": (4, 3, 6, 4)}),
    ],
)
def test_what_decides_the_samples_gets_a_folder_of_its_own(
    change: dict[str, Any],
    how: dict[str, Any],
    own: dict[str, Any],
    teacher: Teacher,
    tmp_path: Path,
) -> None:
    sample(teacher, tmp_path)
    before = read_bytes(tmp_path)
    sample(dataclasses.replace(teacher, **own), tmp_path, how, **change)
    after = read_bytes(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert len(after) == 2 * len(before) and after.items() >= before.items()


def assert_same_states(found: Trajectories, expected: Trajectories) -> None:
    assert len(found) == len(expected)
    for name, tensor in states_of(expected).items():
        exact = {} if tensor.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(states_of(found)[name], tensor, **(exact or HALF))


def states_of(trajectories: Trajectories) -> dict[str, Tensor]:
    return dataclasses.asdict(trajectories.take(torch.arange(len(trajectories)), "cpu"))


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_video_is_the_same_whatever_number_is_sampled_together(
    size: int, teacher: Teacher, tmp_path: Path
) -> None:
    expected = sample(teacher, tmp_path / "two")
    assert_same_states(sample(teacher, tmp_path / "other", shard_size=size), expected)


def test_of_more_or_fewer_videos_all_that_is_there_is_kept(
    teacher: Teacher, tmp_path: Path
) -> None:
    sample(teacher, tmp_path)
    first = read_bytes(tmp_path)
    for number in (3, 1):
        files_in(tmp_path)[number].unlink()
    sizes = count_calls(teacher)
    for changes, num_missing, num_sampled in (
        ({"num_trajectories": 1, "shard_size": 7}, 0, 0),
        ({"num_trajectories": 2, "shard_size": 1}, 1, 1),
        # Videos 3, and 5 to 8: the first with those that it was sampled with.
        ({"num_trajectories": 9, "shard_size": 2}, 5, 7),
    ):
        sizes.clear()
        settings = dataclasses.replace(SETTINGS, teacher_folder=tmp_path, **changes)
        assert count_missing(teacher, settings, Run(seed=1)) == num_missing
        found = sample(teacher, tmp_path, **changes)
        assert sum(sizes) == num_sampled * SETTINGS.sampler_steps
    assert_same_states(found, sample(teacher, tmp_path / "at once", **changes))
    kept = {name: content for name, content in first.items() if name[-13] not in "13"}
    assert read_bytes(tmp_path).items() >= kept.items()


def test_videos_that_another_run_made_meanwhile_are_not_sampled_again(
    teacher: Teacher, tmp_path: Path
) -> None:
    sample(teacher, tmp_path / "theirs")
    theirs = files_in(tmp_path / "theirs")[2:4]

    class Deliver(Recorder):
        def on_step_end(self, done: int, **metrics: float) -> None:
            mine = tmp_path / "mine" / theirs[0].parent.name
            for path in theirs:
                if mine.exists() and path.exists():
                    path.rename(mine / path.name)

    sizes = count_calls(teacher)
    sample(teacher, tmp_path / "mine", {"callbacks": Deliver()})
    assert sum(sizes) == 3 * SETTINGS.sampler_steps


def test_a_file_of_something_else_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    sample(teacher, tmp_path)
    path = files_in(tmp_path)[1]
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="sampled with other settings; delete") as caught:
        sample(teacher, tmp_path)
    assert path.exists() and "\n" not in str(caught.value)


def test_samples_that_the_disk_cannot_hold_are_refused_before_one_is_made(
    teacher: Teacher, tmp_path: Path
) -> None:
    huge = dataclasses.replace(teacher, latent_shape=(4, 10**6, 10**4, 10**4))
    with pytest.raises(ValueError, match=r"samples take .* --teacher-folder on another") as caught:
        sample(huge, tmp_path / "new")
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


def test_the_room_that_samples_are_said_to_take_is_what_they_take(
    teacher: Teacher, tmp_path: Path
) -> None:
    sample(teacher, tmp_path)
    found = sum(path.stat().st_size for path in files_in(tmp_path))
    told = count_bytes(SETTINGS, teacher.latent_shape)
    assert told < found < told + 4096 * len(files_in(tmp_path))


def test_samples_lie_beside_the_run_or_where_they_are_wanted(tmp_path: Path) -> None:
    assert SETTINGS.folder_beside(tmp_path / "runs" / "a") == tmp_path / "runs" / "teacher"
    elsewhere = dataclasses.replace(SETTINGS, teacher_folder=tmp_path / "x")
    assert elsewhere.folder_beside(tmp_path / "runs" / "a") == tmp_path / "x"


def test_an_interruption_costs_the_videos_in_the_making_alone(
    teacher: Teacher, tmp_path: Path
) -> None:
    stop = Recorder(stop_at=("sampling_teacher", 3))
    with pytest.raises(KeyboardInterrupt):
        sample(teacher, tmp_path / "broken", {"callbacks": stop})
    names = [path.stem for path in files_in(tmp_path / "broken")]
    assert names == ["video-000000", "video-000001"]
    rest, whole = Recorder(), Recorder()
    sample(teacher, tmp_path / "broken", {"callbacks": rest})
    sample(teacher, tmp_path / "unbroken", {"callbacks": whole})
    assert read_bytes(tmp_path / "broken") == read_bytes(tmp_path / "unbroken")
    for recorder, first in ((rest, 2), (whole, 0)):
        assert recorder.totals == {"sampling_teacher": 5}
        done = [done for _, done in recorder.seen]
        assert done == sorted(done) and set(done) == set(range(first, 6))
    # Once at the start, then at each of the sampler's steps and after what is sampled together.
    assert len(whole.seen) == 1 + 3 * (SETTINGS.sampler_steps + 1)


@pytest.fixture
def small(teacher: Teacher, tmp_path: Path) -> Trajectories:
    return sample(teacher, tmp_path, num_trajectories=3, states_per_trajectory=2)


def test_states_are_drawn_evenly_or_by_the_density_of_their_levels(small: Trajectories) -> None:
    assert len(small) == 6
    counts = small.pick(3000, torch.Generator().manual_seed(0)).bincount()
    # Five standard deviations of a binomial count.
    assert len(counts) == 6 and float((counts - 500).abs().max()) < 5 * (3000 / 6 * 5 / 6) ** 0.5
    kept = small.steps().unique()
    density = torch.zeros(SETTINGS.sampler_steps)
    density[kept] = torch.arange(1.0, len(kept) + 1)
    density /= density.sum()
    picks = small.pick(4000, torch.Generator().manual_seed(0), small.weigh(density))
    shares = small.steps()[picks].bincount(minlength=len(density)) / 4000
    torch.testing.assert_close(shares, density, rtol=0, atol=0.04)


def test_states_are_numbered_video_by_video_and_what_is_taken_belongs_together(
    small: Trajectories, tmp_path: Path
) -> None:
    stored, picks = read(tmp_path), torch.tensor([3, 0, 5, 5, 1, 2, 4])
    taken = small.take(picks, "cpu")
    assert (stored["step"].diff(dim=1) > 0).all()
    assert torch.equal(small.steps(), stored["step"].flatten())
    for name in KEPT:
        assert torch.equal(getattr(taken, name), stored[name].flatten(0, 1)[picks].float())
    assert torch.equal(taken.step, stored["step"].flatten()[picks])
    assert torch.equal(taken.prompt, stored["prompt"][picks // 2])
