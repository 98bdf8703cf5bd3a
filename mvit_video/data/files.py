"""Files on disk: what counts as a video or a picture, and reading text with errors that name the line."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from reprlib import Repr
from typing import Any, NoReturn

from mvit_video.errors import DataError

log = logging.getLogger(__name__)

# fmt: off
VIDEO_EXTENSIONS = (
    ".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp", ".gif",
    ".ogv", ".mts", ".m2ts", ".m2t", ".asf", ".f4v", ".3g2", ".vob", ".mxf", ".dv", ".ogg", ".divx", ".h264",
    ".264", ".hevc", ".h265", ".265", ".m2v", ".m1v", ".mjpeg", ".mjpg", ".y4m", ".apng", ".dav", ".qt",
    ".mpe", ".mod", ".tod", ".rm", ".rmvb", ".ivf", ".obu", ".nut", ".mk3d", ".wtv", ".xvid",
)
# fmt: on
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # a picture is a short video

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def quoted(value: object) -> str:
    """A value from a file as an error shows it: escaped, and short."""
    return _SHORT.repr(value)


def is_text(text: str) -> bool:
    """Whether a name can go to a disk, a table and a terminal: it has no NUL and can be written as UTF-8."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:  # half a character, or bytes of a name that aren't UTF-8
        return False


def existing(path: str | Path, *, folder: bool = False) -> Path:
    """Raises `DataError` where there is nothing, or no folder."""
    path = Path(str(path))
    with suppress(RuntimeError):  # ~x is a user's folder or just a name
        path = path.expanduser()  # shells leave the ~ of an override such as data.root=~/k400 alone
    try:
        path.stat()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # no permission, a loop of links, a name that can't be
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{quoted(str(path))} can't be used: {reason}") from None
    if folder and not path.is_dir():
        raise DataError(f"{path} is not a folder")
    return path


def find_first(folder: Path, *names: str) -> Path | None:
    """The first of these files and folders that `folder` has."""
    return next((folder / name for name in names if (folder / name).exists()), None)


def names_in(folder: str | Path) -> list[str]:
    """Sorted names of what isn't hidden in a folder. Raises `DataError` where it can't be listed."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208 (many)
    except OSError as error:
        _cant_read(error)


def lines_of(file: Path) -> Iterator[tuple[str, str]]:
    """Each line that isn't blank, with where it stands; a file of gigabytes is never read as a whole.

    Raises:
        DataError: as `read_text`.
    """
    return ((where, stripped) for where, line in _decoded_lines(file) if (stripped := line.strip()))


def read_text(file: Path) -> str:
    """The content of a text file. Raises `DataError`, with the line, for what isn't UTF-8 text."""
    return "".join(line for _, line in _decoded_lines(file))


def parse_json(file: Path) -> object:
    """Raises `DataError`, with the line, for a mistake, and for a key that comes twice."""
    try:
        return json.loads(read_text(file), object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        hint = "; a value a line? Put them into one list" if error.msg == "Extra data" else ""
        raise DataError(f"{file}, line {error.lineno}: not JSON: {error.msg}{hint}") from None
    except RecursionError:
        raise DataError(f"{file}: its lists are nested too deeply") from None
    except ValueError as error:  # a key that comes twice, a number of thousands of digits
        raise DataError(f"{file}: {str(error).partition(';')[0]}") from None


class FileSearch:
    """Finds the files of some kinds in folders, and counts those that it passes over.

    Args:
        extensions: of the files to find, in lower case.
    """

    def __init__(self, extensions: tuple[str, ...] = VIDEO_EXTENSIONS) -> None:
        self.extensions = extensions
        self.passed_over: Counter[str] = Counter()  # by suffix

    def below(self, folder: str | Path) -> list[str]:
        """The files at any depth, sorted; nothing hidden, and a folder that links lead to twice but once.

        Raises:
            DataError: a folder can't be read.
        """
        found: list[str] = []
        seen: set[tuple[int, int]] = set()
        for parent, folders, files in os.walk(folder, onerror=_cant_read, followlinks=True):
            stat = os.stat(parent)  # noqa: PTH116 (speed)
            if (stat.st_dev, stat.st_ino) in seen:
                folders.clear()
                continue
            seen.add((stat.st_dev, stat.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            found += [os.path.join(parent, name) for name in files if self.takes(name)]  # noqa: PTH118
        return sorted(found)

    def takes(self, name: str) -> bool:
        """Whether a file is of these kinds, by its name; another one that isn't hidden is counted."""
        if name.startswith("."):
            return False
        if name.lower().endswith(self.extensions):
            return True
        self.passed_over[os.path.splitext(name)[1].lower() or "no suffix"] += 1  # noqa: PTH122
        return False

    def report(self, folder: Path) -> None:
        """Log how many files were passed over, by suffix."""
        if self.passed_over:
            kinds = [f"{count} {suffix}" for suffix, count in self.passed_over.most_common(8)]
            more = ", ..." if len(self.passed_over) > 8 else ""
            log.info("%s: ignored files: %s%s", folder, ", ".join(kinds), more)


def _decoded_lines(file: Path) -> Iterator[tuple[str, str]]:
    where = f"{file}, line "
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape") as text:
            for number, line in enumerate(text, start=1):
                if not is_text(line):
                    raise DataError(f"{where}{number}: this isn't UTF-8 text: {quoted(line.strip())}")
                yield f"{where}{number}", line
    except OSError as error:
        raise DataError(f"{file} can't be read as text: {error.strerror or error}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {quoted(twice)} comes twice")
    return content


def _cant_read(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename} can't be read: {error.strerror}")
