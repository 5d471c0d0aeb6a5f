"""Launch the kernels on cards that are not here: Triton compiles for them, and loads nothing.

    python tests/kernels/target_program.py '[["cuda", 86, 32, 128, 128, "bfloat16", "maps"], ...]'

Each case: backend, architecture, threads of a warp, D, M, dtype, and what has gradients: "", "maps"
or "tokens"; "hybrid" is the kernel with softmax within tiles. Prints a line of JSON for each: a
list for each kernel, in which are its name, bytes of shared memory and bytes of stack a thread,
which hold spilled registers.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from linvideo_core.kernels import hybrid_triton, triton_launch
from linvideo_core.kernels.tiles import Tiles

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
AMD_STACK = b".private_segment_fixed_size"
# Of a thread block, in KB; NVIDIA's by architecture.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
AMD_SHARED = 64
# Wide enough for the largest blocks of queries and keys.
TILES = Tiles(grid=(5, 9, 20), tile=(5, 9, 15))
loaded: list[tuple[str, int, int]] = []


def stack_of(binary: bytes) -> int:
    """Return a kernel's bytes of stack a thread, from its binary for NVIDIA or AMD."""
    if AMD_STACK in binary:
        # A number in msgpack: itself up to 127, else its width, then big-endian bytes.
        kind, *rest = binary.partition(AMD_STACK)[2][:5]
        width = {0xCC: 1, 0xCD: 2, 0xCE: 4}.get(kind, 0)
        return int.from_bytes(rest[:width], "big") if width else kind
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", file.name], text=True)
    return int(re.search(r"STACK:(\d+)", said)[1])


class Utils:
    """What Triton asks a card's driver for."""

    unload_module = staticmethod(lambda module: None)

    def __init__(self, target: GPUTarget) -> None:
        self._properties = {"max_shared_mem": SHARED.get(target.arch, AMD_SHARED) * 1024}

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self._properties

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        loaded.append((name, shared, stack_of(binary)))
        return 1, 1, 0, 0, 1024


class Driver:
    """A card of a target, on which every launch does nothing."""

    get_current_stream = staticmethod(lambda device: 0)
    launcher_cls = staticmethod(lambda source, metadata: lambda *launch: None)

    def __init__(self, target: GPUTarget, index: int = 0) -> None:
        self.utils = Utils(target)
        self._target, self._index = target, index

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by this number.
        return self._index


def launch(D: int, M: int, dtype: torch.dtype, gradients: str) -> None:
    """Launch what sampling or training does."""
    length = TILES.num_tokens if gradients == "hybrid" else 40
    tensors: list[Any] = [torch.zeros(1, length, 3, D, dtype=dtype) for _ in "qkv"]
    tensors += [torch.zeros(3, D, M // 2) for _ in "qk"]
    if gradients == "hybrid":
        hybrid_triton.moments(tensors[1])
        tensors += [torch.zeros(3), torch.zeros(1, 3, D), torch.zeros(1, 3, D, D)]
        found = hybrid_triton.forward(*tensors, TILES)
        arguments = (found[0], *tensors, *found, TILES)
        hybrid_triton.backward(*arguments, needs_map_gradients=True)
        return
    out, *states = triton_launch.forward(*tensors)
    if gradients:
        needs = gradients == "maps"
        triton_launch.backward(out, *tensors, *states, needs_map_gradients=needs)


def main(cases: str) -> None:
    """Launch each case as on a card of its own."""
    for i, (backend, architecture, warp_size, D, M, dtype, gradients) in enumerate(
        json.loads(cases)
    ):
        driver.set_active(Driver(GPUTarget(backend, architecture, warp_size), i))
        torch.version.hip = "6.4" if backend == "hip" else None
        triton_launch._architecture.cache_clear()
        triton_launch._first_launch.clear()
        loaded.clear()
        launch(D, M, getattr(torch, dtype), gradients)
        print(json.dumps(loaded), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
