"""The program that ComfyUI's interpreter runs for the tests: it answers requests, line by line.

A request is JSON: {"file", "test", "case"} runs a test function of a file, with a case if it is not
null, {"source", "function", "arguments"} a function of the given source text. The answer is
{"outcome": "passed", "failed" or "skipped", "words": why, "printed": text}. The first line that it
writes says that it has started, and what `describe` returns.

`PACK` is set by whoever starts it. ComfyUI's flags are its command line.
"""

import contextlib
import functools
import importlib
import importlib.util
import io
import json
import os
import sys
import traceback
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what ComfyUI prints is no answer

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
from comfy.cli_args import args  # noqa: E402

if not args.cpu:  # the allocator and the dynamic video memory that ComfyUI starts with on a GPU
    import cuda_malloc  # noqa: F401
    import main  # noqa: F401
import comfy.model_management  # noqa: E402
import torch  # noqa: E402
import utils.extra_config  # noqa: E402, F401 - as main.py does, before others take the name


def load_pack(folder: str) -> None:
    """Load the pack as ComfyUI does, under a name of its own."""
    init = Path(folder) / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        "linvideo_pack", init, submodule_search_locations=[folder]
    )
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])


def describe() -> dict[str, Any]:
    """Return which `nodes` are found here, and what records say of this ComfyUI."""
    why_not_fused = importlib.import_module("linvideo_pack.linvideo_core.kernels").why_not_fused
    device = comfy.model_management.get_torch_device()
    triton = importlib.import_module("triton") if importlib.util.find_spec("triton") else None
    is_plain = device.type == "cpu" or why_not_fused(device, 128, 128, torch.bfloat16)
    return {
        "nodes": importlib.util.find_spec("nodes").origin,
        "torch": torch.__version__,
        "triton": triton and triton.__version__,
        "linear_layers": "plain" if is_plain else "fused",
    }


def find_function(request: dict[str, Any]) -> Callable[[], Any]:
    """Return what a request asks to be called."""
    if "source" in request:
        names: dict[str, Any] = {}
        exec(request["source"], names)  # noqa: S102
        return lambda: names[request["function"]](*request["arguments"])
    test = getattr(importlib.import_module(Path(request["file"]).stem), request["test"])
    return test if request["case"] is None else functools.partial(test, request["case"])


def answer(request: dict[str, Any]) -> dict[str, str]:
    """Call what is asked for as ComfyUI calls nodes, and say what came of it."""
    outcome, words = "passed", ""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            function = find_function(request)
            with torch.inference_mode():
                function()
        except unittest.SkipTest as missing:
            outcome, words = "skipped", str(missing)
        except BaseException:
            outcome, words = "failed", traceback.format_exc()
        end_node()
    return {"outcome": outcome, "words": words, "printed": printed.getvalue()}


def end_node() -> None:
    """Let go of what is compiled, and of what dynamic video memory keeps for a node."""
    if compiler := sys.modules.get("torch._dynamo"):
        compiler.reset()
        compiler.utils.counters.clear()
    memory = sys.modules.get("comfy.memory_management")
    if getattr(memory, "aimdo_enabled", False):
        import comfy_aimdo.model_vbar

        comfy.model_management.reset_cast_buffers()
        comfy_aimdo.model_vbar.vbars_reset_watermark_limits()


# ComfyUI's matrix products are full fp32. With TF32 a convolution's have 11 bits, in which much of
# what tests look for would be lost.
torch.backends.cudnn.allow_tf32 = False
load_pack(PACK)  # noqa: F821
sys.path.append(str(Path(PACK) / "tests" / "host"))  # noqa: F821
said = describe()
while True:
    print(json.dumps(said), file=answers, flush=True)
    if not (line := sys.stdin.readline()):
        break
    said = answer(json.loads(line))
