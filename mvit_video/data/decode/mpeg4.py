"""When the pictures of an AVI file with B-frames are shown, which only their kinds tell.

AVI stores no times of presentation, and FFmpeg's guesses are often wrong. UCF101's and HMDB51's files are of
this kind: MPEG-4 Visual by XviD, "packed", with a B-frame in the packet of the picture that it comes before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from av.bitstream import BitStreamFilterContext
from av.packet import Packet
from av.video.stream import VideoStream

_PICTURE = b"\x00\x00\x01\xb6"  # starts a VOP; two bits follow, its kind (ISO/IEC 14496-2, 6.2.5)
_INTRA, _BIDIRECTIONAL = 0, 2
_TINY = 19  # bytes, as FFmpeg's unpacker has it


def unpacked(
    stream: VideoStream, packets: Iterator[Packet[VideoStream]], times: dict[int, int]
) -> Iterator[Packet[VideoStream]]:
    """One picture in each packet, with its time: by the time at which it is stored, None where not given."""
    split = BitStreamFilterContext("mpeg4_unpack_bframes", stream)
    for packed in chain(packets, [None]):
        for packet in split.filter(packed):
            packet.pts = None if packet.dts is None else times.get(packet.dts)
            yield packet


def noting_kinds(
    packets: Iterator[Packet[VideoStream]], kinds: list[int | None]
) -> Iterator[Packet[VideoStream]]:
    """The same packets; their kinds are added to a list."""
    for packet in packets:
        kinds.append(kind_of(packet))
        yield packet


def kind_of(packet: Packet[VideoStream]) -> int | None:
    """0 for I, 1 for P, 2 for B, 3 for S; None where there is no picture."""
    content = bytes(packet)
    start = content.find(_PICTURE) + len(_PICTURE)
    return content[start] >> 6 if len(_PICTURE) <= start < len(content) else None


def may_show_nothing(packet: Packet[VideoStream]) -> bool:
    """Whether a packet is as small as those that stand for a picture which is left out."""
    return packet.size <= _TINY and kind_of(packet) != _BIDIRECTIONAL and not packet.is_corrupt


def times_shown(stored: Sequence[int], kinds: Sequence[int | None]) -> list[int] | None:
    """When each picture is shown, of pictures in the order and at the times at which they are stored.

    A picture that others may refer to is shown after the B-frames that follow it in the file.

    Returns None where this doesn't tell.
    """
    if None in kinds or kinds[:1] != [_INTRA] or kinds[1:2] == [_BIDIRECTIONAL]:
        return None
    order: list[int] = []  # pictures, as they are shown
    held: list[int] = []  # the last one that is no B-frame
    for picture, kind in enumerate(kinds):
        if kind == _BIDIRECTIONAL:
            order.append(picture)
        else:
            order += held
            held = [picture]
    times = [0] * len(kinds)
    for picture, time in zip(order + held, sorted(stored), strict=True):
        times[picture] = time
    return times
