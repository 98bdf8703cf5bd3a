"""Which videos are meant: files, folders, globs, lists of them, and standard input."""

from __future__ import annotations

import glob
import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from mvit_video.data.index import find_videos
from mvit_video.errors import DataError

STDIN = "-"
_BYTES = "surrogateescape"  # names on disk need not be UTF-8


def expand(arguments: str | Path | Iterable[str | Path]) -> list[str]:
    """The video files that arguments stand for, in order, each once.

    Args:
        arguments: files; folders, searched at any depth; globs, in which ``**`` is any depth; lists
            (``@FILE`` or a ``.txt`` file) with one of these a line, or with null bytes between them, as
            ``find -print0`` writes; ``-`` for a list on standard input. Relative paths in a list start in the
            current folder. Addresses are left as they are.

    Raises:
        DataError: an argument that is missing or finds nothing. What a list names isn't looked for: a file
            that is gone gets an error of its own in the answer.
    """
    arguments = [arguments] if isinstance(arguments, str | Path) else arguments
    return list(dict.fromkeys(file for argument in arguments for file in _expand_one(argument)))


def _expand_one(argument: str | Path) -> Iterator[str]:
    name = str(argument)
    if name == STDIN:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors=_BYTES)
        yield from _expand_list(sys.stdin.read(), "standard input")
    elif "://" in name:  # for whoever reads streams; a file it isn't
        yield name
    elif Path(name).exists() and Path(name).suffix.lower() != ".txt":
        yield from find_videos(name)
    elif name.startswith("@") or name.lower().endswith(".txt"):
        path = Path(name.removeprefix("@")).expanduser()
        try:
            text = path.read_text(encoding="utf-8-sig", errors=_BYTES)
        except OSError as error:
            raise DataError(f"the list {path} can't be read: {error}") from None
        yield from _expand_list(text, str(path))
    elif glob.has_magic(name):
        yield from _expand_glob(name)
    else:
        yield from find_videos(name)


def _expand_list(text: str, source: str) -> Iterator[str]:
    if "\0" in text:  # names as they are, such as find -print0 writes them
        for name in filter(None, text.split("\0")):
            yield from find_videos(name) if Path(name).is_dir() else (name,)
        return
    found = text.split("\n")  # no splitlines: names may hold what else ends lines
    lines = [line.strip("\r\n ") for line in found if line.strip() and not line.startswith("#")]
    if not lines:
        raise DataError(f"{source} lists no videos; expected one file, folder or glob a line")
    for line in lines:
        path = Path(line).expanduser()
        if path.is_dir():
            yield from find_videos(path)
        elif glob.has_magic(line) and not path.exists():
            yield from _expand_glob(line)
        else:
            yield str(path)


def _expand_glob(pattern: str) -> Iterator[str]:
    found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))  # noqa: PTH207 (absolute too)
    if not found:
        raise DataError(f"{pattern} matches no file")
    for path in found:
        # A folder that a glob meets may hold other things.
        yield from find_videos(path) if Path(path).is_file() or _has_videos(path) else ()


def _has_videos(folder: str) -> bool:
    try:
        return bool(find_videos(folder))
    except DataError:
        return False
