"""Start a command: what `python -m` a folder runs."""

import os
from importlib import import_module

from .config import run_command


def launch(package: str) -> None:
    """Run the `main` of a package's `cli`, which is imported here.

    PyTorch reads the policy when it is imported: threads that spin while they wait slow a command
    down tenfold where anything else computes on the same cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run_command(import_module(".cli", package).main)
