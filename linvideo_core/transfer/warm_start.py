"""Layer-wise warm start: fit each layer's linear attention to its own softmax output.

Only the feature maps move. Every layer sees the teacher's own queries, keys and values, so all
layers are fitted at once from one teacher forward pass, without a backward pass through it: each
takes its gradient as soon as it was called, so what one layer needs is all that is in memory.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.attention import MixedAttention
from ..models.velocity import autocast, bind
from ..run.config import option
from ..run.process_group import SINGLE_PROCESS, ProcessGroup
from ..run.progress import Progress
from ..teacher.teacher import Teacher
from ..teacher.trajectories import Trajectories
from ..training.trainer import ParameterGroup, TrainingConfig, fit
from .batches import draw_batch

# Of the warm start's own steps, those in which its learning rate rises; a cosine follows.
_WARMUP_SHARE = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """How long the feature maps are fitted before the weights move."""

    warm_start_steps: int = option(40, "steps of the layer-wise warm start; 0 leaves it out")
    warm_start_learning_rate: float = option(1e-2, "peak learning rate of the warm start")

    def __post_init__(self) -> None:
        if self.warm_start_steps < 0 or not self.warm_start_learning_rate > 0:
            raise ValueError(
                f"--warm-start-steps {self.warm_start_steps} and --warm-start-learning-rate "
                f"{self.warm_start_learning_rate} given; steps >= 0 and a rate > 0 are needed"
            )


class WarmStart:
    """The task: relative squared error of linear to softmax output, averaged over layers."""

    def __init__(
        self,
        student: nn.Module,
        mixed: Mapping[int, MixedAttention],
        teacher: Teacher,
        trajectories: Trajectories,
        *,
        batch_size: int,
        prompt_dropout: float,
        learning_rate: float,
        precision: str,
        processes: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.student = student
        self.mixed = mixed
        self.teacher = teacher
        self.trajectories = trajectories
        self.batch_size = batch_size
        self.prompt_dropout = prompt_dropout
        self.learning_rate = learning_rate
        self.precision = precision
        self.processes = processes

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the feature maps of every layer."""
        return [ParameterGroup(feature_maps(self.mixed), self.learning_rate)]

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        """Return the mean over layers of `|linear - softmax|^2 / |softmax|^2`."""
        drawn = draw_batch(
            self.teacher,
            self.trajectories,
            self.batch_size,
            self.prompt_dropout,
            generator,
            self.processes,
        )
        errors: dict[MixedAttention, list[Tensor]] = {m: [] for m in self.mixed.values()}
        gradients: dict[nn.Parameter, Tensor] = {}

        def learn(module: MixedAttention, args: tuple[Tensor, ...], output: Tensor) -> None:
            error, found = self._differentiate(module, args, output)
            # A model that takes one video a call runs each layer once for every sample.
            num_calls = len(drawn.batch.latents) // len(output)
            errors[module].append(error)
            for parameter, gradient in zip(module.linear.parameters(), found, strict=True):
                earlier = gradients.get(parameter)
                share = gradient / num_calls
                gradients[parameter] = share if earlier is None else earlier + share

        sigma = self.trajectories.sigmas.to(drawn.batch.latents.device)[drawn.batch.step]
        with _watched(self.mixed, learn), torch.no_grad():
            bind(self.student, drawn.branch_embeds, precision=self.precision)(
                drawn.batch.latents, sigma
            )
        layer_errors = torch.stack([torch.stack(each).mean() for each in errors.values()])
        loss = _Differentiated.apply(layer_errors.mean(), [*gradients.values()], *gradients)
        return loss, {"layer_errors": layer_errors}

    def _differentiate(
        self, module: MixedAttention, args: tuple[Tensor, ...], output: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return a layer's own error and what its maps' gradients are of the mean over layers.

        args: query, key and value of its softmax attention, which returned `output`.
        """
        with torch.enable_grad():
            linear = module.linear(*(x.detach() for x in args))
            error = _relative_error(linear, output.detach(), self.processes)
            share = error / len(self.mixed)
        del linear
        with autocast(output.device, "fp32"):
            return error.detach(), torch.autograd.grad(share, list(module.linear.parameters()))

    def after_step(self, step: int) -> None:
        """Nothing follows a step."""

    def state(self) -> dict[str, Any]:
        """Nothing but the parameters must survive a restart."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""


def _relative_error(linear: Tensor, softmax: Tensor, processes: ProcessGroup) -> Tensor:
    """Return `|linear - softmax|^2 / |softmax|^2`, whose size is the whole process group's."""
    target = softmax.float()
    size = processes.mean(target.square().mean())
    return (linear.float() - target).square().mean() / size


class _Differentiated(torch.autograd.Function):
    """A loss whose gradients were taken before: its backward pass hands them out."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *_: nn.Parameter) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(upstream * gradient for gradient in ctx.saved_tensors)


@contextlib.contextmanager
def _watched(
    mixed: Mapping[int, MixedAttention], see: Callable[[Any, Any, Tensor], None]
) -> Iterator[None]:
    """Let every layer compute softmax attention, and `see` each call of one right after it."""
    hooks = [module.register_forward_hook(see) for module in mixed.values()]
    choices = [module.choice for module in mixed.values()]
    try:
        for module in mixed.values():
            module.choice = "softmax"
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, choice in zip(mixed.values(), choices, strict=True):
            module.choice = choice


def fit_feature_maps(
    student: nn.Module,
    mixed: Mapping[int, MixedAttention],
    teacher: Teacher,
    trajectories: Trajectories,
    config: WarmStartConfig,
    training: TrainingConfig,
    folder: Path,
    *,
    prompt_dropout: float,
    precision: str,
    seed: int,
    progress: Progress,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Train the feature maps for as many steps as `config` says.

    Every process holds its models whole: they are frozen, and the maps are small.
    """
    if not config.warm_start_steps:
        return
    task = WarmStart(
        student,
        mixed,
        teacher,
        trajectories,
        batch_size=training.batch_size,
        prompt_dropout=prompt_dropout,
        learning_rate=config.warm_start_learning_rate,
        precision=precision,
        processes=processes,
    )
    steps = config.warm_start_steps
    warmup_steps = round(_WARMUP_SHARE * steps)
    settings = dataclasses.replace(training, steps=steps, warmup_steps=warmup_steps, accumulation=1)
    fit(
        task,
        settings,
        folder,
        seed=seed,
        stage="warm start",
        progress=progress,
        processes=processes,
    )


def feature_maps(mixed: Mapping[int, MixedAttention]) -> dict[str, nn.Parameter]:
    """Return the linear attention's own weights of all layers by unique name.

    Feature maps, and where the form has them gates and window mixes.
    """
    return {
        f"{layer}.{name}": parameter
        for layer, module in mixed.items()
        for name, parameter in module.linear.named_parameters()
    }
