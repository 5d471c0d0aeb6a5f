"""A terminal bar ends with its stage."""

import pytest

from linvideo_core.run.progress import TerminalCallbacks


def test_a_bar_closes_with_its_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalCallbacks() as callbacks:
        callbacks.on_stage("sampling_teacher", 3)
        for done in range(1, 4):
            callbacks.on_step_end(done)
        callbacks.on_stage("training", 100, 40)
        callbacks.on_step_end(41, loss=0.25)
        callbacks.on_step_end(42, loss=0.125)
    shown = capsys.readouterr().err
    assert "sampling the teacher: 100%" in shown and "3/3" in shown
    assert "42/100" in shown and "loss=0.125" in shown
    assert shown.endswith("\n")
