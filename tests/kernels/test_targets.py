"""Cards that are not here: Triton's own compiler builds each launch that such a card is given.

What is taken is what compiles, fits the card's shared memory and keeps its registers. The widest
heads are compiled for the cards that have least; for the others, to save minutes, narrower ones.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.4")
ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("target_program.py")

# Backend, architecture, threads of a warp, bytes of shared memory that a program may have.
CARDS = {
    "A100": ("cuda", 80, 32, 163 * 1024),
    "RTX 30": ("cuda", 86, 32, 99 * 1024),
    "RTX 40": ("cuda", 89, 32, 99 * 1024),
    "H100": ("cuda", 90, 32, 227 * 1024),
    "B200": ("cuda", 100, 32, 227 * 1024),
    "RTX 50": ("cuda", 120, 32, 99 * 1024),
    "MI300X": ("hip", "gfx942", 64, 64 * 1024),
}
# Bytes a thread, 100 registers: the launches that were fastest on an H200 spill up to 352.
MAX_STACK = 400


@pytest.mark.slow
@pytest.mark.parametrize(
    ("card", "head_dim", "kind"),
    [
        ("A100", 64, "forward"),
        ("RTX 30", 128, "backward"),
        ("RTX 40", 64, "forward"),
        ("H100", 64, "forward"),
        ("B200", 64, "forward"),
        ("RTX 50", 128, "forward"),
        ("MI300X", 128, "forward"),
    ],
)
def test_every_launch_compiles_fits_and_spills_little(card: str, head_dim: int, kind: str) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    finished = subprocess.run(
        [sys.executable, PROGRAM, *map(str, (*CARDS[card], head_dim, head_dim)), kind],
        env={**kept, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert not finished.returncode, finished.stderr[-3000:]
    loaded = json.loads(finished.stdout.splitlines()[-1])
    assert len(loaded) == (9 if kind == "backward" else 3)
    spilling = [(name, stack) for name, _, stack in loaded if stack > MAX_STACK]
    assert not spilling and max(shared for _, shared, _ in loaded) <= CARDS[card][3]
