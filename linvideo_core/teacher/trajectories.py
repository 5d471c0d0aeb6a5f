"""Sample the teacher and store states of its trajectories: the method's only training data.

The teacher's own sampler runs with guidance; at a few noise levels of each trajectory the state
and both branches' velocities are kept. They belong to model, prompts, size, sampler and seed: a
folder called after these serves every run that asks for them, whatever else it is set to. Files are
written one by one: a repeated call, or another run, continues after the last whole one.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..artifact import Usage
from ..flow import make_sigmas
from ..run.context import Run
from ..run.files import check_space, write_tensors
from ..run.memory import show_gb
from .config import TrajectoryConfig
from .sampling import KEPT, Sampling, sample_videos
from .shards import FoundVideos, find_videos, name_shard
from .teacher import Teacher

logger = logging.getLogger(__name__)

USED_AGAIN = " beside it, which uses the teacher's samples again if they fit"
"""What a run in another folder would have of one that is there, see `run.folder.check_run`."""
# Changes whenever the same settings give other samples.
_FORM = 2
_DECISIVE = ("states_per_trajectory", "sampler_steps", "guidance_scale", "shift")


@dataclasses.dataclass(frozen=True, kw_only=True)
class States:
    """A batch of stored states.

    latents, conditional, unconditional: [B, C, F, H, W], the state and the teacher's velocity in
        both guidance branches.
    step: [B] int64, index into the sampling grid; prompt: [B] int64, index into the prompts.
    """

    latents: Tensor
    conditional: Tensor
    unconditional: Tensor
    step: Tensor
    prompt: Tensor


class Trajectories:
    """Stored shards, memory-mapped; `draw` picks states at random, `take` those that are named.

    States are numbered video by video; those of one video go through its noise levels in order.
    """

    def __init__(
        self, paths: Sequence[Path], config: TrajectoryConfig, rows: Tensor | None = None
    ) -> None:
        """rows: [videos] int64, each one's place among the rows of all files; none: all of them."""
        self.states_per_trajectory = config.states_per_trajectory
        self.guidance_scale = config.guidance_scale
        self.sigmas = make_sigmas(config.sampler_steps, config.shift)
        self._shards = [load_file(path) for path in paths]
        self._ends = torch.tensor([len(shard["step"]) for shard in self._shards]).cumsum(0)
        self._rows = torch.arange(int(self._ends[-1])) if rows is None else rows

    def __len__(self) -> int:
        """Return the number of stored states."""
        return len(self._rows) * self.states_per_trajectory

    def steps(self) -> Tensor:
        """Return the index into the sampling grid of every state, [len] int64."""
        return torch.cat([shard["step"] for shard in self._shards])[self._rows].flatten()

    def pick(
        self, batch_size: int, generator: torch.Generator, weights: Tensor | None = None
    ) -> Tensor:
        """Draw the numbers [batch_size] int64 of states, with replacement.

        weights: how likely each state is, of `weigh`; none: as any other.
        """
        if weights is None:
            return torch.randint(len(self), (batch_size,), generator=generator)
        return torch.multinomial(weights, batch_size, replacement=True, generator=generator)

    def weigh(self, density: Tensor) -> Tensor:
        """Return how likely each state is, [len]: a level's share is split among its states.

        density: [sampler steps], how likely each level is to be drawn.
        """
        steps = self.steps()
        return (density / steps.bincount(minlength=len(density)).clamp(min=1))[steps]

    def take(self, picks: Tensor, device: torch.device | str) -> States:
        """Bring the states `picks` [B] int64, in [0, len), to `device` in fp32."""
        rows = self._rows[picks // self.states_per_trajectory]
        where = torch.searchsorted(self._ends, rows, right=True)
        parts: dict[str, list[Tensor]] = {field.name: [] for field in dataclasses.fields(States)}
        order = []
        for index in where.unique().tolist():
            shard = self._shards[index]
            places = (where == index).nonzero().squeeze(1)
            video = rows[places] - (self._ends[index - 1] if index else 0)
            state = picks[places] % self.states_per_trajectory
            order.append(places)
            parts["prompt"].append(shard["prompt"][video])
            for name in ("latents", "conditional", "unconditional", "step"):
                parts[name].append(shard[name][video, state])
        back = torch.cat(order).argsort()
        drawn = {name: torch.cat(values)[back].to(device) for name, values in parts.items()}
        return States(**{n: t.float() if t.is_floating_point() else t for n, t in drawn.items()})


def collect(teacher: Teacher, config: TrajectoryConfig, run: Run) -> Trajectories:
    """Sample what is missing of the teacher's videos, and open them.

    They lie in a folder that is called after what decides them; of another shard size or of fewer
    videos they serve as well. Several processes share what is missing. Callbacks are called at
    each of the sampler's steps; one that raises costs the shard in the making.

    Raises ValueError, in one sentence, when the disk is too full or the folder holds a file of
    something else.
    """
    kept = _Kept(teacher, config, run)
    found, total = kept.find(), config.num_trajectories
    chunks = found.split_missing(config.shard_size)
    # All have looked before one writes.
    run.processes.wait()
    if chunks:
        num_bytes = count_bytes(config, teacher.latent_shape, total - found.num_found)
        check_space([(kept.folder, num_bytes, "the teacher's samples")])
        _announce(kept.folder, found.num_found, total, num_bytes)
        kept.folder.mkdir(parents=True, exist_ok=True)
    sampling = Sampling(
        sigmas=make_sigmas(config.sampler_steps, config.shift),
        guidance_scale=config.guidance_scale,
        num_kept=config.states_per_trajectory,
        seed=run.seed,
        precision=run.precision,
    )
    done = found.num_found
    run.begin_stage("sampling_teacher", total, done)
    mine = set(run.processes.share(torch.arange(len(chunks))).tolist())
    for number, videos in enumerate(chunks):
        path = kept.folder / name_shard(videos)
        # Another run may have made it since.
        if number in mine and not path.exists():

            def on_step(step: int, done: int = done, size: int = len(videos)) -> None:
                run.callbacks.on_step_end(done + size * step // config.sampler_steps)

            tensors = sample_videos(teacher, sampling, videos, on_step)
            write_tensors(path, tensors, {"identity": kept.identity})
        done += len(videos)
        run.callbacks.on_step_end(done)
    run.processes.wait()
    found = kept.find()
    if found.num_found < total:
        raise ValueError(
            f"{kept.folder} lost files while the teacher was sampled; start again with the "
            "same settings"
        )
    return Trajectories(found.paths, config, found.rows)


def count_missing(teacher: Teacher, config: TrajectoryConfig, run: Run) -> int:
    """Return how many videos `collect` would have to sample."""
    return config.num_trajectories - _Kept(teacher, config, run).find().num_found


def count_bytes(
    config: TrajectoryConfig, latent_shape: Sequence[int], num_videos: int | None = None
) -> int:
    """Return what videos take on disk, of a latent shape (C, F, H, W); none given: all of them."""
    count = config.num_trajectories if num_videos is None else num_videos
    tensors = len(KEPT) * config.states_per_trajectory * math.prod(latent_shape)
    return count * tensors * torch.float16.itemsize


def _announce(folder: Path, num_found: int, total: int, num_bytes: int) -> None:
    there = (
        f"{num_found} of {total} videos are there, the others take" if num_found else "they take"
    )
    logger.info(
        "the teacher's samples are kept in %s for every run that can use them: %s %s; the folder "
        "may be deleted when no run needs it",
        folder,
        there,
        show_gb(num_bytes),
    )


class _Kept:
    """Samples on disk: what decides them, as JSON, and the folder that is called after it."""

    def __init__(self, teacher: Teacher, config: TrajectoryConfig, run: Run) -> None:
        sampler = {name: float(getattr(config, name)) for name in _DECISIVE}
        others = {"form": _FORM, "precision": run.precision, "seed": run.seed}
        self.identity = json.dumps({**teacher.describe(), **sampler, **others})
        root = config.folder_beside(run.folder)
        self.folder = root / hashlib.blake2b(self.identity.encode(), digest_size=6).hexdigest()
        self._num_videos = config.num_trajectories

    def find(self) -> FoundVideos:
        return find_videos(self.folder, self.identity, self._num_videos)


def find_usage(teacher: Teacher, config: TrajectoryConfig) -> Usage:
    """Say how a student wants to be used: as its teacher was sampled."""
    num_frames, height, width = teacher.video_size
    return Usage(
        width=width,
        height=height,
        num_frames=num_frames,
        guidance_scale=config.guidance_scale,
        shift=config.shift,
        steps=config.sampler_steps,
        sampler="euler",
    )
