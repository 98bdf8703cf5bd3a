"""What a video file really is: opened, decoded at three places, and hashed."""

from __future__ import annotations

import hashlib
import os

from mvit_video.data.decode import open_video
from mvit_video.data.decode.stills import pictures_of
from mvit_video.data.lists import NO_FILE
from mvit_video.data.table import Facts
from mvit_video.errors import VideoError

_BLOCK = 1 << 20  # bytes


def stat_of(path: str) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds; of pictures, their sum and the newest.

    Raises:
        VideoError: something isn't there.
    """
    try:
        found = [os.stat(file) for file in pictures_of(path)]  # noqa: PTH116 (speed)
    except FileNotFoundError as error:
        raise VideoError(path, NO_FILE) from error
    except (OSError, ValueError) as error:
        raise VideoError(path, f"the file can't be read ({error})") from error
    return sum(stat.st_size for stat in found), max(stat.st_mtime_ns for stat in found)


def probe(path: str, frame_rate: float = 30.0) -> Facts:
    """Open a video, decode its first, middle and last frame, hash its content; a bad file has an `error`.

    Args:
        frame_rate: of pictures, as of `open_video`.
    """
    try:
        size, mtime_ns = stat_of(path)
    except VideoError as error:
        return Facts(error=error.reason)
    facts = Facts(size, mtime_ns)
    try:
        facts = facts._replace(sha256=_hash(path))
        with open_video(path, backend="pyav", frame_rate=frame_rate) as video:
            facts = facts._replace(
                frames=video.num_frames,
                fps=video.fps,
                duration=video.duration,
                height=video.height,
                width=video.width,
                codec=video.codec,
            )
            video.get_frames([0, video.num_frames // 2, video.num_frames - 1])
    except VideoError as error:
        return facts._replace(error=error.reason)
    except OSError as error:
        return facts._replace(error=f"the file can't be read ({error.strerror})")
    return facts


def _hash(path: str) -> str:
    digest = hashlib.sha256()
    for name in pictures_of(path):
        with open(name, "rb") as file:  # noqa: PTH123 (speed)
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()
