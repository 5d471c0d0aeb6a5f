"""One training loop for judge and teacher: time limit, averaged weights, checkpoints, any GPUs.

Every process of a group draws each batch whole and keeps its rows, so that any number of processes
take the same steps up to the order of sums. Every draw of a step comes from (seed, step): a run
that stopped and is started again takes the steps that an unbroken one would have taken.
"""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from linvideo_core.run import limits
from linvideo_core.run.config import Settings, option
from linvideo_core.run.context import Run
from linvideo_core.run.devices import resolve_device, resolve_precision
from linvideo_core.run.files import write_tensors
from linvideo_core.run.process_group import ProcessGroup
from linvideo_core.training.trainer import seed_step

logger = logging.getLogger(__name__)

CHECKPOINT_NAME, METRICS_NAME = "checkpoint.safetensors", "metrics.jsonl"

Loss = Callable[[float, torch.Generator], tuple[Tensor, int]]
"""(share of the training done, generator) -> (loss of this process's rows, clips of all)."""


class RunConfig(Protocol):
    """Where a command trains, and on how many clips a step over all processes."""

    batch_size: int
    seed: int
    device: str
    out: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig(Settings):
    """How long and how fast to train; it ends at whichever limit comes first."""

    minutes: float = option(
        9.0, "time limit, with compilation and what earlier calls took", limits.POSITIVE
    )
    steps: int = option(1_000_000, "most optimizer steps", limits.COUNT)
    learning_rate: float = option(
        1e-3, "peak, after the warm-up and before the cosine decay", limits.POSITIVE
    )
    warmup_steps: int = option(200, "steps over which the learning rate rises", limits.COUNT)
    ema_decay: float = option(
        0.999, "decay of the weight average that is kept as the result", limits.FRACTION
    )
    weight_decay: float = option(0.01, "decoupled weight decay of AdamW", limits.LOSS_WEIGHT)
    checkpoint_every: int = option(500, "steps between checkpoints", limits.COUNT)
    log_every: int = option(20, "steps between rows of metrics.jsonl", limits.COUNT)


class _Fitting:
    """What a training changes: parameters, their average, the optimizer; and how far it is."""

    def __init__(self, model: nn.Module, config: FitConfig, run: Run) -> None:
        self.config, self.run = config, run
        self.parameters = dict(model.named_parameters())
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.step, self.num_clips, self.earlier_seconds = 0, 0, 0.0
        self.begin = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.begin

    def find_done(self) -> float:
        """Return the share of the training that is done, the same in all processes."""
        done = max(self.step / self.config.steps, self.seconds / (60 * self.config.minutes))
        return float(self.run.processes.mean(torch.tensor(done)))

    def take_step(self, loss_fn: Loss, done: float) -> Tensor:
        """Take one optimizer step; return the loss of this process's rows."""
        config, processes = self.config, self.run.processes
        rise = min((self.step + 1) / config.warmup_steps, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * rise * (1 + math.cos(math.pi * done)) / 2
        seed = seed_step(self.run.seed, self.step).initial_seed()
        loss, count = loss_fn(done, torch.Generator(self.run.device).manual_seed(seed))
        loss.backward()
        processes.average_gradients(self.parameters.values())
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(config.ema_decay, (1 + self.step) / (10 + self.step))
        current = [parameter.detach() for parameter in self.parameters.values()]
        torch._foreach_lerp_([*self.average.values()], current, 1 - decay)
        self.step += 1
        self.num_clips += count
        return loss.detach()

    def log(self, loss: Tensor, done: float) -> None:
        """Append a row of metrics; reading the loss waits for the device, so the clock is true."""
        value = self.run.processes.mean(loss).item()
        if not math.isfinite(value):
            raise ValueError(f"the loss became {value} at step {self.step}; lower --learning-rate")
        rate = self.num_clips / self.seconds
        row = {"step": self.step, "loss": value, "done": done, "clips_per_second": rate}
        if self.run.processes.is_first:
            logger.info(
                "step %d, %.0f%%, loss %.4f, %.0f clips/s", self.step, 100 * done, value, rate
            )
            with (self.run.folder / METRICS_NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def save(self) -> None:
        """Write the checkpoint: the first process's, of which all others have the same."""
        if not self.run.processes.is_first:
            return
        tensors = {f"parameter/{name}": p for name, p in self.parameters.items()}
        tensors |= {f"average/{name}": tensor for name, tensor in self.average.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam/{i}/{key}": tensor for key, tensor in state.items()}
        reached = {"step": self.step, "num_clips": self.num_clips, "seconds": self.seconds}
        write_tensors(self.run.folder / CHECKPOINT_NAME, tensors, {"reached": json.dumps(reached)})

    @torch.no_grad()
    def resume(self) -> None:
        """Take the checkpoint of an earlier call, if there is one."""
        path = self.run.folder / CHECKPOINT_NAME
        if not path.exists():
            return
        with safe_open(path, framework="pt") as file:
            reached = json.loads(file.metadata()["reached"])
        self.step, self.num_clips = reached["step"], reached["num_clips"]
        self.earlier_seconds = reached["seconds"]
        tensors, states = load_file(path), {}
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            self.average[name].copy_(tensors[f"average/{name}"])
        for name, tensor in tensors.items():
            if name.startswith("adam/"):
                _, i, key = name.split("/")
                states.setdefault(int(i), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})


def make_run(config: RunConfig, processes: ProcessGroup) -> Run:
    """Return the run of one process of a command.

    Raises SettingError for a batch that the processes cannot share.
    """
    processes.check_batch(config.batch_size)
    device = processes.place(resolve_device(config.device))
    return Run(
        folder=config.out,
        device=device,
        precision=resolve_precision("auto", device),
        seed=config.seed,
        processes=processes,
    )


def fit(model: nn.Module, loss_fn: Loss, config: FitConfig, run: Run) -> dict[str, float]:
    """Train a model in place, on from the checkpoint in `run.folder`; leave the averaged weights.

    Returns how many steps and clips it took, over all calls, in how many seconds.
    Raises ValueError when the loss is no longer finite.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    fitting = _Fitting(model, config, run)
    fitting.resume()
    _drop_rows(run.folder / METRICS_NAME, fitting)
    while (done := fitting.find_done()) < 1:
        loss = fitting.take_step(loss_fn, done)
        if fitting.step == 1 or fitting.step % config.log_every == 0:
            fitting.log(loss, done)
        if fitting.step % config.checkpoint_every == 0:
            fitting.save()
    fitting.save()
    with torch.no_grad():
        for name, parameter in fitting.parameters.items():
            parameter.copy_(fitting.average[name])
    return {"steps": fitting.step, "clips": fitting.num_clips, "seconds": fitting.seconds}


def _drop_rows(path: Path, fitting: _Fitting) -> None:
    """Drop the metrics of steps that are taken again."""
    if fitting.run.processes.is_first and path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= fitting.step]
        path.write_text("".join(kept), encoding="utf-8")
