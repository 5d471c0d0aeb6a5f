"""Whether a run fits into memory, by arithmetic on shapes, before anything long begins.

Every count is a lower bound, without an allocator's waste and without what kernels need between: a
run that is refused cannot work; one that is not may still be short, and ends in a sentence then.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from .errors import SettingError

Shapes = Mapping[str, tuple[int, ...]]

FP32 = 4
# A trained number, its gradient, the two averages of Adam, and the average that is kept.
_TRAINED = 5 * FP32
# What autograd keeps of a Wan block with frozen weights, in widths: five of the residual stream, in
# its own dtype, three of norms, four in the precision of the products. Trained weights keep more.
_STREAM_KEPT, _NORMS_KEPT, _NARROW_KEPT = 5, 3, 4
_LOWER_SAMPLING = "lower {shard_size} and {evaluate_batch_size}, or the video's size"
_LOWER_STEP = "lower {batch_size}, give {activation_checkpointing}, or lower the video's size"
_LOWER_TRAINED = "train less of it (LoRA, a lower rank)"
LOWER_RUN = (
    "lower {batch_size}, {shard_size}, {evaluate_batch_size} or the video's size, or give "
    "{activation_checkpointing}, {frozen} bf16 or {offload_blocks}; with another {shard_size}, "
    "{evaluate_batch_size} or {offload_blocks} this run continues, else give a new {out} beside "
    "it, which uses the teacher's samples that there are"
)
# All that a sentence on memory may name.
_FIELDS = ("batch_size", "shard_size", "evaluate_batch_size", "activation_checkpointing")
_FIELDS += ("frozen", "offload_blocks", "out", "device")
_CGROUP = Path("/sys/fs/cgroup")


@dataclasses.dataclass(frozen=True)
class Need:
    """A part of what must be in memory: its name, its bytes, and what would lower it."""

    what: str
    num_bytes: int
    lower: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transformer:
    """The sizes of a model at work, as far as they decide memory.

    num_tokens: L of one video.
    stream_bytes: of a number of the residual stream, which has the dtype of most frozen weights.
    """

    dim: int
    ffn_dim: int
    num_layers: int
    num_tokens: int
    stream_bytes: int = FP32


def fits(needs: Sequence[Need], device: torch.device | str) -> bool:
    """Say whether a device has as much free as the needs add up to, or cannot tell."""
    free = free_bytes(device)
    return free is None or sum(need.num_bytes for need in needs) <= free


def check_memory(
    needs: Sequence[Need],
    device: torch.device | str,
    advice: str = "choose another {device}",
    flags: str = "",
    free: int | None = None,
) -> None:
    """Raise SettingError when a device has less free than the needs add up to.

    advice: what to do where no need says what would lower it.
    flags: with which it would fit; "" where none are known.
    free: bytes; None asks the device.
    """
    free = free_bytes(device) if free is None else free
    needed = sum(need.num_bytes for need in needs)
    if free is None or needed <= free:
        return
    parts = sorted(needs, key=lambda need: -need.num_bytes)
    listed = ", ".join(f"{need.what} {show_gb(need.num_bytes)}" for need in parts)
    lowered = next((need.lower for need in parts if need.lower), advice)
    raise SettingError(
        f"{torch.device(device)} has {show_gb(free)} of free memory and at least "
        f"{show_gb(needed)} are needed ({listed}): {lowered}"
        f"{f'; it would fit with {flags}' if flags else ''}",
        *_FIELDS,
    )


@contextlib.contextmanager
def explained(lower: str) -> Iterator[None]:
    """Raise SettingError where memory runs out after all; `lower` would need less of it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        in_use = ""
        if torch.cuda.is_available():
            num_bytes = sum(map(torch.cuda.memory_allocated, range(torch.cuda.device_count())))
            in_use = f" with {show_gb(num_bytes)} of the GPU's in use"
        raise SettingError(f"memory ran out{in_use}: {lower}", *_FIELDS) from error


