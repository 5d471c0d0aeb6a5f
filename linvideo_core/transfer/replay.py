"""Replay a model's kernels as CUDA graphs: a small model keeps a GPU waiting for its launches.

A call with shapes that were not seen before is captured, forward and, with gradients, backward;
every later one copies its inputs in and replays. The numbers are those of the same kernels.
"""

import contextlib
import gc
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator

import torch
from torch import Tensor, nn

_WARM_UPS = 3


class _Plain(nn.Module):
    """The model as it computes without replay, in one precision; has its parameters."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, *inputs: Tensor) -> Tensor:
        # A cast that is cached by one call would be missing from another's graph.
        with torch.autocast("cuda", self.dtype, self.dtype is not None, cache_enabled=False):
            return type(self.model).forward(self.model, *inputs)


class Replayed:
    """Stands in for a model's `forward` on a CUDA device.

    The result of a call with gradients is overwritten by the next such call: one backward pass
    belongs between two of them.
    """

    def __init__(self, model: nn.Module, state: Callable[[], Hashable]) -> None:
        """state: what besides shapes decides which kernels run; a new one drops the old graphs."""
        self.model = model
        self.state = state
        self._current: Hashable = None
        self._graphs: dict[Hashable, Callable[..., Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Replay the call of the same shapes, or capture it."""
        if (state := self.state()) != self._current:
            self._current = state
            self.drop_graphs()
        is_autocast = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if is_autocast else None
        shapes = tuple((x.shape, x.dtype, x.requires_grad) for x in inputs)
        key = (torch.is_grad_enabled(), dtype, shapes)
        if key not in self._graphs:
            plain = _Plain(self.model, dtype)
            capture = _capture_with_gradient if torch.is_grad_enabled() else _capture_forward
            with torch.autocast("cuda", enabled=False, cache_enabled=False):
                self._graphs[key] = capture(plain, inputs)
        return self._graphs[key](*inputs)

    def drop_graphs(self) -> None:
        """Give the graphs' memory back, gigabytes that would wait for the collector's own time."""
        self._graphs.clear()
        # PyTorch leaves each graph in a cycle with the module that it was made of.
        gc.collect()


def _capture_with_gradient(plain: _Plain, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    samples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
    return torch.cuda.make_graphed_callables(
        plain, samples, num_warmup_iters=_WARM_UPS, allow_unused_input=True
    )


def _capture_forward(plain: _Plain, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    static = tuple(x.clone() for x in inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            plain(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = plain(*static)

    def replay(*inputs: Tensor) -> Tensor:
        for mine, given in zip(static, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return result.clone()

    return replay


@contextlib.contextmanager
def replayed(models: Iterable[nn.Module], state: Callable[[], Hashable]) -> Iterator[None]:
    """Replay all calls of some models while the context lasts.

    Forward hooks within them run at the capture alone.

    Raises ValueError where a model is on no CUDA device.
    """
    models = list(models)
    for model in models:
        if (device := next(model.parameters()).device).type != "cuda":
            raise ValueError(
                f"--cuda-graphs was given on {device}; it needs a CUDA device: leave it out"
            )
    replays = [Replayed(model, state) for model in models]
    for model, replay in zip(models, replays, strict=True):
        model.forward = replay
    try:
        with warnings.catch_warnings():
            # Graphs are captured on a stream of their own; gradients are added up on the usual one.
            warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
            yield
    finally:
        for model, replay in zip(models, replays, strict=True):
            del model.forward
            replay.drop_graphs()
