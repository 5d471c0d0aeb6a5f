"""Warm starts that several trainings have in common: fitted once, borrowed by the others.

The feature maps of every layer are fitted before anything else is chosen, so trainings that differ
in objective, layers or weights begin with the same ones.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from linvideo_core.run.files import replacing
from linvideo_core.training.checkpoint import CHECKPOINT_NAME
from linvideo_core.transfer.config import WARM_START_NAME, TransferConfig

# Settings of a training that change nothing of the fit before it.
_OWN = (
    "steps",
    "warmup_steps",
    "accumulation",
    "learning_rate",
    "compile",
    "cuda_graphs",
    "checkpoint_every",
)


@contextlib.contextmanager
def sharing(folder: Path, config: TransferConfig) -> Iterator[None]:
    """Lay a finished warm start into the run's folder before its training, or keep its own.

    folder: where all runs keep theirs; config: of the run.
    """
    mine = config.out / WARM_START_NAME / CHECKPOINT_NAME
    kept = folder / f"{_name(config)}.safetensors"
    if kept.exists() and not mine.exists():
        _copy(kept, mine)
    yield
    if config.warm_start.warm_start_steps and not kept.exists():
        _copy(mine, kept)


def _name(config: TransferConfig) -> str:
    """Return what tells warm starts apart, as a file can be called."""
    training = dataclasses.asdict(config.training)
    decisive = [
        config.seed,
        config.precision,
        dataclasses.asdict(config.student.form),
        config.student.feature_ratio,
        dataclasses.asdict(config.warm_start),
        config.objective.prompt_dropout,
        {name: value for name, value in training.items() if name not in _OWN},
    ]
    return hashlib.blake2b(json.dumps(decisive).encode(), digest_size=8).hexdigest()


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)
