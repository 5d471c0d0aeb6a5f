"""Where Triton cannot run: a sentence that says why, and plain PyTorch; each in its own process.

What a machine lacks is taken from Triton, PyTorch or the environment, never from our own code.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
TRITON_CALL = """
import torch
from linvideo_core.kernels import linear_attention, reference
torch.manual_seed(0)
inputs = [torch.randn(1, 9, 2, 64) for _ in "qkv"] + [torch.randn(2, 64, 32) / 8 for _ in "qk"]
expected = reference.linear_attention(*inputs)
assert torch.allclose(linear_attention(*inputs), expected, atol=1e-5)
try:
    assert torch.allclose(linear_attention(*inputs, backend="triton"), expected, atol=1e-5)
    print("computed")
except ValueError as error:
    print(error)
"""


def run(code: str, **environment: str) -> str:
    """Return what a program prints, or the last line of its exception."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return (finished.stdout or finished.stderr).strip().splitlines()[-1]


INTERPRETED = {"TRITON_INTERPRET": "1"}


def test_a_triton_without_dependent_launches_computes_without_them() -> None:
    """As all before 3.4."""
    hidden = (
        "import triton.language.extra.cuda as cuda\n"
        "for name in ('gdc_wait', 'gdc_launch_dependents'):\n"
        "    vars(cuda).pop(name, None)\n"
    )
    assert run(hidden + TRITON_CALL, **INTERPRETED) == "computed"


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        (
            "import sys; sys.modules['triton'] = None",
            "Triton is not installed (pip install triton)",
        ),
        (
            "import sys, linvideo_core.kernels\n"
            "sys.modules['triton'] = None; sys.platform = 'win32'",
            "Triton is not installed (pip install triton-windows)",
        ),
        (
            "import sys, torch; sys.modules['triton'] = None; torch.version.hip = '6.4'",
            "Triton is not installed, which PyTorch for ROCm comes with",
        ),
        ("import triton; triton.__version__ = '3.2.0'", "Triton 3.2.0 is installed; 3.3 or newer"),
    ],
    ids=["none", "none, Windows", "none, ROCm", "old"],
)
def test_a_triton_that_is_not_there_or_too_old_is_said(lacking: str, said: str) -> None:
    assert said in run(f"{lacking}\n{TRITON_CALL}", **INTERPRETED)


@pytest.mark.parametrize(
    ("card", "said"),
    [
        (
            "torch.version.hip = '6.4'\n"
            "card = types.SimpleNamespace(gcnArchName='gfx1100:sramecc-')\n"
            "torch.cuda.get_device_properties = lambda _: card",
            "of AMD's GPUs the fused kernels know gfx942, not gfx1100",
        ),
        (
            "torch.cuda.get_device_capability = lambda _: (7, 5)\n"
            "torch.cuda.get_device_name = lambda _: 'RTX 2080'",
            "RTX 2080 is older than the fused kernels can use",
        ),
    ],
    ids=["AMD", "old"],
)
def test_a_card_that_the_kernels_do_not_know_is_named(card: str, said: str) -> None:
    asked = (
        "from linvideo_core.kernels import why_not_fused\n"
        "print(why_not_fused(torch.device('cuda', 0), 128, 128, torch.bfloat16))"
    )
    assert run(f"import torch, types\n{card}\n{asked}") == said


@pytest.mark.parametrize("compiler", ["/nonexistent", "false"])
def test_a_compiler_that_is_not_there_or_fails_is_said(compiler: str, tmp_path: Path) -> None:
    """The second is what a compiler does that finds no Python.h."""
    # Triton believes in a GPU and builds its driver, for kernels that are not interpreted.
    gpu = (
        "import os, torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "from linvideo_core.kernels import triton_launch\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
    )
    places = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    said = run(gpu + TRITON_CALL, CC=compiler, **places)
    assert "it needs a C compiler and Python's headers" in said


def test_a_pytorch_that_is_too_old_is_refused_in_a_sentence() -> None:
    old = (
        "import importlib.metadata as m; m.version = lambda _: '2.4.1+cu121'; import linvideo_core"
    )
    said = "ImportError: PyTorch 2.4.1+cu121 is installed; LinVideo needs 2.5 or newer"
    assert run(old) == said


def test_installing_the_requirements_replaces_neither_pytorch_nor_triton() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert "torch" in lines
    assert not [line for line in lines if "triton" in line.partition("#")[0]]
