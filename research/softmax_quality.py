"""What sparse softmax does to the embedded model's videos: `python -m research.softmax_quality`.

The teacher; without any training Sol-Attn in every layer, at several densities; the shipped file
alone, and with Sol-Attn in the layers that it leaves softmax. All sample the same prompts from the
same noise, every step sparse. Rows are means over seeds of noise and prompts.
    python -m research.softmax_quality --num-samples 256 --batch-size 256 --seeds 3 --record  # GPU
    python -m research.softmax_quality --num-samples 48 --batch-size 12 --sampler-steps 10 \
        --seeds 1 --record  # CPU, five minutes
A video of this model has 448 tokens: blocks are of 16 tokens here, 28 to a video, and not of the 64
of real sizes; comfy-kitchen's plain PyTorch computes them. Each block's two neighbours are exact
besides, which is up to 7 % more.
"""

import contextlib
import dataclasses
import importlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.number_lists import read_densities
from benchmarks.record import RESULTS_FOLDER, show_rows, write_record
from linvideo_core import artifact
from linvideo_core.evaluate.compare import compare, load_linearized
from linvideo_core.evaluate.config import CompareConfig
from linvideo_core.kernels.softmax import SPARSE, sparse_attention
from linvideo_core.kernels.tiles import TokenGrid
from linvideo_core.models.attention import LinearAttention
from linvideo_core.models.attention_sites import attention_at, install, restore, shapes_of
from linvideo_core.models.families import identify
from linvideo_core.run import limits
from linvideo_core.run.config import Settings, option, parse, run_command, to_flags
from linvideo_core.run.devices import device_option, resolve_device
from linvideo_core.run.progress import TerminalCallbacks
from linvideo_core.teacher.config import TeacherConfig
from linvideo_core.teacher.teacher import load_teacher

from .sparse_baselines import BLOCK

_RECORD_NAME = "softmax_quality.json"
# Of a comparison's row -> of the record's; what is no number of that name there is left out.
_MEASURES = {"digit": "digit", "motion": "motion", "distance_to_teacher": "error"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityConfig(Settings):
    """What is compared, and how often."""

    comparison: CompareConfig = dataclasses.field(default_factory=CompareConfig)
    densities: str = option("0.1,0.2,0.4", "shares of exact key blocks")
    seeds: int = option(2, "seeds of noise and prompts, counted up from 0", limits.COUNT)
    device: str = device_option()
    out: Path = option(Path("runs/softmax-quality"), "folder of the record")
    record: bool = option(False, f"write results/{_RECORD_NAME}, not the one in --out")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.list_densities()

    def list_densities(self) -> list[float]:
        """Return the densities of the sparse rows."""
        return [*read_densities(self.densities, "densities").values()]


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """Let comfy-kitchen's plain PyTorch take blocks of 16 tokens."""
    module = importlib.import_module("comfy_kitchen.backends.eager.sol_attn")
    usual, module.BLOCK = module.BLOCK, BLOCK
    try:
        yield
    finally:
        module.BLOCK = usual


class SparseReference(nn.Module):
    """Sparse attention by its plain PyTorch, on any device and in any dtype."""

    def __init__(self, density: float) -> None:
        super().__init__()
        self.density = density

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, grid: TokenGrid | None = None
    ) -> Tensor:
        """Attend over all keys; query, key, value and the result are [B, L, N, D]."""
        return sparse_attention(query, key, value, self.density, backend="reference")


@contextlib.contextmanager
def changed(model: nn.Module, *, is_linear: bool, density: float) -> Iterator[nn.Module]:
    """Yield the model with the shipped file's linear layers, or sparse softmax ones, or both."""
    _, sites = identify(shapes_of(model))
    with contextlib.ExitStack() as stack:
        if is_linear:
            stack.enter_context(artifact.apply(load_linearized(None), model))
        if density < 1:
            kept = [s for s in sites if not isinstance(attention_at(model, s), LinearAttention)]
            originals = install(model, kept, lambda _: SparseReference(density))
            stack.callback(restore, model, kept, originals)
        yield model


def run(config: QualityConfig) -> list[dict[str, Any]]:
    """Return the record's rows: means over seeds, and the spread of each measure."""
    teacher = load_teacher(TeacherConfig()).to(resolve_device(config.device))
    densities = config.list_densities()
    cases = [(False, 1.0), *((is_linear, d) for is_linear in (False, True) for d in densities)]
    cases.insert(1, (True, 1.0))
    found: dict[str, list[dict[str, Any]]] = {}
    with small_blocks(), TerminalCallbacks() as callbacks:
        for seed in range(config.seeds):
            students = {
                f"{is_linear} {density}": changed(
                    teacher.model, is_linear=is_linear, density=density
                )
                for is_linear, density in cases[1:]
            }
            how = {"seed": seed, "callbacks": callbacks}
            for row in compare(teacher, students, config.comparison, **how).rows:
                found.setdefault(row["model"], []).append(row)
    return [_to_row(*each) for each in zip(cases, found.values(), strict=True)]


def _to_row(case: tuple[bool, float], seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    _, density = case
    row = {
        "softmax_backend": SPARSE if density < 1 else "default",
        "density": density,
        "linear_layers": seeds[0]["linear_layers"],
        "seeds": len(seeds),
    }
    for name, shown in _MEASURES.items():
        values = [seed[name] for seed in seeds]
        row[shown] = statistics.fmean(values)
        if len(values) > 1:
            row[f"{shown}_spread"] = statistics.stdev(values)
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, sample and measure, write the record's rows, show them."""
    config = parse(QualityConfig, argv, description=__doc__)
    rows = run(config)
    write_record(
        (RESULTS_FOLDER if config.record else config.out) / _RECORD_NAME,
        title="Sparse softmax layers of the embedded model, without and with linear ones",
        command=f"python -m research.softmax_quality "
        f"{to_flags(config, without=('out', 'record', 'device'))} --record",
        rows=rows,
        device=resolve_device(config.device),
    )
    sys.stdout.write(show_rows(rows))


if __name__ == "__main__":
    run_command(main)
