"""What is done to a file so that it is none any more, or another one."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from linvideo_core.run.reading import parse_json

MOST_BYTES = 2**26
"""Of a file that is damaged once more."""


_DEEP = "@deep@"
_STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 2**31, 2**62, 2**64, 10**400, 1e308, float("nan"), float("inf")),
    *("", " ", "x" * 100_000, "../../x", "/etc/x", "\udcff", "²", "9" * 5000, "NaN", _DEEP, "null"),
    *([], {}, [[]], [0, 2**62], [1] * 1000, {"a": {}}, ["\0"]),
)
_DTYPES = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F16", "BF16", "F32", "F64", "I64", "C64", "X")


def damage(path: Path, draw: random.Random) -> None:
    """Change a file in one way, sometimes in two."""
    for _ in range(draw.choice((1, 1, 2))):
        if path.stat().st_size > MOST_BYTES:
            return
        ways = [_flip, _cut, _grow, _replace]
        if path.suffix == ".safetensors":
            ways += 6 * [_edit_header] + [_spoil_numbers]
        elif path.suffix in (".json", ".jsonl"):
            ways += 4 * [_edit_json]
        draw.choice(ways)(path, draw)


def _flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    most = draw.choice((len(data), 64, 2000))
    for _ in range(draw.choice((1, 1, 4, 100))):
        if data:
            data[draw.randrange(min(len(data), most))] ^= draw.randrange(1, 256)
    path.write_bytes(data)


def _cut(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data) + 1)])


def _grow(path: Path, draw: random.Random) -> None:
    with path.open("r+b") as file:
        if draw.random() < 0.2:
            # Zeros that take no room on a disk.
            file.truncate(draw.choice((2**20, 3 * 2**30)))
        else:
            file.seek(0, 2)
            file.write(draw.randbytes(draw.choice((1, 8, 5000))))


def _replace(path: Path, draw: random.Random) -> None:
    texts = [
        b"",
        b"\0" * 999,
        b"\x80\x04\x95",
        b"PK\x03\x04",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe{\0",
    ]
    texts += [
        b"[" * 200_000,
        b'{"a":' * 50_000,
        b"9" * 9000,
        draw.randbytes(3000),
        b"a\n" * 200_000,
    ]
    path.write_bytes(draw.choice(texts))


def _spoil_numbers(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    if begin + 8 < len(data):
        place = begin + draw.randrange((len(data) - begin) // 4) * 4
        # NaN and infinity, as fp32 and twice as fp16.
        data[place : place + 4] = draw.choice((b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\0\x7c\0\x7e"))
    path.write_bytes(data)


def _edit_header(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    try:
        header = parse_json(data[8 : 8 + size])
        entry = draw.choice([name for name in header if name != "__metadata__"])
        _change_entry(header, entry, draw)
        text = _to_text(header)
    except (ValueError, LookupError, TypeError, AttributeError):
        return
    # At times the size is that of another header.
    stated = draw.choice((*[len(text)] * 9, size, 2**62))
    path.write_bytes(stated.to_bytes(8, "little") + text + data[8 + size :])


def _change_entry(header: dict[str, Any], entry: str, draw: random.Random) -> None:
    shape = header[entry]["shape"]
    metadata = header.setdefault("__metadata__", {})
    name = draw.choice(("blocks.999999.x", "blocks.1.x", "x" * 99_999, "\udcff", "", f"{entry}.x"))
    key = draw.choice([*metadata, "x"])
    spare = {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}
    changes: list[Callable[[], Any]] = [
        lambda: header[entry].update(dtype=draw.choice(_DTYPES)),
        lambda: header[entry].update(shape=draw.choice((shape[::-1], [1, *shape], [*shape, 0]))),
        lambda: header[entry].update(shape=draw.choice(([], [0], [2**62, 0], [2**32] * 2))),
        lambda: header[entry].update(data_offsets=draw.choice(([0, 0], [0, 2**62], [8, 4]))),
        lambda: header[entry].update({draw.choice([*header[entry]]): draw.choice(_STRANGE)}),
        lambda: header.pop(entry),
        lambda: header.update({name: header.pop(entry)}),
        lambda: header.update({name: spare | {"dtype": draw.choice(_DTYPES)}}),
        lambda: header.update({name: header[entry]}),
        lambda: header.update({draw.choice((entry, "__metadata__")): draw.choice(_STRANGE)}),
        lambda: metadata.pop(key),
        *2 * [lambda: metadata.update({key: draw.choice(_STRANGE)})],
        *3 * [lambda: metadata.update({key: _to_text(draw.choice(_STRANGE)).decode()})],
    ]
    draw.choice(changes)()


def _edit_json(path: Path, draw: random.Random) -> None:
    """Put something strange in the place of one of the values in a line."""
    lines = path.read_bytes().splitlines() if path.suffix == ".jsonl" else [path.read_bytes()]
    try:
        number = draw.randrange(len(lines))
        tree = parse_json(lines[number])
        places = [*_places(tree)]
        owner, key = draw.choice(places)
        owner[key] = draw.choice(_STRANGE)
        lines[number] = _to_text(tree)
    except (ValueError, LookupError):
        return
    path.write_bytes(b"\n".join(lines) + b"\n")


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else ()
    items = enumerate(tree) if isinstance(tree, list) else items
    for key, value in items:
        yield tree, key
        yield from _places(value)


def _to_text(value: Any) -> bytes:
    deep = "[" * 100_000 + "]" * 100_000
    return json.dumps(value).replace(f'"{_DEEP}"', deep).encode()
