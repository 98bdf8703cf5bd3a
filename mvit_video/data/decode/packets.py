"""Which packets hold which frame, read off the packets alone: no pixel is decoded here.

A position counts a stream's packets in the order in which they are stored and decoded.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from av.packet import Packet
from av.video.stream import VideoStream

from mvit_video.data.decode.mpeg4 import may_show_nothing

NO_TIME = -(1 << 63)  # as FFmpeg has it
_KEY, _DISCARD, _NOT_SHOWN, _CORRUPT = 1, 2, 4, 8


class PacketList:
    """What the packets of a stream say of themselves, in 17 bytes each: long files have very many."""

    def __init__(self, codec: str, container_format: str) -> None:
        self._stores_dts = container_format != "matroska"  # there FFmpeg guesses it, and may go back in time
        self._shows_nothing = _SHOW_NOTHING.get(codec, _never)
        self.pts, self.dts, self.flags = array("q"), array("q"), bytearray()
        self.key_sizes = array("q")

    def __len__(self) -> int:
        return len(self.flags)

    def add(self, packet: Packet[VideoStream]) -> None:
        self.pts.append(NO_TIME if packet.pts is None else packet.pts)
        self.dts.append(packet.dts if self._stores_dts and packet.dts is not None else NO_TIME)
        if packet.is_keyframe:
            self.key_sizes.append(packet.size)
        self.flags.append(
            _KEY * packet.is_keyframe
            | _DISCARD * packet.is_discard  # decoded but not shown: an edit list cuts it off
            | _NOT_SHOWN * self._shows_nothing(packet)
            | _CORRUPT * packet.is_corrupt  # something is missing at or after it
        )

    @property
    def num_keys(self) -> int:
        """Packets that are marked as key frames."""
        return len(self.positions(_KEY))

    def positions(self, flag: int) -> npt.NDArray[np.intp]:
        """Where the packets with a flag are."""
        return np.flatnonzero(np.frombuffer(self.flags, np.uint8) & flag)


def _never(packet: Packet[VideoStream]) -> bool:
    return False


def _is_vp8_reference(packet: Packet[VideoStream]) -> bool:
    # Frames that are only referred to (alt-ref) have packets of their own; bit 4 says "show" (RFC 6386, 9.1).
    return not memoryview(packet)[0] & 16


# Codecs some of whose packets show no picture.
_SHOW_NOTHING = {"vp8": _is_vp8_reference, "mpeg4": may_show_nothing}


class Key(NamedTuple):
    """A key frame.

    Attributes:
        size: of its packet, in bytes.
        is_shown: an edit list may hide it.
    """

    position: int
    pts: int
    seek_time: int
    size: int
    is_shown: bool


class Index:
    """Where each frame is. A position counts packets in decoding order; pts counts the stream's clock.

    Attributes:
        pts: of each frame, rising.
        num_keys: key frames; they rise in position and pts.
    """

    def __init__(self, packets: PacketList) -> None:
        self._packets = packets
        stored = np.frombuffer(packets.pts, np.int64)
        order = np.argsort(stored, kind="stable")
        shown = (np.frombuffer(packets.flags, np.uint8)[order] & _DISCARD) == 0
        self._order = array("q", order.astype(np.int64).tobytes())
        self._sorted = array("q", stored[order].tobytes())
        self.pts = self._sorted if shown.all() else array("q", stored[order][shown].tobytes())
        key_positions = packets.positions(_KEY)
        self._key_positions = array("q", key_positions.astype(np.int64).tobytes())
        self._key_pts = array("q", stored[key_positions].tobytes())
        self.num_keys = len(self._key_positions)

    def key(self, number: int) -> Key:
        packets, position = self._packets, self._key_positions[number]
        pts, dts = packets.pts[position], packets.dts[position]
        is_shown = not packets.flags[position] & _DISCARD
        return Key(position, pts, pts if dts == NO_TIME else dts, packets.key_sizes[number], is_shown)

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
        return bool((np.diff(np.frombuffer(self._packets.pts, np.int64)) < 0).any())

    @property
    def has_open_gops(self) -> bool:
        """Whether pictures stored after a key frame are shown before it."""
        pts = self._packets.pts
        return any(
            any(later < pts[position] for later in pts[position + 1 : position + 9])
            for position in self._key_positions
        )

    def key_of(self, frame: int) -> int:
        """Number of the last key frame that frame needs: neither shown nor stored after it."""
        number = bisect.bisect_right(self._key_pts, self.pts[frame]) - 1
        position = self.position_of(frame)
        while number > 0 and self._key_positions[number] > position:
            number -= 1
        return max(number, 0)

    def is_corrupted(self, frame: int, damaged: list[int]) -> bool:
        """Whether a damaged packet lies between the frame's key frame and the frame itself."""
        start, end = self._key_positions[self.key_of(frame)], self.position_of(frame)
        return any(start <= position <= end for position in damaged)


def build_index(packets: PacketList) -> Index | None:
    """None when the order or number of pictures shown can't be read off the packets' timestamps."""
    if not len(packets) or not packets.flags[0] & _KEY or len(packets.positions(_NOT_SHOWN)):
        return None
    pts, dts = np.frombuffer(packets.pts, np.int64), np.frombuffer(packets.dts, np.int64)
    # What precedes the first key frame may be shown or not.
    if (pts == NO_TIME).any() or pts.min() != pts[0]:
        return None
    if (
        not _rises(np.sort(pts))
        or not _rises(dts[dts != NO_TIME])
        or not _rises(pts[packets.positions(_KEY)])
    ):
        return None
    return Index(packets)


def _rises(times: npt.NDArray[np.int64]) -> bool:
    return bool((np.diff(times) > 0).all())


def find_lost_packets(packets: PacketList) -> list[int]:
    """Positions where packets are lost; none where a key frame follows, as at a joint of two streams."""
    # The parser hands the flag on one packet too early, so a joint may be two packets away.
    lost = [
        i + 1
        for i in packets.positions(_CORRUPT).tolist()
        if not any(flags & _KEY for flags in packets.flags[i + 1 : i + 3])
    ]
    if len(packets) in lost:
        lost.append(len(packets) - 1)  # the last packet itself is cut off
    return lost


@dataclass
class DecodeRange:
    """Packets to decode in one go: from a key frame (its number) to a last position, for these frames."""

    key: int
    last: int
    frames: list[int]


def plan_ranges(index: Index, wanted: list[int]) -> list[DecodeRange]:
    """Ranges for rising frame indices; a new one begins where a later key frame saves some packets."""
    ranges: list[DecodeRange] = []
    for frame in wanted:
        key = index.key_of(frame)
        position = index.position_of(frame)
        current = ranges[-1] if ranges else None
        if current is not None and (
            index.key(key).position <= current.last + 1 or key == index.key_of(current.frames[-1])
        ):
            current.frames.append(frame)
            current.last = max(current.last, position)
        else:
            ranges.append(DecodeRange(key, position, [frame]))
    return ranges


def filled(packets: Iterator[Packet[VideoStream]]) -> Iterator[Packet[VideoStream]]:
    """Without the empty packets with which PyAV ends a stream, and those that stand for no picture."""
    return (packet for packet in packets if packet.size)
