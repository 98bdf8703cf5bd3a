"""Which packets hold which frame, read off the packets alone: no pixel is decoded here.

A position counts a stream's packets in the order in which they are stored and decoded.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from av.packet import Packet
from av.video.stream import VideoStream


class PacketInfo(NamedTuple):
    pts: int | None
    dts: int | None
    is_key: bool
    is_discard: bool  # decoded but not shown: an edit list cuts it off
    is_hidden: bool
    is_corrupt: bool  # something is missing at or after it

    @classmethod
    def of(cls, packet: Packet[VideoStream]) -> PacketInfo:
        # VP8 stores pictures that are only referred to as packets of their own; bit 4 says "show".
        hidden = packet.stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 16
        return cls(packet.pts, packet.dts, packet.is_keyframe, packet.is_discard, hidden, packet.is_corrupt)


@dataclass(frozen=True)
class Key:
    position: int
    pts: int
    seek_time: int


@dataclass(frozen=True)
class Index:
    """Where each frame is. A position counts packets in decoding order; pts counts the stream's clock."""

    pts: list[int]  # of each frame, rising
    position: dict[int, int]  # pts -> position, of all packets
    keys: list[Key]  # rising in position and pts

    @property
    def hides_frames(self) -> bool:
        """Whether some pictures are decoded but not shown, as an edit list says."""
        return len(self.position) > len(self.pts)

    @property
    def has_open_gops(self) -> bool:
        """Whether pictures stored after a key frame are shown before it."""
        shown = list(self.position)  # by position
        return any(
            any(pts < key.pts for pts in shown[key.position + 1 : key.position + 9]) for key in self.keys
        )

    def key_of(self, frame: int) -> int:
        """Number of the last key frame that frame needs: neither shown nor stored after it."""
        pts = self.pts[frame]
        number = bisect.bisect_right(self.keys, pts, key=lambda key: key.pts) - 1
        while number > 0 and self.keys[number].position > self.position[pts]:
            number -= 1
        return max(number, 0)

    def is_spoilt(self, frame: int, damage: list[int]) -> bool:
        """Whether damage lies between the frame's key frame and the frame itself."""
        start = self.keys[self.key_of(frame)].position
        return any(start <= position <= self.position[self.pts[frame]] for position in damage)


def build_index(packets: list[PacketInfo]) -> Index | None:
    """None when the order or number of pictures shown can't be read off the packets' timestamps."""
    pts = [packet.pts for packet in packets if packet.pts is not None]
    dts = [packet.dts for packet in packets if packet.dts is not None]
    keys = [
        Key(i, packet.pts, packet.pts if packet.dts is None else packet.dts)
        for i, packet in enumerate(packets)
        if packet.is_key and packet.pts is not None
    ]
    trustworthy = (
        len(pts) == len(set(pts)) == len(packets) > 0
        and all(a < b for a, b in pairwise(dts))
        and all(a.pts < b.pts for a, b in pairwise(keys))
        and packets[0].is_key
        and min(pts) == pts[0]  # pictures before the first key frame may or may not be shown
        and not any(packet.is_hidden for packet in packets)
    )
    if not trustworthy:
        return None
    shown = sorted(p for p, packet in zip(pts, packets, strict=True) if not packet.is_discard)
    return Index(shown, {p: i for i, p in enumerate(pts)}, keys)


def find_holes(packets: list[PacketInfo]) -> list[int]:
    """Positions before which packets are lost; not where a key frame follows, as at joints of a stream."""
    flagged = (i for i, packet in enumerate(packets) if packet.is_corrupt)
    # The parser hands the flag on one packet too early, so a joint may be two packets away.
    return [i + 1 for i in flagged if not any(after.is_key for after in packets[i + 1 : i + 3])]


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
        position = index.position[index.pts[frame]]
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
