"""Draw an ablation's record and judge its claims: `python -m research.ablations.evidence_report`.

From results/evidence.json, which `ablate --record` writes, come results/evidence_*.png and
results/evidence_claims.json. Nothing is measured, so this can be repeated anywhere.
    python -m research.ablations.evidence_report
    python -m research.ablations.evidence_report --runs runs/ablate-gpu     # the samples too
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.record import REPOSITORY, RESULTS_FOLDER, read_record

from linvideo_core.run.config import option, parse, run_command, to_json

from .findings import Findings
from .report import draw_samples, publish

logger = logging.getLogger(__name__)

RECORD_NAME = "evidence.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvidenceReportConfig:
    """Which record is drawn, and where to."""

    results: Path | None = option(None, "folder of the record and of its plots; none: results")
    runs: Path | None = option(None, "the ablation's --out, whose samples are drawn; none: not")
    docs: Path | None = option(None, "folder of the samples' picture and animation; none: docs")


def run(config: EvidenceReportConfig) -> list[Path]:
    """Draw and judge the record; return the files.

    Raises ValueError or FileNotFoundError, in one sentence, for a record that is none.
    """
    results = config.results or RESULTS_FOLDER
    record = read_record(results / RECORD_NAME)
    written = publish(record, results)
    if config.runs is not None:
        stem = (config.docs or REPOSITORY / "docs") / "evidence_samples"
        written += draw_samples(Findings(record), config.runs, stem)
    return written


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, draw, say what was written."""
    config, is_dry_run = parse(EvidenceReportConfig, argv, description=__doc__.splitlines()[0])
    if is_dry_run:
        sys.stdout.write(to_json(config))
        return
    sys.stdout.writelines(f"{path}\n" for path in run(config))


if __name__ == "__main__":
    run_command(main)
