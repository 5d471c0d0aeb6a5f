"""Run a transfer inside ComfyUI: from a graph's MODEL to a file in models/linvideo.

The run folder `<output>/linvideo/<name>` keeps samples, checkpoints and the result, and belongs to
one model with one set of inputs: queueing them again continues, or finds the finished file.
"""

import contextlib
import dataclasses
import filecmp
import gc
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch

from ...linvideo_core import artifact
from ...linvideo_core.artifact import ArtifactError
from ...linvideo_core.artifact.file import check_name
from ...linvideo_core.models.config import NO_TILE
from ...linvideo_core.run.config import override
from ...linvideo_core.run.context import Run
from ...linvideo_core.run.errors import SettingError
from ...linvideo_core.run.files import replacing
from ...linvideo_core.run.folder import CONFIG_NAME, OtherRunError, check_run, open_run
from ...linvideo_core.run.lock import locked
from ...linvideo_core.run.memory import is_out_of_memory
from ...linvideo_core.run.reading import read_json
from ...linvideo_core.teacher.teacher import Teacher
from ...linvideo_core.teacher.trajectories import USED_AGAIN
from ...linvideo_core.training.checkpoint import finished_steps
from ...linvideo_core.transfer.config import ARTIFACT_NAME, TRAINING_NAME, TransferConfig
from ...linvideo_core.transfer.estimate import forecast, time_run
from ...linvideo_core.transfer.layer_selection import check_target
from ...linvideo_core.transfer.pipeline import linearize
from ...linvideo_core.transfer.preflight import check_tile
from ...linvideo_core.transfer.recipe import settings_by_steps, settings_for, tile_for
from ...linvideo_core.transfer.student import Student
from ..model_folder import FOLDER
from .host_teacher import HostTeacher
from .live_preview import LiveProgress, show_on_node

logger = logging.getLogger(__name__)

