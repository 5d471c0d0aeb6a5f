"""Sample the teacher and store states of its trajectories: the method's only training data.

The teacher's own sampler runs with guidance; at a few noise levels of each trajectory the state
and both branches' velocities are kept. Shards are written one by one: a repeated call continues
after the last whole one.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .adapters import identify, shapes_of, weights_digest
from .artifact import Usage
from .config import option, positive
from .demo import DEMO_GUIDANCE_SCALE, DEMO_SHIFT, DEMO_STEPS
from .flow import make_sigmas, sample_euler
from .models.denoiser import bind_guided
from .models.experts import parts_of
from .progress import Progress, silent
from .storage import write_tensors
from .subject import Subject
from .team import ALONE, Team

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrajectoryConfig:
    """How the teacher is sampled and how much of it is kept."""

    num_trajectories: int = option(24, "videos that the teacher samples")
    states_per_trajectory: int = option(8, "noise levels kept of each, spread over the trajectory")
    sampler_steps: int = option(DEMO_STEPS, "Euler steps of the teacher")
    guidance_scale: float = option(DEMO_GUIDANCE_SCALE, "classifier-free guidance of the teacher")
    shift: float = option(DEMO_SHIFT, "warp of the noise levels: Wan takes 3 for 480p, 5 for 720p")
    shard_size: int = option(8, "videos sampled together and stored in one file")

    def __post_init__(self) -> None:
        positive(
            self,
            "num_trajectories",
            "states_per_trajectory",
            "sampler_steps",
            "shift",
            "shard_size",
        )
        if self.states_per_trajectory > self.sampler_steps:
            raise ValueError(
                f"--states-per-trajectory {self.states_per_trajectory} given; at most "
                f"--sampler-steps {self.sampler_steps} can be kept"
            )


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
    """Stored shards, memory-mapped; `draw` picks states at random, `take` those that are named."""

    def __init__(self, paths: Sequence[Path], config: TrajectoryConfig) -> None:
        self.states_per_trajectory = config.states_per_trajectory
        self.guidance_scale = config.guidance_scale
        self.sigmas = make_sigmas(config.sampler_steps, config.shift)
        self._shards = [load_file(path) for path in paths]
        self._ends = torch.tensor([shard["step"].numel() for shard in self._shards]).cumsum(0)

    def __len__(self) -> int:
        """Return the number of stored states."""
        return int(self._ends[-1])

    def steps(self) -> Tensor:
        """Return the index into the sampling grid of every state, [len] int64."""
        return torch.cat([shard["step"].flatten() for shard in self._shards])

    def draw(
        self,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str,
        team: Team = ALONE,
        weights: Tensor | None = None,
    ) -> States:
        """Pick `batch_size` states and bring them to `device` in fp32.

        Of a team's batch, the states of this process's share.

        weights: how likely each state is, of `weigh`; none: as any other.
        """
        if weights is None:
            picks = torch.randint(len(self), (batch_size,), generator=generator)
        else:
            picks = torch.multinomial(weights, batch_size, replacement=True, generator=generator)
        return self.take(team.share(picks), device)

    def weigh(self, density: Tensor) -> Tensor:
        """Return how likely each state is, [len]: a level's share is split among its states.

        density: [sampler steps], how likely each level is to be drawn.
        """
        steps = self.steps()
        return (density / steps.bincount(minlength=len(density)).clamp(min=1))[steps]

    def take(self, picks: Tensor, device: torch.device | str) -> States:
        """Bring the states `picks` [B] int64, in [0, len), to `device` in fp32.

        They are numbered video by video; a video's states go through its noise levels in order.
        """
        where = torch.searchsorted(self._ends, picks, right=True)
        parts: dict[str, list[Tensor]] = {field.name: [] for field in dataclasses.fields(States)}
        order = []
        for index in where.unique().tolist():
            shard = self._shards[index]
            places = (where == index).nonzero().squeeze(1)
            first = self._ends[index - 1] if index else 0
            video = (picks[places] - first) // self.states_per_trajectory
            state = (picks[places] - first) % self.states_per_trajectory
            order.append(places)
            parts["prompt"].append(shard["prompt"][video])
            for name in ("latents", "conditional", "unconditional", "step"):
                parts[name].append(shard[name][video, state])
        back = torch.cat(order).argsort()
        drawn = {name: torch.cat(values)[back].to(device) for name, values in parts.items()}
        return States(**{n: t.float() if t.is_floating_point() else t for n, t in drawn.items()})


def collect(
    subject: Subject,
    config: TrajectoryConfig,
    folder: Path,
    *,
    seed: int,
    precision: str = "fp32",
    progress: Progress = silent,
    team: Team = ALONE,
) -> Trajectories:
    """Sample the teacher until `folder` holds all shards, and open them.

    The processes of a team share the missing shards, which are the same whoever samples them.
    Progress is said at each of the sampler's steps; one that raises costs the shard in the making.

    Raises ValueError when the folder holds shards of another teacher, config or seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    identity = json.dumps([*_describe(subject), seed, precision, dataclasses.asdict(config)])
    num_shards = -(-config.num_trajectories // config.shard_size)
    paths = [folder / f"shard-{i:05d}.safetensors" for i in range(num_shards)]
    missing = torch.tensor([i for i, path in enumerate(paths) if not _is_whole(path, identity)])
    # All have looked before one writes.
    team.wait()
    mine = set(team.share(missing).tolist())
    for i, path in enumerate(paths):
        first = i * config.shard_size
        progress("sampling the teacher", first, config.num_trajectories)
        if i in mine:
            size = min(config.shard_size, config.num_trajectories - first)
            generator = torch.Generator().manual_seed(seed * 1_000_003 + i)

            def say_step(step: int, first: int = first, size: int = size) -> None:
                done = first + size * step // config.sampler_steps
                progress("sampling the teacher", done, config.num_trajectories)

            tensors = _sample_shard(subject, config, size, generator, precision, say_step)
            write_tensors(path, tensors, {"identity": identity})
    team.wait()
    progress("sampling the teacher", config.num_trajectories, config.num_trajectories)
    return Trajectories(paths, config)


def _describe(subject: Subject) -> list[Any]:
    """Return what decides a sample besides seed and config: weights, prompts, size."""
    prompts = hashlib.blake2b(digest_size=8)
    for embeds in (subject.prompt_embeds, subject.negative_embeds):
        prompts.update(embeds.cpu().half().numpy().tobytes())
    digests = [
        weights_digest(model, identify(shapes_of(model))[1]) for model in parts_of(subject.model)
    ]
    return [subject.name, "+".join(digests), prompts.hexdigest(), subject.latent_shape]


def _is_whole(path: Path, identity: str) -> bool:
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("identity")
    except SafetensorError:
        logger.warning("%s is damaged and will be sampled again", path)
        return False
    if found != identity:
        raise ValueError(
            f"{path} was sampled with other settings; delete {path.parent} or choose another --out"
        )
    return True


@torch.no_grad()
def _sample_shard(
    subject: Subject,
    config: TrajectoryConfig,
    size: int,
    generator: torch.Generator,
    precision: str,
    say_step: Callable[[int], None],
) -> dict[str, Tensor]:
    device = subject.prompt_embeds.device
    prompt = torch.randint(len(subject.prompts), (size,), generator=generator)
    noise = torch.randn(size, *subject.latent_shape, generator=generator).to(device)
    kept_steps = _spread(size, config.states_per_trajectory, config.sampler_steps, generator)
    kept: dict[str, list[Tensor]] = {"latents": [], "conditional": [], "unconditional": []}
    branches: list[Tensor] = []

    def on_branches(conditional: Tensor, unconditional: Tensor) -> None:
        branches[:] = conditional, unconditional

    def on_step(step: int, latents: Tensor, velocity: Tensor) -> None:
        say_step(step)
        rows = (kept_steps == step).any(dim=1).nonzero().squeeze(1)
        for name, tensor in zip(kept, (latents, *branches), strict=True):
            kept[name].append(tensor[rows.to(device)].half().cpu())
        order.append(rows)

    order: list[Tensor] = []
    velocity_fn = bind_guided(
        subject.model,
        subject.prompt_embeds[prompt.to(device)],
        subject.negative_embeds.expand(size, -1, -1),
        config.guidance_scale,
        precision=precision,
        on_branches=on_branches,
    )
    sample_euler(
        velocity_fn, noise, make_sigmas(config.sampler_steps, config.shift), on_step=on_step
    )
    # States arrive step by step; a stable sort by video brings each video's together, in order.
    by_video = torch.cat(order).argsort(stable=True)
    shape = (size, config.states_per_trajectory)
    stored = {name: torch.cat(parts)[by_video].unflatten(0, shape) for name, parts in kept.items()}
    return {**stored, "step": kept_steps, "prompt": prompt}


def find_usage(subject: Subject, config: TrajectoryConfig) -> Usage:
    """Say how a student wants to be used: as its teacher was sampled."""
    num_frames, height, width = subject.video_size
    return Usage(
        width=width,
        height=height,
        num_frames=num_frames,
        guidance_scale=config.guidance_scale,
        shift=config.shift,
        steps=config.sampler_steps,
        sampler="euler",
    )


def spread_edges(num_kept: int, num_steps: int) -> Tensor:
    """Return where the strata begin and end of which one step each is kept, [num_kept + 1]."""
    return torch.linspace(0, num_steps, num_kept + 1).round().long()


def _spread(size: int, num_kept: int, num_steps: int, generator: torch.Generator) -> Tensor:
    """Pick `num_kept` of `num_steps` for each video, one in each of as many equal strata."""
    edges = spread_edges(num_kept, num_steps)
    widths = edges[1:] - edges[:-1]
    offsets = (torch.rand(size, num_kept, generator=generator) * widths).long()
    return edges[:-1] + offsets
