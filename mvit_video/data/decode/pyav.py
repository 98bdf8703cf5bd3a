"""The exact decoder: PyAV, on the CPU or with NVDEC.

Frame i is the i-th picture that a plain front-to-back decode of the file shows: never a header's count,
never time x rate. Opening a video for the first time reads all its packets (no decoding) into an index;
asking for frames plans which ranges of packets to decode, seeks to each and decodes only what is needed. A
file whose timestamps can't be trusted is decoded from the front and its frames are counted instead.
"""

from __future__ import annotations

import functools
import sys
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias

import torch
from av.error import FFmpegError
from av.format import Flags
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from mvit_video.data.decode import cuda, mpeg4
from mvit_video.data.decode.container import (
    MAX_PIXELS,
    best_video_stream,
    check_file,
    decoder_limit,
    has_telling_header,
    is_encrypted,
    open_file,
    require_pixels,
    size_without_padding,
)
from mvit_video.data.decode.frames import (
    FrameCollector,
    FrameFormat,
    NotOnHardware,
    PlaneBuffer,
    Transform,
    make_buffer,
)
from mvit_video.data.decode.index_cache import FileIndex, IndexCache
from mvit_video.data.decode.packets import (
    DecodeRange,
    Index,
    Key,
    PacketList,
    build_index,
    filled,
    find_lost_packets,
    plan_ranges,
)
from mvit_video.data.decode.times import measure_times, warn_of_jumps
from mvit_video.data.decode.video import Video
from mvit_video.data.timing import stage
from mvit_video.errors import VideoError

# Reading on is cheaper than a seek when the next key frame is at most this many packets away.
_SHORT_GAP = 32

# As many packets as a decoder may hold back to put frames in order.
_LONGEST_DELAY = 16

_NOTHING = "no frame can be decoded, the file is damaged"

# Probing a file decodes its first picture to learn the pixel format, which frames tell here anyway.
_PROBE = {"skip_frame": "all"}

# Of files whose header says all that is asked here, FFmpeg need not read packets.
_NO_PROBING = {"probesize": "32"}  # bytes, the least that FFmpeg takes

# Containers with a table of all packets, which tells when some are missing.
_HAS_SAMPLE_TABLE = ("mp4", "avi")

# Containers whose header gives the size of the first picture; of others it is guessed from some packets.
_HEADER_HAS_SIZE = ("mp4", "matroska", "avi")

_Slots: TypeAlias = dict[int, int]  # frame index, rising -> place in the request
_Write: TypeAlias = Callable[[int, VideoFrame], None]  # takes a frame for its place


