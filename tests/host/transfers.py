"""What tests of transfers share: a node's inputs for a tiny one, and the teacher that it lends."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from linvideo_pack.linvideo_core.teacher.teacher import Teacher
from linvideo_pack.nodes.transfer.host_teacher import HostTeacher
from linvideo_pack.nodes.transfer.pipeline import make_config

_SETTINGS = {
    "target": 2,
    "steps": 6,
    "batch_size": 2,
    "cfg": 3.0,
    "seed": 1,
    "parameters": "lora",
    "lora_rank": 4,
    "objective": "adm",
    "learning_rate": 2e-3,
    "warm_start_steps": 2,
    "num_videos": 2,
    "sampler_steps": 8,
    "width": 0,
    "height": 0,
    "frames": 0,
    "tile": "",
    "attention_mass": "query",
}


def make_inputs(**changes: Any) -> dict[str, Any]:
    """Return what the node is given; an expert's settings are told from the others by name."""
    sockets = dict.fromkeys(("positive", "negative", "clip", "latent"))
    usual = {"name": "fast", "quality": "standard", "prompts": "", "keep_first_steps": 0, **sockets}
    settings = {name: changes.pop(name, value) for name, value in _SETTINGS.items()}
    return {**usual, "settings": settings, **changes}


@contextlib.contextmanager
def lend_teacher(model: Any, inputs: dict[str, Any]) -> Iterator[Teacher]:
    """Lend the teacher of a transfer, outside of the inference mode that nodes run in."""
    with torch.inference_mode(False), torch.no_grad():
        host = HostTeacher(model, inputs)
        with host.teacher(make_config(inputs, host)) as teacher:
            yield teacher
