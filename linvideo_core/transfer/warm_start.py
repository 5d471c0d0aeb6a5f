"""Layer-wise warm start: fit each layer's linear attention to its own softmax output.

Only the feature maps move. Every layer sees the teacher's own queries, keys and values, so all
layers are fitted at once from one teacher forward pass, without a backward pass through it: each
takes its gradient as soon as it was called, so only one layer's activations are in memory.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..flow import autocast, bind
from ..models.attention import MixedAttention
from ..models.lora import switched
from ..run.context import Run
from ..teacher.pool import TrajectoryPool
from ..teacher.teacher import Teacher
from ..teacher.trajectories import Trajectories
from ..training.config import TrainingConfig
from ..training.trainer import ParameterGroup, Task, fit
from .config import ObjectiveConfig, WarmStartConfig
from .objective import Batches

# Of the warm start's own steps, those in which its learning rate rises; a cosine follows.
_WARMUP_SHARE = 0.1


class WarmStart(Task):
    """The task: relative squared error of linear to softmax output, averaged over layers."""

    def __init__(
        self,
        model: nn.Module,
        mixed: Mapping[int, MixedAttention],
        batches: Batches,
        *,
        learning_rate: float,
        run: Run,
    ) -> None:
        """model: the student's, whose sites hold `mixed`; batches: all rows stored."""
        self.model = model
        self.mixed = mixed
        self.batches = batches
        self.learning_rate = learning_rate
        self.run = run

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the feature maps of every layer."""
        return [ParameterGroup(feature_maps(self.mixed), self.learning_rate)]

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        """Return the mean over layers of `|linear - softmax|^2 / |softmax|^2`."""
        batch = self.batches.draw(generator)
        errors: dict[MixedAttention, list[Tensor]] = {m: [] for m in self.mixed.values()}
        gradients: dict[nn.Parameter, Tensor] = {}

        def learn(module: MixedAttention, args: tuple[Tensor, ...], output: Tensor) -> None:
            error, found = self._differentiate(module, args, output)
            # A model that takes one video a call runs each layer once for every sample.
            num_calls = len(batch.latents) // len(output)
            errors[module].append(error)
            for parameter, gradient in zip(module.linear.parameters(), found, strict=True):
                earlier = gradients.get(parameter)
                share = gradient / num_calls
                gradients[parameter] = share if earlier is None else earlier + share

        sigmas = self.batches.trajectories.sigmas.to(batch.latents.device)
        velocity_fn = bind(self.model, batch.branch_embeds, precision=self.run.precision)
        with contextlib.ExitStack() as stack, torch.no_grad():
            stack.enter_context(switched(dict.fromkeys(self.mixed.values(), False)))
            for module in self.mixed.values():
                stack.callback(module.register_forward_hook(learn).remove)
            velocity_fn(batch.latents, sigmas[batch.step])
        layer_errors = torch.stack([torch.stack(each).mean() for each in errors.values()])
        # Zeros whose gradients are those that were taken.
        taken = [((p - p.detach()) * gradient).sum() for p, gradient in gradients.items()]
        return layer_errors.mean() + sum(taken), {"layer_errors": layer_errors}

    def _differentiate(
        self, module: MixedAttention, args: tuple[Tensor, ...], output: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return a layer's own error, and its maps' gradients of the mean over layers.

        args: query, key, value and grid of its softmax attention, which returned `output`.
        """
        target = output.detach().float()
        # Of the whole batch, on all processes.
        size = self.run.processes.mean(target.square().mean())
        with torch.enable_grad():
            *tokens, grid = args
            linear = module.linear(*(x.detach() for x in tokens), grid)
            error = (linear.float() - target).square().mean() / size
            share = error / len(self.mixed)
        del linear
        with autocast(output.device, "fp32"):
            return error.detach(), torch.autograd.grad(share, list(module.linear.parameters()))

    def after_step(self, step: int) -> None:
        """Make what is in flight that of the next step."""
        self.batches.after_step()

    def state(self) -> dict[str, Any]:
        """Return what is in flight."""
        return self.batches.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what was in flight."""
        self.batches.load_state(state)


def fit_feature_maps(
    model: nn.Module,
    mixed: Mapping[int, MixedAttention],
    teacher: Teacher,
    trajectories: Trajectories | TrajectoryPool,
    config: WarmStartConfig,
    training: TrainingConfig,
    run: Run,
    *,
    prompt_dropout: float,
) -> None:
    """Train the feature maps for as many steps as `config` says; files go into the run's folder.

    Every process holds its models whole: they are frozen, and the maps are small.
    """
    steps = config.warm_start_steps
    if not steps:
        return
    objective = ObjectiveConfig(objective="velocity", levels="even", prompt_dropout=prompt_dropout)
    batches = Batches(teacher, trajectories, objective, training.batch_size, run.processes)
    task = WarmStart(model, mixed, batches, learning_rate=config.warm_start_learning_rate, run=run)
    warmup_steps = round(_WARMUP_SHARE * steps)
    settings = dataclasses.replace(training, steps=steps, warmup_steps=warmup_steps, accumulation=1)
    fit(task, settings, run, stage="warm_start")


def feature_maps(mixed: Mapping[int, MixedAttention]) -> dict[str, nn.Parameter]:
    """Return the linear attention's own weights of all layers by unique name.

    Feature maps, and what else its form has.
    """
    return {
        f"{layer}.{name}": parameter
        for layer, module in mixed.items()
        for name, parameter in module.linear.named_parameters()
    }
