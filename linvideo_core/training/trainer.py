"""fit(): accumulate, clip, step, average, log, checkpoint, resume. Knows nothing of attention.

Every random draw of a step comes from a generator seeded by (seed, step), so an interrupted run
that is started again ends in the same weights as an unbroken one. Losses are means over a process's
rows of the batch; gradients and metrics are averaged over all processes here.
"""

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..run.callbacks import Stage
from ..run.context import Run
from ..run.errors import SettingError, shown_value
from ..run.files import write_text
from ..run.folder import read_metrics
from .checkpoint import Checkpoint, CheckpointFiles, Monitor
from .config import TrainingConfig


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Parameters by name that share a peak learning rate.

    every: steps between two of their updates, where networks train in turns: the loss reaches them
        at its multiples alone, and their average counts those.
    betas: AdamW's, of the gradient's average and of its square's.
    network: groups of one network have their gradients clipped together.
    """

    parameters: Mapping[str, nn.Parameter]
    learning_rate: float
    every: int = 1
    betas: tuple[float, float] = (0.9, 0.99)
    network: str = ""


class Task:
    """What is trained: parameters, a loss, and what else must survive a restart."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the trainable parameters; names are unique over all groups."""
        raise NotImplementedError

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Any]]:
        """Return the loss of one forward pass and figures to log."""
        raise NotImplementedError

    def losses(
        self, step: int, generator: torch.Generator, accumulation: int
    ) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
        """Yield the terms whose sum is the loss of a step, each with figures to log.

        A term's backward pass is run before the next term is computed: one graph is in memory at a
        time. Here a term is `loss` over `accumulation`; of figures with one name the last is
        logged.
        """
        for _ in range(accumulation):
            loss, figures = self.loss(step, generator)
            yield loss / accumulation, figures

    def after_step(self, step: int) -> None:
        """React to a finished optimiser step."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold besides parameters, by name: JSON, and tensors.

        Of several processes each returns its own tensors, under names that no other has; the rest
        is the same in all.
        """
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned, with the tensors of all processes."""


logger = logging.getLogger(__name__)

# Before the names of a task's own tensors in a checkpoint.
_OWN = "task/"


def seed_step(seed: int, step: int) -> torch.Generator:
    """Return the generator of one training step, independent of all steps before it."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def learning_rate_share(step: int, config: TrainingConfig) -> float:
    """Return the share of the peak learning rate at a step: linear warm-up, cosine to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def fit(
    task: Task,
    config: TrainingConfig,
    run: Run,
    *,
    stage: Stage = "training",
    monitor: Monitor | None = None,
) -> None:
    """Train until `config.steps`, continuing from `run.folder` where it holds a checkpoint.

    Leaves `metrics.jsonl` and a checkpoint in the folder, and the averaged weights in the task's
    parameters. Whatever stops it between, such as a callback that raises, finds the finished
    steps in the checkpoint; of several processes all stop after the same step.

    monitor: sees every row of metrics, those of an earlier run first, and may find a fault.

    Raises ValueError when the loss is no longer finite or `monitor` finds a fault, the last
    checkpoint from before it being kept, and when the folder is deleted meanwhile.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    fitting = _Fitting(task, config, run, monitor)
    first = fitting.resume()
    with run.processes.graceful_shutdown(), fitting.kept_when_stopped():
        run.begin_stage(stage, config.steps, first)
        for step in range(first, config.steps):
            row = fitting.take_step(step, seed_step(run.seed, step))
            is_last = step + 1 == config.steps
            if step % config.log_every == 0 or is_last:
                fitting.log(step, row)
            run.callbacks.on_step_end(step + 1, **fitting.shown)
            if (step + 1) % config.checkpoint_every == 0 or is_last:
                fitting.save()
            run.processes.stop_together()
    fitting.keep_average()


class _Diverged(SettingError):
    """What was trained is lost from here on: it must not replace the last good checkpoint."""


