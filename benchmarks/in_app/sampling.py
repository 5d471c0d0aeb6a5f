"""Time whole samplings in a real ComfyUI server: `python -m benchmarks.in_app.sampling`.

A Wan with random weights makes a guided video by Euler: as ComfyUI computes it by itself, by other
kernels of softmax attention, with linear layers, and with both; and with every layer hybrid. Then
videos in four steps without guidance by LinVideo Few-Step Sampler, with linear layers and each
kernel, and with every layer hybrid; they are compared with the default's usual 50 guided steps,
whose seconds are told from --steps of them. Each is sampled briefly, then timed. Ratios are those
of one server. `peak_gb` is all that the card holds; of it PyTorch's pool holds `reserved_gb`, and
gave out `allocated_gb` at once: what lies between is holes that no tensor fitted into.
    python -m benchmarks.in_app.sampling --comfyui ~/ComfyUI --record
    python -m benchmarks.in_app.sampling --comfyui ~/ComfyUI --size 14b-720p --steps 3 \
        --kernels sparse --start-percent 0 --record
    python -m benchmarks.in_app.sampling --comfyui ~/ComfyUI --rows 'sparse linear' --record
    python -m benchmarks.in_app.sampling --comfyui ~/ComfyUI --without-triton --record
    python -m benchmarks.in_app.sampling --comfyui ~/ComfyUI --cpu
Each row is kept as soon as it is sampled, in --out or results; the first of a run replaces all
earlier ones of its size, ComfyUI and Triton. Of --rows each replaces itself alone.
"""

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from linvideo_core.kernels.softmax import DENSITY
from linvideo_core.models.config import LinearForm
from linvideo_core.run import limits
from linvideo_core.run.config import Settings, option, parse, run_command, to_flags
from linvideo_core.run.errors import SettingError, shown_value
from linvideo_core.transfer.preflight import check_tile

from ..models.sizes import GUIDANCE_SCALE, SIZES, VIDEO_STEPS, Size
from ..models.softmax_layers import RECORD_NAME, RECORD_TITLE
from ..record import RESULTS_FOLDER, change_part, check_parts, replacing, show_rows
from . import graphs
from .checkpoints import write_linear_layers
from .cli import find_installation
from .comfyui_server import Installation, PromptError, Server, read_version
from .workbench import Workbench, opened, watching

_GUIDED, _FEW = "sampling", "few_steps"
# What a model's self-attention is, in all layers or in those of its size.
_SOFTMAX, _LINEAR, _HYBRID = "softmax", "linear", "hybrid"
_FEW_STEPS = 4
# What is the same in all rows of a run, and what tells a row from all others.
_RUN = ("model", "resolution", "where", "triton")
_ROW = (*_RUN, "what", "softmax_backend", "linear_layers", "hybrid_layers")
_LIMIT_SECONDS = 600.0

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(Settings):
    """What is sampled, and where."""

    comfyui: Path | None = option(None, "folder of a ComfyUI; needed")
    python: Path | None = option(None, "interpreter with ComfyUI's requirements; none: this one")
    size: str = option("1.3b-480p", "model and video", choices=tuple(SIZES))
    steps: int = option(VIDEO_STEPS, "steps of a video", limits.COUNT)
    kernels: str = option(
        "",
        f"kernels beside the default: {', '.join(graphs.KERNELS)}, commas between; default: it "
        "alone; none: all",
    )
    rows: str = option(
        "",
        "rows to sample beside the first, such as 'sparse linear few steps', commas between; "
        "none: all",
    )
    start_percent: float = option(
        0.2, "part of sampling before sparse kernels begin", limits.Limits(low=0, high=0.99)
    )
    tile: str | None = option(None, "tile of hybrid layers; none: the larger one of the size's own")
    without_triton: bool = option(False, "as on a computer without Triton, by ComfyUI's own kernel")
    cpu: bool = option(False, "sample on the CPU, a model of next to no size")
    out: Path = option(Path("runs/sampling"), "folder of the server, its log, and the rows")
    record: bool = option(False, f"write results/{RECORD_NAME}, not the one in --out")

    def __post_init__(self) -> None:
        super().__post_init__()
        if strangers := [name for name in self.list_kernels() if name not in graphs.KERNELS]:
            raise SettingError(
                f"{{kernels}} {shown_value(self.kernels)} given, and {shown_value(strangers[0])} "
                f"is none: some of {', '.join(graphs.KERNELS)} are needed",
                "kernels",
            )
        # The first is sampled in any case, and not kept beside chosen ones.
        known = [str(way) for way in list_ways(self.list_kernels())[1:]]
        if strangers := [name for name in self.list_rows() if name not in known]:
            raise SettingError(
                f"{{rows}} {shown_value(self.rows)} given, and {shown_value(strangers[0])} is "
                f"none: some of {', '.join(known)} are needed",
                "rows",
            )
        check_tile(LinearForm(tile=self.hybrid_tile), [self.video.grid])

    def list_kernels(self) -> list[str]:
        """Return the kernels beside the default that are to be sampled with."""
        if self.kernels:
            names = dict.fromkeys(name.strip() for name in self.kernels.split(","))
            return [name for name in names if name != "default"]
        return [] if self.cpu or self.without_triton else [*graphs.KERNELS]

    def list_rows(self) -> list[str]:
        """Return the rows that are to be sampled beside the first; none: all."""
        return [name.strip() for name in self.rows.split(",")] if self.rows else []

    @property
    def video(self) -> Size:
        """The model and the video that are sampled."""
        return SIZES["tiny" if self.cpu else self.size]

    @property
    def device(self) -> str:
        """What samples."""
        return "cpu" if self.cpu else "cuda"

    @property
    def path(self) -> Path:
        """Where the table goes."""
        return (RESULTS_FOLDER if self.record else self.out) / RECORD_NAME

    @property
    def hybrid_tile(self) -> str:
        """The tile of hybrid layers."""
        return self.tile or self.video.tiles[-1]


