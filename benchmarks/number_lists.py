"""Lists of numbers in settings, such as "0.1,0.2"."""

import re

from linvideo_core.run.errors import SettingError, shown_value
from linvideo_core.run.limits import Limits

_WHOLE, _DECIMAL = "[0-9]{1,6}", r"[0-9]{1,6}(\.[0-9]{1,9})?"


def read_densities(text: str, field: str) -> dict[str, float]:
    """Return the densities of a list, shares of exact blocks, see `read_numbers`."""
    return read_numbers(text, field, Limits(low=0, high=1, without_low=True))


def read_numbers(text: str, field: str, limits: Limits) -> dict[str, float]:
    """Return the numbers of a list by what they are called in tables, such as "0.1".

    limits: of each; of whole numbers integers are returned.

    Raises SettingError for an empty list, for words that are no decimals within `limits`, and for
    two of one name.
    """
    words = [word.strip() for word in text.split(",")]
    pattern, kind = (_WHOLE, int) if limits.is_whole else (_DECIMAL, float)
    numbers = [kind(word) for word in words if re.fullmatch(pattern, word)]
    found = {f"{number:g}": number for number in numbers if limits.takes(number)}
    if len(found) < len(words):
        raise SettingError(
            f"{{{field}}} {shown_value(text)} given; each must be {limits} and stand there once, "
            "with commas between",
            field,
        )
    return found
