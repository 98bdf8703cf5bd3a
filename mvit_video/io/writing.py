"""One way to write: what a file held stays until its successor is safely on the disk.

A run owns what it writes (``sole_writer``), replaces whole files in one step (``replacing``), adds whole rows
to growing ones (``append``), and takes up what a killed run has left: a torn end is set aside under a name of
its own, never deleted (``keep_whole_lines``, ``set_aside``).
"""

from __future__ import annotations

import errno
import filecmp
import json
import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from mvit_video.errors import ConfigError

log = logging.getLogger(__name__)

_LOCK_ATTEMPTS = 10  # where runs begin and end at the same moment


@contextmanager
def replacing(path: str | Path, mode: str = "wb", *, keep: bool = False, **options: Any) -> Iterator[IO[Any]]:
    """A new file that takes the place of ``path`` when the block ends well, in one step, synced to the disk.

    If the block raises, ``path`` is as it was and nothing else is left. Missing parent folders are made. A
    link goes on leading to its file; a device or a pipe, which holds nothing, is written to as it stands.

    Args:
        mode, options: as of ``open``; text is UTF-8 unless ``encoding`` is given.
        keep: give a file of another content the name ``<name>.former``, and say so.

    Raises:
        OSError: with ``path`` as its file name.
    """
    path = Path(os.path.realpath(path))
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    if path.exists() and not path.is_file() and not path.is_dir():
        with naming(path), path.open(mode, **options) as file:
            yield file
        return
    unfinished = path.with_name(f".unfinished-{secrets.token_hex(4)}{path.suffix}")
    with naming(path):
        try:
            _make_parents(path)
            with unfinished.open(mode.replace("w", "x"), **options) as file:
                try:
                    yield file
                except RuntimeError:  # torch's, in the place of the system's own if there was one
                    file.flush()
                    for _ in range(2):  # the first may still fill what is left
                        os.write(file.fileno(), bytes(1 << 20))
                    raise
                file.flush()
                os.fsync(file.fileno())
            if keep and path.is_file() and not filecmp.cmp(unfinished, path, shallow=False):
                keep_former(path)
            unfinished.replace(path)
            _sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink()
            raise


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Replace a file by one that holds these values; ValueError if a number of them is not finite."""
    with replacing(path, "w") as file:
        json.dump(values, file, indent=2, allow_nan=False)


@contextmanager
def growing(path: Path) -> Iterator[IO[bytes]]:
    """A file to ``append`` to. Raises OSError with its name, also when it is closed."""
    with naming(path), path.open("ab") as file:
        yield file


def append(file: IO[Any], rows: str | bytes, *, sync: bool = True) -> None:
    """Add whole rows to an open file; then they survive a kill and, with ``sync``, a power loss."""
    with naming(Path(file.name)):
        file.write(rows)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def keep_whole_lines(path: Path) -> None:
    """Cut a line without an end off a file of lines, which a killed run has left; it is set aside."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        torn = _free_name(path.with_name(f"{path.name}.torn"))
        for file, part in ((torn, content[whole:]), (path, content[:whole])):
            with replacing(file) as written:
                written.write(part)
        log.warning("%s ended in the middle of a line, which is set aside as %s", path, torn)


def set_aside(path: Path, why: str, *, prefix: str = "") -> Path:
    """Give a damaged file another name in its folder, and say so; returns the name.

    Args:
        prefix: of the name, such as ``_`` in a folder whose readers take all files that don't begin so.
    """
    aside = path.rename(_free_name(path.with_name(f"{prefix}{path.name}.damaged")))
    log.warning("%s: %s; it is set aside as %s", path, why, aside)
    return aside


def keep_former(path: Path) -> None:
    """Give what another run has left, if anything, the name ``<name>.former``, and say so."""
    if path.exists():
        former = path.rename(_free_name(path.with_name(f"{path.name}.former")))
        log.warning("%s of a former run is now %s", path, former)


def remove_unfinished(folder: Path) -> None:
    """Remove what ``replacing`` of a killed run has left in a folder that this run alone writes to."""
    for file in folder.glob(".unfinished-*"):
        file.unlink(missing_ok=True)


@contextmanager
def sole_writer(path: str | Path) -> Iterator[None]:
    """Be the only run that writes to a file or folder; the lock ends with the process, however that ends.

    Raises:
        ConfigError: another run writes there, or it is a device or a pipe.
        OSError: no file can be made there.
    """
    path = Path(os.path.realpath(path))  # whatever links lead to it
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ConfigError(f"{path} is a device or a pipe, which nobody owns; name a file or a folder")
    with naming(path):
        _make_parents(path)
        lock_file = path.parent / f".{path.name}.lock"
        lock = FileLock(lock_file, timeout=0)
        for _ in range(_LOCK_ATTEMPTS):
            with suppress(Timeout):
                lock.acquire()
                if lock_file.exists():
                    break
                lock.release()
            if lock_file.exists():
                what = "another run is writing there; wait for it to end, or choose another output"
                raise ConfigError(f"{path}: {what}")
            # Its owner has ended between our opening and locking it.
        else:
            raise OSError(errno.EACCES, "no file can be made there", str(path))
    try:
        yield
    finally:
        lock_file.unlink(missing_ok=True)
        lock.release()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an error of the operating system, such as of a full disk, the name of the file it is about."""
    try:
        yield
    except OSError as error:
        if error.filename is None or ".unfinished-" in str(error.filename):
            with suppress(AttributeError):  # FFmpeg's own can't be changed
                error.filename = str(path)
        raise


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power loss, where the file system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _make_parents(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # a parent is a file
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None


def _free_name(path: Path) -> Path:
    """``path``, or with a number behind it where there is such a file already."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in count(1))
    return next(name for name in chain([path], numbered) if not name.exists())


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Ctrl-C takes effect when the block has ended.

    Where Python drops exceptions, as in what it runs after a fork, KeyboardInterrupt would be lost; where C++
    calls back, as in ``torch.save``, it would become another error.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    deferred: list[Any] = []
    signal.signal(signal.SIGINT, lambda *frame: deferred.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if deferred:
            handler(*deferred[0])
