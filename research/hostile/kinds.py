"""The kinds of files: as they should be, and how each is read."""

import contextlib
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from linvideo_core import artifact
from linvideo_core.evaluate.compare import EVALUATION_NAME, read_evaluation
from linvideo_core.evaluate.lora_file import add_changes, find_changes, load_lora
from linvideo_core.models.checkpoint import load_wan
from linvideo_core.models.config import LinearForm
from linvideo_core.models.wan import WanConfig, WanModel
from linvideo_core.prompts import read_prompts
from linvideo_core.prompts.embeddings import read_embeds
from linvideo_core.run.callbacks import Callbacks
from linvideo_core.run.config import to_json
from linvideo_core.run.context import Run
from linvideo_core.run.folder import CONFIG_NAME, check_run
from linvideo_core.teacher.teacher import Teacher
from linvideo_core.training.config import TrainingConfig
from linvideo_core.training.trainer import ParameterGroup, Task, fit
from linvideo_core.transfer.config import StudentConfig, TransferConfig
from linvideo_core.transfer.student import Student

_TEXT_DIM, _MODEL = 16, "model.safetensors"


class WrongError(Exception):
    """What was read cannot be what was written."""


def make_model() -> WanModel:
    """Return a Wan of next to no size."""
    torch.manual_seed(0)
    sizes = {"dim": 128, "num_heads": 1, "num_layers": 2, "ffn_dim": 64, "freq_dim": 16}
    model = WanModel(WanConfig(**sizes, text_dim=_TEXT_DIM, in_channels=4, out_channels=4))
    model.init_weights()
    return model.requires_grad_(False).eval()


def use(model: nn.Module) -> None:
    """Run a model; raise WrongError where it does not run or a weight is not finite."""
    if not all(p.isfinite().all() for p in model.parameters()):
        raise WrongError("a weight is not finite")
    config = getattr(model, "config", None) or WanConfig(dim=128, num_heads=1)
    latents = torch.zeros(1, config.in_channels, 1, 4, 4)
    embeds = torch.zeros(1, 3, config.text_dim)
    try:
        with torch.no_grad():
            model(latents, torch.tensor([500.0]), embeds)
    except RuntimeError as error:
        raise WrongError(f"the model does not run: {error}") from error


def write_artifact(folder: Path, **form: str) -> None:
    """Write a LINVIDEO file of two layers in a form."""
    embeds = torch.zeros(1, 3, _TEXT_DIM)
    teacher = Teacher(
        name="tiny",
        model=make_model(),
        prompts=["one"],
        prompt_embeds=embeds,
        negative_embeds=embeds[0],
        latent_shape=(4, 1, 4, 4),
        decode=lambda latents: latents.mean(dim=1),
        is_demo=False,
    )
    config = StudentConfig(lora_rank=2, form=LinearForm(**form))
    with Student(teacher, config, seed=3) as student:
        student.harden([0, 1])
        about = {"parameters": "lora", "objective": "adm", "steps": 1, "provenance": {"by": "us"}}
        made = artifact.extract(student.model, teacher.model, **about)
    artifact.save(made, folder / "linearized.safetensors")


def read_artifact(folder: Path) -> None:
    """Apply the file to its model."""
    found = artifact.load(folder / "linearized.safetensors")
    with artifact.apply(found, make_model()) as model:
        use(model)


def write_model(folder: Path) -> None:
    """Write a checkpoint in one file."""
    save_file(make_model().state_dict(), folder / _MODEL)


def write_shards(folder: Path) -> None:
    """Write a checkpoint in two files and their index."""
    tensors = sorted(make_model().state_dict().items())
    halves = {f"m-0000{i}-of-00002.safetensors": dict(tensors[i - 1 :: 2]) for i in (1, 2)}
    for name, half in halves.items():
        save_file(half, folder / name)
    places = {key: name for name, half in halves.items() for key in half}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))


def write_prompts(folder: Path) -> None:
    """Write embeddings of three prompts."""
    embeds = torch.randn(4, 5, _TEXT_DIM)
    about = {"padded_to": "12", "prompts": json.dumps(["a", "b", "c"]), "identity": "0" * 16}
    tensors = {"prompt_embeds": embeds[:3].half(), "negative_embeds": embeds[3].half()}
    save_file(tensors, folder / "prompts.safetensors", about)


