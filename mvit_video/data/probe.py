"""What a video file really is: opened, decoded at three places, and hashed."""

from __future__ import annotations

import os
from collections.abc import Callable
from stat import S_ISREG

import av
import PIL

from mvit_video.data.decode import Video, open_video
from mvit_video.data.decode.images import image_files
from mvit_video.data.lists import NO_FILE
from mvit_video.data.table import FileInfo
from mvit_video.errors import VideoError
from mvit_video.io.console import valid_text
from mvit_video.io.fingerprint import Fingerprint, file_sha256, fingerprint

PROBE = 3  # one more whenever the same file would be described otherwise


def settings(frame_rate: float, index_cache: str | None = None) -> Fingerprint:
    """What `probe` depends on besides the files."""
    libraries = {"av": av.__version__, "ffmpeg": str(av.ffmpeg_version_info), "pillow": PIL.__version__}
    cache = index_cache and os.path.abspath(index_cache)  # noqa: PTH100
    return fingerprint(probe=PROBE, frame_rate=float(frame_rate), index_cache=cache, **libraries)


def stat_of(path: str) -> FileInfo:
    """Size and time of the last change alone, or an `error`; of pictures, their sum and the newest."""
    try:
        found = [os.stat(file) for file in image_files(path)]  # noqa: PTH116 (speed)
    except FileNotFoundError:
        return FileInfo(error=NO_FILE)
    except VideoError as error:
        return FileInfo(error=valid_text(error.reason))
    except (OSError, ValueError) as error:
        return FileInfo(error=valid_text(f"the file can't be read ({error})"))
    if not all(S_ISREG(stat.st_mode) for stat in found):
        return FileInfo(error="this is no regular file")  # a pipe would be waited for
    return FileInfo(sum(stat.st_size for stat in found), max(stat.st_mtime_ns for stat in found))


def probe(path: str, open_file: Callable[[str], Video] = open_video) -> FileInfo:
    """Open a video, decode its first, middle and last frame, hash its content; a bad file has an `error`."""
    info = stat_of(path)
    if info.error is not None:
        return info
    try:
        info = info._replace(sha256=file_sha256(*image_files(path)))
        with open_file(path) as video:
            info = info._replace(
                frames=video.num_frames,
                fps=video.fps,
                duration=video.duration,
                height=video.height,
                width=video.width,
                codec=video.codec,
            )
            video.get_frames([0, video.num_frames // 2, video.num_frames - 1])
    except VideoError as error:
        return info._replace(error=valid_text(error.reason))
    except (OSError, MemoryError) as error:
        return info._replace(error=f"the file can't be read ({getattr(error, 'strerror', None) or error!r})")
    return info
