"""Sample the teacher and store states of its trajectories: the method's only training data.

The teacher's own sampler runs with guidance; at a few noise levels of each trajectory the state
and both branches' velocities are kept. They belong to model, prompts, size, sampler and seed: a
folder called after these serves every run that asks for them. It holds a file a video: a repeated
call, or another run, adds only those that are missing. What is random of a video (prompt, noise,
which states are kept) is drawn from (seed, its number) alone: it is the same whatever is sampled
together with it, up to rounding.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..artifact import Usage
from ..flow import bind_guided, make_sigmas, sample_euler
from ..run.context import Run
from ..run.files import DIGEST, check_space, is_as_written, sweep, write_with_digest
from ..run.memory import show_gb
from .config import TrajectoryConfig
from .teacher import Teacher

logger = logging.getLogger(__name__)

USED_AGAIN = " beside it, which uses the teacher's stored videos again if they fit"
"""What a run in another folder would have of one that is there, see `run.folder.check_run`."""
# Changes whenever the same settings give other samples or other files.
_FORM = 5
_DECISIVE = ("states_per_trajectory", "sampler_steps", "guidance_scale", "shift")
_KEPT = ("latents", "conditional", "unconditional")


@dataclasses.dataclass(frozen=True, kw_only=True)
class States:
    """A batch of states of trajectories.

    latents, conditional, unconditional: [B, C, F, H, W], the state and the teacher's velocity in
        both guidance branches.
    step: [B] int64, index into the sampling grid; prompt: [B] int64, index into the prompts.
    negative: [B] int64, index into the negative prompts.
    """

    latents: Tensor
    conditional: Tensor
    unconditional: Tensor
    step: Tensor
    prompt: Tensor
    negative: Tensor

    def take(self, rows: Sequence[int]) -> "States":
        """Return some of the states."""
        fields = dataclasses.fields(self)
        return States(**{field.name: getattr(self, field.name)[rows] for field in fields})


class Trajectories:
    """Stored videos, memory-mapped; `pick` draws states at random, `take` reads those it is given.

    States are numbered video by video; those of one video go through its noise levels in order.
    """

    def __init__(self, paths: Sequence[Path], config: TrajectoryConfig) -> None:
        """paths: one file a video."""
        self.states_per_trajectory = config.states_per_trajectory
        self.guidance_scale = config.guidance_scale
        self.sigmas = make_sigmas(config.sampler_steps, config.shift)
        self._videos = [load_file(path) for path in paths]

    def __len__(self) -> int:
        """Return the number of stored states."""
        return len(self._videos) * self.states_per_trajectory

    def steps(self) -> Tensor:
        """Return the index into the sampling grid of every state, [len] int64."""
        return torch.cat([video["step"] for video in self._videos])

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
        places = [divmod(pick, self.states_per_trajectory) for pick in picks.tolist()]

        def read(name: str) -> Tensor:
            return torch.stack([self._videos[v][name][state] for v, state in places]).to(device)

        prompt = torch.stack([self._videos[video]["prompt"] for video, _ in places]).to(device)
        kept = {name: read(name).float() for name in _KEPT}
        negative = torch.zeros_like(prompt)
        return States(**kept, step=read("step"), prompt=prompt, negative=negative)

    def take_ends(self, picks: Tensor, device: torch.device | str) -> Tensor:
        """Return the videos [B, C, F, H, W] fp32 that the states `picks` [B] int64 end in."""
        videos = (picks // self.states_per_trajectory).tolist()
        return torch.stack([self._videos[video]["end"] for video in videos]).to(device).float()


def collect(teacher: Teacher, config: TrajectoryConfig, run: Run) -> Trajectories:
    """Sample what is missing of the teacher's videos, and open them.

    Several processes share what is missing. Callbacks are called at each of the sampler's steps;
    one that raises costs the videos in the making.

    Raises ValueError, in one sentence, when the disk is too full or the folder holds a file of
    something else.
    """
    identity, paths = _find_files(teacher, config, run)
    own = run.processes.share(torch.arange(len(paths))).tolist()
    _drop_damaged([paths[video] for video in own])
    run.processes.wait()
    missing = set(_find_missing(paths, identity))
    # All have looked before one writes.
    run.processes.wait()
    total, done = len(paths), len(paths) - len(missing)
    if missing:
        num_bytes = count_bytes(config, teacher.latent_shape, len(missing))
        _make_room(paths[0].parent, done, total, num_bytes)
    run.begin_stage("sampling_teacher", total, done)
    # Videos are sampled again with those that they were sampled with: to the same bytes.
    videos = torch.arange(total).split(config.shard_size)
    chunks = [chunk for chunk in map(Tensor.tolist, videos) if missing.intersection(chunk)]
    mine = set(run.processes.share(torch.arange(len(chunks))).tolist())
    for number, chunk in enumerate(chunks):
        num_new = len(missing.intersection(chunk))
        # Another run may have made some since.
        wanted = [v for v in chunk if number in mine and v in missing and not paths[v].exists()]
        if wanted:

            def on_step(step: int, done: int = done, num_new: int = num_new) -> None:
                run.callbacks.on_step_end(done + num_new * step // config.sampler_steps)

            tensors = sample_videos(teacher, config, run, chunk, on_step)
            for video in wanted:
                write_with_digest(paths[video], tensors[video], {"identity": identity})
        done += num_new
        run.callbacks.on_step_end(done)
    run.processes.wait()
    if _find_missing(paths, identity):
        raise ValueError(
            f"{paths[0].parent} lost files while the teacher was sampled; start again with the "
            "same settings"
        )
    return Trajectories(paths, config)


@torch.no_grad()
def sample_videos(
    teacher: Teacher,
    config: TrajectoryConfig,
    run: Run,
    videos: Sequence[int],
    on_step: Callable[[int], None],
) -> dict[int, dict[str, Tensor]]:
    """Sample videos together; `on_step` is called before each of the sampler's steps.

    Returns of each video the kept states and both branches' velocities [kept, C, F, H, W] fp16, the
    step [kept] that each is of, the index [] of the prompt, and the video's end [C, F, H, W] fp16,
    at noise level 0.
    """
    device = teacher.prompt_embeds.device
    drawn = [draw_video(teacher, config, run.seed, video) for video in videos]
    prompt, noise, kept_steps, _ = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    kept: dict[str, list[Tensor]] = {name: [] for name in _KEPT}
    order: list[Tensor] = []
    branches: list[Tensor] = []

    def on_branches(conditional: Tensor, unconditional: Tensor) -> None:
        branches[:] = conditional, unconditional

    def keep(step: int, latents: Tensor, velocity: Tensor) -> None:
        on_step(step)
        rows = (kept_steps == step).any(dim=1).nonzero().squeeze(1)
        for name, tensor in zip(kept, (latents, *branches), strict=True):
            kept[name].append(tensor[rows.to(device)].half().cpu())
        order.append(rows)

    prompt_embeds = teacher.prompt_embeds[prompt.to(device)]
    velocity_fn = bind_guided(
        teacher.model,
        prompt_embeds,
        teacher.negatives_for(prompt_embeds),
        config.guidance_scale,
        precision=run.precision,
        on_branches=on_branches,
    )
    sigmas = make_sigmas(config.sampler_steps, config.shift)
    end = sample_euler(velocity_fn, noise.to(device), sigmas, on_step=keep)
    # States arrive step by step; a stable sort by video brings each video's together, in order.
    by_video = torch.cat(order).argsort(stable=True)
    shape = kept_steps.shape
    stored = {name: torch.cat(parts)[by_video].unflatten(0, shape) for name, parts in kept.items()}
    stored |= {"step": kept_steps, "prompt": prompt, "end": end.half().cpu()}
    return {video: {n: t[row] for n, t in stored.items()} for row, video in enumerate(videos)}


def spread_edges(config: TrajectoryConfig) -> Tensor:
    """Return where the strata of steps begin and end of which one each is kept, [kept + 1]."""
    num_kept = config.states_per_trajectory
    return torch.linspace(0, config.sampler_steps, num_kept + 1).round().long()


def draw_video(
    teacher: Teacher,
    config: TrajectoryConfig,
    seed: int,
    video: int,
    latent_shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a video's prompt [], noise [C, F, H, W], the steps [kept] kept of it, its negative [].

    Prompts and negative prompts are numbers; stored videos all have the first negative.

    latent_shape: (C, F, H, W); none: the teacher's.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + video) % 2**63)
    prompt = torch.randint(len(teacher.prompts), (), generator=generator)
    noise = torch.randn(latent_shape or teacher.latent_shape, generator=generator)
    edges = spread_edges(config)
    shares = torch.rand(config.states_per_trajectory, generator=generator)
    kept_steps = edges[:-1] + (shares * edges.diff()).long()
    num_negatives = 1 if teacher.all_negatives is None else len(teacher.all_negatives)
    negative = torch.randint(num_negatives, (), generator=generator)
    return prompt, noise, kept_steps, negative


def count_missing(teacher: Teacher, config: TrajectoryConfig, run: Run) -> int:
    """Return how many videos `collect` would have to sample."""
    identity, paths = _find_files(teacher, config, run)
    return len(_find_missing(paths, identity))


def has_stored_since(folder: Path, moment: float) -> bool:
    """Say whether any video was stored below a folder of samples since a moment in seconds."""
    # Another run may take files away meanwhile.
    with contextlib.suppress(FileNotFoundError):
        return any(path.stat().st_mtime >= moment for path in folder.glob("*/video-*.safetensors"))
    return False


def count_bytes(
    config: TrajectoryConfig, latent_shape: Sequence[int], num_videos: int | None = None
) -> int:
    """Return what videos take on disk, of a latent shape (C, F, H, W); none given: all of them."""
    count = config.num_trajectories if num_videos is None else num_videos
    tensors = len(_KEPT) * config.states_per_trajectory + 1
    return count * tensors * math.prod(latent_shape) * torch.float16.itemsize


def _find_files(teacher: Teacher, config: TrajectoryConfig, run: Run) -> tuple[str, list[Path]]:
    """Return what decides the samples, as JSON, and the videos' files, in a folder called after it.

    Nothing need be there yet.
    """
    sampler = {name: float(getattr(config, name)) for name in _DECISIVE}
    others = {"form": _FORM, "precision": run.precision, "seed": run.seed}
    identity = json.dumps({**teacher.describe(), **sampler, **others})
    name = hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()
    folder = config.folder_beside(run.folder) / name
    numbers = range(config.num_trajectories)
    return identity, [folder / f"video-{number:06d}.safetensors" for number in numbers]


def _drop_damaged(paths: Sequence[Path]) -> None:
    """Take away what is not as it was written, to be sampled again; which is logged."""
    # All bytes are read: some 2 s a GB on one core.
    with concurrent.futures.ThreadPoolExecutor() as threads:
        found = zip(paths, threads.map(_is_damaged, paths), strict=True)
    for path in (path for path, is_damaged in found if is_damaged):
        logger.warning("%s is damaged and will be sampled again", path)
        path.unlink(missing_ok=True)


def _is_damaged(path: Path) -> bool:
    """Say whether a file is not what was sampled; a file of something else is left to refuse."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return bool({"identity", DIGEST} & set(metadata)) and not is_as_written(path)
    except FileNotFoundError:
        return False
    except SafetensorError:
        return True


def _find_missing(paths: Sequence[Path], identity: str) -> list[int]:
    """Return the numbers of files that are not there, or cannot be opened.

    Raises ValueError for a file that has another identity.
    """
    return [video for video, path in enumerate(paths) if not _is_there(path, identity)]


def _is_there(path: Path, identity: str) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("identity")
    except (FileNotFoundError, SafetensorError):
        return False
    if found != identity:
        raise ValueError(
            f"{path} was sampled with other settings; delete {path.parent}, whose samples will be "
            "made again"
        )
    return True


def _make_room(folder: Path, num_found: int, total: int, num_bytes: int) -> None:
    """Make the samples' folder, and say what they take; see `check_space` for its error."""
    check_space([(folder, num_bytes, "the teacher's samples")])
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
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)


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
        more_sizes=tuple(
            (width, height, num_frames)
            for num_frames, height, width in map(teacher.measure, teacher.more_shapes)
        )
        or None,
    )
