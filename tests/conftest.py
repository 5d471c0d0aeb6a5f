"""The debug model that the method's tests run on: a tiny, random Wan with everything around it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Each worker, and what it starts, has its share of the cores. Threads that wait sleep: two
    # processes that spin on two cores hold each other up for minutes.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported: its kernels then run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.models.sizes import SIZES
from linvideo_core.artifact import Artifact, extract
from linvideo_core.models.attention_sites import shapes_of
from linvideo_core.models.checkpoint import Checkpoint
from linvideo_core.models.config import LinearForm
from linvideo_core.models.wan import WanConfig, WanModel
from linvideo_core.run.callbacks import Callbacks
from linvideo_core.run.config import override
from linvideo_core.teacher import teacher as teachers
from linvideo_core.teacher.config import TeacherConfig
from linvideo_core.teacher.teacher import Teacher, TeacherCheckpoint
from linvideo_core.transfer.config import StudentConfig, TransferConfig
from linvideo_core.transfer.student import Student

LATENT_SHAPE = (4, 2, 6, 4)
TEXT_DIM = 16


def pytest_configure() -> None:
    """Let tests and what they start heed Ctrl+C, also where a shell runs them in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a CUDA device where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def make_wan(*, num_layers: int = 3, num_heads: int = 1, seed: int = 0) -> WanModel:
    """Return a random Wan whose every parameter acts on its output."""
    torch.manual_seed(seed)
    config = WanConfig(
        dim=128 * num_heads,
        num_heads=num_heads,
        num_layers=num_layers,
        ffn_dim=96,
        text_dim=TEXT_DIM,
        freq_dim=16,
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
    )
    model = WanModel(config)
    model.init_weights()
    nn.init.normal_(model.head.head.weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sum in one order here and in the processes that are started."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def wan() -> WanModel:
    """A random Wan of three layers, one head of 128."""
    return make_wan()


@pytest.fixture
def wide_wan() -> WanModel:
    """A random Wan of three layers, two heads of 128."""
    return make_wan(num_heads=2)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and prompt embeddings that `wan` takes."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, *LATENT_SHAPE, generator=generator)
    prompt_embeds = torch.randn(2, 5, TEXT_DIM, generator=generator)
    return latents, torch.tensor([810.0, 120.0]), prompt_embeds


@pytest.fixture
def teacher(wan: WanModel) -> Teacher:
    """The frozen `wan` as a teacher with three prompts."""
    return make_teacher(wan)


def make_teacher(wan: WanModel) -> Teacher:
    """Return a model, frozen, as a teacher with three prompts."""
    generator = torch.Generator().manual_seed(6)
    return Teacher(
        name="tiny",
        model=wan.eval().requires_grad_(False),
        prompts=["one", "two", "three"],
        prompt_embeds=torch.randn(3, 5, TEXT_DIM, generator=generator),
        negative_embeds=torch.randn(5, TEXT_DIM, generator=generator),
        latent_shape=LATENT_SHAPE,
        decode=lambda latents: latents.mean(dim=1),
        is_demo=False,
    )


def headers_of(name: str, config: TeacherConfig | None = None) -> TeacherCheckpoint:
    """Return a Wan of a published size, of which there are headers alone."""
    config = config or TeacherConfig()
    with torch.device("meta"):
        shapes = shapes_of(WanModel(SIZES[name].config))
    tensors = {key: SimpleNamespace(shape=shape) for key, shape in shapes.items()}
    checkpoint = Checkpoint(path=Path("wan"), config=SIZES[name].config, tensors=tensors)
    latent_shape = (16, (config.num_frames - 1) // 4 + 1, config.height // 8, config.width // 8)
    return TeacherCheckpoint(checkpoint=checkpoint, source=None, latent_shape=latent_shape)


def open_headers(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let every model of one's own be a Wan of a published size; see `headers_of`."""
    monkeypatch.setattr(
        teachers, "open_teacher", lambda config, more_sizes=(): headers_of(name, config)
    )


def assert_fitted(
    found: dict[str, Any], batch_size: int, accumulation: int, offload_blocks: int
) -> None:
    """Hold settings of a model of one's own to what a card should decide of them."""
    fitted = (found["batch_size"], found["accumulation"], found.get("offload_blocks", 0))
    assert fitted == (batch_size, accumulation, offload_blocks)
    assert found["frozen"] == "bf16" and found["activation_checkpointing"]


def save_inputs(teacher: Teacher, folder: Path) -> dict[str, Path]:
    """Write a teacher's checkpoint and prompts as a user has them; return them by their flags."""
    paths = {f"--{name}": folder / f"{name}.safetensors" for name in ("model", "prompts")}
    save_file(teacher.model.state_dict(), paths["--model"])
    embeds = {"prompt_embeds": teacher.prompt_embeds, "negative_embeds": teacher.negative_embeds}
    save_file(embeds, paths["--prompts"])
    return paths


class Recorder(Callbacks):
    """Keeps what it is told; `stop_at`, a stage and a step of it, stops with KeyboardInterrupt."""

    def __init__(self, stop_at: tuple[str, int] | None = None) -> None:
        self.stop_at = stop_at
        self.stages: list[str] = []
        self.seen: list[tuple[str, int]] = []
        self.totals: dict[str, int] = {}

    def on_stage(self, stage: str, total: int, done: int = 0, detail: str = "") -> None:
        self.stages.append(f"{detail}: {stage}" if detail else stage)
        self.totals[stage] = total
        self._see(stage, done)

    def on_step_end(self, done: int, **metrics: float) -> None:
        self._see(self.seen[-1][0], done)

    def _see(self, stage: str, done: int) -> None:
        self.seen.append((stage, done))
        if (stage, done) == self.stop_at:
            raise KeyboardInterrupt


@pytest.fixture
def linearized(teacher: Teacher) -> Artifact:
    """A file of two linear layers with random low-rank changes, as a transfer leaves it."""
    return make_file(teacher, LinearForm())


@pytest.fixture
def hybrid(teacher: Teacher) -> Artifact:
    """The same of hybrid layers, their tiles cut off at the edges of a video of `inputs`."""
    return make_file(teacher, LinearForm(tile="1x2x0"))


def make_file(teacher: Teacher, form: LinearForm) -> Artifact:
    """Return a file of layers 0 and 2 in a form; the teacher is left as it was."""
    with Student(teacher, StudentConfig(lora_rank=2, form=form), seed=3) as student:
        student.harden([0, 2])
        for i, parameter in enumerate(student.weights.values()):
            generator = torch.Generator().manual_seed(i)
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        return extract(
            student.model, teacher.model, parameters="lora", objective="adm", steps=1, provenance={}
        )


def small_transfer(model_path: Path, **changes: Any) -> TransferConfig:
    """Return a transfer of seconds of a `wan` in a file; its prompts are written beside it."""
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(4, 5, TEXT_DIM, generator=generator)
    prompts = model_path.parent / "prompts.safetensors"
    save_file({"prompt_embeds": embeds[:3], "negative_embeds": embeds[3].clone()}, prompts)
    values = {
        "model": model_path,
        "prompts": prompts,
        "num_frames": 5,
        "height": 32,
        "width": 32,
        "num_trajectories": 2,
        "states_per_trajectory": 2,
        "sampler_steps": 4,
        "warm_start_steps": 2,
        "steps": 3,
        "batch_size": 2,
        "target": 1,
        "lora_rank": 2,
        # Not the default: its student moves, too, so that more can go wrong.
        "objective": "adm",
        "evaluate_samples": 2,
        "checkpoint_every": 1,
        "device": "cpu",
        "precision": "fp32",
        "out": model_path.parent / "run",
        **changes,
    }
    return override(TransferConfig(), values)
