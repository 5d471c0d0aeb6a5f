"""Damaged files, read by the real readers: `python -m research.hostile`.

A seed decides every case: files of one kind as LinVideo or others write them, one of them then
damaged. A process of its own reads them, and is watched.

    python -m research.hostile --minutes 20 --record
    python -m research.hostile --kinds lora,model --seed 7

Of each kind are counted: `tried`; `refused`, in one sentence; `accepted_benign`; `accepted_wrong`,
where what came out cannot be used, or a training ended in other weights than from whole files;
`crashed`, by another error, or in words that are no sentence; `hung`, for half a minute; `grew`, by
more memory than 64 MB and eight times what the files hold (measured on Linux).
"""

import collections
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS_FOLDER, show_rows, write_part
from linvideo_core.run import limits
from linvideo_core.run.config import Settings, option, parse, to_flags
from linvideo_core.run.errors import SettingError

from .kinds import KINDS
from .reader import Reader

COUNTS = ("refused", "accepted_benign", "accepted_wrong", "crashed", "hung", "grew")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostileConfig(Settings):
    """Which files are damaged, and for how long."""

    minutes: float = option(1.0, "how long cases are tried, of all kinds in turn", limits.POSITIVE)
    kinds: str = option("all", "kinds of files, such as lora,model")
    seed: int = option(0, "the first case of each kind; others follow", limits.SEED)
    out: Path = option(Path("runs/hostile"), "folder of the record")
    record: bool = option(False, "write results/hostile.json, not the one in --out")

    def __post_init__(self) -> None:
        super().__post_init__()
        if strangers := [name for name in self.chosen if name not in KINDS]:
            raise SettingError(
                f"{{kinds}} {self.kinds} given, and {strangers[0]!r} is unknown; names of "
                f"{', '.join(KINDS)} are needed",
                "kinds",
            )

    @property
    def chosen(self) -> list[str]:
        """The kinds by name."""
        return list(KINDS) if self.kinds == "all" else self.kinds.split(",")


def run(config: HostileConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Try cases until the time is up; return a row a kind, and every case that went wrong."""
    counts = {kind: collections.Counter() for kind in config.chosen}
    failures = []
    end = time.monotonic() + 60 * config.minutes
    with tempfile.TemporaryDirectory() as folder:
        reader = Reader(Path(folder))
        try:
            for seed, kind in ((n, k) for n in itertools.count(config.seed) for k in config.chosen):
                if time.monotonic() > end:
                    break
                verdict, words = reader.read(kind, seed)
                counts[kind][verdict] += 1
                if verdict not in COUNTS[:2]:
                    failures.append({"kind": kind, "seed": seed, "what": verdict, "words": words})
        finally:
            reader.close()
    return [make_row("files", kind, counts[kind]) for kind in config.chosen], failures


def make_row(what: str, kind: str, counts: collections.Counter[str]) -> dict[str, Any]:
    """Return the row of a kind; what: the part of the record."""
    row = {name: counts[name] for name in COUNTS}
    return {"what": what, "kind": kind, "tried": counts.total(), **row}


def record(folder: Path, what: str, command: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write a part of hostile.json."""
    title = "Hostile files and names, and what became of them"
    write_part(folder / "hostile.json", what, title=title, command=command, rows=rows, device="cpu")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, try cases, keep and show the counts."""
    config = parse(HostileConfig, argv, description=__doc__)
    rows, failures = run(config)
    sys.stdout.write(show_rows(rows))
    for failure in failures[:50]:
        sys.stdout.write(f"{json.dumps(failure)}\n")
    command = f"python -m research.hostile {to_flags(config, without=('out',))}"
    record(RESULTS_FOLDER if config.record else config.out, "files", command, rows)