class PyAVVideo(Video):
    """An open video file; see `Video`. Not thread-safe: each thread opens its own.

    Args:
        device: where the frames end up; None: the CPU.
        nvdec: decode on the device, where it can decode the file's codec.
        max_pixels: of a frame; a file with larger ones is refused.
        index_cache: folder where the index is kept, see `IndexCache`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: torch.device | None = None,
        nvdec: bool = False,
        max_pixels: int = MAX_PIXELS,
        index_cache: str | Path | None = None,
    ) -> None:
        self.path = str(path)
        self.device = device or torch.device("cpu")
        self._nvdec, self._max_pixels = nvdec, max_pixels
        self._hardware: cuda.HardwareDecoder | None = None  # decodes in the place of `_codec`
        self._reformatter = VideoReformatter()  # kept: setting it up costs more than converting a frame
        check_file(self.path)
        self._probing = _NO_PROBING if has_telling_header(self.path) else {}
        cache = IndexCache(self.path, index_cache)
        found = cache.load()
        self._num_bytes = None if found is None else found.size  # of the file, where not all count
        self._presentation_times = None if found is None else found.presentation_times
        self._keep = cache.save
        self._open()
        try:
            if found is None:
                found = self._read_file()
                self._keep(found)
            self._use(found)
            if not self.num_frames:
                raise self._error(_NOTHING)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the file and the decoder."""
        self._demuxer: Iterator[Packet[VideoStream]] = iter(())
        self._container.close()

    @functools.cached_property
    def size(self) -> tuple[int, int]:  # type: ignore[override]  # nobody sets it
        """Height and width; asked before any frame was decoded, it decodes the first."""
        return self.frame_format().upright_size

    def frame_format(self) -> FrameFormat:
        """That of the first frame, which all are converted to. Raises `VideoError` without any."""
        if self._found.fmt is None:
            first = next((frame for frame in self._iter_frames() if frame is not None), None)
            if first is None:
                raise self._error(_NOTHING)
            self._found.fmt = FrameFormat.of(first)
        require_pixels(self._found.fmt.width, self._found.fmt.height, self._max_pixels, self.path)
        return self._found.fmt

    def _format_by(self, frame: VideoFrame) -> FrameFormat:
        """See `frame_format`; any frame will do if it has the size of the first one."""
        if self._found.fmt is None and (frame.width, frame.height) == self._first_size:
            self._found.fmt = FrameFormat.of(frame)
        if self._found.fmt is None:  # this file is being decoded
            with PyAVVideo(self.path, max_pixels=self._max_pixels) as other:
                self._found.fmt = other.frame_format()
        return self.frame_format()

    @property
    def index(self) -> Index | None:
        """None where the packets don't tell which frames there are."""
        return self._found.index

    @property
    def lost_packets(self) -> list[int]:
        """Positions where packets are missing."""
        return self._found.lost_packets

    @property
    def needs_reordering(self) -> bool:
        """Whether the decoder, which has decoded a picture, reorders them though their times don't say so."""
        return self.index is not None and self._codec.has_b_frames and not self.index.reorders

    @property
    def has_false_keys(self) -> bool:
        """Whether the container's table marks other packets as key frames than are."""
        if self.index is None or self.container_format not in _HAS_SAMPLE_TABLE:
            return False
        return sum(entry.is_keyframe for entry in self._stream.index_entries) > self.index.num_keys

    def _decode(self, wanted: list[int], transform: Transform | None) -> Tensor:
        """A damaged file may look sound to NVDEC: the CPU decoder sees more."""
        slots = {index: slot for slot, index in enumerate(wanted)}
        try:
            if self._nvdec:
                try:
                    return self._decode_on_gpu(slots, transform)
                except NotOnHardware as reason:
                    self._nvdec = False
                    cuda.fall_back(self.path, str(reason))
            return self._decode_on_cpu(slots, transform)
        except (FFmpegError, OSError) as error:
            raise VideoError(self.path, "the file can't be read any more") from error

    def _decode_on_cpu(self, slots: _Slots, transform: Transform | None) -> Tensor:
        self._hardware = None
        frames: FrameCollector[VideoFrame] | None = None

        def write(slot: int, frame: VideoFrame) -> None:
            nonlocal frames
            if frames is None:
                fmt = self._format_by(frame)
                make = functools.partial(
                    make_buffer, fmt=fmt, reformatter=self._reformatter, device=self.device
                )
                frames = FrameCollector(len(slots), make, size=fmt.upright_size, transform=transform)
            frames.write(slot, frame)

        if self.index is not None:
            missing = self._decode_indexed(self.index, slots, write)
            if missing:
                self._fall_back_to_sequential(missing[0])
        if self.index is None:
            self._decode_from_front(slots, write)
        assert frames is not None
        return frames.to_tensor().to(self.device)

    def _decode_on_gpu(self, slots: _Slots, transform: Transform | None) -> Tensor:
        if self.index is None:
            raise NotOnHardware("its timestamps are no index of its frames")
        fmt = self.frame_format()
        make = functools.partial(PlaneBuffer, fmt=fmt, reformatter=self._reformatter, device=self.device)
        for anew in (False, True):
            with cuda.decoder_for(self._stream, fmt.pix_fmt, self.device, anew=anew) as self._hardware:
                frames = FrameCollector(len(slots), make, size=fmt.upright_size, transform=transform)
                if not self._decode_indexed(self.index, slots, frames.write):
                    return frames.to_tensor()
                if self._hardware.is_new:  # a kept one may have too few surfaces for this file's references
                    break
        raise NotOnHardware("NVDEC did not give all frames")  # the CPU decoder says what is wrong

    # Opening

    @stage("demux")
    def _open(self) -> None:
        options = {**_PROBE, **decoder_limit(self._max_pixels)}
        self._container = open_file(
            self.path, size=self._num_bytes, options=options, container_options=self._probing
        )
        if self._probing and len(self._container.streams.video) > 1:  # which is best, FFmpeg sees by packets
            self._probing = {}
            self._reopen()
            return
        try:
            self._stream = best_video_stream(self._container, self.path, self._max_pixels)
        except VideoError:
            self._container.close()
            raise
        self.container_format = _short_name(self._container.format.name)
        self._codec = self._stream.codec_context
        self.codec = self._codec.codec.canonical_name  # "av1", whichever decoder is at work
        # Clips are decoded in parallel instead: same speed, less CPU time.
        self._codec.thread_type, self._codec.thread_count = "NONE", 1
        # AVI tells no times of presentation: FFmpeg guesses them, and may be wrong.
        self.has_guessed_times = self.container_format == "avi" and bool(self._codec.has_b_frames)
        sized = self.container_format in _HEADER_HAS_SIZE
        self._first_size = (self._codec.width, self._codec.height) if sized else None
        # Fail where FFmpeg would paint over damage.
        self._codec.options = {"err_detect": "explode", **decoder_limit(self._max_pixels)}
        self._demuxer = self._demux()
        self._position = 0  # of the packet that `_demuxer` gives next, in decoding order

    def _reopen(self) -> None:
        self._container.close()
        self._open()

    def _demux(self) -> Iterator[Packet[VideoStream]]:
        packets = filled(self._container.demux(self._stream))
        if self._presentation_times is not None:
            packets = mpeg4.unpacked(self._stream, packets, self._presentation_times)
        return packets

    @stage("demux")
    def _read_file(self) -> FileIndex:
        if self.container_format == "mpegts":
            self._num_bytes = size_without_padding(self.path)
            if self._num_bytes is not None:
                self._reopen()
        packets, kinds = self._read_packets()
        self._position = len(packets)
        told = None
        if self.has_guessed_times:
            told = mpeg4.times_shown(packets.dts, kinds)
            if told is None:
                return self._count_frames(packets)
            packets.pts = array("q", [told[time] for time in packets.dts])
        index = build_index(packets)
        if index is None:
            return self._count_frames(packets)
        return FileIndex(packets, index, index.pts, self._num_bytes, guesses_times=told is not None)

    def _read_packets(self) -> tuple[PacketList, list[int | None]]:
        """Of the whole file, and the kinds of pictures whose time depends on it."""
        packets = PacketList(self.codec, self.container_format)
        kinds: list[int | None] = []
        source = self._demuxer
        goes_by_kind = self.has_guessed_times and self.codec == "mpeg4"
        if goes_by_kind:
            source = mpeg4.unpacked(self._stream, source, {})
        try:
            for packet in source:
                packets.add(packet)
                if goes_by_kind:
                    kinds.append(mpeg4.kind_of(packet))
        except FFmpegError as error:
            raise VideoError(self.path, "the file can't be read to its end, it is damaged") from error
        entries = self._stream.index_entries if self.container_format in _HAS_SAMPLE_TABLE else ()
        listed = len(packets) if len(entries) <= len(packets) else sum(entry.size > 0 for entry in entries)
        if listed > len(packets):
            raise VideoError(
                self.path, f"the file is cut off: {len(packets)} of its {listed} frames are there"
            )
        return packets, kinds

    def _use(self, found: FileIndex) -> None:
        self._found, self._presentation_times = found, found.presentation_times
        declared = float(self._stream.average_rate or self._stream.guessed_rate or 25)
        clock_may_jump = Flags.ts_discont in Flags(self._container.format.flags)
        tick = self._stream.time_base
        guessed = self.has_guessed_times and found.index is None  # an AVI file has one rate throughout
        pts = [None] * len(found.pts) if guessed else found.pts
        self.times, self.fps, self.start, num_jumps = measure_times(
            pts, tick or Fraction(1), declared, clock_may_jump=clock_may_jump
        )
        if num_jumps:
            warn_of_jumps(self.path, num_jumps, self.fps)
        self.num_frames = len(found.pts)

    def _error(self, reason: str) -> VideoError:
        """For frames that don't come."""
        if self._codec.width and self._codec.height:
            require_pixels(self._codec.width, self._codec.height, self._max_pixels, self.path)
        if self.container_format in ("mp4", "matroska") and is_encrypted(self.path):
            reason = "the video is encrypted (DRM), and can't be decoded without its key"
        return VideoError(self.path, reason)

    # Decoding by the index

    def _decode_indexed(self, index: Index, slots: _Slots, write: _Write) -> list[int]:
        """Write the frames; returns those that did not come."""
        missing: list[int] = []
        for range_ in plan_ranges(index, list(slots)):
            late = self._decode_range(index, range_, slots, write)
            if late and range_.key > 0:  # a decoder may need a longer run-up, as with periodic intra refresh
                longer = DecodeRange(range_.key - 1, range_.last, late)
                late = self._decode_range(index, longer, slots, write)
            missing += late
        return missing

    def _decode_range(self, index: Index, range_: DecodeRange, slots: _Slots, write: _Write) -> list[int]:
        key = index.key(range_.key)
        wanted = {index.pts[i]: i for i in range_.frames}
        came: set[int] = set()
        damage = list(self.lost_packets)  # positions of packets that are lost or don't decode well
        newest, is_first = key.pts, key.is_shown
        (self._hardware or self._codec).flush_buffers()
        for packet in self._packets(index, key, range_.last):
            pts = None if packet is None else packet.pts  # decoding may empty the packet
            decoder = self._hardware or self._codec  # the latter may have been opened anew
            try:
                # Pictures that nobody wants or refers to are dropped undecoded: it is lossless. In a doubtful
                # order all are decoded, and have to come in the order of their times. The key frame is asked
                # for in any case: dav1d goes by what it is opened with.
                needed = packet is None or pts in wanted or pts == key.pts or self.needs_reordering
                decoder.skip_frame = "DEFAULT" if needed else "NONREF"
                frames = decoder.decode(packet)
            except FFmpegError:
                frames = []
                position = None if pts is None else index.position(pts)
                if position is not None and position >= key.position:
                    damage.append(position)
            for frame in frames:
                # Pictures shown before the key frame but coded after it refer to what was not decoded.
                if frame.pts is None or frame.pts < key.pts:
                    continue
                position = index.position(frame.pts)
                # Not the order of the timestamps, or no key frame where one is marked: the index is wrong.
                if position is None or frame.pts < newest or (is_first and not frame.key_frame):
                    return range_.frames
                newest, is_first = frame.pts, False
                if frame.is_corrupt:
                    damage.append(position)
                elif frame.pts in wanted:
                    came.add(wanted[frame.pts])
                    write(slots[wanted[frame.pts]], frame)
        return [i for i in range_.frames if i not in came or index.is_corrupted(i, damage)]

    def _packets(self, index: Index, key: Key, last: int) -> Iterator[Packet[VideoStream] | None]:
        """Packets from a key frame to position `last`, then None to force out what the decoder holds."""
        packet = self._go_to(index, key)
        while packet is not None:
            yield packet
            delay = _LONGEST_DELAY if self.needs_reordering else 0
            packet = self._next_packet() if self._position <= last + delay else None
            self._position += packet is not None
        yield None

    @stage("demux")
    def _next_packet(self) -> Packet[VideoStream] | None:
        return next(self._demuxer, None)

    @stage("demux")
    def _go_to(self, index: Index, key: Key) -> Packet[VideoStream] | None:
        """Read the key frame's packet, seeking if it is not near."""
        if 0 <= key.position - self._position <= _SHORT_GAP:
            packet = self._read_until(index, key)
            if packet is not None:
                return packet
        try:
            self._container.seek(key.seek_time, stream=self._stream)
            self._demuxer = self._demux()
            packet = self._read_until(index, key)
        except FFmpegError:
            packet = None
        if packet is None:  # the seek failed or went too far: read from the front
            self._reopen()
            packet = self._read_until(index, key)
        return packet

    def _read_until(self, index: Index, key: Key) -> Packet[VideoStream] | None:
        for packet in self._demuxer:
            position = None if packet.pts is None else index.position(packet.pts)
            if position is not None and position > key.position:
                return None
            if position == key.position:
                if packet.size != key.size:  # after a seek, MPEG-PS gives times to halves of packets
                    return None
                self._position = position + 1
                return packet
        return None

    # Decoding from the front

    def _fall_back_to_sequential(self, missing: int) -> None:
        """A promised frame did not come: either the file is damaged or its packets are no index of it."""
        counted = self._count_frames(self._found.packets)
        if counted.num_intact < len(counted.pts):
            raise self._error(f"frame {missing} of {self.num_frames} can't be decoded, the file is damaged")
        self._keep(counted)
        self._use(counted)

    def _count_frames(self, packets: PacketList) -> FileIndex:
        pts: list[int | None] = []
        last_key = 0
        num_intact: int | None = None
        fmt: FrameFormat | None = None
        for frame in self._iter_frames(find_lost_packets(packets)):
            if frame is not None and frame.key_frame:
                last_key = len(pts)
            if frame is not None and fmt is None:
                fmt = FrameFormat.of(frame)
            damaged = frame is None or frame.is_corrupt or (not pts and _is_predicted(frame))
            if damaged and num_intact is None:
                num_intact = last_key  # pictures in between may refer to the damaged one
            if frame is not None:
                pts.append(frame.pts)
        num_intact = len(pts) if num_intact is None else num_intact
        return FileIndex(packets, None, pts, self._num_bytes, num_intact=num_intact, fmt=fmt)

    def _decode_from_front(self, slots: _Slots, write: _Write) -> None:
        for index in slots:
            if index >= self._found.num_intact:
                which = f"frame {index} of {max(self.num_frames, index + 1)}"
                raise self._error(f"{which} can't be decoded, the file is damaged")
        shown = (frame for frame in self._iter_frames() if frame is not None)
        for number in range(max(slots) + 1):
            frame = next(shown, None)
            if frame is None:
                raise VideoError(self.path, "the file changed while it was read")
            if number in slots:
                write(slots[number], frame)

    def _iter_frames(self, lost_packets: Collection[int] = ()) -> Iterator[VideoFrame | None]:
        """All pictures in the order shown, with None for each packet that is damaged or lost."""
        self._reopen()
        self._position = sys.maxsize  # whoever reads on has to seek
        try:
            for position, packet in enumerate(filled(self._container.demux(self._stream))):
                if position in lost_packets:
                    yield None
                yield from self._decode_or_none(packet)
        except FFmpegError:
            yield None
        yield from self._decode_or_none(None)

    @stage("decode")
    def _decode_or_none(self, packet: Packet[VideoStream] | None) -> Sequence[VideoFrame | None]:
        try:
            return self._codec.decode(packet)
        except FFmpegError:
            return [None]


def _is_predicted(frame: VideoFrame) -> bool:
    """Whether it was decoded from other pictures. Some decoders, as QuickTime Animation's, don't tell."""
    return not frame.key_frame and frame.pict_type not in (PictureType.NONE, PictureType.I)


def _short_name(format_name: str) -> str:
    names = format_name.split(",")  # "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"
    return "mp4" if "mp4" in names else names[0]
