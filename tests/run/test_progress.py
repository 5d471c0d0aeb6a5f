"""A terminal bar ends with its stage."""

import pytest

from linvideo_core.run.progress import TqdmProgress


def test_a_progress_bar_closes_with_its_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with TqdmProgress() as progress:
        for done in range(1, 4):
            progress("sampling", done, 3)
        progress("sampling", 3, 3)
        progress("training", 41, 100, loss=0.25)
        progress("training", 42, 100, loss=0.125)
    shown = capsys.readouterr().err
    assert "sampling: 100%" in shown and "3/3" in shown
    assert shown.count("3/3") == 1
    assert "42/100" in shown and "loss=0.125" in shown
    assert shown.endswith("\n")
