"""LinVideo's headless core: linear attention for video diffusion transformers, without data.

A folder imports only those above it:

    flow        rectified-flow arithmetic; Euler and few-step samplers
    run         one run of a command: settings, errors, folder, files, callbacks, memory, processes
    kernels     linear attention, fused for GPUs, and in plain PyTorch
    demo        the embedded model of moving digits: weights, codec, prompts, classifier
    training    train any task on any number of processes
    models      Wan, its attention and where it sits, LoRA, fp8, checkpoints
    artifact    a LINVIDEO file: header, reading, writing, applying it to a model
    pipelines   applying a LINVIDEO file to a Wan pipeline of diffusers
    prompts     words -> prompt embeddings
    teacher     the frozen model with its prompts; the trajectories sampled from it
    evaluate    models sampled on equal terms, and measured
    transfer    warm start, layer selection, training -> a linearized student and its file
    distill     a linearized student -> a few-step one

Commands: `python -m linvideo_core.transfer`, `.distill`, `.evaluate`. From a checkout, too:
`python -m benchmarks.kernels`, `.models`, `.models.training_steps`, `.in_app` and
`python -m research.ablations`, `research.evaluation_record`, `research.demo_model.train`.
"""

import importlib.metadata
import re
import sys

__version__ = "0.2.0"

_OLDEST_TORCH = (2, 5)


def _check_torch() -> None:
    """Raise ImportError, in one sentence, for a PyTorch that is too old; a command ends with it."""
    # Asked of the package's record: to import it takes seconds, which `--help` would wait for.
    try:
        found = importlib.metadata.version("torch") or ""
    except importlib.metadata.PackageNotFoundError:
        found = ""
    # A version that says nothing is a build of one's own; one without a record may be, too.
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or tuple(map(int, numbers.groups())) >= _OLDEST_TORCH:
        return
    needed = ".".join(map(str, _OLDEST_TORCH))
    said = f"PyTorch {found} is installed; LinVideo needs {needed} or newer: update PyTorch"
    # So Python writes it while it looks the module of `-m` up, and for that imports its package.
    if sys.argv[:1] == ["-m"]:
        sys.stderr.write(f"error: {said}\n")
        sys.exit(2)
    raise ImportError(said)


_check_torch()