def is_out_of_memory(error: Exception) -> bool:
    """Say whether an error is a lack of memory, on a GPU or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # PyTorch's own words on the CPU, and of memory that it cannot lock.
    return any(words in str(error) for words in ("can't allocate memory", "out of memory"))


def free_bytes(device: torch.device | str) -> int | None:
    """Return what a device can still give to this process; None where it cannot be told."""
    device = torch.device(device)
    if device.type == "cpu":
        found = [free for free in (_free_of_machine(), _free_of_container()) if free is not None]
        return min(found, default=None)
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    mine = torch.cuda.memory_reserved(device)
    share = torch.cuda.get_per_process_memory_fraction(number_of_gpu(device))
    capped = int(total * share) - mine
    # What PyTorch's allocator holds without using it is free to this process.
    return min(free, capped) + mine - torch.cuda.memory_allocated(device)


def number_of_gpu(device: torch.device | str) -> int:
    """Return the number of the GPU that a device means, also "cuda": caps, alone, need it."""
    index = torch.device(device).index
    return torch.cuda.current_device() if index is None else index


def count(shapes: Shapes, prefix: str = "") -> int:
    """Return how many numbers the tensors under a prefix are."""
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))


def count_low_rank(shapes: Shapes, prefix: str, rank: int) -> int:
    """Return how many numbers low-rank changes of all linear layers under a prefix are."""
    return sum(
        rank * sum(shape)
        for name, shape in shapes.items()
        if name.startswith(prefix) and name.endswith(".weight") and len(shape) == 2
    )


def training_needs(
    model: Transformer,
    *,
    weight_bytes: int,
    num_trained: int,
    batch_size: int,
    sampled_together: int,
    is_checkpointed: bool,
    precision: str,
    num_processes: int = 1,
) -> list[Need]:
    """Return what must be on the device at once in a run that samples a teacher, then trains.

    Of both stages the one that needs more counts. The warm start between them keeps less than a
    block's way back, one layer at a time, so a training step stands for it.

    weight_bytes: of the frozen weights that are on the device.
    num_trained: numbers that are trained, over all models.
    batch_size: videos of a pass, of this process alone.
    sampled_together: videos, each in both guidance branches.
    num_processes: each holds the whole weights while it samples, and its part of them in training,
        where two blocks at a time are whole.
    """
    stream = model.stream_bytes
    size = min(stream, FP32 if precision == "fp32" else 2)
    # Autocast computes norms in fp32, whatever the stream is in.
    norms = stream if precision == "fp32" else FP32
    widths = _STREAM_KEPT * stream + _NORMS_KEPT * norms + _NARROW_KEPT * size
    block = model.dim * widths + model.ffn_dim * size
    kept = model.num_layers * block
    if is_checkpointed:
        # Recomputed blocks keep their input alone, all but the one at work.
        kept = model.num_layers * model.dim * stream + block
    activations = batch_size * model.num_tokens * kept
    trained = _TRAINED * num_trained // num_processes
    blocks = 2 * weight_bytes // model.num_layers
    part = min(weight_bytes, weight_bytes // num_processes + blocks)
    training = [
        Need("the weights", part),
        Need("what is trained, with its optimiser", trained, _LOWER_TRAINED),
        Need("a training step's activations", activations, _LOWER_STEP),
    ]
    # A video's stream and one feed-forward layer, in both guidance branches.
    passing = model.num_tokens * (model.dim * stream + 2 * size * model.ffn_dim)
    sampling = [
        Need("the weights", weight_bytes),
        Need("the sampling of the teacher", 2 * sampled_together * passing, _LOWER_SAMPLING),
    ]
    return max(training, sampling, key=lambda needs: sum(need.num_bytes for need in needs))


def show_gb(num_bytes: int) -> str:
    """Return bytes in GB of 10^9, for a sentence."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 5e7 else f"{num_bytes / 1e6:,.1f} MB"


def _free_of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None


def _free_of_container() -> int | None:
    """Return what a container's own limit leaves; its file cache can be given up."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    cached = sum(int(line.split()[1]) for line in stat if line.startswith("file "))
    return None if limit == "max" else int(limit) - used + cached
