"""What goes together with frozen weights in fewer bytes or in CPU memory, and what does not."""

from ..models.quantized import FrozenConfig
from ..training.trainer import TrainingConfig


def check_frozen_weights(
    frozen_weights: FrozenConfig, training: TrainingConfig, all_trained_by: str = ""
) -> None:
    """Raise ValueError, in one sentence, for settings of a training that contradict one another.

    all_trained_by: the flag that trains whole weights; "" where there is none.
    """
    if frozen_weights.given and all_trained_by:
        raise ValueError(
            f"{frozen_weights.given} was given with {all_trained_by}, "
            "which trains whole weights in fp32; only frozen ones can be held otherwise: leave one "
            "of them out"
        )
    if not frozen_weights.offload_blocks:
        return
    flag = f"--offload-blocks {frozen_weights.offload_blocks}"
    if not training.activation_checkpointing:
        raise ValueError(
            f"{flag} was given without --activation-checkpointing; the way back would keep the "
            "weights of all blocks on the device: give both"
        )
    if training.compile:
        raise ValueError(f"{flag} and --compile given; they do not work together: leave one out")


def check_offload_alone(frozen_weights: FrozenConfig, num_processes: int) -> None:
    """Raise ValueError, in one sentence, where several processes cannot hold weights so."""
    if frozen_weights.offload_blocks and num_processes > 1:
        raise ValueError(
            f"--offload-blocks {frozen_weights.offload_blocks} was given to {num_processes} "
            "processes, which hold a part of each block already: leave it out"
        )
