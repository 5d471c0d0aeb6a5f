"""The processes that compute one run together; a process alone is a process group too.

What each step draws is drawn for the whole batch by every process, which then keeps its share:
the same global batch is computed by 1 process and by many. `training.fsdp` has
those of several.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ProcessGroup:
    """A run's processes, numbered by rank: here one alone, whom nothing that it is asked costs.

    Every process of a process group calls the same methods in the same order.

    rank, size: this process's number, from 0, and how many there are.
    """

    rank = 0
    size = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def place(self, device: str) -> str:
        """Return the device of this process, where all were asked for `device`.

        Raises ValueError where they cannot all have one.
        """
        return device

    def check_batch(self, batch_size: int) -> None:
        """Raise ValueError for a batch that the processes cannot share evenly."""
        if batch_size % self.size:
            raise ValueError(
                f"--batch-size {batch_size} given to {self.size} processes, which share it; a "
                f"multiple of {self.size} is needed"
            )

    def share(self, whole: Tensor) -> Tensor:
        """Return this process's rows of a batch [B, ...]: every `size`-th, from its rank on."""
        return whole[self.rank :: self.size]

    def draw(self, count: int, make: Callable[[int], Tensor]) -> Tensor:
        """Return this process's `count` rows of a batch that `make(rows)` draws whole."""
        return self.share(make(count * self.size))

    def mean(self, value: Tensor, weight: float = 1.0) -> Tensor:
        """Return the mean of every process's value, as heavy as its weight.

        The gradient is the process's own: gradients are averaged where all are known.
        """
        return value

    def std(self, x: Tensor) -> Tensor:
        """Return the standard deviation [...] over the whole batch of which x [B, ...] is part."""
        if self.size == 1:
            return x.std(dim=0)
        num_rows = len(x) * self.size
        deviation = x - self.mean(x.mean(dim=0))
        return (self.mean(deviation.square().mean(dim=0)) * num_rows / (num_rows - 1)).sqrt()

    def mean_row(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a row of metrics whose numbers are means over all processes."""
        if self.size == 1:
            return row
        numbers = {
            name: value.detach()
            for name, value in row.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        return {**row, **dict(zip(numbers, self._mean_all([*numbers.values()]), strict=True))}

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients of those parameters that every process holds whole."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None and not is_sharded(p.grad)]
        for gradient, mean in zip(gradients, self._mean_all(gradients), strict=True):
            gradient.copy_(mean)

    def _mean_all(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return the mean of each value over all processes, asked for in one message."""
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
    def sharded(
        self, models: Sequence[nn.Module], blocks: Sequence[Sequence[nn.Module]]
    ) -> Iterator[None]:
        """Spread the parameters of some models over the processes while the context lasts.

        blocks: of each model, in depth order; models that share parameters go on sharing them.

        Parameters are other objects within, and after, than they were before.
        """
        yield

    def wait(self) -> None:
        """Return once every process has come here."""

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let the first process run a block before the others do: its error is then the only one.

        The others do not come to the block where the first fails in it.
        """
        yield

    @contextlib.contextmanager
    def graceful_shutdown(self) -> Iterator[None]:
        """Make a wish to stop wait for `stop_together`; alone it is granted at once, as ever."""
        yield

    def stop_together(self) -> None:
        """Raise KeyboardInterrupt in all processes if any of them was asked to stop."""

    def is_agreed(self, error: BaseException) -> bool:
        """Say whether all processes end by this error at the same place, and can still act."""
        return True

    def destroy(self) -> bool:
        """End the group once all work is done; say whether this process is to go on alone."""
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
