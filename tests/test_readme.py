"""Pages: commands can be typed as they stand, links lead somewhere, tables show the records."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from cogapp import Cog

REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / "README.md", REPOSITORY / "SECURITY.md"]
PAGES += sorted((REPOSITORY / "docs").glob("*.md"))
PACKAGES = ("linvideo_core", "benchmarks", "research")


def lines_of(page: Path) -> list[str]:
    """Return the lines of a page's code blocks, continued ones joined."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


LINES = lines_of(PAGES[0])
COMMANDS = [part.strip() for page in PAGES for line in lines_of(page) for part in line.split("&&")]
OURS = [c for c in COMMANDS if c.startswith(tuple(f"python -m {name}" for name in PACKAGES))]


def test_readme_shows_the_main_job_and_the_tests_with_their_installation() -> None:
    assert "pip install -r requirements.txt && python -m linvideo_core.transfer" in LINES
    tests = "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest"
    assert tests in LINES
    assert f"    {tests}\n" in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_links_to_exists(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)\s#]+)[^)\s]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_shows_its_record(page: Path) -> None:
    show = ("-P", "-I", str(REPOSITORY), "-p", "from results.tables import show")
    assert Cog().main(["cog", "--check", "--diff", *show, str(page)]) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_quotes_is_there_or_said_to_be_gone(page: Path) -> None:
    gone = []
    for paragraph in page.read_text(encoding="utf-8").split("\n\n"):
        for module in re.findall(rf"-m\s+((?:{'|'.join(PACKAGES)}|tests)\.[\w.]*\w)", paragraph):
            place = REPOSITORY.joinpath(*module.split("."))
            found = [place.with_suffix(".py"), place / "__main__.py"]
            if not any(map(Path.exists, found)) and "no longer there" not in paragraph:
                gone.append(module)
    assert gone == []


# As `python -m` runs it, in the process that has imported it for other tests, too.
@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", sorted({*OURS}))
def test_a_command_of_a_page_resolves_to_a_config(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, module, *words = shlex.split(command)
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", [module, *words, "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    found = capsys.readouterr()
    if "--model" in words:
        # Settings follow from the headers of files, and nobody has such files here.
        assert ended.value.code == 2
        missing, is_missing, _ = found.err.partition(" does not exist")
        assert is_missing and missing.split()[-1] in words
    else:
        assert not ended.value.code
        assert found.out.startswith("{")
