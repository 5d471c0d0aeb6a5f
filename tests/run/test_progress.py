"""A terminal bar ends with its stage, and shares no line with the log."""

import logging

import pytest

from linvideo_core.run.progress import LogHandler, TerminalCallbacks


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


def test_a_log_line_under_a_bar_is_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.Logger("test")
    log.addHandler(LogHandler())
    log.warning("before any bar")
    with TerminalCallbacks() as callbacks:
        callbacks.on_stage("training", 3)
        log.warning("checkpoint is damaged")
        log.warning("second line")
        callbacks.on_step_end(1)
    log.warning("after the bar")
    lines = capsys.readouterr().err.split("\n")
    assert {"before any bar", "checkpoint is damaged", "second line", "after the bar"} < {*lines}
    assert lines[0] == "before any bar" and "1/3" in lines[-3]
