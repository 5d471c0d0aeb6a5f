"""The processes that compute one run together; a single process is a group of one.

Every process draws each batch whole and keeps its share of the rows, so that any number of
processes compute the same global batch. `training.fsdp` has the group of several.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SettingError


class ProcessGroup:
    """A run's processes, which all call the same methods in the same order; here one alone.

    rank, size: this process's number, from 0, and how many there are.
    """

    rank = 0
    size = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and logs."""
        return self.rank == 0

    def place(self, device: str) -> str:
        """Return this process's own of `device`; raise SettingError where not all can have one."""
        return device

    def check_batch(self, batch_size: int) -> None:
        """Raise SettingError for a batch that the processes cannot share evenly."""
        if batch_size % self.size:
            able = [str(n) for n in range(1, batch_size + 1) if not batch_size % n]
            raise SettingError(
                f"{{batch_size}} {batch_size} cannot be shared evenly by {self.size} processes: a "
                f"new run takes a multiple of {self.size}; one that was begun with {{batch_size}} "
                f"{batch_size} keeps it, and is continued by {' or '.join(able)} of them",
                "batch_size",
            )

    def share(self, whole: Tensor) -> Tensor:
        """Return this process's rows of a batch [B, ...]: every `size`-th, from its rank on."""
        return whole[self.rank :: self.size]

    def mean(self, value: Tensor, weight: float = 1.0) -> Tensor:
        """Return the weighted mean of every process's value; its gradient is that of this one's."""
        return value

    def std(self, x: Tensor) -> Tensor:
        """Return the standard deviation [...] over the whole batch of which x [B, ...] is part."""
        if self.size == 1:
            return x.std(dim=0)
        num_rows = len(x) * self.size
        deviation = x - self.mean(x.mean(dim=0))
        return (self.mean(deviation.square().mean(dim=0)) * num_rows / (num_rows - 1)).sqrt()

    def mean_row(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a row of metrics whose floating-point tensors are means over all processes."""
        if self.size == 1:
            return row
        tensors = {n: value.detach() for n, value in row.items() if isinstance(value, Tensor)}
        numbers = {n: value for n, value in tensors.items() if value.is_floating_point()}
        return {**row, **dict(zip(numbers, self._mean_all([*numbers.values()]), strict=True))}

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients of the parameters that are not sharded."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None and not is_sharded(p.grad)]
        for gradient, mean in zip(gradients, self._mean_all(gradients), strict=True):
            gradient.copy_(mean)

    def _mean_all(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return the mean of each value over all processes, in one message."""
        if not values:
            return []
        device = next((value.device for value in values if value.device.type != "cpu"), "cpu")
        mean = self.mean(torch.cat([value.to(device).float().flatten() for value in values]))
        parts = mean.split([value.numel() for value in values])
        return [part.view_as(value) for part, value in zip(parts, values, strict=True)]

    def clip_gradients(self, parameters: Iterable[nn.Parameter], norm: float) -> Tensor:
        """Scale gradients down to a norm over all of them; return what it was before."""
        return nn.utils.clip_grad_norm_(parameters, norm)

    def find_not_finite(self, parameters: Mapping[str, Tensor]) -> str | None:
        """Return the first name whose tensor is not finite in some process, None if all are."""
        found = (name for name, tensor in parameters.items() if not torch.isfinite(tensor).all())
        return next(found, None)

    @contextlib.contextmanager
    def sharded(self, models: Mapping[nn.Module, Sequence[nn.Module]]) -> Iterator[None]:
        """Shard models, each with its blocks in depth order, while the context lasts.

        Within, and after, parameters are other objects than before.
        """
        yield

    def wait(self) -> None:
        """Return once every process has come here."""

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let the first process run a block before the others; where it fails they do not enter."""
        yield

    @contextlib.contextmanager
    def graceful_shutdown(self) -> Iterator[None]:
        """Let signals to stop wait for `stop_together`; a single process stops at once."""
        yield

    def stop_together(self) -> None:
        """Raise KeyboardInterrupt in all processes if any of them was asked to stop."""

    def is_agreed(self, error: BaseException) -> bool:
        """Say whether all processes end by this error at the same place, and can still act."""
        return True

    def destroy(self) -> bool:
        """End the group; say whether this process continues alone."""
        return True

    def fails_first(self) -> bool:
        """Say whether no other process has failed before; every later caller hears that one has."""
        return True


SINGLE_PROCESS = ProcessGroup()


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a process holds only its part of a tensor."""
    return hasattr(tensor, "to_local")


def whole_of(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor, on every process."""
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor.full_tensor()
    # As bytes, because not all backends send fp8.
    own, kind = tensor.to_local().view(torch.uint8), type(tensor)
    where = (tensor.device_mesh, tensor.placements)
    row = kind.from_local(own, *where, shape=tensor.shape, stride=tensor.stride())
    return row.full_tensor().view(tensor.dtype)
