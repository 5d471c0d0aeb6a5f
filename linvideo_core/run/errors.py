"""Errors of settings: they know which fields they are about, and each caller names those its way.

A command calls a field by its flag, a node by its input: the message itself has neither.
"""

from collections.abc import Callable

_MAX_SHOWN = 200


def flag_of(field: str) -> str:
    """Return the command-line flag of a config field, such as "--batch-size"."""
    return f"--{field.replace('_', '-')}"


def shown_value(value: object, *, is_quoted: bool = False) -> str:
    """Return a value of unknown origin as a short text of plain characters, for a sentence.

    An exception is what it says, which may hold all that a file claims.

    is_quoted: a text stands in quotes, as it does anyway where it would not be told apart.
    """
    is_huge = isinstance(value, int) and abs(value) >= 10**100
    text = "a huge number" if is_huge else str(value)
    if isinstance(value, Exception):
        text = text.encode("unicode_escape").decode()
    elif (
        (is_quoted and text == value)
        or not (text and text.isascii() and text.isprintable())
        or " " in text
    ):
        text = ascii(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


class SettingError(ValueError):
    """A setting that cannot be used.

    message: one sentence that says what was given, what is needed and what to do, where "{field}"
        stands for the name of each of `fields`: SettingError("{steps} 0 given; ...", "steps").
    fields: the config fields that it is about, the one at fault first.

    `str` of it has flags, for a command line; `worded` has other names.
    """

    def __init__(self, message: str, *fields: str) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields

    def worded(self, name_field: Callable[[str], str]) -> str:
        """Return the message with each field called as `name_field` says."""
        text = self.message
        for field in self.fields:
            text = text.replace(f"{{{field}}}", name_field(field))
        return text

    def __str__(self) -> str:
        return self.worded(flag_of)
