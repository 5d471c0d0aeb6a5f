"""A trajectory pool: states of trajectories that are used once and never stored.

Videos are in flight, each at a noise level of its own. A draw takes one of every row's videos and
asks the teacher there for both guidance branches, which is what the student is to match. Guided,
the same two velocities then move the video on to its next state by one Euler step. One that
arrives makes room for other noise and another prompt: nothing fills a disk, no state comes twice,
and the number of prompts is not bounded by what was sampled beforehand.

A share of the videos is moved by the student instead. What they pass through is where the
student's own sampling leads, from noise to video: there the objective is on-policy.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..flow import bind_guided, euler_step, guide, make_sigmas
from ..run.context import Run
from .config import TrajectoryConfig
from .teacher import Teacher
from .trajectories import States, draw_video

GuidedFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(latents [B, C, F, H, W], sigma [B], prompt_embeds, negative_embeds) -> velocity`, guided.

Both embeddings are [B, S, T].
"""


@dataclasses.dataclass(frozen=True)
class _Video:
    """A video in flight.

    number: decides its prompts, noise and states. place: index of the present one of its states.
    steps: index into the sampling grid of all its states, then of the end. latents: [C, F, H, W],
    fp32 on the CPU.
    """

    number: int
    prompt: Tensor
    negative: Tensor
    steps: tuple[int, ...]
    place: int
    latents: Tensor


