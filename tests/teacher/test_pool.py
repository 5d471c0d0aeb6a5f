"""A pool's videos move along the teacher's trajectories, on any number of processes alike."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from linvideo_core.flow import bind_guided, make_sigmas, sample_euler
from linvideo_core.run.context import Run
from linvideo_core.run.process_group import SINGLE_PROCESS, ProcessGroup
from linvideo_core.teacher.config import TrajectoryConfig
from linvideo_core.teacher.pool import TrajectoryPool, count_filling_calls, count_pool_bytes
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.teacher.trajectories import States, draw_video
from linvideo_core.training.checkpoint import Checkpoint, CheckpointFiles

STEPS = 6
EVERY = TrajectoryConfig(states_per_trajectory=STEPS, sampler_steps=STEPS, guidance_scale=2.0)
OTHERS = ((4, 1, 4, 4), (4, 3, 6, 4))
SPREAD = dataclasses.replace(EVERY, states_per_trajectory=3)


class Part(ProcessGroup):
    """One of several processes whose calls need no others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def draw(pool: TrajectoryPool, count: int, **how: object) -> list[States]:
    """Take as many batches as a training of so many steps would."""
    found = []
    for step in range(count):
        found.append(pool.draw(torch.Generator().manual_seed(step), **how))
        pool.keep()
    return found


def zero(latents: Tensor, sigma: Tensor, *prompts: Tensor) -> Tensor:
    """A student that moves nothing."""
    return torch.zeros_like(latents)


def of_several_sizes(teacher: Teacher) -> Teacher:
    """Return the teacher with videos of three sizes."""
    return dataclasses.replace(teacher, more_shapes=OTHERS)


@pytest.mark.parametrize("more_shapes", [(), OTHERS])
def test_a_video_passes_through_every_state_of_the_samplers_own_trajectory(
    teacher: Teacher, more_shapes: tuple[tuple[int, ...], ...]
) -> None:
    teacher = dataclasses.replace(teacher, more_shapes=more_shapes)
    pool = TrajectoryPool(teacher, EVERY, 1, 1, Run(seed=3))
    num_sizes = len(teacher.latent_shapes)
    states = draw(pool, 4 * num_sizes * STEPS)
    for video in range(2 * num_sizes):
        turn, size = divmod(video, num_sizes)
        shape = teacher.latent_shapes[size]
        mine = [s for s in states if s.latents.shape[1:] == shape][turn * STEPS :][:STEPS]
        prompt, noise, *_ = draw_video(teacher, EVERY, 3, video, shape)
        velocity_fn = bind_guided(
            teacher.model,
            teacher.prompt_embeds[prompt][None],
            teacher.negative_embeds[None],
            EVERY.guidance_scale,
        )
        seen: list[Tensor] = []
        sample_euler(
            velocity_fn,
            noise[None],
            make_sigmas(STEPS, EVERY.shift),
            on_step=lambda step, latents, velocity, seen=seen: seen.append(latents),
        )
        assert [s.step.item() for s in mine] == [*range(STEPS)]
        assert {s.prompt.item() for s in mine} == {prompt.item()}
        torch.testing.assert_close(torch.cat([s.latents for s in mine]), torch.cat(seen))


def test_a_state_comes_with_the_teachers_velocities_there(teacher: Teacher) -> None:
    pool = TrajectoryPool(teacher, SPREAD, 8, 2, Run())
    pool.fill()
    (states,) = draw(pool, 1)
    with torch.no_grad():
        sigma = 1000 * pool.sigmas[states.step]
        wanted = teacher.model(states.latents, sigma, teacher.prompt_embeds[states.prompt])
    torch.testing.assert_close(states.conditional, wanted)


