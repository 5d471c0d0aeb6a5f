"""What comes from outside is read up to a bound, and any fault of it is one sentence."""

import ast
from pathlib import Path

import pytest

from linvideo_core.prompts import read_prompts
from linvideo_core.run.folder import read_metrics, read_settings
from linvideo_core.run.reading import MOST_BYTES, parse_json, read_json, read_text

ROOT = Path(__file__).parents[2]
DEEP = "[" * 100_000 + "]" * 100_000


def large_file(path: Path, num_bytes: int) -> Path:
    """Return a file of zeros that takes no room on a disk."""
    with path.open("wb") as file:
        file.truncate(num_bytes)
    return path


def test_a_text_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("a\r\né\n".encode())
    assert read_text(path) == "a\né\n"
    path.write_text('{"a": [1]}')
    assert read_json(path) == {"a": [1]}


@pytest.mark.parametrize("read", [read_text, read_json, read_prompts])
def test_a_file_of_gigabytes_is_refused_by_its_name(read, tmp_path: Path) -> None:
    path = large_file(tmp_path / "large.txt", 3 * 2**30)
    with pytest.raises(ValueError, match=r"large\.txt is larger than 64 MB"):
        read(path)
    assert read_text(large_file(path, MOST_BYTES))[:2] == "\0\0"


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000, "9" * 5000, "", "{", "\0"])
def test_no_json_is_more_than_a_value_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        parse_json(text)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        read_settings(tmp_path)


def test_too_many_prompts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a\n" * 100_001)
    with pytest.raises(ValueError, match="holds 100,001 prompts, 100,000 at most are read"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"step": 1}\nnull\n', "line 2 of .*metrics.jsonl is damaged"),
        (b'{"loss": 1}\n', "line 1 of .*metrics.jsonl is damaged"),
        (b'{"step": 1\n{"step": 2}\n', "line 1 of .*metrics.jsonl is damaged"),
        (b'{"step": "1"}\n', "line 1 of .*metrics.jsonl is damaged"),
        (b"[" * 100_000 + b"\n", "line 1 of .*metrics.jsonl is damaged"),
        (b'{"step": 1}\n\xff\xfe\n', "metrics.jsonl is not a text in UTF-8; delete the file"),
    ],
)
def test_damaged_metrics_are_named_with_their_line(
    content: bytes, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_metrics(path)


def test_a_row_that_is_cut_short_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


def test_all_json_comes_by_one_door() -> None:
    inside = {
        "linvideo_core/run/reading.py",
        "linvideo_core/run/folder.py",
        "linvideo_core/run/files.py",
    }
    users = {
        path.relative_to(ROOT).as_posix()
        for folder in ("linvideo_core", "nodes")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.loads", "json.load")
    }
    assert users == inside
