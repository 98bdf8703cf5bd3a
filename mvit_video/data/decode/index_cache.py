"""What reading a whole file has told, kept so that opening it again takes the same for any length.

In memory for this process, bounded; and in a folder, if one is given, a small compressed file for each video.
A kept index counts only as long as the file has the size and the time of change that it had.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from mvit_video.data.decode.packets import FileIndex
from mvit_video.data.decode.times import Integers
from mvit_video.io.fingerprint import Fingerprint, file_stamp
from mvit_video.io.writing import replacing

log = logging.getLogger(__name__)
_warn_once = functools.cache(log.warning)

_MADE_WITH = [3, av.__version__, str(av.ffmpeg_version_info)]  # others may see other packets in a file
_MAX_FRAMES = 2_000_000  # in memory, of all files together; a frame takes about 60 bytes
_SETTLED_SECONDS = 2.0  # a file that changed later than this ago may change again within a tick of its clock


class _Memory:
    """The indices used last, by path."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, tuple[Fingerprint, FileIndex]] = {}
        self._num_frames = 0

    def get(self, key: str, stamp: Fingerprint) -> FileIndex | None:
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is None:
                return None
            self._entries[key] = entry  # as the last of all
            return entry[1] if entry[0] == stamp else None

    def put(self, key: str, stamp: Fingerprint, index: FileIndex) -> None:
        with self._lock:
            former = self._entries.pop(key, None)
            self._num_frames += len(index.pts) - (len(former[1].pts) if former else 0)
            self._entries[key] = (stamp, index)
            while self._num_frames > _MAX_FRAMES:
                oldest = next(iter(self._entries))
                self._num_frames -= len(self._entries.pop(oldest)[1].pts)


_memory = _Memory()


class IndexCache:
    """Where the index of one file is kept.

    Args:
        folder: where it stays for other processes and later runs; None: in memory only.
    """

    def __init__(self, path: str, folder: str | Path | None = None) -> None:
        self._key = os.path.abspath(path)  # noqa: PTH100 (speed)
        self._stamp = file_stamp(path)
        self._file = None
        if folder is not None:
            name = hashlib.sha256(os.fsencode(self._key)).hexdigest()
            self._file = Path(os.path.expanduser(folder)) / name[:2] / f"{name[2:34]}.npz"  # noqa: PTH111

    def load(self) -> FileIndex | None:
        """None where none is kept that fits."""
        found = _memory.get(self._key, self._stamp)
        if found is None and self._file is not None:
            try:
                found = _read(self._file, self._stamp)
            except FileNotFoundError:
                pass
            except Exception as error:  # NumPy, zipfile and zlib raise many kinds for a damaged file
                log.info("%s is no index of packets (%s); it is made anew", self._file, error)
            if found is not None:
                _memory.put(self._key, self._stamp, found)
        return found

    def save(self, index: FileIndex) -> None:
        """Keep it, unless the file is just being written."""
        settled = time.time_ns() - self._stamp.get("mtime_ns", time.time_ns()) > _SETTLED_SECONDS * 1e9
        if not settled:
            return
        _memory.put(self._key, self._stamp, index)
        if self._file is not None:
            try:
                _write(self._file, self._stamp, index)
            except (OSError, ValueError) as error:  # a null byte in its name
                reason = getattr(error, "strerror", None) or str(error)
                _warn_once("indices of packets can't be kept in %s: %s", self._file.parent.parent, reason)


def _write(file: Path, stamp: Fingerprint, index: FileIndex) -> None:
    about = {
        "version": _MADE_WITH,
        "stamp": stamp,
        "is_counted": index.counted is not None,
        "num_intact": index.num_intact,
        "guesses_times": index.guesses_times,
        "size": index.size,
    }
    counted = np.empty(0, np.int64) if index.counted is None else index.counted
    with replacing(file) as target:
        np.savez_compressed(
            target,
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            # Differences repeat themselves, so they take a byte or less each.
            packets=_narrow(np.diff(index.packets.T, prepend=np.int64(0))),
            counted=_narrow(np.diff(counted, prepend=np.int64(0))),
        )


def _narrow(steps: Integers) -> npt.NDArray[Any]:
    """In a type of half the size or less that holds them: it is unpacked the faster."""
    least, most = steps.min(initial=0), steps.max(initial=0)
    bits = next(bits for bits in (8, 16, 32, 64) if -(1 << bits - 1) <= least and most < 1 << bits - 1)
    return steps.astype(f"int{bits}")


def _read(file: Path, stamp: Fingerprint) -> FileIndex | None:
    """Raises many kinds of errors for what is no index."""
    with np.load(file, allow_pickle=False) as arrays:
        about = json.loads(arrays["about"].tobytes())
        if about["version"] != _MADE_WITH or about["stamp"] != stamp:
            return None
        packets, counted = (
            np.cumsum(arrays[name], axis=-1, dtype=np.int64) for name in ("packets", "counted")
        )
    index = FileIndex(
        np.ascontiguousarray(packets.T).reshape(-1, 4),
        counted if about["is_counted"] else None,
        int(about["num_intact"]),
        bool(about["guesses_times"]),
        about["size"],
    )
    fits = index.is_usable if index.counted is None else index.num_intact <= len(counted)
    if not fits or not (index.size is None or 0 < int(index.size) <= stamp["size"]):
        raise ValueError("its parts contradict each other")
    return index
