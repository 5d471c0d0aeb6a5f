"""Measure models inside ComfyUI, in a process that sees ComfyUI's modules alone.

`python -m benchmarks.models --comfyui PATH` starts it by its path, in ComfyUI's folder, with
the path of a job. No ComfyUI loads it.
"""

import json
import os
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

PACK = "linvideo_pack"
CPU_FLAGS = ("--cpu",)
# All weights stay on the card: what is measured is computing, not moving.
CUDA_FLAGS = ("--highvram",)


class _OneCore(MetaPathFinder, Loader):
    """Gives the nodes the core that the benchmarks have: its operators can be registered once."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        """Find the core's modules below the pack's name."""
        if name.startswith(f"{PACK}.linvideo_core"):
            return ModuleSpec(name, self)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module of the same name without the pack's."""
        module = import_module(spec.name.removeprefix(f"{PACK}."))
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Leave it as it was."""
        module.__spec__ = self._own


def main() -> None:
    """Run the job that the command line names."""
    root = Path(__file__).parents[2]
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # A script's own folder comes first, where modules of ours would hide ComfyUI's.
    sys.path[0] = os.getcwd()
    is_cuda = job["device"].startswith("cuda")
    flags = ("--use-pytorch-cross-attention", *(CUDA_FLAGS if is_cuda else CPU_FLAGS))
    sys.argv = [sys.argv[0], *flags]
    import_module("comfy.options").enable_args_parsing()
    # After ComfyUI's own folder, whose `nodes` is another than ours.
    sys.path.append(str(root))
    # Packages by their path alone: declaring nodes would need all that ComfyUI's server needs.
    for name, folder in ((PACK, root), (f"{PACK}.nodes", root / "nodes")):
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    sys.meta_path.insert(0, _OneCore())
    import_module("benchmarks.models.comfyui_worker").run(job)


if __name__ == "__main__":
    main()
