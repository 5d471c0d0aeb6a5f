"""What a run can be refused for by headers and arithmetic alone, before anything long begins."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import torch

from .. import kernels
from ..kernels.tiles import Size
from ..models import lora
from ..models.attention_sites import AttentionSite, ModelFamily, Shapes
from ..models.config import FROZEN, FrozenConfig, LinearForm
from ..models.families import identify
from ..models.quantized import count_frozen_bytes
from ..models.wan import WanConfig
from ..run.errors import SettingError
from ..run.memory import (
    FP32,
    Need,
    Transformer,
    check_memory,
    count,
    count_low_rank,
    fits,
    training_needs,
)
from ..teacher.teacher import TeacherCheckpoint
from .config import RunConfig, StudentConfig, TransferConfig, check_offload_alone
from .layer_selection import check_layers

# Activations take so many times the least that arithmetic counts (docs/home.md), and a card is not
# all a run's.
_ACTIVATIONS, _USABLE = 1.5, 0.9
# In plain PyTorch hybrid layers take so many times what linear ones do: 1.4 to 1.5 was measured, at
# a Wan's proportions and 3,072 and 12,288 tokens.
_OF_PLAIN_HYBRID = 1.5
_BLOCKS_AT_ONCE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a run that was not refused takes at least.

    num_trained: numbers that are trained.
    memory_bytes: of the CPU; device_bytes: of a GPU, None without one.
    """

    num_trained: int
    memory_bytes: int
    device_bytes: int | None


def check_transfer(
    teacher: TeacherCheckpoint,
    config: TransferConfig,
    device: str,
    precision: str,
    num_processes: int = 1,
) -> Footprint:
    """Return what a transfer of a teacher takes.

    Raises ValueError, in one sentence, when it cannot work.
    """
    check_layers(config.selection, [site.layer for site in identify(teacher.shapes)[1]])
    check_tile(config.student.form, find_grids(teacher))
    return check_footprint(
        teacher,
        config,
        device,
        precision,
        num_trained=count_trained(teacher, config.student),
        all_trained=config.student.parameters == "full",
        num_processes=num_processes,
        may_offload=num_processes == 1 and config.experts.low_noise_model is None,
    )


def check_tile(form: LinearForm, grids: Iterable[Size]) -> None:
    """Raise SettingError where one tile has all tokens of a video: its layers would be softmax.

    grids: (frames, height, width) in tokens of the videos to learn from.
    """
    for grid in grids:
        if form.tile and _covers(form.tile_size, grid):
            size = " x ".join(map(str, grid))
            raise SettingError(
                f"{{tile}} {form.tile} given, and a video is {size} tokens, all of them one tile, "
                "which leaves nothing to linear attention: give a smaller {tile}, or none",
                "tile",
            )


def find_grids(teacher: TeacherCheckpoint) -> list[Size]:
    """Return the grid of tokens of every size of a teacher's videos."""
    shapes = [teacher.latent_shape, *teacher.more_shapes]
    return [teacher.checkpoint.config.find_grid(shape) for shape in shapes]


def _covers(tile: Size, grid: Size) -> bool:
    return all(size == 0 or size >= length for size, length in zip(tile, grid, strict=True))


