"""Many processes, one run: the only file that knows torch.distributed.

`torchrun --nproc-per-node N -m linvideo_core.transfer ...` starts N processes, which
`init_process_group` joins. Models are written for one device; here their parameters are sharded
from outside with PyTorch's FSDP2 (`fully_shard`), block by block, and checkpoints are PyTorch's
DCP.

The same global batch gives the same results on any number of processes up to the order of sums, see
tests/training/test_fsdp.py. Single elements can lie further apart: AdamW divides a gradient by its
own size, so where a gradient is all rounding so is its step.
"""

import contextlib
import datetime
import functools
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..run.config import leave
from ..run.errors import SettingError
from ..run.process_group import SINGLE_PROCESS, ProcessGroup, is_sharded, whole_of

_STARTED_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# A process may sample videos for hours before the others hear of it; torchrun ends all with one.
_TIMEOUT = datetime.timedelta(days=7)
# At first it is torchrun that is waited for, and what was killed never answers.
_FIRST_TIMEOUT = datetime.timedelta(minutes=10)
_SECONDS_BETWEEN_LOOKS, _GRACE_SECONDS = 2, 60
_FAILED = "linvideo/failed"
_CONTINUES = "the same command continues from the last checkpoint"


def init_process_group() -> ProcessGroup:
    """Return the processes that torchrun started with this one; without it, this one alone."""
    given = [os.environ.get(name) for name in _STARTED_BY_TORCHRUN]
    if not all(given) or int(os.environ["WORLD_SIZE"]) == 1:
        return SINGLE_PROCESS
    return _Ranks()


def run_together(
    main: Callable[[ProcessGroup], None], describe_kept: Callable[[], str] = lambda: _CONTINUES
) -> None:
    """Run a command in the processes that torchrun started; the first that fails says why, alone.

    An interruption ends them all with exit code 130.

    describe_kept: says, in a part of a sentence, what the same command does after an interruption.

    Raises KeyboardInterrupt with the last words of a process that is alone.
    """
    processes = init_process_group()
    try:
        main(processes)
    except KeyboardInterrupt:
        words = f"interrupted; {describe_kept()}"
        processes.fails_first()
        if processes.size == 1:
            raise KeyboardInterrupt(words) from None
        if processes.is_first:
            sys.stderr.write(f"{words}\n")
        leave(130)
    except Exception as error:
        if not processes.fails_first():
            # What others say of a failed process is its echo.
            leave(1)
        if _is_lost_process(error) and not sys.flags.dev_mode:
            raise ValueError(
                f"another process of this run ended without a word; {describe_kept()}"
            ) from error
        raise
    if processes.size > 1:
        # Python's own end takes groups and meshes down in no order, and their threads may abort the
        # process, now and then; torchrun would then end the first one in its evaluation.
        leave(0)


def _end_with_torchrun() -> None:
    """Let this process end when the torchrun that started it is killed, as if it was asked to stop.

    Without it, it would wait for its neighbours for days, and hold the memory of a GPU.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    torchrun = os.getppid()

    def watch() -> None:
        while os.getppid() == torchrun:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _StoppedTogether(KeyboardInterrupt):
    """All processes of a process group stop after the same step."""


class _Ranks(ProcessGroup):
    """Processes that torchrun started, each with a device of its own."""

    def __init__(self) -> None:
        import torch.distributed as dist

        _end_with_torchrun()
        self.dist = dist
        self.local_rank = int(os.environ["LOCAL_RANK"])
        has_cuda = torch.cuda.is_available() and dist.is_nccl_available()
        if has_cuda and self.local_rank < torch.cuda.device_count():
            torch.cuda.set_device(self.local_rank)
        found = dist.rendezvous("env://", timeout=_FIRST_TIMEOUT)
        self.store, self.rank, self.size = next(iter(found))
        self.store.set_timeout(_TIMEOUT)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_cuda else "gloo",
            store=dist.PrefixStore("linvideo/group", self.store),
            rank=self.rank,
            world_size=self.size,
            timeout=_TIMEOUT,
        )
        self.device_type = "cpu"
        self._is_asked_to_stop = False
        if not self.is_first:
            logging.getLogger(__package__.rpartition(".")[0]).setLevel(logging.ERROR)

    def place(self, device: str) -> str:
        if device.startswith("cuda"):
            available = torch.cuda.device_count()
            if device != "cuda":
                raise SettingError(
                    f"{{device}} {device} given to {self.size} processes; give {{device}} cuda, "
                    "each takes a GPU of its own",
                    "device",
                )
            if self.local_rank >= available:
                raise ValueError(
                    f"process {self.local_rank} of this machine found {available} GPUs; give "
                    f"torchrun --nproc-per-node {available}"
                )
            device = f"cuda:{self.local_rank}"
        self.device_type = device.partition(":")[0]
        return device

    def mean(self, value: Tensor, weight: float = 1.0) -> Tensor:
        own = value.detach().float().flatten() * weight
        # What has no weight may be the mean of nothing, which is NaN.
        total = torch.cat([own if weight else torch.zeros_like(own), own.new_tensor([weight])])
        self.dist.all_reduce(total)
        mean = (total[:-1] / total[-1]).view_as(value).to(value.dtype)
        return value + (mean - value).detach() if value.requires_grad else mean

    def clip_gradients(self, parameters: Iterable[nn.Parameter], norm: float) -> Tensor:
        gradients = [p.grad for p in parameters if p.grad is not None]
        parts = [_own_part(gradient) for gradient in gradients if is_sharded(gradient)]
        whole = [gradient for gradient in gradients if not is_sharded(gradient)]
        square = nn.utils.get_total_norm(parts).square() if parts else torch.zeros(())
        square = square.to(self.device_type)
        self.dist.all_reduce(square)
        total = (square + nn.utils.get_total_norm(whole).square().to(square)).sqrt()
        scale = (norm / (total + 1e-6)).clamp(max=1.0)
        if gradients:
            torch._foreach_mul_([*parts, *whole], scale)
        return total

    def find_not_finite(self, parameters: Mapping[str, Tensor]) -> str | None:
        found = [~torch.isfinite(_own_part(tensor)).all() for tensor in parameters.values()]
        flags = torch.stack(found).int()
        self.dist.all_reduce(flags)
        return next((n for n, flag in zip(parameters, flags.tolist(), strict=True) if flag), None)

    @contextlib.contextmanager
    def sharded(self, models: Mapping[nn.Module, Sequence[nn.Module]]) -> Iterator[None]:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(self.device_type, (self.size,))
        with contextlib.ExitStack() as undo:
            roots = [_shard(model, blocks, mesh, undo) for model, blocks in models.items()]
            # After an error of one process the others gather no more.
            yield
        for root in roots:
            _gather(root)

    def wait(self) -> None:
        # On the CPU: a GPU's stream would let the process run on.
        self.dist.all_reduce(torch.zeros(()))

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    @contextlib.contextmanager
    def graceful_shutdown(self) -> Iterator[None]:
        def ask(number: int, frame: Any) -> None:
            self._is_asked_to_stop = True

        self._is_asked_to_stop = False
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop_together(self) -> None:
        asked = torch.tensor(float(self._is_asked_to_stop))
        self.dist.all_reduce(asked)
        if asked:
            raise _StoppedTogether

    def is_agreed(self, error: BaseException) -> bool:
        return isinstance(error, _StoppedTogether)

    def destroy(self) -> bool:
        self.wait()
        self.dist.destroy_process_group()
        return self.is_first

    def fails_first(self) -> bool:
        try:
            return self.store.add(_FAILED, 1) == 1
        # The store went with the process that kept it.
        except RuntimeError:
            return False


def save_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into a folder, each process its part: safetensors, where DCP usually pickles.

    Raises OSError, in all processes, where one of them could not.
    """
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save({n: t.detach() for n, t in tensors.items()}, storage_writer=writer)
    except dcp.CheckpointException as error:
        raise OSError(_say(error, f"could not write {folder}")) from error


