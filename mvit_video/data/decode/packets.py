"""Which packets hold which frame, read off the packets alone: no pixel is decoded here.

A position counts a stream's packets in the order in which they are stored and decoded.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from av.packet import Packet
from av.video.stream import VideoStream

from mvit_video.data.decode.mpeg4 import may_show_nothing

_NO_TIME = -(1 << 63)  # as FFmpeg has it
_KEY, _DISCARD, _HIDDEN, _CORRUPT = 1, 2, 4, 8


class PacketList:
    """What the packets of a stream say of themselves, in 17 bytes each: long files have very many."""

    def __init__(self, codec: str, container_format: str) -> None:
        self._stores_dts = container_format != "matroska"  # there FFmpeg guesses it, and may go back in time
        self._is_hidden = _HIDING.get(codec, _hides_nothing)
        self.pts, self.dts, self.marks = array("q"), array("q"), bytearray()
        self.key_sizes = array("q")

    def __len__(self) -> int:
        return len(self.marks)

    def add(self, packet: Packet[VideoStream]) -> None:
        self.pts.append(_NO_TIME if packet.pts is None else packet.pts)
        self.dts.append(packet.dts if self._stores_dts and packet.dts is not None else _NO_TIME)
        if packet.is_keyframe:
            self.key_sizes.append(packet.size)
        self.marks.append(
            _KEY * packet.is_keyframe
            | _DISCARD * packet.is_discard  # decoded but not shown: an edit list cuts it off
            | _HIDDEN * self._is_hidden(packet)
            | _CORRUPT * packet.is_corrupt  # something is missing at or after it
        )

    def positions(self, mark: int) -> list[int]:
        """Where the packets with a mark are."""
        return np.flatnonzero(np.frombuffer(self.marks, np.uint8) & mark).tolist()


def _hides_nothing(packet: Packet[VideoStream]) -> bool:
    return False


def _hides_vp8(packet: Packet[VideoStream]) -> bool:
    # Pictures that are only referred to are packets of their own; bit 4 says "show".
    return not memoryview(packet)[0] & 16


# Codecs some of whose packets show no picture.
_HIDING = {"vp8": _hides_vp8, "mpeg4": may_show_nothing}


class Key(NamedTuple):
    position: int
    pts: int
    seek_time: int
    size: int  # of its packet, in bytes
    is_shown: bool


class Index:
    """Where each frame is. A position counts packets in decoding order; pts counts the stream's clock.

    Attributes:
        pts: of each frame, rising.
        keys: rising in position and pts.
    """

    def __init__(self, packets: PacketList) -> None:
        self._stored = packets.pts
        stored = np.frombuffer(packets.pts, np.int64)
        order = np.argsort(stored, kind="stable")
        shown = (np.frombuffer(packets.marks, np.uint8)[order] & _DISCARD) == 0
        self._order = array("q", order.astype(np.int64).tobytes())
        self._sorted = array("q", stored[order].tobytes())
        self.pts = self._sorted if shown.all() else array("q", stored[order][shown].tobytes())
        self.keys = [
            Key(
                i,
                packets.pts[i],
                packets.pts[i] if packets.dts[i] == _NO_TIME else packets.dts[i],
                size,
                is_shown=not packets.marks[i] & _DISCARD,
            )
            for i, size in zip(packets.positions(_KEY), packets.key_sizes, strict=True)
        ]

    def position(self, pts: int) -> int | None:
        """Of the packet with this time, None where there is none."""
        place = bisect.bisect_left(self._sorted, pts)
        known = place < len(self._sorted) and self._sorted[place] == pts
        return self._order[place] if known else None

    def position_of(self, frame: int) -> int:
        """Of a frame's packet."""
        position = self.position(self.pts[frame])
        assert position is not None
        return position

    @property
    def hides_frames(self) -> bool:
        """Whether some pictures are decoded but not shown, as an edit list says."""
        return len(self._sorted) > len(self.pts)

    @cached_property
    def reorders(self) -> bool:
        """Whether frames are stored in another order than they are shown."""
        return bool((np.diff(np.frombuffer(self._stored, np.int64)) < 0).any())

    @property
    def has_open_gops(self) -> bool:
        """Whether pictures stored after a key frame are shown before it."""
        return any(
            any(pts < key.pts for pts in self._stored[key.position + 1 : key.position + 9])
            for key in self.keys
        )

    def key_of(self, frame: int) -> int:
        """Number of the last key frame that frame needs: neither shown nor stored after it."""
        number = bisect.bisect_right(self.keys, self.pts[frame], key=lambda key: key.pts) - 1
        position = self.position_of(frame)
        while number > 0 and self.keys[number].position > position:
            number -= 1
        return max(number, 0)

    def is_spoilt(self, frame: int, damage: list[int]) -> bool:
        """Whether damage lies between the frame's key frame and the frame itself."""
        start, end = self.keys[self.key_of(frame)].position, self.position_of(frame)
        return any(start <= position <= end for position in damage)


def build_index(packets: PacketList) -> Index | None:
    """None when the order or number of pictures shown can't be read off the packets' timestamps."""
    if not len(packets) or not packets.marks[0] & _KEY or packets.positions(_HIDDEN):
        return None
    pts, dts = np.frombuffer(packets.pts, np.int64), np.frombuffer(packets.dts, np.int64)
    if (pts == _NO_TIME).any() or pts.min() != pts[
        0
    ]:  # what precedes the first key frame may be shown or not
        return None
    if not (np.diff(np.sort(pts)) > 0).all() or not (np.diff(dts[dts != _NO_TIME]) > 0).all():
        return None
    index = Index(packets)
    return index if all(a.pts < b.pts for a, b in pairwise(index.keys)) else None


def find_holes(packets: PacketList) -> list[int]:
    """Positions where packets are lost; none where a key frame follows, as at a joint of two streams."""
    # The parser hands the flag on one packet too early, so a joint may be two packets away.
    holes = [
        i + 1
        for i in packets.positions(_CORRUPT)
        if not any(mark & _KEY for mark in packets.marks[i + 1 : i + 3])
    ]
    if len(packets) in holes:
        holes.append(len(packets) - 1)  # the last packet itself is cut off
    return holes


@dataclass
class Stretch:
    """Packets to decode in one go: from a key frame (its number) to a last position, for these frames."""

    key: int
    last: int
    frames: list[int]


def plan(index: Index, wanted: list[int]) -> list[Stretch]:
    """Stretches for rising frame indices; a new one begins where a later key frame saves some packets."""
    stretches: list[Stretch] = []
    for frame in wanted:
        key = index.key_of(frame)
        position = index.position_of(frame)
        current = stretches[-1] if stretches else None
        if current is not None and (
            index.keys[key].position <= current.last + 1 or key == index.key_of(current.frames[-1])
        ):
            current.frames.append(frame)
            current.last = max(current.last, position)
        else:
            stretches.append(Stretch(key, position, [frame]))
    return stretches


def filled(packets: Iterator[Packet[VideoStream]]) -> Iterator[Packet[VideoStream]]:
    """Without the empty packets with which PyAV ends a stream, and those that stand for no picture."""
    return (packet for packet in packets if packet.size)
