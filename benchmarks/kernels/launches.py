"""Which launch of a kernel is fastest on this card: `python -m benchmarks.kernels.launches`.

A launch is how many tokens a block has, how many warps work on it, and how far ahead they load. The
fused kernels' were chosen on an H200; other cards have such as fit them (docs/kernels.md). This
times a layer in bf16 with every launch of one kind, all others as they are. What gives other
numbers than the launch that is taken now, or does not fit the card, is left out.
    python -m benchmarks.kernels.launches --kinds "hybrid,hybrid backward" --jobs 8
A launch takes some ten seconds to compile; `--jobs` processes do that first. The table goes to
launches.json in `--out`: please send it to us, if your card is another one.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from linvideo_core.kernels import linear_attention
from linvideo_core.kernels.tiles import Tiles
from linvideo_core.run import limits
from linvideo_core.run.config import Settings, option, parse, run_command, to_flags
from linvideo_core.run.errors import SettingError

from ..record import check_file, show_rows, write_record
from .agreement import relative_error
from .contenders import TOLERANCE, Setting, Shape, make_inputs, on_gpu
from .hybrid import CASES, attend_in_tiles, make_calls, make_weights
from .speed import BACKWARD, FORWARD
from .timing import Call, milliseconds

KINDS = {
    "reduce keys": ("linear", FORWARD),
    "map": ("linear", FORWARD),
    "reduce queries": ("linear", BACKWARD),
    "backward": ("linear", BACKWARD),
    "hybrid": ("hybrid", FORWARD),
    "hybrid backward": ("hybrid", BACKWARD),
}
"""Kind of kernel -> the layer and pass that are timed for it."""
_TOKENS, _WARPS, _STAGES, _PROGRAMS = (32, 64, 128), (4, 8), (1, 2, 3, 4), (1, 2)
_FIELDS = ("tokens", "warps", "stages", "programs")
_RECORD_NAME = "launches.json"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchesConfig(Settings):
    """Which kernels, at which size."""

    kinds: str = option(",".join(KINDS), "kinds of kernels, with a comma between two")
    shape: str = option(str(next(iter(CASES))), f"tokens x heads, of {', '.join(map(str, CASES))}")
    seconds: float = option(0.2, "for about how long a call is repeated", limits.POSITIVE)
    jobs: int = option(4, "processes that compile", limits.COUNT)
    out: Path = option(Path("runs/launches"), "folder of the table")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("kinds", [*KINDS]), ("shape", [*map(str, CASES)])):
            given = getattr(self, name)
            if strangers := [word for word in given.split(",") if word not in known]:
                raise SettingError(
                    f"{{{name}}} {given} given, and {strangers[0]!r} is unknown; of "
                    f"{', '.join(known)} is needed",
                    name,
                )

    @property
    def case(self) -> tuple[Shape, Tiles]:
        """The shape in numbers, and its largest tile, which hybrid layers have."""
        shape = next(shape for shape in CASES if str(shape) == self.shape)
        return shape, CASES[shape][-1]


def list_launches(kind: str) -> list[tuple[int, int, int, int]]:
    """Return all launches of a kind that are tried; tiles are not split, whatever shares a core."""
    programs = _PROGRAMS if KINDS[kind][0] == "linear" else (1,)
    return [*itertools.product(_TOKENS, _WARPS, _STAGES, programs)]


def make_call(kind: str, shape: Shape, tiles: Tiles, setting: Setting) -> Call:
    """Return what is timed for a kind: it gives the output, or the gradients of all that learns."""
    layer, step = KINDS[kind]
    inputs = make_inputs(shape, 1, setting)
    attend = functools.partial(linear_attention, backend="triton")
    if layer == "hybrid":
        weights = make_weights(shape.heads, setting)
        attend = functools.partial(attend_in_tiles, tiles, [*weights])
        inputs = [*inputs, *weights.values()]
    return make_calls(attend, inputs)[step]


def compile_launch(
    launch: Sequence[int], kind: str, shape: Shape, tiles: Tiles, setting: Setting
) -> None:
    """Run a launch once, so that Triton keeps what it compiled for every later process."""
    call = make_call(kind, shape, tiles, setting)
    with _launched_as(launch, kind, setting):
        call()


def measure_kind(kind: str, shape: Shape, tiles: Tiles, setting: Setting) -> Iterator[Row]:
    """Yield a row for each launch that runs and gives what the present one gives.

    over_present: its time over that of the launch that is taken now, whose row is the first.
    """
    from linvideo_core.kernels.triton_launch import launches_of

    call = make_call(kind, shape, tiles, setting)
    expected = _list(call())
    present = tuple(launches_of(setting.device, setting.dtype)[kind][0])
    launches = dict.fromkeys([present, *list_launches(kind)])
    usual = None
    for launch in tqdm(launches, kind):
        taken = None
        with _launched_as(launch, kind, setting):
            if _are_close(_list(call()), expected):
                taken = milliseconds(call, setting.device, setting.seconds)
        if taken is not None:
            usual = usual or taken
            row = {"kind": kind, **dict(zip(_FIELDS, launch, strict=True)), "milliseconds": taken}
            yield {**row, "over_present": taken / usual, "is_present": launch == present}


@contextlib.contextmanager
def _launched_as(launch: Sequence[int], kind: str, setting: Setting) -> Iterator[None]:
    """Let a kind have this launch; what is inside ends where the card cannot run it."""
    # Triton is imported where it is used: nothing else here needs it.
    from triton.errors import TritonError

    from linvideo_core.kernels.triton_launch import Launch, launched_as

    with (
        contextlib.suppress(TritonError),
        launched_as(Launch(*launch), kind, setting.device, setting.dtype),
    ):
        yield


def _list(found: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [*found]


def _are_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(relative_error(x, y) < TOLERANCE for x, y in pairs)


def run(config: LaunchesConfig, setting: Setting) -> list[Row]:
    """Compile all launches, then time them; return their rows, of each kind the fastest first."""
    kinds, at = config.kinds.split(","), (*config.case, setting)
    work = [(launch, kind, *at) for kind in kinds for launch in list_launches(kind)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(config.jobs, context) as pool:
        waiting = [pool.submit(compile_launch, *each) for each in work]
        for future in tqdm(concurrent.futures.as_completed(waiting), "compiling", len(waiting)):
            future.result()
    rows = []
    for kind in kinds:
        rows += sorted(measure_kind(kind, *at), key=lambda row: row["milliseconds"])
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, compile, time, write and show the table."""
    config = parse(LaunchesConfig, argv, description=__doc__)
    setting = on_gpu(config.seconds)
    path = config.out / _RECORD_NAME
    check_file(path)
    rows = run(config, setting)
    write_record(
        path,
        title=f"Launches of the fused kernels, {config.shape}, bf16",
        command=f"python -m benchmarks.kernels.launches {to_flags(config, without=['out'])}",
        rows=rows,
        device=setting.device,
    )
    sys.stdout.write(f"{show_rows(rows)}table: {path}\n")


if __name__ == "__main__":
    run_command(main)