def load_shards(
    folder: Path, like: Mapping[str, Tensor], *, is_alone: bool = False
) -> dict[str, Tensor]:
    """Read the safetensors files of a folder, which any number of processes wrote.

    like: tensors by the last part of a name, after its last slash; what is read becomes sharded as
        they are, and is whole without one.
    is_alone: no process group is asked.

    Raises ValueError for shards that do not fit.
    """
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    tensors = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        model, dtype = like.get(name.rpartition("/")[2]), stored.properties.dtype
        is_like = model is not None and model.shape == stored.size
        zeros = torch.zeros_like(model, dtype=dtype) if is_like else torch.zeros(stored.size)
        tensors[name] = zeros.to(dtype).detach()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(tensors, storage_reader=reader, no_dist=is_alone)
    except dcp.CheckpointException as error:
        raise ValueError(_say(error, f"could not read {folder}")) from error
    return tensors


class _Unit(nn.Module):
    """What FSDP2 shards: a module's parameters, with the `forward` that it has now.

    FSDP2 cannot be taken off a module again, so its hooks sit here.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.run = module.forward

    def forward(self, *args: Any) -> Tensor:
        """Run the module."""
        # FSDP2 hangs a hook on the output, which a view would lose when it is written into.
        out = self.run(*args)
        return out.clone() if out._is_view() else out


def _shard(
    model: nn.Module, blocks: Sequence[nn.Module], mesh: Any, undo: contextlib.ExitStack
) -> _Unit:
    """Shard each block of a model, then all that is left; `undo` gives their forwards back."""
    from torch.distributed.fsdp import fully_shard

    root, units = _Unit(model), [_Unit(block) for block in blocks]
    root.units = nn.ModuleList(units)
    # A layer score is a number: every process holds it, and its gradient is averaged apart.
    numbers = {p for p in model.parameters() if not p.ndim}
    for unit in units:
        fully_shard(unit, mesh=mesh, ignored_params=numbers)
    inner = {p for unit in units for p in unit.parameters()}
    fully_shard(root, mesh=mesh, ignored_params=inner | numbers)
    for unit in (*units, root):
        undo.callback(_set_forward, unit.module, unit.module.__dict__.get("forward"))
        unit.module.forward = functools.partial(unit)
    return root


def _set_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Give a module a `forward` of its own, or that of its class."""
    module.__dict__.pop("forward", None)
    if forward is not None:
        module.forward = forward


@torch.no_grad()
def _gather(root: _Unit) -> None:
    """Give every module its whole parameters back, on every process."""
    # A model without a backward pass, such as a teacher, keeps those of its root unsharded.
    root.reshard()
    for module in root.module.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if is_sharded(parameter):
                whole = nn.Parameter(whole_of(parameter), parameter.requires_grad)
                setattr(module, name, whole)


def _own_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor


def _say(error: Any, what: str) -> str:
    """Say in one line what DCP gathered from all processes."""
    reasons = {str(reason).splitlines()[0] for reason, _ in error.failures.values()}
    return f"{what} ({'; '.join(sorted(reasons))})"


def _is_lost_process(error: Exception) -> bool:
    words = ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "NCCL")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
