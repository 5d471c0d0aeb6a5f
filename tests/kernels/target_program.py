"""Launch the kernels on a card that is not here: Triton compiles for it, and loads nothing.

    python tests/kernels/target_program.py BACKEND ARCH WARP_SIZE SHARED_BYTES D M PASS

PASS is forward or backward, which is both. Prints JSON, a list for each kernel that fits: name,
bytes of shared memory, bytes of stack a thread, which are spilled registers.
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

from linvideo_core.kernels import triton_launch

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
AMD_STACK = b".private_segment_fixed_size"
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

    def __init__(self, shared_bytes: int) -> None:
        self._properties = {"max_shared_mem": shared_bytes}

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self._properties

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        loaded.append((name, shared, stack_of(binary)))
        return 1, 1, 0, 0, 1024


class Driver:
    """A card of a target, on which every launch does nothing."""

    get_current_device = get_current_stream = staticmethod(lambda *_: 0)
    launcher_cls = staticmethod(lambda source, metadata: lambda *launch: None)

    def __init__(self, target: GPUTarget, shared_bytes: int) -> None:
        self.utils = Utils(shared_bytes)
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target


def main(backend: str, arch: str, warp_size: str, shared: str, D: str, M: str, kind: str) -> None:
    """Launch what a training in bf16 does."""
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp_size))
    driver.set_active(Driver(target, int(shared)))
    if backend == "hip":
        torch.version.hip = "6.4"
    tensors: list[Any] = [torch.zeros(1, 40, 3, int(D), dtype=torch.bfloat16) for _ in "qkv"]
    tensors += [torch.zeros(3, int(D), int(M) // 2) for _ in "qk"]
    out, *states = triton_launch.forward(*tensors)
    if kind == "backward":
        triton_launch.backward(out, *tensors, *states, needs_map_gradients=True)
    print(json.dumps(loaded))


if __name__ == "__main__":
    main(*sys.argv[1:])