# The node's input for a field of the core's settings, where they differ.
_INPUTS = {"out": "name", "guidance_scale": "cfg", "num_trajectories": "num_videos"}
_FIELDS = {node: core for core, node in _INPUTS.items()}
_SIZES = ("width", "height", "frames", "seed")
# What a run belongs to beside its settings, when it is another.
_OTHERS = {
    "weights": "another model, or with other LoRAs in it",
    "conditions": "other prompts or conditioning",
    "latent_shape": "another video size",
}
# What follows from other settings is not compared: those are.
_FREE_FIELDS = ("out", "device", "shard_size", "teacher_folder", *settings_by_steps(1))
_TEACHER_FOLDER = "linvideo_teacher"
"""In ComfyUI's output folder: the teacher's videos, for every transfer that can use them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostRun:
    """What a run folder belongs to: the graph's model and conditioning beside the settings.

    weights, conditions: digests; latent_shape: (C, F, H, W).
    """

    weights: str
    conditions: str
    latent_shape: tuple[int, ...]
    transfer: TransferConfig


def run(model: Any, inputs: dict[str, Any], guidance_scale: float | None = None) -> Path:
    """Return the file of a transfer of a ModelPatcher, made now unless it is there already.

    inputs: by name, see `read_transfer_inputs`. guidance_scale: with which the graph samples the
    result, None if unknown. The model is left as it is.

    Raises ValueError or RuntimeError for bad input, too little memory or a folder that is gone, and
    ComfyUI's own exception on Interrupt; what was trained until then is kept.
    """
    with _with_input_names(), torch.inference_mode(False), torch.enable_grad():
        host = HostTeacher(model, inputs)
        config = make_config(inputs, host, guidance_scale)
        check_target(config.selection, len(host.sites))
        if config.student.form.tile:
            host.family.check_grid(model.model.diffusion_model)
            check_tile(config.student.form, [host.grid])
        identity = HostRun(
            weights=host.weights_digest(),
            conditions=host.conditions.digest(),
            latent_shape=host.video.latent_shape,
            transfer=config,
        )
        _check_run(identity)
        made, models = config.out / ARTIFACT_NAME, folder_paths.get_folder_paths(FOLDER)
        target = Path(models[0]) / f"{config.out.name}.safetensors"
        _check_results(made, target)
        if not made.exists():
            _train(host, config, identity)
        if not target.exists():
            _copy(made, target)
        return target


def make_config(
    inputs: dict[str, Any], host: HostTeacher, guidance_scale: float | None = None
) -> TransferConfig:
    """Return the core's settings: an expert's where they are given, else what suits the model.

    Raises ValueError for a setting that is out of range or a name that cannot be a file's.
    """
    name = check_name(inputs["name"], is_single=True)
    values = settings_for(inputs["quality"], is_embedded=host.is_demo, num_layers=len(host.sites))
    out = Path(folder_paths.get_output_directory()) / FOLDER / name
    # A run that was begun keeps its guidance, whatever its result is tried with since.
    begun = _begun_with(out)
    guidance_scale = begun.get("guidance_scale") or guidance_scale
    if guidance_scale is not None:
        values["guidance_scale"] = guidance_scale
    expert = inputs["settings"] or {}
    given = {n: value for n, value in expert.items() if n not in _SIZES and value not in (0, "")}
    if not host.is_demo and "num_videos" not in given:
        values["states"] = "pool"
    if not host.is_demo and host.has_known_grid:
        values["tile"] = begun.get("tile") or tile_for([host.grid], given)
    values |= {_FIELDS.get(name, name): value for name, value in given.items()}
    values |= {
        **settings_by_steps(values["steps"]),
        "seed": expert.get("seed", 0),
        "shift": host.shift,
        "device": str(host.device),
        "out": out,
        "evaluate_samples": 0,
        "teacher_folder": out.parent.with_name(_TEACHER_FOLDER),
    }
    fewest = TransferConfig().trajectories.states_per_trajectory
    if values["sampler_steps"] < fewest:
        raise ValueError(
            f"sampler_steps {values['sampler_steps']} given; at least {fewest} are needed"
        )
    config = override(TransferConfig(), values)
    is_large = not host.is_copied(config)
    by_size = {
        "shard_size": 1 if is_large else config.training.batch_size,
        "activation_checkpointing": is_large,
        "precision": "bf16" if is_large and host.training_dtype == torch.bfloat16 else "fp32",
    }
    return override(config, by_size)


def _begun_with(folder: Path) -> dict[str, Any]:
    """Return what the run that a folder holds keeps by the fields' names; {}: none can be read."""
    try:
        transfer = read_json(folder / CONFIG_NAME)["transfer"]
        tile = transfer["student"]["form"]["tile"]
        return {
            "guidance_scale": float(transfer["trajectories"]["guidance_scale"]),
            "tile": NO_TILE if tile is None else tile,
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _check_run(identity: HostRun) -> None:
    """Raise ValueError where the name belongs to a transfer that differs."""
    out = identity.transfer.out
    try:
        check_run(out, identity, ignore=_FREE_FIELDS, new_run=USED_AGAIN)
    except OtherRunError as error:
        name, *_ = error.fields
        if name not in _OTHERS:
            # The shift is of the graph's model.
            where = "" if name == "shift" else ", by quality or in LinVideo Transfer Settings"
            raise SettingError(f"{error.message}{where}", *error.fields) from error
        raise ValueError(
            f"the transfer {out.name!r} was begun with {_OTHERS[name]}: give this one "
            "another name, or that one what it was begun with"
        ) from error


def _check_results(made: Path, target: Path) -> None:
    """Mend a damaged result in the run folder, and see that what lies at its target is the same.

    A damaged result is copied back from its target, or removed, to be written again.

    Raises ValueError where the target is no result of this run, or is damaged itself.
    """
    if made.exists() and not _is_whole(made):
        made.unlink()
        if target.exists() and _is_whole(target):
            logger.warning("LinVideo: %s was damaged, and is copied again from %s", made, target)
            _copy(target, made)
    if not target.exists() or (made.exists() and filecmp.cmp(made, target, shallow=False)):
        return
    shown = f"models/{FOLDER}/{target.name}"
    if not _is_whole(target):
        raise ValueError(f"{shown} is damaged: delete it, or choose another name")
    why = "is not what this transfer made"
    if not made.exists():
        why = f"what it was made from is not in output/{FOLDER}/{made.parent.name}"
    raise ValueError(
        f"{shown} exists, but {why}: choose another name, move that file away, or apply it as it is"
    )


def _is_whole(path: Path) -> bool:
    try:
        artifact.load(path)
    except ArtifactError:
        return False
    return True


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def _train(host: HostTeacher, config: TransferConfig, identity: HostRun) -> None:
    """Make the result in the run folder."""
    # What a transfer that failed has left: its error still referred to it all.
    _give_memory_back()
    with locked(config.out), host.teacher(config) as teacher:
        takes = _tell_what_it_takes(host, teacher, config)
        open_run(config.out, identity, ignore=_FREE_FIELDS)
        with Student(teacher, config.student, seed=config.seed) as student:
            live = LiveProgress(student, teacher, config, host.latent_format, host.video, takes)
            where = {"folder": config.out, "device": config.device, "seed": config.seed}
            run = Run(**where, precision=config.precision, callbacks=live)
            with live.watching():
                linearize(student, teacher, config, run)
    _give_memory_back()


def _give_memory_back() -> None:
    # A layer's forward refers to the layer: only the collector takes the two apart.
    gc.collect()
    comfy.model_management.cleanup_models()
    comfy.model_management.soft_empty_cache()


def _tell_what_it_takes(host: HostTeacher, teacher: Teacher, config: TransferConfig) -> str:
    """Measure a few calls, show on the node what the rest takes, and return the sentence.

    Raises ValueError where a disk has too little room.
    """
    show_on_node("a few calls are measured, to tell what this takes")
    try:
        pace = time_run(teacher, config, precision=config.precision)
        done = finished_steps(config.out / TRAINING_NAME)
        found = forecast(teacher, config, pace, precision=config.precision, num_done=done)
    except comfy.model_management.InterruptProcessingException:
        show_on_node("stopped before it had begun; queue again to begin, or to go on where it was")
        raise
    total = comfy.model_management.get_total_memory(host.device)
    if found.device_bytes is not None:
        # The weights are ComfyUI's, and beside what PyTorch counts.
        weight_bytes = host.model.model_size()
        found = dataclasses.replace(found, device_bytes=found.device_bytes + weight_bytes)
    sentence = f"This takes {found.sentence(total)}."
    logger.info("LinVideo: %s", sentence)
    show_on_node(sentence)
    return sentence


@contextlib.contextmanager
def _with_input_names() -> Iterator[None]:
    """Raise the core's errors with inputs' names, and those of memory and disk in one sentence.

    They are raised outside of `except`, where the frames that hold the model are let go of.
    """
    problem: Exception | None = None
    try:
        yield
    except SettingError as error:
        # Which a node decides itself.
        message = error.message.replace(" give {activation_checkpointing},", "")
        named = SettingError(message, *error.fields)
        problem = ValueError(named.worded(lambda field: _INPUTS.get(field, field)))
    except OSError as error:
        problem = RuntimeError(_explain(error))
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        problem = RuntimeError(
            "there is not enough memory for this transfer: lower batch_size, frames, width and "
            "height, or lora_rank, and give it another name; videos that were made first and "
            "kept are used again where they fit"
        )
    if problem is not None:
        raise problem


def _explain(error: OSError) -> str:
    found = error.__cause__ if isinstance(error.__cause__, OSError) else error
    if not isinstance(found, FileNotFoundError) or not found.filename:
        return str(error)
    return (
        f"{Path(found.filename).parent} is gone, in which this transfer keeps its work: was it "
        "moved or deleted? Queue the same inputs again; what is still there is used"
    )


def _is_out_of_memory(error: Exception) -> bool:
    return is_out_of_memory(error) or comfy.model_management.is_oom(error)