def read_prompt_embeds(folder: Path) -> None:
    """Read the embeddings."""
    found = read_embeds(folder / "prompts.safetensors")
    tensors = (found.prompt_embeds, found.negative_embeds)
    are_finite = all(tensor.isfinite().all() for tensor in tensors)
    if not are_finite or len(found.prompts) != len(found.prompt_embeds):
        raise WrongError("the embeddings are not those of the prompts")


def write_prompt_list(folder: Path) -> None:
    """Write a list of prompts."""
    (folder / "prompts.txt").write_text("a dog runs\n\nun café, la nuit\n")


def write_lora(folder: Path) -> None:
    """Write a LoRA of two layers, as others name its tensors."""
    tensors: dict[str, Tensor] = {}
    for layer in ("self_attn.q", "cross_attn.o"):
        name = f"diffusion_model.blocks.0.{layer}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, 128)
        tensors[f"{name}.lora_B.weight"] = torch.randn(128, 2)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    tensors["diffusion_model.blocks.1.ffn.0.diff_b"] = torch.randn(64)
    save_file(tensors, folder / "lora.safetensors", {"format": "pt"})


def read_lora(folder: Path) -> None:
    """Add the LoRA to its model."""
    model = make_model()
    with add_changes(model, find_changes(load_lora(folder / "lora.safetensors"), model)):
        use(model)


class Fitting(Task):
    """A training of seven weights that counts its steps."""

    config = TrainingConfig(steps=6, batch_size=1, checkpoint_every=2, log_every=1)

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.zeros(7))
        self.num_steps = 0

    def parameter_groups(self) -> list[ParameterGroup]:
        """The weights."""
        return [ParameterGroup({"weight": self.weight}, 0.1)]

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        """A square, whose middle moves with the number of steps."""
        target = torch.randn(7, generator=generator) + self.num_steps
        return (self.weight - target).square().mean(), {}

    def after_step(self, step: int) -> None:
        """Count."""
        self.num_steps += 1

    def state(self) -> dict[str, Any]:
        """The count."""
        return {"num_steps": self.num_steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take the count back."""
        self.num_steps = state["num_steps"]


class _StopLate(Callbacks):
    def on_step_end(self, done: int, **metrics: float) -> None:
        if done == 5:
            raise KeyboardInterrupt


def train(folder: Path, callbacks: Callbacks | None = None) -> Tensor:
    """Return the weights that the training ends with."""
    task = Fitting()
    fit(task, task.config, Run(folder=folder, callbacks=callbacks or Callbacks()))
    return task.weight.detach()


def write_run(folder: Path) -> None:
    """Write the folder of a run that was stopped, and what it would have ended with."""
    (folder / CONFIG_NAME).write_text(to_json(TransferConfig()))
    rows = {"settings": {}, "rows": [{"model": "teacher"}], "velocity_rows": []}
    (folder / EVALUATION_NAME).write_text(json.dumps(rows))
    with contextlib.suppress(KeyboardInterrupt):
        train(folder / "training", _StopLate())


def read_run(folder: Path) -> None:
    """Check the settings, read the measures, train on."""
    check_run(folder, TransferConfig())
    read_evaluation(folder)
    with tempfile.TemporaryDirectory() as apart:
        expected = train(Path(apart))
    if not train(folder / "training").equal(expected):
        raise WrongError("the training ended in other weights")


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], object]]] = {
    "artifact": (write_artifact, read_artifact),
    "hybrid": (functools.partial(write_artifact, tile="1x1x2"), read_artifact),
    "model": (write_model, lambda folder: use(load_wan(folder / _MODEL))),
    "shards": (write_shards, lambda folder: use(load_wan(folder))),
    "prompts": (write_prompts, read_prompt_embeds),
    "prompt_list": (write_prompt_list, lambda folder: read_prompts(folder / "prompts.txt")),
    "lora": (write_lora, read_lora),
    "run": (write_run, read_run),
}
