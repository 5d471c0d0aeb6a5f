"""On the device that `auto` finds, every command goes from a user's checkpoint to its result."""

from pathlib import Path

import pytest
from safetensors.torch import save_file

from linvideo_core.distill import cli as distill
from linvideo_core.evaluate import cli as evaluate
from linvideo_core.transfer import cli as transfer
from tests.conftest import make_teacher, make_wan, save_inputs

pytestmark = pytest.mark.gpu

VIDEOS = "--num-frames 13 --height 32 --width 48"
TRAINING = (
    "--states-per-trajectory 2 --sampler-steps 4 --shard-size 2 --steps 2 --batch-size 2 "
    "--checkpoint-every 1 --evaluate-samples 2"
)
STORED = "--num-trajectories 2"
LINEARIZED = "--warm-start-steps 2 --target 1 --lora-rank 2"
DISTILLED = f"{STORED} --lora-rank 2 --num-steps 2"
EVALUATED = "--num-samples 2 --sampler-steps 4 --batch-size 2"
# What a home recipe sets beside the sizes.
HOME_OPTIONS = {
    "plain": "",
    "home": "--frozen bf16 --offload-blocks 2 --activation-checkpointing",
    "fp8": "--frozen fp8 --activation-checkpointing",
    "compiled": "--compile",
}


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Return flags with a checkpoint and its prompts."""
    files = save_inputs(make_teacher(make_wan()), tmp_path)
    return [*(str(word) for pair in files.items() for word in pair), *VIDEOS.split()]


@pytest.mark.parametrize(
    ("options", "form"), [*((name, "") for name in HOME_OPTIONS), ("compiled", "--tile 1x2x2")]
)
def test_a_checkpoint_is_linearized_distilled_and_evaluated(
    options: str, form: str, flags: list[str], tmp_path: Path
) -> None:
    made = tmp_path / "linear" / "linearized.safetensors"
    own = [*flags, *TRAINING.split(), *HOME_OPTIONS[options].split()]
    transfer.main([*own, *LINEARIZED.split(), *form.split(), "--out", str(made.parent)])
    few = tmp_path / "few" / "distilled.safetensors"
    distill.main([*own, *DISTILLED.split(), "--artifact", str(made), "--out", str(few.parent)])
    files = ["--artifact", str(made), "--distilled", str(few)]
    evaluate.main([*flags, *EVALUATED.split(), *files, "--out", str(tmp_path / "evaluated")])
    for folder in (made.parent, few.parent, tmp_path / "evaluated"):
        assert (folder / "evaluation.json").is_file()


def test_both_experts_are_linearized(flags: list[str], tmp_path: Path) -> None:
    save_file(make_wan(seed=1).state_dict(), tmp_path / "low.safetensors")
    second = [
        *STORED.split(),
        "--low-noise-model",
        str(tmp_path / "low.safetensors"),
        "--frozen",
        "bf16",
    ]
    out = tmp_path / "experts"
    transfer.main([*flags, *TRAINING.split(), *LINEARIZED.split(), *second, "--out", str(out)])
    names = {path.name for path in out.glob("linearized_*.safetensors")}
    assert names == {"linearized_high_noise.safetensors", "linearized_low_noise.safetensors"}
