"""Where Triton cannot run: a sentence that says why, and plain PyTorch.

What a machine lacks is taken from Triton, PyTorch or the environment, never from our own code.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from linvideo_core import kernels

ROOT = Path(__file__).parents[2]
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _nothing_is_known_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_refuse_device_once", kernels.refuse_device)
    monkeypatch.setattr(kernels, "_tried", {})


def why_not() -> str:
    return kernels.why_not_fused(GPU, 128, 128, torch.bfloat16)


@pytest.mark.parametrize(
    ("platform", "hip", "said"),
    [
        ("linux", None, "Triton is not installed (pip install triton)"),
        ("win32", None, "Triton is not installed (pip install triton-windows)"),
        ("linux", "6.4", "Triton is not installed, which PyTorch for ROCm comes with"),
    ],
    ids=["Linux", "Windows", "ROCm"],
)
def test_a_triton_that_is_not_there_is_named(
    platform: str, hip: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert why_not() == said


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_a_device_that_no_kernel_is_for_is_named(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    said = f"the fused kernels are for NVIDIA's and AMD's GPUs, not for {device}"
    assert kernels.why_not_fused(torch.device(device), 128, 128, torch.bfloat16) == said


def lend_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "RTX 2080")


def test_a_card_that_the_kernels_do_not_know_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lend_a_gpu(monkeypatch, (7, 5))
    assert why_not() == "RTX 2080 is older than the fused kernels can use"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    card = SimpleNamespace(gcnArchName="gfx1100:sramecc-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert why_not() == "of AMD's GPUs the fused kernels know gfx942, not gfx1100"


@pytest.mark.parametrize(
    ("capability", "shape", "is_refused"),
    [
        ((8, 6), (128, 256, torch.bfloat16), True),
        ((12, 0), (64, 128, torch.float32), True),
        ((8, 9), (64, 128, torch.bfloat16), False),
        ((8, 0), (128, 256, torch.bfloat16), False),
        ((9, 0), (128, 256, torch.bfloat16), False),
    ],
)
def test_a_state_that_a_card_has_no_room_for_is_refused_by_name(
    capability: tuple[int, int],
    shape: tuple[int, int, torch.dtype],
    is_refused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lend_a_gpu(monkeypatch, capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    D, M, dtype = shape
    name = str(dtype).removeprefix("torch.")
    said = f"RTX 2080 has no room for {M} features at head dim {D} in {name}"
    assert kernels.why_not_fused(GPU, *shape) == (said if is_refused else "")


def test_features_that_no_kernel_of_hybrid_layers_is_for_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lend_a_gpu(monkeypatch, (9, 0))
    found = kernels.why_not_fused(GPU, 128, 256, torch.bfloat16, attention_mass="query")
    assert found == "the fused kernels know hybrid layers of 128 features at most"


def test_a_pytorch_without_gpus_refuses_a_fake_tensor_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "meta"):
        with FakeTensorMode():
            x, w = torch.empty(1, 9, 2, 64, device=device), torch.empty(2, 64, 32, device=device)
            assert kernels.linear_attention(x, x, x, w, w).shape == x.shape
    assert why_not() == "PyTorch finds no GPU"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU that is there would compute")
def test_nothing_is_tried_or_remembered_while_a_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lend_a_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert why_not() == ""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tried = why_not()
    assert tried.startswith("Triton fails (")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert why_not() == tried


# Kernels that are not interpreted, on a GPU that Triton believes in: it builds its driver for it.
CANNOT_COMPILE = """
import os, torch, triton
import triton.language.extra.cuda as cuda
from linvideo_core.kernels import why_not_fused

for name in ("gdc_wait", "gdc_launch_dependents"):
    vars(cuda).pop(name, None)
torch.cuda.is_available = lambda: True
os.environ["TRITON_INTERPRET"] = "1"

def ask(dtype):
    print(why_not_fused(torch.device("cpu"), 64, 64, dtype))

here, triton.__version__ = triton.__version__, "3.2.0"
ask(torch.float32)
del os.environ["TRITON_INTERPRET"]
triton.__version__ = here
import linvideo_core.kernels.triton_launch
os.environ["TRITON_INTERPRET"] = "1"
for os.environ["CC"], dtype in (("/nonexistent", torch.float16), ("false", torch.bfloat16)):
    ask(dtype)
"""


def run(code: str, **environment: str) -> list[str]:
    """Return the lines that a program prints, or those of its exception."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return (finished.stdout or finished.stderr).strip().splitlines()


def test_an_old_triton_and_a_compiler_that_is_not_there_or_fails_are_said(tmp_path: Path) -> None:
    """A Triton before 3.4 has no dependent launches; `false` does what finds no Python.h."""
    pytest.importorskip("triton", minversion="3.3")
    places = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    old, *without = run(CANNOT_COMPILE, **places)
    assert "Triton 3.2.0 is installed; 3.3 or newer is needed" in old
    assert len(without) == 2
    for said in without:
        assert "it needs a C compiler and Python's headers" in said


FIRST_CALL_IN_A_GRAPH = """
import torch
from linvideo_core.kernels import linear_attention

x = torch.randn(1, 300, 2, 64, device="cuda", dtype=torch.bfloat16)
w = torch.randn(2, 64, 64, device="cuda")
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        linear_attention(x, x, x, w, w)
except RuntimeError as error:
    print("the capture failed:", type(error).__name__)
graph = torch.cuda.CUDAGraph()
linear_attention(x, x, x, w, w)
with torch.cuda.graph(graph):
    found = linear_attention(x, x, x, w, w)
graph.replay()
expected = linear_attention(*(y.double() for y in (x, x, x, w, w)), backend="reference")
print(float((found.double() - expected).norm() / expected.norm()))
"""


@pytest.mark.gpu
def test_a_first_call_inside_a_cuda_graph_harms_no_later_one(tmp_path: Path) -> None:
    """Whether a kernel that was never compiled can be recorded is for Triton to say."""
    *_, error = run(FIRST_CALL_IN_A_GRAPH, TRITON_CACHE_DIR=str(tmp_path))
    assert float(error) < 0.02


OLD = "PyTorch 2.4.1+cu121 is installed; LinVideo needs 2.5 or newer: update PyTorch"


def with_torch(version: str) -> str:
    """Return code after which an installed PyTorch says that it has a version."""
    return f"import importlib.metadata as m; m.version = lambda _: {version!r}; "


def test_a_pytorch_that_is_too_old_is_refused_in_a_sentence() -> None:
    assert run(with_torch("2.4.1+cu121") + "import linvideo_core")[-1] == f"ImportError: {OLD}"


@pytest.mark.parametrize("command", ["transfer", "distill", "evaluate"])
def test_a_command_on_a_pytorch_that_is_too_old_ends_with_that_sentence_alone(
    command: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(with_torch("2.4.1+cu121"), encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-m", f"linvideo_core.{command}", "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"error: {OLD}\n")


@pytest.mark.parametrize("version", ["garbage", "", "2", "2.11.0a0+gitabc", "2.5a1", "3.0"])
def test_the_version_of_a_pytorch_of_ones_own_is_no_obstacle(version: str) -> None:
    assert run(with_torch(version) + "import linvideo_core; print('there')") == ["there"]


def test_installing_the_requirements_replaces_neither_pytorch_nor_triton() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert "torch" in lines
    assert not [line for line in lines if "triton" in line.partition("#")[0]]
