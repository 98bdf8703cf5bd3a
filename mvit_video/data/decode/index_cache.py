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
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mvit_video.data.decode.frames import FrameFormat
from mvit_video.data.decode.packets import NO_TIME, Index, PacketList, build_index, find_lost_packets
from mvit_video.io.fingerprint import file_stamp
from mvit_video.io.writing import replacing

log = logging.getLogger(__name__)

_VERSION = 2
_MAX_FRAMES = 2_000_000  # in memory, of all files together; a frame takes about 50 bytes
_SETTLED_SECONDS = 2.0  # a file that changed later than this ago may change again within a tick of its clock


@dataclass
class FileIndex:
    """What is known of a file's frames once all of it was read.

    Attributes:
        packets: of the stream, with the times at which its frames are shown.
        index: None where the packets don't tell which frames there are, and all were decoded and counted.
        pts: of each frame, in the order shown; None where it has none.
        guesses_times: the file tells the times of storage alone, `packets` has those worked out from them.
        num_intact: frames before the first damage; of a file without an index.
        size: bytes of the file up to the space that a camera allocated ahead; None: all count.
        fmt: of the frames, once one was decoded.
    """

    packets: PacketList
    index: Index | None
    pts: Sequence[int | None]
    size: int | None = None
    guesses_times: bool = False
    num_intact: int = 0
    fmt: FrameFormat | None = None

    @cached_property
    def presentation_times(self) -> dict[int, int] | None:
        """By the time stored, where the file doesn't tell them."""
        return dict(zip(self.packets.dts, self.packets.pts, strict=True)) if self.guesses_times else None

    @cached_property
    def lost_packets(self) -> list[int]:
        """Positions where packets are missing."""
        return find_lost_packets(self.packets)


class _Memory:
    """The indices used last, by path and options."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[object, tuple[dict[str, Any], FileIndex]] = OrderedDict()
        self._num_frames = 0

    def get(self, key: object, stamp: dict[str, Any]) -> FileIndex | None:
        with self._lock:
            if key not in self._entries or self._entries[key][0] != stamp:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][1]

    def put(self, key: object, stamp: dict[str, Any], index: FileIndex) -> None:
        with self._lock:
            former = self._entries.pop(key, None)
            self._num_frames += len(index.pts) - (len(former[1].pts) if former else 0)
            self._entries[key] = (stamp, index)
            while self._num_frames > _MAX_FRAMES and self._entries:
                _, (_, dropped) = self._entries.popitem(last=False)
                self._num_frames -= len(dropped.pts)


_memory = _Memory()


class IndexCache:
    """Where the index of one file is kept.

    Args:
        folder: where it stays for other processes and later runs; None: in memory only.
    """

    def __init__(self, path: str, folder: str | Path | None = None) -> None:
        self._key = os.path.abspath(path)  # noqa: PTH100 (speed)
        self._stamp = file_stamp(path)
        name = hashlib.sha256(os.fsencode(self._key)).hexdigest()
        self._file = None
        if folder is not None:
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
                _warn_not_kept(str(self._file.parent.parent), getattr(error, "strerror", None) or str(error))


@functools.cache
def _warn_not_kept(folder: str, reason: str) -> None:
    """Once a folder and reason."""
    log.warning("indices of packets can't be kept in %s: %s", folder, reason)


def _write(file: Path, stamp: dict[str, Any], found: FileIndex) -> None:
    packets, indexed = found.packets, found.index is not None
    about = {
        "version": _VERSION,
        "stamp": stamp,
        "indexed": indexed,
        "guesses_times": found.guesses_times,
        "num_intact": found.num_intact,
        "size": found.size,
    }
    with replacing(file) as target:
        np.savez_compressed(
            target,
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            # Differences repeat themselves, so they take a byte or less each.
            packet_pts=_steps(packets.pts),
            packet_dts=_steps(packets.dts),
            flags=np.frombuffer(packets.flags, np.uint8),
            key_sizes=np.array(packets.key_sizes, np.int64),
            pts=_steps([] if indexed else [NO_TIME if time is None else time for time in found.pts]),
        )


def _read(file: Path, stamp: dict[str, Any]) -> FileIndex | None:
    """Raises many kinds of errors for what is no index."""
    with np.load(file, allow_pickle=False) as arrays:
        about = json.loads(arrays["about"].tobytes())
        if about["version"] != _VERSION or about["stamp"] != stamp:
            return None
        packets = PacketList("", "")
        packets.pts, packets.dts = _sums(arrays["packet_pts"]), _sums(arrays["packet_dts"])
        packets.flags = bytearray(arrays["flags"].tobytes())
        packets.key_sizes = array("q", arrays["key_sizes"].astype(np.int64).tobytes())
        counted = [None if time == NO_TIME else time for time in _sums(arrays["pts"])]
    index = build_index(packets) if about["indexed"] else None
    num_intact, size = int(about["num_intact"]), about["size"]
    fits = (
        len(packets.pts) == len(packets.dts) == len(packets.flags)
        and len(packets.key_sizes) == packets.num_keys
        and (index is not None) == about["indexed"]
        and (size is None or 0 < int(size) <= stamp["size"])
    )
    if not fits:
        raise ValueError("its parts contradict each other")
    pts = counted if index is None else index.pts
    return FileIndex(packets, index, pts, size, bool(about["guesses_times"]), num_intact)


def _steps(values: Sequence[int]) -> Any:
    return np.diff(np.array(values, np.int64), prepend=np.int64(0))


def _sums(steps: Any) -> array[int]:
    return array("q", np.cumsum(steps.astype(np.int64)).tobytes())
