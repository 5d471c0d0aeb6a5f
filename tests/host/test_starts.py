"""What every other test here needs: ComfyUI starts, its server, and the pack in it."""

import re
from typing import Any

import pytest
from PIL import Image

from tests.host.conftest import Host
from tests.host.recording import tell_workflow
from tests.host.server import Server

pytestmark = pytest.mark.host


def test_comfyui_starts(host: Host) -> None:
    assert host.described["nodes"] == str(host.root / "nodes.py")


def test_its_server_starts(server: Server) -> None:
    assert server.ask("/system_stats")["devices"]


def test_the_pack_loads_without_a_complaint(server: Server, record_property: Any) -> None:
    log = server.log.read_text()
    assert "LinVideo: the nodes" not in log
    # Of a pack; without brackets it is a module of ComfyUI's own that misses a package.
    assert "(IMPORT FAILED)" not in log
    (seconds,) = re.findall(r"([\d.]+) seconds: \S*custom_nodes/LinVideo\s", log)
    tell_workflow(record_property, server, "pack_start", float(seconds))


def test_the_first_queue_of_the_demo_gives_both_videos_side_by_side(
    server: Server, record_property: Any
) -> None:
    tell_workflow(record_property, server, "demo_first_queue", server.first_seconds)
    answer = server.first_answer
    assert answer["status"]["status_str"] == "success", answer["status"]
    (saved,) = next(each["images"] for each in answer["outputs"].values() if "animated" in each)
    with Image.open(server.folder / "output" / "linvideo" / saved["filename"]) as video:
        assert (video.n_frames, video.height) == (28, 256)
        assert video.width > 2 * video.height
