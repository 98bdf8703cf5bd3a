"""Which packets hold which frame, read off the packets alone: no pixel is decoded here.

A position counts a stream's packets in the order in which they are stored and decoded; pts counts the
stream's clock.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from av.packet import Packet
from av.video.stream import VideoStream

from mvit_video.data.decode.frames import FrameFormat
from mvit_video.data.decode.mpeg4 import may_show_nothing
from mvit_video.data.decode.times import NO_TIME, FrameTimes, Integers

VideoPacket: TypeAlias = "Packet[VideoStream]"

PTS, DTS, _KEY_SIZE, _FLAGS = range(4)  # columns of the table of packets
_KEY, _DISCARD, _NOT_SHOWN, _CORRUPT = 1, 2, 4, 8


def _is_vp8_reference(packet: VideoPacket) -> bool:
    # Frames that are only referred to (alt-ref) have packets of their own; bit 4 says "show" (RFC 6386, 9.1).
    return not memoryview(packet)[0] & 16


# Codecs some of whose packets show no picture.
_SHOW_NOTHING: dict[str, Callable[[VideoPacket], bool]] = {
    "vp8": _is_vp8_reference,
    "mpeg4": may_show_nothing,
}


def table_of(packets: Iterable[VideoPacket], codec: str, container_format: str) -> Integers:
    """What the packets of a stream say of themselves, (N, 4): pts, dts, bytes of a key frame or 0, flags."""
    stores_dts = container_format != "matroska"  # there FFmpeg guesses it, and may go back in time
    shows_nothing = _SHOW_NOTHING.get(codec)
    table = array("q")  # long files have very many
    for packet in packets:
        flags = (
            _KEY * packet.is_keyframe
            | _DISCARD * packet.is_discard  # decoded but not shown: an edit list cuts it off
            | _NOT_SHOWN * (shows_nothing is not None and shows_nothing(packet))
            | _CORRUPT * packet.is_corrupt  # something is missing at or after it
        )
        pts, dts = (NO_TIME if time is None else time for time in (packet.pts, packet.dts))
        table.extend((pts, dts if stores_dts else NO_TIME, packet.size * packet.is_keyframe, flags))
    return np.frombuffer(table, np.int64).reshape(-1, 4)


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


@dataclass
class DecodeRange:
    """Packets to decode in one go: from a key frame (its number) to a last position, for these frames."""

    key: int
    last: int
    frames: list[int]


@dataclass(eq=False)
class FileIndex:
    """What is known of a file's frames once all of it was read.

    Attributes:
        packets: int64 (N, 4), see `table_of`.
        counted: pts of each frame, or `NO_TIME`, in the order shown, where all were decoded and counted since
            the packets don't tell which frames there are.
        num_intact: frames that were counted before the first damage.
        guesses_times: the file tells the times of storage alone, `packets` has those worked out from them.
        size: bytes of the file up to the space that a camera allocated ahead; None: all count.
        fmt: of the frames, once one was decoded.
        times: of all frames, once the file was opened.
    """

    packets: Integers
    counted: Integers | None = None
    num_intact: int = 0
    guesses_times: bool = False
    size: int | None = None
    fmt: FrameFormat | None = None
    times: FrameTimes | None = None

    @property
    def pts(self) -> Integers:
        """Of each frame, in the order shown; they rise, unless they were counted."""
        return self._shown if self.counted is None else self.counted

    @cached_property
    def shown_at(self) -> dict[int, int] | None:
        """When pictures are shown by the time stored, where the file doesn't tell."""
        if not self.guesses_times:
            return None
        return dict(zip(self.packets[:, DTS].tolist(), self.packets[:, PTS].tolist(), strict=True))

    # All below is for packets that tell which frames there are.

    @property
    def is_usable(self) -> bool:
        """Whether the order and number of pictures shown can be read off the packets' timestamps."""
        pts, dts, _, flags = self.packets.T
        if not len(pts) or not flags[0] & _KEY or (flags & _NOT_SHOWN).any():
            return False
        # What precedes the first key frame may be shown or not.
        if (pts == NO_TIME).any() or pts.min() != pts[0]:
            return False
        return _rises(self._pts) and _rises(dts[dts != NO_TIME]) and _rises(self._key_pts)

    @cached_property
    def _order(self) -> npt.NDArray[np.intp]:
        """Positions in the order of pts."""
        return np.argsort(self.packets[:, PTS], kind="stable")

    @cached_property
    def _pts(self) -> Integers:
        """Of all packets, rising."""
        return self.packets[self._order, PTS]

    @cached_property
    def _shown(self) -> Integers:
        return self._pts[self.packets[self._order, _FLAGS] & _DISCARD == 0]

    @cached_property
    def key_positions(self) -> list[int]:
        """They rise, as the times of the key frames do."""
        return self.positions(_KEY)

    @cached_property
    def _key_pts(self) -> Integers:
        return self.packets[self.key_positions, PTS]

    def positions(self, flag: int) -> list[int]:
        """Where the packets with a flag are."""
        return np.flatnonzero(self.packets[:, _FLAGS] & flag).tolist()

    def position(self, pts: int) -> int | None:
        """Of the packet with this time, None where there is none."""
        place = int(np.searchsorted(self._pts, pts))
        known = place < len(self._pts) and self._pts[place] == pts
        return int(self._order[place]) if known else None

    def position_of(self, frame: int) -> int:
        """Of a frame's packet."""
        return int(self._order[np.searchsorted(self._pts, self._shown[frame])])

    def key(self, number: int) -> Key:
        position = self.key_positions[number]
        pts, dts, size, flags = self.packets[position].tolist()
        return Key(position, pts, pts if dts == NO_TIME else dts, size, not flags & _DISCARD)

    def key_of(self, frame: int) -> int:
        """Number of the last key frame that a frame needs: neither shown nor stored after it."""
        number = int(np.searchsorted(self._key_pts, self._shown[frame], side="right")) - 1
        return max(min(number, bisect.bisect_right(self.key_positions, self.position_of(frame)) - 1), 0)

    def positions_by_pts(self, first: int, last: int) -> dict[int, int]:
        """Of a stretch of packets, both ends included."""
        return {pts: first + i for i, pts in enumerate(self.packets[first : last + 1, PTS].tolist())}

    def is_corrupted(self, frame: int, damaged: Iterable[int]) -> bool:
        """Whether a damaged packet lies between the frame's key frame and the frame itself."""
        start, end = self.key_positions[self.key_of(frame)], self.position_of(frame)
        return any(start <= position <= end for position in damaged)

    def plan_ranges(self, wanted: Iterable[int]) -> list[DecodeRange]:
        """Ranges for rising frame numbers; a new one begins where a later key frame saves some packets."""
        ranges: list[DecodeRange] = []
        for frame in wanted:
            key, position = self.key_of(frame), self.position_of(frame)
            current = ranges[-1] if ranges else None
            if current is not None and (
                self.key_positions[key] <= current.last + 1 or key == self.key_of(current.frames[-1])
            ):
                current.frames.append(frame)
                current.last = max(current.last, position)
            else:
                ranges.append(DecodeRange(key, position, [frame]))
        return ranges

    @cached_property
    def lost_packets(self) -> list[int]:
        """Positions where packets are lost; none where a key frame follows, as at a joint of two streams."""
        # The parser hands the flag on one packet too early, so a joint may be two packets away.
        flags, num_packets = self.packets[:, _FLAGS], len(self.packets)
        lost = [i + 1 for i in self.positions(_CORRUPT) if not (flags[i + 1 : i + 3] & _KEY).any()]
        if num_packets in lost:
            lost.append(num_packets - 1)  # the last packet itself is cut off
        return lost

    @cached_property
    def hides_frames(self) -> bool:
        """Whether some pictures are decoded but not shown, as an edit list says."""
        return bool((self.packets[:, _FLAGS] & _DISCARD).any())

    @cached_property
    def reorders(self) -> bool:
        """Whether frames are stored in another order than they are shown."""
        return bool((np.diff(self.packets[:, PTS]) < 0).any())

    @property
    def has_open_gops(self) -> bool:
        """Whether pictures stored after a key frame are shown before it."""
        pts = self.packets[:, PTS]
        return any(
            (pts[position + 1 : position + 9] < pts[position]).any() for position in self.key_positions
        )


def _rises(times: Integers) -> bool:
    return bool((np.diff(times) > 0).all())
