"""Which videos are meant: files, folders, globs, lists of them, and standard input."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

from mvit_video.data.index import find_videos
from mvit_video.errors import DataError

STDIN = "-"
_CONTROLS = bytes(c for c in range(32) if c not in b"\0\t\n\r")  # which no name holds


def expand(arguments: str | Path | Iterable[str | Path]) -> list[str]:
    """The video files that arguments stand for, in order, each once.

    Args:
        arguments: files; folders, searched at any depth; globs, in which ``**`` is any depth; lists
            (``@FILE`` or a ``.txt`` file) with one of these a line, or with null bytes between them, as
            ``find -print0`` writes; ``-`` for a list on standard input. Relative paths in a list start in the
            current folder. Addresses are left as they are.

    Raises:
        DataError: an argument that is missing or finds nothing. What a list names isn't looked for: a file
            that is gone gets an error of its own in the predictions.
    """
    arguments = [arguments] if isinstance(arguments, str | Path) else arguments
    return list(dict.fromkeys(file for argument in arguments for file in _expand_one(str(argument))))


def is_address(name: str) -> bool:
    """Whether a name is one of a stream rather than of a file."""
    return "://" in name and not os.path.lexists(name)


def _expand_one(name: str) -> Iterable[str]:
    is_list = name.lower().endswith(".txt")
    if name == STDIN:
        stdin = getattr(sys.stdin, "buffer", None)
        return _expand_list(stdin.read() if stdin else sys.stdin.read().encode(), "standard input")
    if is_address(name):
        return [name]
    if is_list or (name.startswith("@") and not os.path.lexists(name)):
        path = _expand_home(name.removeprefix("@"))
        try:
            return _expand_list(path.read_bytes(), str(path))
        except (OSError, ValueError) as error:
            raise DataError(f"the list {path} can't be read: {error}") from None
    if glob.has_magic(name) and not os.path.lexists(name):
        return _expand_glob(name)
    return _find_videos(name)


def _find_videos(name: str) -> list[str]:
    if os.path.isfile(name):  # noqa: PTH113 (it takes any name)
        return [str(Path(name))]
    path = Path(name) if os.path.lexists(name) else _expand_home(name)
    return find_videos(path.absolute() if str(path).startswith("~") else path)


def _expand_list(content: bytes, source: str) -> Iterator[str]:
    if _is_binary(content[:65536]):
        raise DataError(
            f"{source} holds a video, not a list of names; window=SECONDS looks at a video from a pipe "
            "through windows, otherwise give the name of its file"
        )
    text = content.decode("utf-8-sig", "surrogateescape")  # names on disk need not be UTF-8
    if as_they_are := "\0" in text:  # such as find -print0 writes them
        names = [name for name in text.split("\0") if name]
    else:  # no splitlines: names may hold what else ends lines
        lines = [line.strip("\r\n ") for line in text.split("\n") if not line.startswith("#")]
        names = [line if os.path.lexists(line) else str(_expand_home(line)) for line in lines if line.strip()]
    if not names:
        raise DataError(f"{source} lists no videos; expected one file, folder or glob a line")
    for name in names:
        if os.path.isdir(name):  # noqa: PTH112
            yield from _find_videos(name)
        elif not as_they_are and glob.has_magic(name) and not os.path.lexists(name):
            yield from _expand_glob(name)
        else:
            yield name


def _is_binary(content: bytes) -> bool:
    """Whether bytes are neither UTF-8 nor names of another encoding."""
    try:
        content[:-4].decode()  # a character may be cut at the end
    except UnicodeDecodeError:
        return len(content.translate(None, _CONTROLS)) < len(content)
    return False


def _expand_glob(pattern: str) -> Iterator[str]:
    found = sorted(glob.glob(str(_expand_home(pattern)), recursive=True))  # noqa: PTH207 (absolute too)
    if not found:
        raise DataError(f"{pattern} matches no file")
    for path in found:
        with suppress(DataError) if Path(path).is_dir() else nullcontext():  # it may hold other things
            yield from find_videos(path)


def _expand_home(name: str) -> Path:
    """``~`` as the home folder, unless it is part of a name such as ``~x.mp4``."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # there is no such user
        return Path(name)