@dataclasses.dataclass(frozen=True)
class Way:
    """How a row is sampled: its kernel of softmax attention, its kind of layers, few steps."""

    kernel: str
    kind: str
    is_few: bool = False

    def __str__(self) -> str:
        return " ".join([self.kernel, self.kind, *(["few steps"] if self.is_few else [])])

    @property
    def file(self) -> str:
        """Name of the file that makes its layers."""
        return f"random-{self.kind}-{_FEW if self.is_few else _GUIDED}.safetensors"


def find_host(config: SamplingConfig) -> Installation:
    """Return the ComfyUI that samples; raise ValueError for bad input or a missing GPU."""
    found = find_installation(config.comfyui, config.python)
    if not config.cpu and not torch.cuda.is_available():
        raise SettingError("no GPU was found; give {cpu} to sample a tiny model", "cpu")
    return dataclasses.replace(found, has_triton=not config.without_triton)


def run(config: SamplingConfig) -> list[Row]:
    """Sample all ways, write the record after each, and return a row of each.

    A kernel that fails is left out, and said, as are hybrid layers. Raises ValueError, before
    anything is sampled, for bad input, for a missing GPU, and where the record has rows of another
    device; PromptError where ComfyUI's own way fails, or linear layers beside it.
    """
    installation = find_host(config)
    check_parts(config.path, config.device)
    where = {
        "where": f"ComfyUI {read_version(installation.root)}",
        "triton": not config.without_triton,
    }
    rows: list[Row] = []
    with opened(installation, config.out, config.device) as bench:
        _write_files(bench.folder / "models" / "linvideo", config)
        file, dtype = bench.checkpoint(config.video, "bf16")
        base = graphs.load_wan(file, dtype, config.video, config.video.num_frames)
        for way in _choose(list_ways(_known_kernels(bench.server(), config)), config):
            try:
                measured = _sample(config, bench, base, way)
            except PromptError as error:
                if way.kernel == "default" and way.kind != _HYBRID:
                    raise
                logging.warning("%s is left out: %s", way, error)
                continue
            row = _describe(config, way) | where | measured
            rows.append(row | compare(row, rows[0] if rows else row))
            # The first of chosen rows stands for another run's, and the others have its seconds.
            if len(rows) > 1 or not config.rows:
                _keep(config, rows[-1], _ROW if len(rows) > 1 else _RUN)
            logging.info("%s: %.1f s", way, row["seconds"])
    return rows


def _choose(ways: Sequence[Way], config: SamplingConfig) -> list[Way]:
    """Return ComfyUI's own way and those that are chosen."""
    chosen = config.list_rows()
    return [way for way in ways if not chosen or way is ways[0] or str(way) in chosen]


def _keep(config: SamplingConfig, row: Row, key: Sequence[str]) -> None:
    """Put a row in place of all earlier ones that have the same values of `key`."""
    flags = to_flags(config, without=("comfyui", "python", "out", "record"))
    # Of few steps first: their ratios are over a guided row that goes.
    for part in (row["what"],) if "what" in key else (_FEW, _GUIDED):
        change_part(
            config.path,
            part,
            replacing([row], key, [row] if row["what"] == part else []),
            title=RECORD_TITLE,
            command=f"python -m benchmarks.in_app.sampling --comfyui PATH {flags} --record",
            device=config.device,
        )


def _known_kernels(server: Server, config: SamplingConfig) -> list[str]:
    # Of kernels by a node of ComfyUI's own, those whose node this ComfyUI has.
    return [name for name in config.list_kernels() if server.has_node(graphs.KERNELS[name][0])]


