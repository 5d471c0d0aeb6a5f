"""Frozen weights of some blocks in CPU memory, copied to the device just before a block runs.

A block's frozen tensors lie in one slab of pinned memory. A call copies the slab, lets the block
compute with the copy and forgets it; the next block's slab is copied meanwhile. What autograd keeps
holds a copy in memory, so without recomputed activations nothing is freed before the way back; with
them, a block's weights come once forward and once backward, and two blocks' at most are there.
FSDP2's own offloading works while a training is sharded, and puts the trained weights into CPU
memory, too; here all stages see the same model, and what is trained stays on the device.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_ALIGNMENT = 256  # Bytes: of what kernels may read at once, with room.


class _Slab:
    """The frozen tensors of one block, one after another in a row of bytes in CPU memory."""

    def __init__(self, block: nn.Module, is_pinned: bool) -> None:
        """Move the tensors of `block` here; what stands in it afterwards are views of the slab."""
        self.places = [
            (name, leaf, is_buffer, tensor)
            for name, module in block.named_modules()
            for is_buffer, tensors in ((False, module._parameters), (True, module._buffers))
            for leaf, tensor in tensors.items()
            if tensor is not None and not tensor.requires_grad
        ]
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for *_, tensor in self.places]
        self.bytes = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=is_pinned)
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        for view, (name, leaf, is_buffer, tensor) in zip(
            self.views(self.bytes), self.places, strict=True
        ):
            view.copy_(tensor)
            owner = block.get_submodule(name)
            if is_buffer:
                owner._buffers[leaf] = view
            else:
                owner._parameters[leaf] = nn.Parameter(view, requires_grad=False)
        # Only what they are like matters from here on.
        self.places = [(n, leaf, is_b, tensor.to("meta")) for n, leaf, is_b, tensor in self.places]

    def views(self, row: Tensor) -> Iterator[Tensor]:
        """Yield the tensors that lie in a row of bytes of this slab's length, in order."""
        for start, (*_, like) in zip(self.starts, self.places, strict=True):
            yield row[start : start + like.nbytes].view(like.dtype).view(like.shape)

    @contextlib.contextmanager
    def lent(self, block: nn.Module, row: Tensor) -> Iterator[None]:
        """Let a block, or a twin of it, have the tensors of a row for a while."""
        found = []
        for tensor, (name, leaf, is_buffer, _) in zip(self.views(row), self.places, strict=True):
            module = block.get_submodule(name)
            tensors = module._buffers if is_buffer else module._parameters
            found.append((tensors, leaf, tensors[leaf]))
            tensors[leaf] = tensor
        try:
            yield
        finally:
            for tensors, leaf, tensor in found:
                tensors[leaf] = tensor


class Depot:
    """Where the frozen weights of a model's first blocks wait; its twins share it."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        """Take the frozen weights of `blocks`, in the order in which they run, into CPU memory."""
        self.device = device
        self.is_cuda = device.type == "cuda"
        self._slabs = [_Slab(block, self.is_cuda) for block in blocks]
        self._stream = torch.cuda.Stream(device) if self.is_cuda else None
        self._last = -1
        self._ahead: tuple[int, int, Tensor, Any] | None = None
        for index, block in enumerate(blocks):
            block.forward = functools.partial(self._run, index, block, block.forward)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Depot":
        """Return this: the copy of a block is lent the same weights."""
        return self

    def _run(
        self, index: int, block: nn.Module, forward: Callable[..., Tensor], *args: Any
    ) -> Tensor:
        row = self._take(index)
        # On the way back each block follows the one after it, the last one follows itself.
        is_backward = index <= self._last <= index + 1
        self._last = index
        self._look_ahead(index - 1 if is_backward else index + 1)
        with self._slabs[index].lent(block, row):
            return forward(*args)

    def _take(self, index: int) -> Tensor:
        """Return a copy of a slab, on the device, that the current stream may read."""
        version = self._slabs[index].bytes._version
        ahead, self._ahead = self._ahead, None
        if ahead is not None and self.is_cuda:
            # Also one that is not wanted: its memory must not be given away while it is written.
            torch.cuda.current_stream(self.device).wait_event(ahead[3])
        if ahead is not None and ahead[:2] == (index, version):
            return ahead[2]
        row = torch.empty_like(self._slabs[index].bytes, device=self.device)
        return row.copy_(self._slabs[index].bytes, non_blocking=True)

    def _look_ahead(self, index: int) -> None:
        """Begin to copy a slab, if there is one, beside what is computed."""
        if not self.is_cuda or not 0 <= index < len(self._slabs):
            return
        slab = self._slabs[index].bytes
        # Memory of the current stream, which may still be at work in it for an earlier block.
        row = torch.empty_like(slab, device=self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            row.copy_(slab, non_blocking=True)
        self._ahead = (index, slab._version, row, self._stream.record_event())


def offload(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device | str) -> None:
    """Bring a frozen model to a device, but for the weights of some blocks, see `Depot`.

    blocks: of the model, in the order in which they run. Twins made afterwards share the weights.
    """
    Depot(blocks, torch.device(device))
    inside = {id(module) for block in blocks for module in block.modules()}
    for module in model.modules():
        if id(module) in inside:
            continue
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                moved = tensor.detach().to(device)
                is_parameter = tensors is module._parameters
                tensors[name] = nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
