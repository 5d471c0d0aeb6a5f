"""Cards that are not here: Triton's own compiler builds each launch that such a card is given.

What is taken compiles, fits the card's shared memory and keeps its registers, but for a few bytes.
Two cases are always compiled; LINVIDEO_ALL_CARDS=1 compiles all, which takes minutes.
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
WANTS_ALL = pytest.mark.skipif(
    os.environ.get("LINVIDEO_ALL_CARDS") != "1", reason="compiled if LINVIDEO_ALL_CARDS is 1"
)

# Backend, architecture, threads of a warp.
CARDS = {
    "A100": ("cuda", 80, 32),
    "RTX 30": ("cuda", 86, 32),
    "RTX 40": ("cuda", 89, 32),
    "H100": ("cuda", 90, 32),
    "B200": ("cuda", 100, 32),
    "RTX 50": ("cuda", 120, 32),
    "MI300X": ("hip", "gfx942", 64),
}
# D, M, dtype, what has gradients. Frozen maps take less than those that learn.
FIRST = [(128, 128, "bfloat16", "maps"), (128, 128, "bfloat16", "hybrid")]
EVERYWHERE = [*FIRST, (64, 128, "bfloat16", "maps"), (64, 128, "bfloat16", "hybrid")]
ON_NVIDIA = [*EVERYWHERE, (64, 64, "float32", "maps"), (64, 64, "float32", "hybrid")]
WIDE = (128, 256, "bfloat16", "tokens")
NUM_KERNELS = {"maps": 9, "tokens": 8, "hybrid": 12}
# What Hopper spills most is what was fastest on it, or fp32: 4 KB.
CASES = {card: ON_NVIDIA for card in CARDS} | {
    "A100": [*ON_NVIDIA, WIDE],
    "H100": EVERYWHERE,
    "B200": [*ON_NVIDIA, WIDE],
    "MI300X": EVERYWHERE,
}
# Bytes a thread, which has 255 registers of 4 bytes, by M / D.
MAX_STACK = {1: 400, 2: 600}


@pytest.mark.parametrize(
    ("card", "cases"),
    [
        pytest.param("RTX 30", FIRST, id="RTX 30, first"),
        *(pytest.param(card, CASES[card], id=card, marks=WANTS_ALL) for card in CARDS),
    ],
)
def test_every_launch_compiles_fits_and_spills_little(
    card: str, cases: list[tuple[int, int, str, str]]
) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, PROGRAM, json.dumps([(*CARDS[card], *case) for case in cases])],
        env={**kept, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    # A launch that does not fit ends the program, as it does on a card.
    assert not finished.returncode, finished.stderr[-3000:]
    compiled = [json.loads(line) for line in finished.stdout.splitlines()]
    assert len(compiled) == len(cases)
    for case, kernels in zip(cases, compiled, strict=True):
        assert len(kernels) == NUM_KERNELS[case[3]]
        most = MAX_STACK[case[1] // case[0]]
        assert [name for name, _, stack in kernels if stack > most] == [], case