class TrajectoryPool:
    """The videos in flight of a training; `draw` takes states of them.

    Videos belong to slots, and those to rows: row i of a batch of B draws among the slots i, i + B,
    i + 2 B, and so on. So a process keeps the videos of its own rows alone, and any number of
    processes draw the same states.

    Of several sizes of video each has as many slots, one size's after the other's. A draw is of one
    size, each as often.
    """

    def __init__(
        self,
        teacher: Teacher,
        config: TrajectoryConfig,
        num_videos: int,
        batch_size: int,
        run: Run,
        as_teacher: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        """num_videos: in flight, of which every row has as many of each of the teacher's sizes.

        batch_size: of all processes. as_teacher: in whose context the model is the teacher.
        """
        self.sigmas = make_sigmas(config.sampler_steps, config.shift)
        self.guidance_scale = config.guidance_scale
        self._teacher, self._config, self._as_teacher = teacher, config, as_teacher
        self._batch_size, self._run = batch_size, run
        self._depth = _depth(num_videos, batch_size, len(teacher.latent_shapes))
        self._num_slots = self._depth * batch_size * len(teacher.latent_shapes)
        own = [slot for slot in range(self._num_slots) if self._is_own(slot)]
        self._videos = {slot: self._start(slot) for slot in own}
        # As they were before the step that is being computed, which may never be finished.
        self._kept = dict(self._videos)

    def fill(self) -> None:
        """Spread the videos over their trajectories, so that a batch has all noise levels."""
        length = self._config.states_per_trajectory
        places = {slot: slot // self._batch_size % self._depth for slot in self._videos}
        moves = {slot: place * length // self._depth for slot, place in places.items()}
        rows = self._batch_size // self._run.processes.size
        total, done = sum(moves.values()), 0
        self._run.begin_stage("filling_pool", total * self._run.processes.size)
        for turn in range(max(moves.values())):
            late = [slot for slot, count in moves.items() if count > turn]
            # `rows` slots that follow one another have one size and one number of moves.
            for first in range(0, len(late), rows):
                slots = late[first : first + rows]
                self._move(slots, self._guide(self._ask(slots)))
                done += len(slots)
                self._run.callbacks.on_step_end(done * self._run.processes.size)
        self.keep()

    @torch.no_grad()
    def draw(
        self, generator: torch.Generator, student: GuidedFn | None = None, share: float = 0.0
    ) -> States:
        """Take this process's rows of a batch, with the teacher's velocities; move their videos on.

        student: moves `share` of all videos.
        """
        rows = torch.arange(self._batch_size)
        num_sizes, size = len(self._teacher.latent_shapes), 0
        if num_sizes > 1:
            size = torch.randint(num_sizes, (), generator=generator)
        picks = size * self._depth + torch.randint(self._depth, rows.shape, generator=generator)
        slots = (picks * self._batch_size + rows).tolist()
        own = [slot for slot in slots if self._is_own(slot)]
        states = self._ask(own)
        velocity = self._guide(states)
        if student is not None and any(_is_in_share(slot, share) for slot in slots):
            # All processes must call a sharded model: one without such a video calls it in vain.
            places = [row for row, slot in enumerate(own) if _is_in_share(slot, share)]
            mine = states.take(places or [0])
            sigma = self.sigmas.to(mine.step.device)[mine.step]
            prompt_embeds = self._teacher.prompt_embeds[mine.prompt]
            negative_embeds = self._teacher.negatives_for(prompt_embeds, mine.negative)
            found = student(mine.latents, sigma, prompt_embeds, negative_embeds)
            velocity[places] = found[: len(places)].float()
        self._move(own, velocity)
        return states

    def keep(self) -> None:
        """Make the present videos those that `state` returns: a step is finished."""
        self._kept = dict(self._videos)

    def state(self) -> dict[str, Any]:
        """Return what brings the videos of the last finished step back: tensors by name."""
        state = {}
        for slot, video in self._kept.items():
            state[f"pool/{slot}/latents"] = video.latents
            state[f"pool/{slot}/video"] = torch.tensor([video.number, video.place])
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what any number of processes returned, each its part."""
        for slot in self._videos:
            number, place = state[f"pool/{slot}/video"].tolist()
            self._videos[slot] = dataclasses.replace(
                self._start(number), place=place, latents=state[f"pool/{slot}/latents"]
            )
        self.keep()

    def _is_own(self, slot: int) -> bool:
        processes = self._run.processes
        return slot % self._batch_size % processes.size == processes.rank

    def _start(self, number: int) -> _Video:
        size = number % self._num_slots // (self._depth * self._batch_size)
        shape = self._teacher.latent_shapes[size]
        prompt, noise, kept, negative = draw_video(
            self._teacher, self._config, self._run.seed, number, shape
        )
        # The noise is a state as well: the teacher is asked there to leave it.
        steps = tuple(dict.fromkeys([0, *kept.tolist(), len(self.sigmas) - 1]))
        return _Video(number, prompt, negative, steps, 0, noise)

    def _ask(self, slots: list[int]) -> States:
        """Return the states of slots with the teacher's velocities, on the teacher's device."""
        device = self._teacher.prompt_embeds.device
        videos = [self._videos[slot] for slot in slots]
        latents = torch.stack([video.latents for video in videos]).to(device)
        step = torch.tensor([video.steps[video.place] for video in videos])
        prompt = torch.stack([video.prompt for video in videos]).to(device)
        negative = torch.stack([video.negative for video in videos]).to(device)
        branches: list[Tensor] = []
        prompt_embeds = self._teacher.prompt_embeds[prompt]
        velocity_fn = bind_guided(
            self._teacher.model,
            prompt_embeds,
            self._teacher.negatives_for(prompt_embeds, negative),
            self.guidance_scale,
            precision=self._run.precision,
            on_branches=lambda *found: branches.extend(branch.float() for branch in found),
        )
        with self._as_teacher(), torch.no_grad():
            velocity_fn(latents, self.sigmas[step].to(device))
        conditional, unconditional = branches
        return States(
            latents=latents,
            conditional=conditional,
            unconditional=unconditional,
            step=step.to(device),
            prompt=prompt,
            negative=negative,
        )

    def _guide(self, states: States) -> Tensor:
        return guide(states.conditional, states.unconditional, self.guidance_scale)

    def _move(self, slots: list[int], velocity: Tensor) -> None:
        """Bring the videos of slots to their next states; start others where they have arrived."""
        for slot, row in zip(slots, velocity.cpu(), strict=True):
            video = self._videos[slot]
            here, there = (self.sigmas[video.steps[video.place + i]] for i in (0, 1))
            place = video.place + 1
            if place == len(video.steps) - 1:
                self._videos[slot] = self._start(video.number + self._num_slots)
            else:
                moved = euler_step(video.latents, row, here, there)
                self._videos[slot] = dataclasses.replace(video, place=place, latents=moved)


def count_filling_calls(
    config: TrajectoryConfig, num_videos: int, batch_size: int, num_sizes: int = 1
) -> int:
    """Return how many guided calls of the teacher, of one video each, `TrajectoryPool.fill` makes.

    All processes together make them; of each size as many.
    """
    depth = _depth(num_videos, batch_size, num_sizes)
    moves = sum(i * config.states_per_trajectory // depth for i in range(depth))
    return num_sizes * batch_size * moves


def count_pool_bytes(
    latent_shapes: Sequence[Sequence[int]], num_videos: int, batch_size: int
) -> int:
    """Return what a pool takes of CPU memory, in all processes.

    latent_shapes: (C, F, H, W) of each size.
    """
    num_slots = batch_size * _depth(num_videos, batch_size, len(latent_shapes))
    return num_slots * sum(map(math.prod, latent_shapes)) * torch.float32.itemsize


def _depth(num_videos: int, batch_size: int, num_sizes: int) -> int:
    """Return the videos of a row of each size, at least one."""
    return max(1, num_videos // (batch_size * num_sizes))


def _is_in_share(slot: int, share: float) -> bool:
    """Say whether a slot is one of `share` of all, spread evenly."""
    return int((slot + 1) * share) > int(slot * share)
