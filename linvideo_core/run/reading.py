"""Read texts and JSON that come from anywhere: of bounded size, any fault one sentence."""

import json
import os
from pathlib import Path
from typing import Any

MOST_BYTES = 2**26
"""Of a text that is read as a whole, 64 MB."""


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Return a text file in UTF-8 of at most `most` bytes, its lines ending in "\\n".

    Raises ValueError naming the file for any other.
    """
    with path.open("rb") as file:
        # What has no size of its own, such as a pipe, is read no further either.
        is_large = os.fstat(file.fileno()).st_size > most
        data = b"" if is_large else file.read(most + 1)
    if is_large or len(data) > most:
        raise ValueError(f"{path} is larger than {most // 2**20} MB, too large for what it is")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text in UTF-8") from None


def parse_json(text: str | bytes, **how: Any) -> Any:
    """Return what `json.loads` makes of a text.

    Raises ValueError where it is no JSON or nested too deep.
    """
    try:
        return json.loads(text, **how)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json(path: Path) -> Any:
    """Return the value in a JSON file; ValueError as `read_text` and `parse_json`."""
    return parse_json(read_text(path))
