"""ComfyUI starts, and its server: what every other test here needs."""

import pytest

from tests.host.conftest import Host
from tests.host.server import Server

pytestmark = pytest.mark.host


def test_comfyui_starts(host: Host) -> None:
    assert host.nodes == str(host.root / "nodes.py")


def test_its_server_starts(server: Server) -> None:
    assert server.ask("/system_stats")["devices"]