def test_a_full_pool_has_all_noise_levels_at_once(teacher: Teacher) -> None:
    empty, full = (TrajectoryPool(teacher, SPREAD, 8, 2, Run()) for _ in range(2))
    full.fill()
    first, spread = ({int(step) for s in draw(p, 12) for step in s.step} for p in (empty, full))
    assert {step // 2 for step in spread} == {0, 1, 2}
    assert len({int(step) for s in draw(empty, 1) for step in s.step} | first) <= len(spread)


def test_a_full_pool_has_all_noise_levels_of_every_size(teacher: Teacher) -> None:
    pool = TrajectoryPool(of_several_sizes(teacher), SPREAD, 18, 2, Run())
    pool.fill()
    found: dict[torch.Size, list[Tensor]] = {}
    for states in draw(pool, 60):
        found.setdefault(states.latents.shape[1:], []).append(states.step)
    for steps in found.values():
        assert 10 < len(steps) < 30
        assert {int(step) // 2 for step in torch.cat(steps[:6])} == {0, 1, 2}
    assert len(found) == 3


def test_filling_takes_the_calls_and_a_pool_the_bytes_that_were_told(teacher: Teacher) -> None:
    for each in (teacher, of_several_sizes(teacher)):
        in_flight = (12, 2)
        pool = TrajectoryPool(each, SPREAD, *in_flight, Run())
        calls: list[int] = []
        hook = each.model.register_forward_pre_hook(
            lambda _, args, calls=calls: calls.append(len(args[0]) // 2)
        )
        pool.fill()
        hook.remove()
        assert sum(calls) == count_filling_calls(SPREAD, *in_flight, len(each.latent_shapes)) > 0
        held = sum(x.nbytes for name, x in pool.state().items() if name.endswith("latents"))
        assert held == count_pool_bytes(each.latent_shapes, *in_flight)


def test_videos_have_one_of_several_negative_prompts_and_else_are_what_they_were(
    teacher: Teacher,
) -> None:
    others = torch.randn(2, *teacher.negative_embeds.shape)
    negatives = torch.cat([teacher.negative_embeds[None], others])
    several = dataclasses.replace(teacher, all_negatives=negatives)
    asked: list[Tensor] = []

    def still(latents: Tensor, sigma: Tensor, prompts: Tensor, negative_embeds: Tensor) -> Tensor:
        asked.extend(negative_embeds)
        return torch.zeros_like(latents)

    one, many = (TrajectoryPool(each, EVERY, 8, 2, Run()) for each in (teacher, several))
    expected = draw(one, 20, student=zero, share=1.0)
    found = draw(many, 20, student=still, share=1.0)
    assert {int(number) for states in found for number in states.negative} == {0, 1, 2}
    rows = iter(asked)
    for mine, its in zip(found, expected, strict=True):
        for name in ("latents", "conditional", "step", "prompt"):
            assert torch.equal(getattr(mine, name), getattr(its, name))
        with torch.no_grad():
            sigma = 1000 * many.sigmas[mine.step]
            wanted = teacher.model(mine.latents, sigma, negatives[mine.negative])
        torch.testing.assert_close(mine.unconditional, wanted)
        assert all(torch.equal(next(rows), negatives[number]) for number in mine.negative)
    again = TrajectoryPool(several, EVERY, 8, 2, Run())
    again.load_state(many.state())
    assert torch.equal(draw(again, 1)[0].negative, draw(many, 1)[0].negative)


def test_no_state_comes_twice(teacher: Teacher) -> None:
    pool = TrajectoryPool(teacher, SPREAD, 8, 2, Run())
    pool.fill()
    latents = torch.cat([states.latents for states in draw(pool, 20)]).flatten(1)
    assert len(latents.unique(dim=0)) == len(latents)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_students_share_of_the_videos_goes_where_the_student_goes(
    teacher: Teacher, share: float
) -> None:
    pool = TrajectoryPool(teacher, SPREAD, 8, 4, Run())
    noises = {v: draw_video(teacher, SPREAD, 0, v)[1].flatten()[0].item() for v in range(400)}
    states = draw(pool, 40, student=zero, share=share)
    later = torch.cat([s.latents[s.step > 0] for s in states])
    # A student that moves nothing leaves its videos at their noise.
    still = torch.tensor([x.flatten()[0].item() in noises.values() for x in later])
    assert still.float().mean().item() == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize("more_shapes", [(), OTHERS])
@pytest.mark.parametrize("size", [2, 4])
def test_processes_draw_the_rows_of_one_alone_and_take_each_others_state_back(
    teacher: Teacher, size: int, more_shapes: tuple[tuple[int, ...], ...]
) -> None:
    teacher = dataclasses.replace(teacher, more_shapes=more_shapes)
    alone = TrajectoryPool(teacher, SPREAD, 8, 4, Run())
    parts = [
        TrajectoryPool(teacher, SPREAD, 8, 4, Run(processes=Part(rank, size)))
        for rank in range(size)
    ]
    for pool in (alone, *parts):
        pool.fill()
    whole = draw(alone, 5, student=zero, share=0.5)
    shares = [draw(part, 5, student=zero, share=0.5) for part in parts]
    for step, states in enumerate(whole):
        for rank, share in enumerate(shares):
            torch.testing.assert_close(share[step].latents, states.latents[rank::size])
    state = {name: value for part in parts for name, value in part.state().items()}
    again = TrajectoryPool(teacher, SPREAD, 8, 4, Run())
    again.load_state(state)
    torch.testing.assert_close(draw(again, 2)[-1].latents, draw(alone, 2)[-1].latents)


def test_a_step_that_was_not_finished_is_drawn_again(teacher: Teacher) -> None:
    pool = TrajectoryPool(teacher, SPREAD, 8, 2, Run())
    draw(pool, 3)
    lost = pool.draw(torch.Generator().manual_seed(3))
    again = TrajectoryPool(teacher, SPREAD, 8, 2, Run())
    again.load_state(pool.state())
    found = again.draw(torch.Generator().manual_seed(3))
    torch.testing.assert_close(found.latents, lost.latents, rtol=0, atol=0)


def test_a_flipped_byte_of_a_videos_latents_is_not_trained_on(
    teacher: Teacher, tmp_path: Path
) -> None:
    pool = TrajectoryPool(teacher, EVERY, 4, 2, Run(seed=3))
    draw(pool, 3)
    files = CheckpointFiles(tmp_path, None, SINGLE_PROCESS)
    files.write(Checkpoint(step=3, tensors=pool.state(), state={}))
    assert files.read({}).step == 3
    data = bytearray(files.path.read_bytes())
    data[-100] ^= 0x01
    files.path.write_bytes(data)
    with pytest.raises(ValueError, match="not what was written"):
        files.read({})