def find_batch(
    teacher: TeacherCheckpoint,
    config: RunConfig,
    sizes: Sequence[int],
    card_gb: int,
    *,
    num_trained: int,
    may_offload: bool,
    num_processes: int = 1,
) -> tuple[int, int, float]:
    """Return the batch size, one of `sizes`, and the offloaded blocks with which a card is enough.

    The third is what is expected to be needed then, in GB of 2^30 bytes: of activations more than
    `check_footprint` counts. Blocks are offloaded only where no size fits without; where none fits
    at all, the last size and all blocks are returned.

    sizes: over all processes, the preferred first. card_gb: of 2^30 bytes.
    """
    most = teacher.checkpoint.config.num_layers if may_offload else 0
    frozen = config.teacher.frozen_weights.frozen
    precision = "bf16" if config.precision == "auto" else config.precision
    offloads = sorted({*range(0, most, _BLOCKS_AT_ONCE), most})
    times_least = _ACTIVATIONS * (_OF_PLAIN_HYBRID if _has_plain_hybrid(config) else 1)
    for offload_blocks, size in itertools.product(offloads, sizes):
        plan = _make_plan(teacher, config, num_trained, size, precision, num_processes)
        frozen_weights = FrozenConfig(frozen=frozen, offload_blocks=offload_blocks)
        weights, *others = plan.needs(frozen_weights, config.training.activation_checkpointing)
        expected = weights.num_bytes + times_least * sum(need.num_bytes for need in others)
        if expected <= _USABLE * card_gb * 2**30:
            break
    return size, offload_blocks, expected / 2**30


def _has_plain_hybrid(config: RunConfig) -> bool:
    """Say whether hybrid layers are made on a GPU on which no fused kernel runs at all."""
    is_hybrid = isinstance(config, TransferConfig) and config.student.form.tile
    return bool(
        is_hybrid and torch.cuda.is_available() and kernels.refuse_device(torch.device("cuda"))
    )


def count_trained(teacher: TeacherCheckpoint, student: StudentConfig) -> int:
    """Return how many numbers a transfer trains, but for the layer scores."""
    family, sites = identify(teacher.shapes)
    num_maps = sum(count_maps(site, student.feature_ratio) for site in sites)
    return num_maps + count_weights(teacher, family, student.parameters, student.lora_rank)


def count_weights(
    teacher: TeacherCheckpoint, family: ModelFamily, parameters: str, rank: int
) -> int:
    """Return how many of a model's own weights are trained; parameters: as `--parameters`."""
    if parameters == "full":
        return count(teacher.shapes, family.trainable_prefix)
    if parameters == "lora":
        lora.check_rank(teacher.shapes, family.trainable_prefix, rank)
        return count_low_rank(teacher.shapes, family.trainable_prefix, rank)
    return 0


