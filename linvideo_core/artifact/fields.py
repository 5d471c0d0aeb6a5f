"""Checks of a header's single fields; each raises ArtifactError naming the field that is wrong."""

import math
from typing import NoReturn

_MAX_TEXT = 200


class ArtifactError(ValueError):
    """A LINVIDEO file that is damaged, foreign, or made for another model."""

    # Where it is imported from: a host shows the name, and loads this file under the pack's path.
    __module__ = "linvideo_core.artifact"


def refuse(name: str, value: object, expected: str) -> NoReturn:
    """Raise ArtifactError saying what a field is, and what is expected of it."""
    raise ArtifactError(f"{name} is {show(value)}; {expected}")


def show(value: object) -> str:
    """Return a value of unknown origin as a short text of plain characters."""
    text = ascii(value) if not isinstance(value, int) or abs(value) < 10**18 else "a huge number"
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."


def is_integer(value: object) -> bool:
    """Say whether a value is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Say whether a value is a finite number; true and false are none."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def check_text(name: str, value: object) -> None:
    """Raise unless a value is a short text that can be printed."""
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT or not value.isprintable():
        refuse(name, value, f"1 to {_MAX_TEXT} printable characters are expected")


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Raise unless a value is a whole number in [low, high]."""
    if not is_integer(value) or not low <= value <= high:
        expected = str(low) if low == high else f"a whole number from {low} to {high}"
        refuse(name, value, f"{expected} is expected")


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raise unless a value is a number in [low, high]."""
    if not is_number(value) or not low <= value <= high:
        refuse(name, value, f"a number from {low:g} to {high:g} is expected")
