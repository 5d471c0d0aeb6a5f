"""With which flags host tests run ComfyUI, and on what they then run.

LINVIDEO_HOST_FLAGS="" python -m pytest tests/host           # as ComfyUI starts by itself
LINVIDEO_HOST_FLAGS="--novram" python -m pytest tests/host
"""

import os
import shlex

VARIABLE = "LINVIDEO_HOST_FLAGS"
ON_A_CPU = ("--cpu", "--use-pytorch-cross-attention")
FLAGS = ON_A_CPU if VARIABLE not in os.environ else tuple(shlex.split(os.environ[VARIABLE]))

TESTS_OWN = ("PYTHONPATH", "TRITON_INTERPRET")
"""Environment variables that the host must not inherit from the tests."""
PATIENT = {"OMP_WAIT_POLICY": "passive"}
"""Waiting threads sleep: spinning, two processes on two cores hold each other up for minutes."""


def make_environment() -> dict[str, str]:
    """Return the environment variables of ComfyUI's processes."""
    return {k: v for k, v in os.environ.items() if k not in TESTS_OWN} | PATIENT


def name_device(name: str) -> str:
    """Return a device as tables name it, with the flags if they are not the usual ones.

    name: as ComfyUI's /system_stats has it, such as "cpu" or "cuda:0 NVIDIA H100 : native".
    """
    model = name.partition(" : ")[0]
    if model.startswith("cuda:"):
        model = model.partition(" ")[2]
    return model if FLAGS in ((), ON_A_CPU) else f"{model} {' '.join(FLAGS)}"
