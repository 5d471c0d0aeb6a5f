"""Measure models inside ComfyUI, in a process that sees ComfyUI's modules alone.

`python -m linvideo_core.benchmark --comfyui PATH` starts it by its path, in ComfyUI's folder, with
the path of a job. No ComfyUI loads it.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

PACK = "linvideo_pack"
CPU_FLAGS = ("--cpu",)
# All weights stay on the card: what is measured is computing, not moving.
CUDA_FLAGS = ("--highvram",)


def main() -> None:
    """Run the job that the command line names."""
    root = Path(__file__).parents[1]
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # A script's own folder comes first, where modules of ours would hide ComfyUI's.
    sys.path[0] = os.getcwd()
    is_cuda = job["device"].startswith("cuda")
    flags = ("--use-pytorch-cross-attention", *(CUDA_FLAGS if is_cuda else CPU_FLAGS))
    sys.argv = [sys.argv[0], *flags]
    import_module("comfy.options").enable_args_parsing()
    # Packages by their path alone: declaring nodes would need all that ComfyUI's server needs.
    for name, folder in ((PACK, root), (f"{PACK}.nodes", root / "nodes")):
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    import_module(f"{PACK}.nodes.scale").run(job)


if __name__ == "__main__":
    main()
