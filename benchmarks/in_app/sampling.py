"""Time whole samplings in a real ComfyUI server: `python -m benchmarks.in_app.sampling`.

A Wan with random weights makes a guided video by Euler: as ComfyUI computes it by itself, by other
kernels of softmax attention, with linear layers, and with both. Each is sampled briefly, then
timed. Ratios are those of one server.
    python -m benchmarks.in_app.sampling --comfyui ~/ComfyUI --record
    python -m benchmarks.in_app.sampling --comfyui ~/ComfyUI --without-triton --record
    python -m benchmarks.in_app.sampling --comfyui ~/ComfyUI --cpu
Rows of one size, ComfyUI and Triton replace earlier ones in --out or results.
"""

import dataclasses
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from linvideo_core.run import limits
from linvideo_core.run.config import Settings, option, parse, run_command, to_flags
from linvideo_core.run.errors import SettingError

from ..models.sizes import GUIDANCE_SCALE, SIZES, VIDEO_STEPS, Size
from ..models.softmax_layers import RECORD_NAME, RECORD_TITLE
from ..record import RESULTS_FOLDER, check_parts, read_part, show_rows, write_part
from . import graphs
from .checkpoints import write_linear_layers
from .cli import find_installation
from .comfyui_server import Installation, PromptError, Server, read_version
from .workbench import Workbench, watching

_PART = "sampling"
_KEY = ("model", "resolution", "where", "triton")
_LIMIT_SECONDS = 600.0

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(Settings):
    """What is sampled, and where."""

    comfyui: Path | None = option(None, "folder of a ComfyUI; needed")
    python: Path | None = option(None, "interpreter with ComfyUI's requirements; none: this one")
    size: str = option("1.3b-480p", "model and video", choices=tuple(SIZES))
    steps: int = option(VIDEO_STEPS, "steps of a video", limits.COUNT)
    without_triton: bool = option(False, "as on a computer without Triton, by ComfyUI's own kernel")
    cpu: bool = option(False, "sample on the CPU, a model of next to no size")
    out: Path = option(Path("runs/sampling"), "folder of the server, its log, and the rows")
    record: bool = option(False, f"write results/{RECORD_NAME}, not the one in --out")

    @property
    def video(self) -> Size:
        """The model and the video that are sampled."""
        return SIZES["tiny" if self.cpu else self.size]


def find_host(config: SamplingConfig) -> Installation:
    """Return the ComfyUI that samples; raise ValueError for bad input or a missing GPU."""
    found = find_installation(config.comfyui, config.python)
    if not config.cpu and not torch.cuda.is_available():
        raise SettingError("no GPU was found; give {cpu} to sample a tiny model", "cpu")
    return dataclasses.replace(found, has_triton=not config.without_triton)


def run(config: SamplingConfig) -> list[Row]:
    """Sample all ways and return a row of each.

    A kernel that fails is left out, and said. Raises ValueError for bad input or a missing GPU,
    PromptError where ComfyUI's own way fails.
    """
    installation = find_host(config)
    config.out.mkdir(parents=True, exist_ok=True)
    bench = Workbench(installation, config.out.absolute(), "cpu" if config.cpu else "cuda")
    write_linear_layers(bench.folder / "models" / "linvideo" / "random.safetensors", config.video)
    file, dtype = bench.checkpoint(config.video, "bf16")
    base = graphs.load_wan(file, dtype, config.video, config.video.num_frames)
    where = {
        "where": f"ComfyUI {read_version(installation.root)}",
        "triton": not config.without_triton,
    }
    rows: list[Row] = []
    try:
        server = bench.server()
        for kernel, is_linear in _ways(server, config):
            try:
                measured = _sample(config, bench, base, kernel, is_linear=is_linear)
            except PromptError as error:
                if kernel == "default":
                    raise
                logging.warning("%s is left out: %s", kernel, error)
                continue
            row = _describe(config.video, kernel, is_linear=is_linear) | where | measured
            row["speedup"] = (rows[0] if rows else row)["seconds"] / row["seconds"]
            rows.append(row)
            logging.info(
                "%s, %d layers linear: %.1f s", kernel, row["linear_layers"], row["seconds"]
            )
    finally:
        bench.stop()
        shutil.rmtree(bench.folder, ignore_errors=True)
    return rows


