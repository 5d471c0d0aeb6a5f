"""Run a transfer inside ComfyUI: from a graph's MODEL to a file in models/linvideo.

The run folder `<output>/linvideo/<name>` keeps samples, checkpoints and the result, and belongs to
one model with one set of inputs: queueing them again continues, or finds the finished file.
"""

import contextlib
import dataclasses
import filecmp
import gc
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch

from ..linvideo_core.artifact import ArtifactError
from ..linvideo_core.artifact.names import check_name
from ..linvideo_core.config import override
from ..linvideo_core.linearization import ARTIFACT_NAME, TransferConfig, linearize
from ..linvideo_core.memory import is_out_of_memory
from ..linvideo_core.run_folder import check_run, open_run
from ..linvideo_core.selection import check_target
from ..linvideo_core.storage import replacing
from ..linvideo_core.student import Student
from ..linvideo_core.transfer import PRESETS
from .files import FOLDER
from .host_subject import HostSubject
from .live import LiveProgress

# How an input is called where the core names its flag.
_INPUTS = {"out": "name", "guidance_scale": "cfg", "num_trajectories": "num_videos"}
_FREE_FIELDS = ("out", "device")
_LOWER = "lower batch_size, frames, width and height, or lora_rank, and give it another name"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostRun:
    """What a run folder belongs to: the graph's model and conditioning beside the settings.

    weights, conditions: digests; latent_shape: (C, F, H, W).
    """

    weights: str
    conditions: str
    latent_shape: tuple[int, ...]
    transfer: TransferConfig


def run(model: Any, inputs: dict[str, Any]) -> Path:
    """Return the file of a transfer of a ModelPatcher, made now unless it is there already.

    inputs: by name, see `transfer_inputs`. The model is left as it is.

    Raises ValueError or RuntimeError, in one sentence, for bad input or too little memory, and
    ComfyUI's own exception on Interrupt; what was trained until then is kept.
    """
    with _in_the_artists_words(), _tidied(), torch.inference_mode(False), torch.enable_grad():
        host = HostSubject(model, inputs)
        config = make_config(inputs, host)
        check_target(config.selection, len(host.sites))
        identity = HostRun(
            weights=host.weights_digest(),
            conditions=host.conditions.digest(),
            latent_shape=host.latent_shape,
            transfer=config,
        )
        check_run(config.out, identity, ignore=_FREE_FIELDS)
        made = config.out / ARTIFACT_NAME
        target = _find_target(config.out.name, made)
        if not made.exists():
            _train(host, config, identity)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as temporary:
                shutil.copyfile(made, temporary)
        return target


def make_config(inputs: dict[str, Any], host: HostSubject) -> TransferConfig:
    """Return the core's settings: the demo's, with those of the node and of the graph's model.

    Raises ValueError for a setting that is out of range or a name that cannot be a file's.
    """
    name, steps = check_name(inputs["name"], is_single=True), inputs["steps"]
    same = ("target", "steps", "batch_size", "seed", "parameters", "lora_rank", "objective")
    same += ("learning_rate", "warm_start_steps", "sampler_steps")
    values = {
        **PRESETS["demo"],
        **{key: inputs[key] for key in same},
        "guidance_scale": inputs["cfg"],
        "num_trajectories": inputs["num_videos"],
        "shard_size": inputs["batch_size"],
        "shift": host.shift,
        # The demo's 0.03 moves r far enough in its 200 steps; in more of them less is enough.
        "layer_score_learning_rate": min(0.03, max(0.01, 6 / steps)),
        "warmup_steps": min(100, max(1, steps // 10)),
        "activation_checkpointing": host.device.type != "cpu",
        "precision": "fp32",
        "device": str(host.device),
        "out": Path(folder_paths.get_output_directory()) / FOLDER / name,
    }
    return override(TransferConfig(), values)


def _find_target(name: str, made: Path) -> Path:
    """Return where the result goes; what lies there already must be this very run's."""
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
    target = folder / f"{name}.safetensors"
    if target.exists() and not (made.exists() and filecmp.cmp(made, target, shallow=False)):
        raise ValueError(
            f"models/{FOLDER}/{target.name} exists and was not made by this transfer: choose "
            "another name, or move that file away"
        )
    return target


def _train(host: HostSubject, config: TransferConfig, identity: HostRun) -> None:
    with host.subject() as subject:
        student = Student(subject, config.student, seed=config.seed)
        open_run(config.out, identity, ignore=_FREE_FIELDS)
        progress = LiveProgress(student, subject, config, host.latent_format)
        linearize(student, subject, config, config.precision, progress)


@contextlib.contextmanager
def _tidied() -> Iterator[None]:
    """Give the memory of the trained copy back."""
    try:
        yield
    finally:
        # A layer's forward refers to the layer: only the collector takes the two apart.
        gc.collect()
        comfy.model_management.cleanup_models()
        comfy.model_management.soft_empty_cache()


@contextlib.contextmanager
def _in_the_artists_words() -> Iterator[None]:
    """Raise the core's errors with inputs' names in place of its flags, and explain lack of memory.

    They are raised outside of `except`, where the frames that hold the model are let go of.
    """
    problem: Exception | None = None
    try:
        yield
    except ArtifactError:
        raise
    except ValueError as error:
        problem = ValueError(re.sub(r"--([a-z][a-z-]+)", _name_input, str(error)))
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        problem = RuntimeError(f"there is not enough memory for this transfer: {_LOWER}")
    if problem is not None:
        raise problem


def _name_input(flag: re.Match) -> str:
    name = flag[1].replace("-", "_")
    return _INPUTS.get(name, name)


def _is_out_of_memory(error: Exception) -> bool:
    is_host_oom = getattr(comfy.model_management, "is_oom", lambda _: False)
    return is_out_of_memory(error) or is_host_oom(error)
