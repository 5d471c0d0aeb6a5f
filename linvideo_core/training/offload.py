"""Frozen weights of some blocks in CPU memory, copied to the device just before a block runs.

A block's frozen tensors lie in one row of pinned memory. A call copies the row, lets the block
compute with the copy and drops it; the next block's row is copied meanwhile. Autograd keeps copies
alive, so without activation checkpointing nothing is freed before the backward pass; with it, a
block's weights come once forward and once backward, and two blocks' at most are on the device.
FSDP2's own offloading works while a training is sharded, and also moves trained weights to CPU
memory; here all stages see the same model, and what is trained stays on the device.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_ALIGNMENT = 256  # Bytes: of what kernels may read at once, with room.


class _Place(NamedTuple):
    """Where a tensor stands in a block, and where in a row of bytes."""

    module: str
    name: str
    is_buffer: bool
    like: Tensor  # On the meta device.
    start: int

    def holder(self, block: nn.Module) -> dict[str, Any]:
        """Return what of a block's module holds the tensor by its name."""
        module = block.get_submodule(self.module)
        return module._buffers if self.is_buffer else module._parameters

    def view(self, row: Tensor) -> Tensor:
        """Return the tensor that lies in a row."""
        part = row[self.start : self.start + self.like.nbytes]
        return part.view(self.like.dtype).view(self.like.shape)


class _PinnedBlock:
    """The frozen tensors of one block, one after another in a row of bytes in CPU memory."""

    def __init__(self, block: nn.Module, is_pinned: bool) -> None:
        """Move the tensors of `block` here; it then holds views of the row."""
        self.places: list[_Place] = []
        length = 0
        for path, module in block.named_modules():
            for is_buffer, tensors in ((False, module._parameters), (True, module._buffers)):
                for name, tensor in tensors.items():
                    if tensor is None or tensor.requires_grad:
                        continue
                    like = tensor.detach().to("meta")
                    self.places.append(_Place(path, name, is_buffer, like, length))
                    length += -(-like.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.bytes = torch.empty(length, dtype=torch.uint8, pin_memory=is_pinned)
        for place in self.places:
            view, holder = place.view(self.bytes), place.holder(block)
            view.copy_(holder[place.name])
            is_buffer = place.is_buffer
            holder[place.name] = view if is_buffer else nn.Parameter(view, requires_grad=False)

    @contextlib.contextmanager
    def swapped_in(self, block: nn.Module, row: Tensor) -> Iterator[None]:
        """Let the block have the tensors of a row while the context lasts."""
        own = [(place.holder(block), place.name) for place in self.places]
        before = [holder[name] for holder, name in own]
        for place, (holder, name) in zip(self.places, own, strict=True):
            holder[name] = place.view(row)
        try:
            yield
        finally:
            for (holder, name), tensor in zip(own, before, strict=True):
                holder[name] = tensor


class _Ahead(NamedTuple):
    """A copy of a block's row that is being made, of how it was at a version."""

    index: int
    version: int
    row: Tensor
    done: torch.cuda.Event | None


class OffloadedBlocks:
    """The first blocks of a model, whose frozen weights stay in CPU memory between their calls."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        """Take the frozen weights of `blocks`, in the order in which they run, into CPU memory."""
        self.device = device
        is_cuda = device.type == "cuda"
        self._pinned = [_PinnedBlock(block, is_cuda) for block in blocks]
        self._stream = torch.cuda.Stream(device) if is_cuda else None
        self._ahead: _Ahead | None = None
        for index, block in enumerate(blocks):
            block.forward = functools.partial(self._run, index, block, block.forward)

    def _run(
        self, index: int, block: nn.Module, forward: Callable[..., Tensor], *args: Any
    ) -> Tensor:
        row = self._take(index)
        # What is computed again on the way back is called by autograd, from the last block on.
        is_backward = torch._C._current_graph_task_id() != -1
        self._look_ahead(index - 1 if is_backward else index + 1)
        with self._pinned[index].swapped_in(block, row):
            return forward(*args)

    def _take(self, index: int) -> Tensor:
        """Return a copy of a row, on the device, that the current stream may read."""
        pinned = self._pinned[index].bytes
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.done is not None:
            # Also one that is not wanted: its memory must not be given away while it is written.
            torch.cuda.current_stream(self.device).wait_event(ahead.done)
        if ahead is not None and (ahead.index, ahead.version) == (index, pinned._version):
            return ahead.row
        return torch.empty_like(pinned, device=self.device).copy_(pinned, non_blocking=True)

    def _look_ahead(self, index: int) -> None:
        """Begin to copy a row, if there is one, beside what is computed."""
        if not 0 <= index < len(self._pinned):
            return
        pinned = self._pinned[index].bytes
        # Memory of the current stream, which may still be at work in it for an earlier block.
        row, done = torch.empty_like(pinned, device=self.device), None
        if self._stream is None:
            row.copy_(pinned)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                row.copy_(pinned, non_blocking=True)
            done = self._stream.record_event()
        self._ahead = _Ahead(index, pinned._version, row, done)


def offload(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device | str) -> None:
    """Bring a frozen model to a device, but for the weights of some blocks.

    blocks: of the model, in the order in which they run; see `OffloadedBlocks`.
    """
    OffloadedBlocks(blocks, torch.device(device))
    inside = {id(module) for block in blocks for module in block.modules()}
    for module in model.modules():
        if id(module) in inside:
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = parameter.detach().to(device)
                module._parameters[name] = nn.Parameter(moved, requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else buffer.to(device)
