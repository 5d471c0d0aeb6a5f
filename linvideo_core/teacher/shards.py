"""Files of sampled videos in a folder: which videos they hold, and which are still missing.

A file holds videos that follow one another and is called after the first and the last of them. A
video is the same whatever number was sampled with it, so files of any sizes complete one another.
"""

import dataclasses
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

logger = logging.getLogger(__name__)

_NAME = re.compile(r"videos-(\d{6,})-(\d{6,})\.safetensors")


@dataclasses.dataclass(frozen=True)
class FoundVideos:
    """Where videos 0, 1, ... lie.

    paths: the files that hold any of them.
    rows: [videos] int64, each one's place among the rows of all these files; -1: it is missing.
    """

    paths: Sequence[Path]
    rows: Tensor

    @property
    def num_found(self) -> int:
        """How many of the videos are there."""
        return int((self.rows >= 0).sum())

    def split_missing(self, size: int) -> list[range]:
        """Return the missing videos in ranges of at most `size`."""
        chunks: list[range] = []
        for video in (self.rows < 0).nonzero().squeeze(1).tolist():
            last = chunks[-1] if chunks else range(0)
            if video == last.stop and len(last) % size:
                chunks[-1] = range(last.start, video + 1)
            else:
                chunks.append(range(video, video + 1))
        return chunks


def name_shard(videos: range) -> str:
    """Return what the file of these videos is called."""
    return f"videos-{videos.start:06d}-{videos.stop - 1:06d}.safetensors"


def find_videos(folder: Path, identity: str, num_videos: int) -> FoundVideos:
    """Look up videos 0 to `num_videos` in the files of a folder; damaged files are taken away.

    Raises ValueError for a file whose videos have another identity.
    """
    rows = torch.full((num_videos,), -1)
    paths: list[Path] = []
    num_rows = 0
    for videos, path in _list_shards(folder):
        mine = rows[videos.start : videos.stop]
        if not (mine < 0).any() or not _is_whole(path, identity):
            continue
        found = torch.arange(num_rows, num_rows + len(mine))
        mine.copy_(torch.where(mine < 0, found, mine))
        paths.append(path)
        num_rows += len(videos)
    return FoundVideos(paths, rows)


def _list_shards(folder: Path) -> list[tuple[range, Path]]:
    """Return the files by their first video, of several the largest first."""
    found = []
    for path in folder.glob("videos-*.safetensors"):
        if match := _NAME.fullmatch(path.name):
            first, last = map(int, match.groups())
            found.append((range(first, last + 1), path))
    return sorted(found, key=lambda shard: (shard[0].start, -shard[0].stop))


def _is_whole(path: Path, identity: str) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("identity")
    except FileNotFoundError:
        return False
    except SafetensorError:
        logger.warning("%s is damaged and will be sampled again", path)
        path.unlink(missing_ok=True)
        return False
    if found != identity:
        raise ValueError(
            f"{path} was sampled with other settings; delete {path.parent}, whose samples will be "
            "made again"
        )
    return True