def list_ways(kernels: Sequence[str]) -> list[Way]:
    """Return the ways in their order, ComfyUI's own first; kernels: those beside the default."""
    guided = [Way("default", kind) for kind in (_SOFTMAX, _LINEAR, _HYBRID)]
    # Where every layer is hybrid there is no softmax for a kernel to compute.
    guided += [Way(kernel, kind) for kernel in kernels for kind in (_SOFTMAX, _LINEAR)]
    few = [dataclasses.replace(way, is_few=True) for way in guided if way.kind != _SOFTMAX]
    return [*guided, *few]


def _write_files(folder: Path, config: SamplingConfig) -> None:
    """Write a file of each kind of layers, for all steps and for few."""
    for kind, tile in ((_LINEAR, None), (_HYBRID, config.hybrid_tile)):
        for is_few in (False, True):
            path = folder / Way("default", kind, is_few).file
            write_linear_layers(path, config.video, _FEW_STEPS if is_few else 0, tile=tile)


def _describe(config: SamplingConfig, way: Way) -> Row:
    size, is_hybrid = config.video, way.kind == _HYBRID
    is_sparse = way.kernel.endswith("sparse")
    return {
        "what": _FEW if way.is_few else _GUIDED,
        "model": size.model,
        "resolution": size.resolution,
        "softmax_backend": None if is_hybrid else way.kernel,
        "density": DENSITY if way.kernel == "sparse" else None,
        "start_percent": config.start_percent if is_sparse else None,
        "linear_layers": len(size.layers) if way.kind == _LINEAR else 0,
        "hybrid_layers": size.config.num_layers if is_hybrid else 0,
        "tile": config.hybrid_tile if is_hybrid else None,
        "layers": size.config.num_layers,
    }


def compare(row: Row, default: Row) -> Row:
    """Return a row's speed-up, over what, and its seconds; default: the row of ComfyUI's own way.

    Few steps are compared with a usual video of the default, told from its measured steps.
    """
    seconds, baseline = default["seconds"], "default"
    if row["what"] == _FEW:
        seconds *= VIDEO_STEPS / default["steps"]
        baseline = f"default, {VIDEO_STEPS} guided steps"
        if default["steps"] != VIDEO_STEPS:
            baseline = f"{baseline} by {default['steps']} measured"
    return {
        "baseline": baseline,
        "baseline_seconds": seconds,
        "speedup": seconds / row["seconds"],
    }


def _sample(config: SamplingConfig, bench: Workbench, base: graphs.Nodes, way: Way) -> Row:
    """Sample once briefly, then a video; the node's words about linear layers come along."""
    bench.tidy()
    server, source, graph = bench.server(), "model", dict(base)
    if way.kind != _SOFTMAX:
        graph |= graphs.apply_file(way.file)
        source = "linear"
    if way.kernel != "default":
        graph |= graphs.choose_softmax(source, way.kernel, config.start_percent)
        source = "chosen"
    deadline = time.monotonic() + _LIMIT_SECONDS
    if way.is_few:
        steps, cfg = _FEW_STEPS, 1.0
        brief, whole = (graphs.sample_few(source, "sampling", seed=seed) for seed in (1, 2))
    else:
        steps, cfg = config.steps, GUIDANCE_SCALE
        brief, whole = (
            graphs.sample(source, count, "sampling", cfg=cfg, seed=seed)
            for count, seed in ((1, 1), (steps, 2))
        )
    server.run(graph | brief, deadline)
    with watching(lambda: bench.read_memory(server.process.pid)) as peak:
        begin = time.perf_counter()
        server.run(graph | whole, deadline)
        seconds = time.perf_counter() - begin
    row = {"steps": steps, "cfg": cfg, "seconds": seconds, "peak_gb": peak.gb}
    row |= _read_peaks(server)
    return row if way.kind == _SOFTMAX else {**row, "said": _read_words(server)}


def _read_peaks(server: Server) -> Row:
    """Return what PyTorch gave out and held at most in the last sampling; None on a CPU."""
    path = server.folder / "output" / "benchmark" / "peaks.json"
    if not path.exists():
        return {"allocated_gb": None, "reserved_gb": None}
    return json.loads(path.read_text(encoding="utf-8"))


def _read_words(server: Server) -> str:
    """Return what nodes have said since they were last asked."""
    path = server.folder / "output" / "benchmark" / "words.jsonl"
    if not path.exists():
        return ""
    lines = path.read_text(encoding="utf-8").splitlines()
    path.unlink()
    return "\n".join(dict.fromkeys(json.loads(line)["words"] for line in lines))


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, sample, show the rows."""
    config = parse(SamplingConfig, argv, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = run(config)
    columns = (
        "softmax_backend",
        "linear_layers",
        "hybrid_layers",
        "start_percent",
        "triton",
        "steps",
        "seconds",
        "speedup",
        "baseline",
        "peak_gb",
        "allocated_gb",
        "reserved_gb",
    )
    sys.stdout.write(f"\n{show_rows([{name: row[name] for name in columns} for row in rows])}\n")


if __name__ == "__main__":
    run_command(main)
