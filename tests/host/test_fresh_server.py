"""What a user meets first: the pack loads, and its demo is the first thing that is queued."""

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from tests.host.recording import tell_workflow
from tests.host.server import WORKFLOW_SECONDS, Server, run_server
from tests.host.test_workflows import make_prompt, read

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def fresh(host: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that nothing was queued on."""
    with run_server(host, tmp_path_factory.mktemp("fresh")) as server:
        yield server


def test_the_pack_loads_without_a_complaint(fresh: Server, record_property: Any) -> None:
    log = fresh.log.read_text()
    assert "LinVideo: the nodes" not in log
    # Of a pack; without brackets it is a module of ComfyUI's own that misses a package.
    assert "(IMPORT FAILED)" not in log
    (seconds,) = re.findall(r"([\d.]+) seconds: \S*custom_nodes/LinVideo\s", log)
    tell_workflow(record_property, fresh, "pack_start", float(seconds))


def test_the_first_queue_of_the_demo_gives_both_videos_side_by_side(
    fresh: Server, record_property: Any
) -> None:
    prompt = make_prompt(read("1 Try it (no download)"), fresh.ask("/object_info"))
    start = time.monotonic()
    answer = fresh.queue(prompt, seconds=WORKFLOW_SECONDS)
    seconds = round(time.monotonic() - start, 1)
    tell_workflow(record_property, fresh, "demo_first_queue", seconds)
    assert answer["status"]["status_str"] == "success", answer["status"]
    (saver,) = (key for key, node in prompt.items() if node["class_type"] == "SaveAnimatedWEBP")
    (saved,) = answer["outputs"][saver]["images"]
    with Image.open(fresh.folder / "output" / "linvideo" / saved["filename"]) as video:
        assert (video.n_frames, video.height) == (28, 256)
        assert video.width > 2 * video.height
