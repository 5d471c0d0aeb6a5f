"""Linearize Wan 2.2's two experts: trajectories of both, then a student and a file of each.

A trajectory starts with the high-noise expert, which hands it on to the low-noise one at the
boundary. Each expert's student learns at its own noise levels only. The high-noise expert's grid
ends at the level that its last step leads to, where the other takes over: objectives compare at
every level of a grid but its last, so a jump of theirs ends at the expert's last own level at the
latest. Beyond, the student's velocity is never sampled with and its teacher never learned one. The
low-noise expert's grid begins at its own first level, and its jumps, which go down, stay its own.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from .. import artifact
from ..artifact import Artifact
from ..flow import TIMESTEP_SCALE, make_sigmas
from ..models.experts import HIGH, LOW, SIDES, Experts, is_high_noise
from ..models.quantized import count_frozen_bytes
from ..run.config import override
from ..run.context import Run
from ..run.errors import SettingError
from ..run.memory import Need, check_memory
from ..teacher.teacher import Teacher, TeacherCheckpoint, open_teacher
from ..teacher.trajectories import States, Trajectories, collect, spread_edges
from .config import ARTIFACT_NAME, TransferConfig
from .pipeline import linearize
from .preflight import Footprint, check_transfer
from .student import Student

EXPERT_NAMES = {side: f"linearized_{side}.safetensors" for side in SIDES}


class OwnStates(Trajectories):
    """The states of trajectories that lie at one expert's noise levels, on its own grid.

    sigmas: from the expert's first level to where its last step leads; steps count from its first.
    """

    def __init__(self, whole: Trajectories, side: str, boundary: float) -> None:
        """Open no file: `whole` keeps them."""
        self._whole = whole
        own = own_steps(whole.sigmas, side, boundary)
        self._picks = own[whole.steps()].nonzero().squeeze(1)
        steps = own.nonzero()
        self._first = int(steps[0])
        self.sigmas = whole.sigmas[self._first : int(steps[-1]) + 2]
        self.guidance_scale = whole.guidance_scale
        share = len(self._picks) / len(whole)
        self.states_per_trajectory = max(1, round(share * whole.states_per_trajectory))

    def __len__(self) -> int:
        """Return the number of the expert's states."""
        return len(self._picks)

    def take(self, picks: Tensor, device: torch.device | str) -> States:
        """Bring the states `picks` [B] int64, in [0, len), to `device` in fp32."""
        states = self._whole.take(self._picks[picks], device)
        return dataclasses.replace(states, step=states.step - self._first)

    def steps(self) -> Tensor:
        """Return the index into `sigmas` of every state, [len] int64."""
        return self._whole.steps()[self._picks] - self._first


def own_steps(sigmas: Tensor, side: str, boundary: float) -> Tensor:
    """Return [steps] bool: at which of a grid's steps [steps + 1] an expert works."""
    is_high = is_high_noise(TIMESTEP_SCALE * sigmas[:-1], boundary)
    return is_high if side == HIGH else ~is_high


def check_experts(
    config: TransferConfig, device: str, precision: str
) -> tuple[dict[str, TeacherCheckpoint], Footprint]:
    """Read the headers of both experts; return their checkpoints by side, and what a run takes.

    Raises FileNotFoundError or ValueError, in one sentence, for what cannot work.
    """
    settings, boundary = config.trajectories, config.experts.boundary
    found = {
        side: open_teacher(override(config.teacher, {"model": path}))
        for side, path in ((HIGH, config.teacher.model), (LOW, config.experts.low_noise_model))
    }
    if found[HIGH].checkpoint.config != found[LOW].checkpoint.config:
        raise ValueError(
            f"{config.teacher.model} and {config.experts.low_noise_model} differ in architecture; "
            "two experts of one model are needed"
        )
    sigmas = make_sigmas(settings.sampler_steps, settings.shift)
    num_high = int(own_steps(sigmas, HIGH, boundary).sum())
    edges = spread_edges(settings)
    # One state is kept of each stratum: some stratum must lie on each side of the boundary.
    if edges[1] > num_high or edges[-2] < num_high:
        raise SettingError(
            f"{{boundary}} {boundary:g} given; of {settings.sampler_steps} sampler steps "
            f"{num_high} are above it, too few or too many to keep "
            f"{settings.states_per_trajectory} states of each trajectory on both sides: raise "
            "{states_per_trajectory}, or change {shift}",
            "boundary",
            "states_per_trajectory",
            "shift",
        )
    footprint = check_transfer(found[HIGH], config, device, precision)
    size = count_frozen_bytes(found[HIGH].shapes, config.teacher.frozen_weights.frozen)
    advice = "choose smaller models or a machine with more memory"
    check_memory([Need("each of two experts", size)] * 2, "cpu", advice)
    return found, footprint


def load_experts(
    checkpoints: Mapping[str, TeacherCheckpoint], config: TransferConfig, run: Run
) -> Teacher:
    """Return both experts as one teacher; its prompts are on the device, its weights on the CPU."""
    high = checkpoints[HIGH].load(run)
    low = checkpoints[LOW].load_model()
    boundary = config.experts.boundary
    return dataclasses.replace(
        high.with_prompts_on(run.device),
        name=f"{high.name} down to {boundary:g}, then {checkpoints[LOW].checkpoint.path.stem}",
        model=Experts(high.model, low, boundary),
    )


def linearize_experts(
    teacher: Teacher,
    names: Mapping[str, str],
    config: TransferConfig,
    run: Run,
    *,
    origin: Mapping[str, str] | None = None,
) -> None:
    """Sample with both experts, then train each one's student and save its file.

    teacher: of `load_experts`; names: of each expert's model; origin: see `linearize`.
    """
    trajectories = collect(teacher, config.trajectories, run)
    for side in SIDES:
        path = run.folder / EXPERT_NAMES[side]
        if path.exists():
            continue
        own = OwnStates(trajectories, side, config.experts.boundary)
        model = teacher.model.fetch(side, teacher.prompt_embeds.device)
        expert = dataclasses.replace(teacher, name=names[side], model=model)
        mine = dataclasses.replace(run.below(side), detail=side.replace("_", " "))
        with Student(expert, config.student, seed=config.seed) as student:
            linearize(student, expert, config, mine, own, origin=origin)
        if not run.processes.is_first:
            continue
        made = artifact.load(mine.folder / ARTIFACT_NAME)
        artifact.save(_with_range(made, side, config.experts.boundary), path)


def _with_range(made: Artifact, side: str, boundary: float) -> Artifact:
    """Return a file that says at which noise levels its model works."""
    above, below = (1.0, boundary) if side == HIGH else (boundary, 0.0)
    header = dataclasses.replace(
        made.header,
        usage=dataclasses.replace(made.header.usage, sigma_from=above, sigma_to=below),
        provenance={**made.header.provenance, "expert": side},
    )
    return dataclasses.replace(made, header=header)
