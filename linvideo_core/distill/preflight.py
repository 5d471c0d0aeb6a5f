"""What a distillation takes, told before anything long begins; refused where it cannot fit."""

from .. import artifact as artifact_files
from ..artifact import Artifact
from ..models.families import identify
from ..run.context import Run
from ..run.errors import SettingError
from ..teacher.teacher import Teacher, TeacherCheckpoint
from ..teacher.trajectories import count_missing
from ..transfer.estimate import (
    LEARNING,
    WARM_START,
    Estimate,
    announce,
    check_disk,
    count_comparing,
    say_that_calls_are_timed,
    time_teacher,
)
from ..transfer.preflight import Footprint, check_footprint, count_maps, count_weights
from .config import DistillationConfig, DistillConfig


def check_distillation(
    checkpoint: TeacherCheckpoint,
    config: DistillConfig,
    first: Artifact,
    device: str,
    precision: str,
    num_processes: int = 1,
) -> Footprint:
    """Return what a distillation of a teacher's linearized file takes, by headers and arithmetic.

    Raises ValueError, in one sentence, when it cannot work.
    """
    usage = first.header.usage
    if usage.sigma_from is not None and (usage.sigma_from < 1 or usage.sigma_to > 0):
        raise SettingError(
            f"{{artifact}} {config.artifact} is for noise levels from {usage.sigma_from:g} to "
            f"{usage.sigma_to:g} alone, of one of Wan 2.2's two experts; only what covers all "
            "levels can be distilled: use it as it is, or give a file of a model with one expert",
            "artifact",
        )
    return check_footprint(
        checkpoint,
        config,
        device,
        precision,
        num_trained=count_trained(checkpoint, config.distillation, first),
        all_trained=config.distillation.parameters == "full",
        num_processes=num_processes,
        may_offload=num_processes == 1,
    )


def count_trained(
    checkpoint: TeacherCheckpoint, config: DistillationConfig, first: Artifact
) -> int:
    """Return how many numbers are trained: the linear layers' maps, student and critic.

    Raises ArtifactError for a file that was made for another model.
    """
    linear = artifact_files.check(first, checkpoint.shapes)
    family, _ = identify(checkpoint.shapes)
    ratio = first.header.feature_dim // linear[0].head_dim
    rank = max(config.lora_rank, first.header.lora_rank)
    changes = count_weights(checkpoint, family, config.parameters, rank)
    return sum(count_maps(site, ratio) for site in linear) + 2 * changes


def forecast(teacher: Teacher, config: DistillConfig, run: Run, footprint: Footprint) -> Estimate:
    """Measure a call of the teacher, log what a distillation takes, and return it.

    Raises ValueError, in one sentence, where a disk has too little room.
    """
    num_missing = count_missing(teacher, config.trajectories, run)
    disk_bytes = check_disk(teacher, config, num_missing, footprint.num_trained)
    say_that_calls_are_timed(teacher)
    call = time_teacher(teacher, config.trajectories, run.precision)
    of_video = config.trajectories.sampler_steps * call
    training, num_processes = config.training, run.processes.size
    num_samples = training.batch_size * training.accumulation / num_processes
    num_calls = count_calls(config.distillation)
    warm_steps = config.warm_start.warm_start_steps if config.single_stage else 0
    # Of the teacher and the linearized model, at all steps.
    comparing = count_comparing(config, num_students=1)
    found = Estimate(
        sampling=-(-num_missing // num_processes) * of_video,
        warm_start=warm_steps * training.batch_size / num_processes * WARM_START * call,
        training=training.steps * num_samples * num_calls * call,
        comparing=comparing * call,
        disk_bytes=disk_bytes,
        device_bytes=footprint.device_bytes,
        memory_bytes=footprint.memory_bytes,
    )
    announce(found, teacher.prompt_embeds.device)
    return found


def count_calls(config: DistillationConfig) -> float:
    """Return what a step takes for a video, in calls of the guided teacher.

    On average a video is sampled up to half of the steps, then made; the critic learns from it. At
    the student's turns the teacher is asked, and the student learns from it and from an ending.
    """
    sampling = 0.5 * ((config.num_steps - 1) / 2 + 1)
    learning = 1 + LEARNING * (2 if config.regression_weight else 1)
    return sampling + LEARNING + learning / config.critic_steps
