"""Every command that README shows can be typed as it stands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [part.strip() for line in LINES for part in line.split("&&")]
OURS = [command for command in COMMANDS if command.startswith("python -m linvideo_core")]


def test_readme_shows_the_main_job_and_the_tests_with_their_installation() -> None:
    assert "pip install -r requirements.txt && python -m linvideo_core.transfer" in LINES
    tests = "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest"
    assert tests in LINES
    assert f"    {tests}\n" in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")


def test_every_path_that_readme_names_exists() -> None:
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", README)
    assert links
    for link in links:
        assert (REPOSITORY / link).exists(), link


@pytest.mark.parametrize("command", OURS)
def test_a_command_of_readme_resolves_to_a_config(command: str) -> None:
    _, *words = shlex.split(command)
    result = subprocess.run(
        [sys.executable, *words, "--dry-run"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("{")