class _Fitting:
    """The mutable state of one fit: parameters, optimiser, average, files.

    num_finished: steps that parameters, optimiser, average and task all hold; None between.
    num_saved: steps that the checkpoint holds; shown: the figures that callbacks see.
    """

    def __init__(
        self, task: Task, config: TrainingConfig, run: Run, monitor: Monitor | None
    ) -> None:
        self.task = task
        self.config = config
        self.monitor = monitor
        self.processes = run.processes
        delay = None if monitor is None else monitor.delay
        self.files = CheckpointFiles(run.folder, delay, run.processes)
        self.metrics_path = run.folder / "metrics.jsonl"
        self.groups = groups = task.parameter_groups()
        self.parameters = {n: p for group in groups for n, p in group.parameters.items()}
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            [{"params": list(g.parameters.values()), "betas": g.betas} for g in groups],
            weight_decay=config.weight_decay,
            # One by one, sharded parameters take long to ask.
            foreach=run.processes.size > 1 or None,
        )
        self.num_finished: int | None = 0
        self.num_saved = 0
        self.shown: dict[str, float] = {}

    @contextlib.contextmanager
    def kept_when_stopped(self) -> Iterator[None]:
        """Write the finished steps down before an error or an interruption goes on its way.

        A step that was stopped while it changed the parameters is dropped, and all since the last
        checkpoint.
        """
        try:
            yield
        except _Diverged:
            raise
        # KeyboardInterrupt and a host's own interruption are no Exception.
        except BaseException as error:
            folder = self.files.folder
            if isinstance(error, OSError) and not folder.exists():
                gone = [folder, *(path for path in folder.parents if not path.exists())][-1]
                raise ValueError(
                    f"{gone} was deleted while this run wrote into it; start again with the same "
                    "settings"
                ) from error
            has_more = self.num_finished is not None and self.num_finished > self.num_saved
            if has_more and self.processes.is_agreed(error):
                try:
                    self.save()
                except (OSError, ValueError) as reason:
                    logger.warning("the last steps are not kept: %s", reason)
            raise

    def take_step(self, step: int, generator: torch.Generator) -> dict[str, Any]:
        """Run one optimiser step; return what to log, still as tensors."""
        share = learning_rate_share(step, self.config)
        for settings, group in zip(self.optimizer.param_groups, self.groups, strict=True):
            settings["lr"] = group.learning_rate * share
        total = torch.zeros(())
        metrics: dict[str, Any] = {}
        for loss, figures in self.task.losses(step, generator, self.config.accumulation):
            loss.backward()
            total = total.to(loss.device) + loss.detach()
            metrics |= figures
        self.processes.average_gradients(self.parameters.values())
        norms = self._clip()
        self.num_finished = None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.after_step(step)
        self._follow(step)
        self.num_finished = step + 1
        return {"loss": total, **norms, "learning_rate_share": share, **metrics}

    def _clip(self) -> dict[str, Tensor]:
        """Scale the gradients of each network down; return their norms before, to be logged."""
        norms = {}
        for network in dict.fromkeys(group.network for group in self.groups):
            mine = [g.parameters for g in self.groups if g.network == network]
            parameters = [p for parameters in mine for p in parameters.values()]
            name = f"{network}_gradient_norm" if network else "gradient_norm"
            norms[name] = self.processes.clip_gradients(parameters, self.config.clip_norm)
        return norms

    @torch.no_grad()
    def _follow(self, step: int) -> None:
        """Move the average of every group whose turn it was."""
        for group in self.groups:
            turn, rest = divmod(step, group.every)
            if not rest:
                average = [self.average[name] for name in group.parameters]
                current = [parameter.detach() for parameter in group.parameters.values()]
                decay = min(self.config.ema_decay, (1 + turn) / (10 + turn))
                torch._foreach_lerp_(average, current, 1 - decay)

    def log(self, step: int, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl in plain numbers."""
        row = self.processes.mean_row(row)
        plain = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in row.items()}
        if not math.isfinite(plain["loss"]):
            raise self._diverged(f"the loss became {plain['loss']} at step {step}")
        self.files.see_row(step)
        if self.monitor is not None and (fault := self.monitor(plain)):
            self.files.return_to_good()
            raise self._diverged(f"{fault} at step {step}")
        if self.processes.is_first:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **plain}) + "\n")
        self.shown = {"loss": plain["loss"]}

    def save(self) -> None:
        """Write the checkpoint of the finished steps."""
        step = self.num_finished
        if name := self.processes.find_not_finite(self.parameters):
            raise self._diverged(f"{name} is no longer finite after step {step}")
        tensors = {f"average/{n}": t for n, t in self.average.items()}
        for name, parameter in self.parameters.items():
            tensors[f"parameter/{name}"] = parameter
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"adam/{key}/{name}": value for key, value in state.items()}
        state = self.task.state()
        own = {name: state.pop(name) for name in [*state] if isinstance(state[name], Tensor)}
        tensors |= {f"{_OWN}{name}": tensor for name, tensor in own.items()}
        self.files.write(Checkpoint(step=step, tensors=tensors, state=state))
        self.num_saved = step

    def _diverged(self, what: str) -> _Diverged:
        advice = "start again with another {out} and a lower {learning_rate}"
        message = f"{what}; {self.files.describe()}: {advice}"
        return _Diverged(message, "out", "learning_rate")

    def resume(self) -> int:
        """Take the checkpoint's state, drop later metrics; return the number of finished steps."""
        if (path := self.files.path) is None:
            if self.processes.is_first:
                self.metrics_path.unlink(missing_ok=True)
            return 0
        try:
            checkpoint = self.files.read(self.parameters)
            self._restore(checkpoint.tensors)
            stored = checkpoint.tensors.items()
            own = {n.removeprefix(_OWN): t for n, t in stored if n.startswith(_OWN)}
            self.task.load_state({**checkpoint.state, **own})
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} cannot be continued from ({shown_value(error)}); delete it to start this "
                "stage again"
            ) from error
        step = self.num_finished = self.num_saved = checkpoint.step
        self._drop_metrics_from(step)
        if step < self.config.steps:
            logger.info("continuing from step %d of %d", step, self.config.steps)
        return step

    @torch.no_grad()
    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            self.average[name].copy_(tensors[f"average/{name}"])
            if f"adam/step/{name}" in tensors:
                self.optimizer.state[parameter] = {
                    "step": tensors[f"adam/step/{name}"].cpu(),
                    "exp_avg": tensors[f"adam/exp_avg/{name}"].to(parameter.device),
                    "exp_avg_sq": tensors[f"adam/exp_avg_sq/{name}"].to(parameter.device),
                }

    def _drop_metrics_from(self, step: int) -> None:
        path = self.metrics_path
        rows = [x for x in read_metrics(path) if x["step"] < step] if path.exists() else []
        # All have read before one writes.
        self.processes.wait()
        if self.processes.is_first and path.exists():
            write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))
        for row in rows if self.monitor else ():
            self.files.see_row(row["step"])
            self.monitor(row)

    @torch.no_grad()
    def keep_average(self) -> None:
        """Replace the parameters by their average."""
        self.files.finish()
        for name, parameter in self.parameters.items():
            parameter.copy_(self.average[name])
