"""Files on disk: what counts as a video or a picture, and reading text with errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path

from mvit_video.errors import DataError

# fmt: off
VIDEO_EXTENSIONS = (
    ".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ts",
    ".wmv", ".flv", ".3gp", ".gif", ".ogv",
)
# fmt: on
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # a picture is a short video


def existing(path: str | Path) -> Path:
    """Raises `DataError` where there is nothing."""
    path = Path(path).expanduser()  # shells leave the ~ of an override such as data.root=~/k400 alone
    if not path.exists():
        raise DataError(f"{path} does not exist")
    return path


def existing_folder(path: str | Path) -> Path:
    """Raises `DataError` where there is no folder."""
    path = existing(path)
    if not path.is_dir():
        raise DataError(f"{path} is not a folder")
    return path


def read_text(file: Path) -> str:
    """Raises `DataError`, with the line, for what isn't UTF-8 text."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{file} can't be read as text: {error}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"{file}, line {line}: this isn't UTF-8 text (it has the byte {error.object[error.start]:#x})"
        ) from None


def parse_json(file: Path) -> object:
    """Raises `DataError` with the line of a mistake."""
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        hint = "; a value a line? Put them into one list" if error.msg == "Extra data" else ""
        raise DataError(f"{file}, line {error.lineno}: not JSON: {error.msg}{hint}") from None


def find_first(folder: Path, names: list[str]) -> Path | None:
    """The first of these files and folders that `folder` has."""
    return next((folder / name for name in names if (folder / name).exists()), None)
