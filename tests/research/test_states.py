"""What a transfer learns from, compared: every row is a transfer that can be run."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from linvideo_core.run.config import override
from linvideo_core.run.errors import SettingError
from linvideo_core.transfer.config import TransferConfig
from research.states import _COMMON, TABLES, StatesConfig, compare, summarize


def fields_of(config: Any) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield from fields_of(value) if dataclasses.is_dataclass(value) else [field.name]


@pytest.mark.parametrize("table", TABLES)
def test_every_row_is_a_transfer(table: str) -> None:
    for settings in TABLES[table].values():
        values = {**_COMMON, **settings}
        assert not set(values) - set(fields_of(TransferConfig()))
        override(TransferConfig(), values)


def test_a_row_is_the_mean_over_seeds_with_its_spread() -> None:
    runs = [{"seed": 0, "error": 1.0}, {"seed": 1, "error": 3.0}]
    row = summarize("states", "pool", runs)
    assert (row["what"], row["seeds"], row["error"]) == ("states", 2, 2.0)
    assert row["error_spread"] == pytest.approx(2**0.5)
    assert "error_spread" not in summarize("states", "pool", runs[:1])


def test_a_name_is_of_the_same_settings_in_every_table() -> None:
    rows = [row for table in TABLES.values() for row in table.items()]
    assert all(TABLES[table].get(name, row) == row for table in TABLES for name, row in rows)


def test_rows_are_compared_seed_by_seed() -> None:
    runs, baseline = (
        [
            {"seed": seed, "error_high_noise": error, "video_error": 2 * error}
            for seed, error in each
        ]
        for each in (((0, 1.0), (1, 5.0)), ((1, 2.0), (0, 0.0)))
    )
    found = compare(runs, baseline)
    assert found["error_high_noise_more"] == 2.0
    assert found["video_error_t"] == pytest.approx(4 / (2 * 2**0.5) * 2**0.5)


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(SettingError, match="'dreams' is unknown"):
        StatesConfig(tables="states,dreams")
