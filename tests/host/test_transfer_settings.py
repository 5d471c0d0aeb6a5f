"""What LinVideo Linearize and LinVideo Transfer Settings hand to a transfer."""

from linvideo_pack.nodes.linearize import TRANSFER, read_transfer_inputs
from linvideo_pack.nodes.transfer_settings import LinVideoTransferSettings


def _defaults() -> dict[str, object]:
    return {each.id: each.default for each in LinVideoTransferSettings.define_schema().inputs}


def test_settings_are_passed_on_by_name_and_are_auto_until_they_are_set() -> None:
    settings = _defaults() | {"target": 7, "learning_rate": 1e-4}
    assert LinVideoTransferSettings.execute(**settings).result == (settings,)
    untouched = {name for name, value in settings.items() if value == 0}
    assert untouched == settings.keys() - {"target", "learning_rate", "parameters", "objective"}


def test_a_transfer_is_run_with_every_input_whatever_is_connected() -> None:
    typed = {"name": "mine", "quality": "best", "prompts": "", "keep_first_steps": 2}
    sockets = dict.fromkeys(("positive", "negative", "clip", "latent", "settings"))
    assert read_transfer_inputs({"mode": TRANSFER, **typed}) == typed | sockets
    connected = {"latent": {"samples": 1}, "settings": _defaults()}
    found = read_transfer_inputs({"mode": TRANSFER, **typed, **connected})
    assert found == typed | sockets | connected
