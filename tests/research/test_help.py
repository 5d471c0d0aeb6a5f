"""Commands that take few words, or none, still say what they do before they do it."""

import runpy
import sys

import pytest


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    "module", ["research.ablation_plots", "research.demo_model.train", "tests.host.check_host"]
)
def test_help_says_what_a_command_does_and_does_nothing(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        assert not ended.code
    assert module in capsys.readouterr().out