def _ways(server: Server, config: SamplingConfig) -> Iterator[tuple[str, bool]]:
    """Yield a kernel of softmax attention, and whether some layers are linear."""
    kernels = [] if config.cpu or config.without_triton else graphs.KERNELS
    # A ComfyUI without its own node has no comfy-kitchen that could compute ours.
    has_sparse = server.has_node(graphs.KERNELS["ComfyUI's sparse"][0])
    known = [name for name in kernels if has_sparse or not name.endswith("sparse")]
    for kernel in ("default", *known):
        yield kernel, False
        yield kernel, True


def _describe(size: Size, kernel: str, *, is_linear: bool) -> Row:
    return {
        "model": size.model,
        "resolution": size.resolution,
        "softmax_backend": kernel,
        "linear_layers": len(size.layers) if is_linear else 0,
        "layers": size.config.num_layers,
    }


def _sample(
    config: SamplingConfig, bench: Workbench, base: graphs.Nodes, kernel: str, *, is_linear: bool
) -> Row:
    """Sample once briefly, then a video; the node's words about linear layers come along."""
    bench.tidy()
    server, source, graph = bench.server(), "model", dict(base)
    if is_linear:
        graph |= graphs.apply_file("random.safetensors")
        source = "linear"
    if kernel != "default":
        graph |= graphs.choose_softmax(source, kernel)
        source = "chosen"
    deadline = time.monotonic() + _LIMIT_SECONDS
    how = {"tag": "sampling", "cfg": GUIDANCE_SCALE}
    server.run(graph | graphs.sample(source, 2, seed=1, **how), deadline)
    with watching(lambda: bench.read_memory(server.process.pid)) as peak:
        begin = time.perf_counter()
        server.run(graph | graphs.sample(source, config.steps, seed=2, **how), deadline)
        seconds = time.perf_counter() - begin
    row = {"steps": config.steps, "seconds": seconds, "baseline": "default", "peak_gb": peak.gb}
    return {**row, "said": _read_words(server)} if is_linear else row


def _read_words(server: Server) -> str:
    """Return what nodes have said since they were last asked."""
    path = server.folder / "output" / "benchmark" / "words.jsonl"
    if not path.exists():
        return ""
    lines = path.read_text(encoding="utf-8").splitlines()
    path.unlink()
    return "\n".join(dict.fromkeys(json.loads(line)["words"] for line in lines))


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, sample, keep the rows, show them."""
    config = parse(SamplingConfig, argv, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    find_host(config)
    device = "cpu" if config.cpu else "cuda"
    path = (RESULTS_FOLDER if config.record else config.out) / RECORD_NAME
    check_parts(path, device)
    rows = [{"what": _PART} | row for row in run(config)]
    place = [rows[0][name] for name in _KEY]
    earlier, _ = read_part(path, _PART)
    hidden = ("comfyui", "python", "out", "record")
    write_part(
        path,
        _PART,
        title=RECORD_TITLE,
        command="python -m benchmarks.in_app.sampling --comfyui PATH "
        f"{to_flags(config, without=hidden)} --record",
        rows=[*(row for row in earlier if [row[name] for name in _KEY] != place), *rows],
        device=device,
        is_added_to=True,
    )
    columns = (
        "softmax_backend",
        "linear_layers",
        "triton",
        "steps",
        "seconds",
        "speedup",
        "peak_gb",
    )
    sys.stdout.write(f"\n{show_rows([{name: row[name] for name in columns} for row in rows])}\n")


if __name__ == "__main__":
    run_command(main)
