"""The exact decoder: PyAV, on the CPU or with NVDEC.

Frame i is the i-th picture that a plain front-to-back decode of the file shows: never a header's count,
never time x rate. Opening a video for the first time reads all its packets (no decoding) into an index;
asking for frames plans which ranges of packets to decode, seeks to each and decodes only what is needed. A
file whose timestamps can't be trusted is decoded from the front and its frames are counted instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from av.error import FFmpegError
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import VideoReformatter
from torch import Tensor

from mvit_video.data.decode import cuda
from mvit_video.data.decode.container import MAX_PIXELS, check_file, declared_rate, require_pixels, unreadable
from mvit_video.data.decode.frames import FrameBuffer, FrameFormat, NotOnHardware, Transform, convert
from mvit_video.data.decode.index_cache import IndexCache
from mvit_video.data.decode.packets import DecodeRange, FileIndex, VideoPacket
from mvit_video.data.decode.reader import PacketReader
from mvit_video.data.decode.times import NO_TIME, FrameTimes, measure_times, warn_of_jumps
from mvit_video.data.decode.video import CPU, Video
from mvit_video.data.timing import stage
from mvit_video.errors import VideoError

# As many packets as a decoder may hold back to put frames in order.
_LONGEST_DELAY = 16

_NOTHING = "no frame can be decoded, the file is damaged"

_Write: TypeAlias = Callable[[int, VideoFrame], None]  # takes the frame of a number


class PyAVVideo(Video):
    """An open video file; see `Video`. Not thread-safe: each thread opens its own.

    Args:
        device: where the frames end up.
        nvdec: decode on the device, where it can decode the file's codec.
        max_pixels: of a frame; a file with larger ones is refused.
        index_cache: folder where the index is kept, see `IndexCache`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: torch.device = CPU,
        nvdec: bool = False,
        max_pixels: int = MAX_PIXELS,
        index_cache: str | Path | None = None,
    ) -> None:
        self.path, self.device = str(path), device
        self._nvdec, self._max_pixels = nvdec, max_pixels
        self._hardware: cuda.HardwareDecoder | None = None  # decodes in the place of the reader's decoder
        self._reformatter = VideoReformatter()  # kept: setting it up costs more than converting a frame
        check_file(self.path)
        cache = IndexCache(self.path, index_cache)
        index = cache.load()
        self.reader = PacketReader(self.path, max_pixels, index)
        self.codec = self.reader.codec.codec.canonical_name  # "av1", whichever decoder is at work
        self._keep = cache.save
        try:
            if index is None:
                index = self.reader.read_all()
                is_told = index.guesses_times or not self.reader.guesses_times
                if not is_told or not index.is_usable:
                    index = self._count_frames(index)
                self._keep(index)
            self._use(index)
            if not self.num_frames:
                raise self._error(_NOTHING)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the file and the decoder."""
        self.reader.close()

    def _use(self, index: FileIndex) -> None:
        self._index, reader = index, self.reader
        reader.shown_at = index.shown_at
        if index.times is None:
            index.times = self._measure_times(index)
        self.times, self.fps, self.start, num_jumps = index.times
        if num_jumps:
            warn_of_jumps(self.path, num_jumps, self.fps)
        self.num_frames = len(index.pts)

    def _measure_times(self, index: FileIndex) -> FrameTimes:
        reader = self.reader
        one_rate = reader.guesses_times and index.counted is not None  # as an AVI file has throughout
        return measure_times(
            np.full(len(index.pts), NO_TIME) if one_rate else index.pts,
            reader.stream.time_base or Fraction(1),
            float(declared_rate(reader.stream)),
            clock_may_jump=reader.clock_may_jump,
        )

    @functools.cached_property
    def size(self) -> tuple[int, int]:  # type: ignore[override]  # nobody sets it
        """Height and width; asked before any frame was decoded, it decodes the first."""
        return self.frame_format().upright_size

    def frame_format(self) -> FrameFormat:
        """That of the first frame, which all are converted to. Raises `VideoError` without any."""
        if self._index.fmt is None:
            with closing(PacketReader(self.path, self._max_pixels, self._index)) as reader:
                first = next((frame for frame in _iter_frames(reader) if frame is not None), None)
            if first is None:
                raise self._error(_NOTHING)
            self._index.fmt = FrameFormat.of(first)
        fmt = self._index.fmt
        require_pixels(fmt.width, fmt.height, self._max_pixels, self.path)
        return fmt

    def _to_tensor(self, frames: list[VideoFrame]) -> Tensor:
        # Any frame tells the format if it has the size of the first one.
        if self._index.fmt is None and (frames[0].width, frames[0].height) == self.reader.first_size:
            self._index.fmt = FrameFormat.of(frames[0])
        return convert(frames, self.frame_format(), self._reformatter, self.device)

    @property
    def index(self) -> FileIndex | None:
        """None where the packets don't tell which frames there are."""
        return self._index if self._index.counted is None else None

    @property
    def needs_reordering(self) -> bool:
        """Whether the decoder, which has decoded a picture, reorders them though their times don't say so."""
        return self.index is not None and self.reader.codec.has_b_frames and not self.index.reorders

    def _decode(self, wanted: list[int], transform: Transform | None) -> Tensor:
        """A damaged file may look sound to NVDEC: the CPU decoder sees more."""
        try:
            if self._nvdec:
                try:
                    return self.decode_on_gpu(wanted, transform)
                except NotOnHardware as reason:
                    self._nvdec = False
                    cuda.fall_back(self.path, str(reason))
            self._hardware = None
            frames = FrameBuffer(wanted, self._to_tensor, transform)
            if self.index is not None:
                missing = self._decode_indexed(self.index, wanted, frames.write)
                if missing:
                    self._fall_back_to_counting(missing[0])
            if self.index is None:
                self._decode_from_front(wanted, frames.write)
            return frames.to_tensor()
        except (FFmpegError, OSError) as error:
            raise VideoError(self.path, "the file can't be read any more") from error

    def decode_on_gpu(self, wanted: list[int], transform: Transform | None = None) -> Tensor:
        """Frames of rising numbers, decoded by NVDEC. Raises `NotOnHardware`."""
        if self.index is None:
            raise NotOnHardware("its timestamps are no index of its frames")
        pix_fmt = self.frame_format().pix_fmt
        for anew in (False, True):
            with cuda.decoder_for(self.reader.stream, pix_fmt, self.device, anew=anew) as self._hardware:
                frames = FrameBuffer(wanted, self._to_tensor, transform)
                if not self._decode_indexed(self.index, wanted, frames.write):
                    return frames.to_tensor()
                if self._hardware.is_new:  # a kept one may have too few surfaces for this file's references
                    break
        raise NotOnHardware("NVDEC did not give all frames")  # the CPU decoder says what is wrong

    # Decoding by the index

    def _decode_indexed(self, index: FileIndex, wanted: list[int], write: _Write) -> list[int]:
        """Write the frames; returns those that did not come."""
        missing: list[int] = []
        for range_ in index.plan_ranges(wanted):
            late = self._decode_range(index, range_, write)
            if late and range_.key > 0:  # a decoder may need a longer run-up, as with periodic intra refresh
                late = self._decode_range(index, DecodeRange(range_.key - 1, range_.last, late), write)
            missing += late
        return missing

    def _decode_range(self, index: FileIndex, range_: DecodeRange, write: _Write) -> list[int]:
        reader, key = self.reader, index.key(range_.key)
        positions = index.positions_by_pts(key.position, range_.last + _LONGEST_DELAY)
        wanted = {int(index.pts[i]): i for i in range_.frames}
        came: set[int] = set()
        damage = list(index.lost_packets)  # positions of packets that are lost or don't decode well
        newest, is_first = key.pts, key.is_shown
        (self._hardware or reader.codec).flush_buffers()
        for packet in self._packets_of(index, range_):
            pts = None if packet is None else packet.pts  # decoding may empty the packet
            # The reader may have opened its decoder anew.
            codec = self._hardware.context if self._hardware else reader.codec
            try:
                # Pictures that nobody wants or refers to are dropped undecoded: it is lossless. In a doubtful
                # order all are decoded, and have to come in the order of their times. The key frame is asked
                # for in any case: dav1d goes by what it is opened with.
                needed = packet is None or pts in wanted or pts == key.pts or self.needs_reordering
                codec.skip_frame = "DEFAULT" if needed else "NONREF"
                frames = (self._hardware or codec).decode(packet)
            except FFmpegError:
                frames = []
                if pts in positions:
                    damage.append(positions[pts])
            for frame in frames:
                # Pictures shown before the key frame but coded after it refer to what was not decoded.
                if frame.pts is None or frame.pts < key.pts:
                    continue
                position = positions.get(frame.pts)
                # Not the order of the timestamps, or no key frame where one is marked: the index is wrong.
                if position is None or frame.pts < newest or (is_first and not frame.key_frame):
                    return range_.frames
                newest, is_first = frame.pts, False
                if frame.is_corrupt:
                    damage.append(position)
                elif frame.pts in wanted:
                    came.add(wanted[frame.pts])
                    write(wanted[frame.pts], frame)
        return [i for i in range_.frames if i not in came or index.is_corrupted(i, damage)]

    def _packets_of(self, index: FileIndex, range_: DecodeRange) -> Iterator[VideoPacket | None]:
        """Its packets, then None to force out what the decoder holds."""
        packet = self.reader.go_to(index, index.key(range_.key))
        while packet is not None:
            yield packet
            delay = _LONGEST_DELAY if self.needs_reordering else 0
            packet = self.reader.read() if self.reader.position <= range_.last + delay else None
        yield None

    # Decoding from the front

    def _fall_back_to_counting(self, missing: int) -> None:
        """A promised frame did not come: either the file is damaged or its packets are no index of it."""
        counted = self._count_frames(self._index)
        self.reader.shown_at = self._index.shown_at
        if counted.num_intact < len(counted.pts):
            raise self._error(f"frame {missing} of {self.num_frames} can't be decoded, the file is damaged")
        self._keep(counted)
        self._use(counted)

    def _count_frames(self, index: FileIndex) -> FileIndex:
        pts: list[int] = []
        last_key = 0
        num_intact: int | None = None
        fmt: FrameFormat | None = None
        self.reader.shown_at = None
        for frame in _iter_frames(self.reader, index.lost_packets):
            if frame is not None and frame.key_frame:
                last_key = len(pts)
            damaged = frame is None or frame.is_corrupt or (not pts and _is_predicted(frame))
            if damaged and num_intact is None:
                num_intact = last_key  # pictures in between may refer to the damaged one
            if frame is not None:
                fmt = fmt or FrameFormat.of(frame)
                pts.append(NO_TIME if frame.pts is None else frame.pts)
        num_intact = len(pts) if num_intact is None else num_intact
        counted = np.array(pts, np.int64)
        return replace(
            index, counted=counted, num_intact=num_intact, guesses_times=False, fmt=fmt, times=None
        )

    def _decode_from_front(self, wanted: list[int], write: _Write) -> None:
        beyond = next((index for index in wanted if index >= self._index.num_intact), None)
        if beyond is not None:
            which = f"frame {beyond} of {max(self.num_frames, beyond + 1)}"
            raise self._error(f"{which} can't be decoded, the file is damaged")
        missing = set(wanted)
        shown = (frame for frame in _iter_frames(self.reader) if frame is not None)
        for number, frame in zip(range(wanted[-1] + 1), shown, strict=False):
            if number in missing:
                missing.remove(number)
                write(number, frame)
        if missing:
            raise VideoError(self.path, "the file changed while it was read")

    def _error(self, reason: str) -> VideoError:
        """For frames that don't come."""
        width, height = self.reader.codec.width, self.reader.codec.height
        require_pixels(width, height, self._max_pixels, self.path)
        # A header may not tell the size, where the decoder has refused it.
        return unreadable(self.path, reason, max_pixels=None if width and height else self._max_pixels)


def _iter_frames(reader: PacketReader, lost_packets: Collection[int] = ()) -> Iterator[VideoFrame | None]:
    """All pictures in the order shown, with None for each packet that is damaged or lost."""
    reader.open()
    try:
        while (packet := reader.read()) is not None:
            if reader.position - 1 in lost_packets:
                yield None
            yield from _decode_or_none(reader, packet)
    except FFmpegError:
        yield None
    yield from _decode_or_none(reader, None)


@stage("decode")
def _decode_or_none(reader: PacketReader, packet: VideoPacket | None) -> Sequence[VideoFrame | None]:
    try:
        return reader.codec.decode(packet)
    except FFmpegError:
        return [None]


def _is_predicted(frame: VideoFrame) -> bool:
    """Whether it was decoded from other pictures. Some decoders, as QuickTime Animation's, don't tell."""
    return not frame.key_frame and frame.pict_type not in (PictureType.NONE, PictureType.I)