def count_maps(site: AttentionSite, feature_ratio: int) -> int:
    """Return the numbers of a layer's feature maps."""
    return site.num_heads * site.head_dim * site.head_dim * feature_ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A training whose memory can be told beforehand, from shapes alone.

    shapes: of the model's parameters. num_tokens: L of one video, of the largest size.
    num_trained, batch_size, sampled_together, num_processes: see `memory.training_needs`.
    """

    config: WanConfig
    shapes: Shapes
    num_tokens: int
    num_trained: int
    batch_size: int
    sampled_together: int
    precision: str
    num_processes: int = 1

    def needs(self, frozen_weights: FrozenConfig, is_checkpointed: bool) -> list[Need]:
        """Return what must be on the device at once, the weights held as `frozen_weights` says."""
        weight_bytes = count_frozen_bytes(self.shapes, frozen_weights.frozen)
        if frozen_weights.offload_blocks > 2:
            # Of offloaded blocks, two are there.
            block = count_frozen_bytes(self.shapes, frozen_weights.frozen, "blocks.0.")
            weight_bytes -= block * (frozen_weights.offload_blocks - 2)
        return training_needs(
            Transformer(
                dim=self.config.dim,
                ffn_dim=self.config.ffn_dim,
                num_layers=self.config.num_layers,
                num_tokens=self.num_tokens,
                stream_bytes=FP32 if frozen_weights.frozen == "fp32" else 2,
            ),
            weight_bytes=weight_bytes,
            num_trained=self.num_trained,
            batch_size=self.batch_size,
            sampled_together=self.sampled_together,
            is_checkpointed=is_checkpointed,
            precision=self.precision,
            num_processes=self.num_processes,
        )

    def find_flags(
        self,
        frozen_weights: FrozenConfig,
        others: Sequence[Need],
        device: str,
        *,
        may_offload: bool,
    ) -> str:
        """Return the flags with which it fits a device beside `others`; "" where none are enough.

        What keeps the weights most precise comes first: bf16, offloading, fp8, both.
        """
        for frozen in FROZEN[FROZEN.index(frozen_weights.frozen) :]:
            most = self.config.num_layers if may_offload and frozen != "fp32" else 0
            for num_blocks in range(
                frozen_weights.offload_blocks, max(most, frozen_weights.offload_blocks) + 1
            ):
                found = FrozenConfig(frozen=frozen, offload_blocks=num_blocks)
                if not fits([_on_host(self.shapes, found, device)], "cpu"):
                    break
                if fits([*self.needs(found, True), *others], device):
                    return f"{{activation_checkpointing}} {found.given}".rstrip()
        return ""


def _on_host(shapes: Shapes, frozen_weights: FrozenConfig, device: str) -> Need:
    """Return what is in CPU memory: the whole model first, then the blocks that stay there."""
    reading = count_frozen_bytes(shapes, frozen_weights.frozen)
    block = count_frozen_bytes(shapes, frozen_weights.frozen, "blocks.0.")
    if device.startswith("cuda"):
        # PyTorch gives out page-locked memory in powers of two.
        block = 2 ** math.ceil(math.log2(block))
    waiting = block * frozen_weights.offload_blocks
    if waiting > reading:
        return Need("the offloaded blocks, page-locked", waiting, "lower {offload_blocks}")
    return Need("the model while it is read", reading)


def check_footprint(
    teacher: TeacherCheckpoint,
    config: RunConfig,
    device: str,
    precision: str,
    *,
    num_trained: int,
    all_trained: bool,
    num_processes: int,
    may_offload: bool,
) -> Footprint:
    """Return what a run takes at least; the parameters are of `memory.training_needs`.

    Raises ValueError, in one sentence, when it does not fit, or its softmax kernel is not there.
    """
    teacher.check_softmax(device, precision)
    frozen_weights = teacher.frozen_weights
    check_offload_alone(frozen_weights, num_processes)
    advice = "choose a smaller model or a machine with more memory"
    may_round = not all_trained and not teacher.is_demo
    if may_round and frozen_weights.frozen != FROZEN[-1]:
        advice = f"give {{frozen}} {FROZEN[-1]}, or {advice}"
    on_host = _on_host(teacher.shapes, frozen_weights, device)
    check_memory([on_host], "cpu", advice)
    size = config.training.batch_size
    plan = _make_plan(teacher, config, num_trained, size, precision, num_processes)
    prompts = teacher.source.need(device)
    is_checkpointed = config.training.activation_checkpointing
    needs = [*plan.needs(frozen_weights, is_checkpointed), prompts]
    flags = ""
    if may_round and not fits(needs, device):
        flags = plan.find_flags(frozen_weights, [prompts], device, may_offload=may_offload)
    check_memory(needs, device, flags=flags)
    on_device = sum(need.num_bytes for need in needs)
    if device == "cpu":
        least = max(on_device, on_host.num_bytes)
        return Footprint(num_trained=num_trained, memory_bytes=least, device_bytes=None)
    return Footprint(
        num_trained=num_trained, memory_bytes=on_host.num_bytes, device_bytes=on_device
    )


def _make_plan(
    teacher: TeacherCheckpoint,
    config: RunConfig,
    num_trained: int,
    batch_size: int,
    precision: str,
    num_processes: int,
) -> Plan:
    """Return the plan of one process's training; batch_size: over all processes."""
    model, trajectories, evaluation = (
        teacher.checkpoint.config,
        config.trajectories,
        config.evaluation,
    )
    return Plan(
        config=model,
        shapes=teacher.shapes,
        num_tokens=max(map(math.prod, find_grids(teacher))),
        num_trained=num_trained,
        batch_size=batch_size // num_processes,
        num_processes=num_processes,
        sampled_together=max(
            min(trajectories.shard_size, trajectories.num_trajectories),
            min(evaluation.evaluate_batch_size, evaluation.evaluate_samples),
        ),
        precision=precision,
    )
