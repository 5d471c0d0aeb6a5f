"""Say within a minute whether a ComfyUI still has all that the pack relies on, without its server.

    python -m tests.host.check_host ~/ComfyUI

Every name, signature and call order; what broke is said in sentences, and the status is 1 then. The
interpreter is COMFYUI_PYTHON, else the checkout's own, else that of ~/ComfyUI.
"""

import argparse
import sys
from pathlib import Path

from tests.host.process import Host, HostError, find_python

CHECKS = Path(__file__).with_name("test_relied_on.py")
TESTS = (
    "test_every_name_is_there_and_takes_what_it_is_given",
    "test_a_sampling_calls_the_pack_in_the_order_that_it_relies_on",
)


def check(root: Path) -> list[str]:
    """Return what broke in a ComfyUI, a sentence each.

    Raises HostError where it does not start at all.
    """
    python = find_python(root) or find_python(Path("~/ComfyUI").expanduser())
    if python is None:
        raise HostError(f"no interpreter for {root}: set COMFYUI_PYTHON")
    host = Host(root, python)
    answers = [host.ask(file=str(CHECKS), test=test, case=None) for test in TESTS]
    host.stop()
    failed = [answer["words"].strip() for answer in answers if answer["outcome"] == "failed"]
    return [words.rpartition("AssertionError: ")[2] for words in failed]


def main() -> int:
    """Check the checkout that the command line names."""
    how = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m tests.host.check_host", **how)
    parser.add_argument("path", type=Path, metavar="PATH", help="the ComfyUI to check")
    root = parser.parse_args().path.expanduser().absolute()
    try:
        problems = check(root)
    except (HostError, OSError) as error:
        problems = [str(error)]
    print("\n".join(problems) or f"{root}: all that LinVideo relies on is there")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
