"""What is wrong with a file that FFmpeg can't open, in words that help."""

from __future__ import annotations

from pathlib import Path

from mvit_video.errors import VideoError


def check_file(path: str) -> None:
    file = Path(path)
    try:
        if not file.exists():
            raise VideoError(path, "no such file")
        if file.is_dir():
            raise VideoError(path, "this is a directory, not a video file")
        if not file.is_file():
            raise VideoError(path, "this is not a regular file")
        if file.stat().st_size == 0:
            raise VideoError(path, "the file is empty")
    except (OSError, ValueError) as error:  # a name that is too long or holds a null byte
        raise VideoError(path, f"the file can't be read ({error})") from error


def has_telling_header(path: str) -> bool:
    """Whether it is an MP4 or Matroska file, whose header describes the streams."""
    try:
        with Path(path).open("rb") as file:
            start = file.read(8)
    except OSError:
        return False
    return start[4:] == b"ftyp" or start.startswith(b"\x1a\x45\xdf\xa3")


def why_not_opened(path: str, error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "no permission to read the file"
    try:
        with Path(path).open("rb") as file:
            start = file.read(12)
    except OSError as reading:
        return f"the file can't be read ({reading.strerror})"
    if start[4:8] == b"ftyp":
        return "an MP4 file without its table of frames: it is cut off or damaged"
    return "not a video file, or one that FFmpeg can't read"
