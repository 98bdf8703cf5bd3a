"""The exact decoder: PyAV, on the CPU or with NVDEC.

Frame i is the i-th picture that a plain front-to-back decode of the file shows: never a header's count,
never time x rate. Opening a video reads all its packets (no decoding) into an index; asking for frames
plans which stretches of packets to decode, seeks to each and decodes only what is needed. A file whose
timestamps can't be trusted is decoded from the front and its pictures are counted instead.
"""

from __future__ import annotations

import bisect
import operator
from array import array
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias, cast

import av
import numpy as np
import numpy.typing as npt
import torch
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from mvit_video.data.decode import cuda, mpeg4
from mvit_video.data.decode.files import check_file, has_telling_header, why_not_opened
from mvit_video.data.decode.packets import (
    Index,
    Key,
    PacketList,
    Stretch,
    build_index,
    filled,
    find_holes,
    plan,
)
from mvit_video.data.decode.pictures import Look, NotOnHardware, Pictures, PlanePictures, gather
from mvit_video.data.timing import timed
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
_LISTED = ("mp4", "avi")

# Containers whose header gives the size of the first picture; of others it is guessed from some packets.
_SIZED = ("mp4", "matroska", "avi")

_Slots: TypeAlias = dict[int, int]  # frame index, rising -> place among the pictures asked for
_Put: TypeAlias = Callable[[int, VideoFrame], None]  # takes a picture for its place


class PyAVVideo:
    """An open video file; see `Video`. Not thread-safe: each thread opens its own.

    `device` is where the frames end up; `nvdec` decodes on it too, where it can decode the file's codec.
    """

    def __init__(self, path: str | Path, *, device: torch.device | None = None, nvdec: bool = False) -> None:
        self.path = str(path)
        self.device = device or torch.device("cpu")
        self._nvdec = nvdec
        self._hardware: cuda.HardwareDecoder | None = None  # decodes in the place of `_codec`
        self._reformatter = VideoReformatter()  # kept: setting it up costs more than converting a frame
        self._demuxer: Iterator[Packet[VideoStream]] = iter(())
        self._position = 0  # of the packet that `_demuxer` gives next, in decoding order
        self._times_shown: dict[int, int] | None = None  # by time stored, where the file does not tell them
        self.has_guessed_times = False  # FFmpeg guesses when frames are shown, and may be wrong
        self.holes: list[int] = []
        self._sound = 0  # frames before the first damage; only of files without an index
        self._look: Look | None = None  # until a picture is decoded
        check_file(self.path)
        self._probing = _NO_PROBING if has_telling_header(self.path) else {}
        self._open()
        try:
            self.index = self._read_index()
            if self.index is not None:
                self._set_times(self.index.pts)
            else:
                self._count_frames()
            if not self.num_frames:
                raise VideoError(self.path, _NOTHING)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PyAVVideo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file and the decoder."""
        self._demuxer = iter(())
        self._container.close()

    @property
    def height(self) -> int:
        """Pixels of the upright picture; asked before any frame was decoded, it decodes the first."""
        return self.look().upright_size[0]

    @property
    def width(self) -> int:
        """See `height`."""
        return self.look().upright_size[1]

    def look(self) -> Look:
        """What the first picture looks like, as all frames are made to. Raises `VideoError` without any."""
        if self._look is None:
            first = next((frame for frame in self._shown() if frame is not None), None)
            if first is None:
                raise VideoError(self.path, _NOTHING)
            self._look = Look.of(first)
        return self._look

    @property
    def is_order_doubtful(self) -> bool:
        """Whether the decoder, which has decoded a picture, reorders them though their times don't say so."""
        return self.index is not None and self._codec.has_b_frames and not self.index.reorders

    @property
    def has_false_keys(self) -> bool:
        """Whether the container's table marks other packets as key frames than are."""
        if self.index is None or self.container_format not in _LISTED:
            return False
        return sum(entry.is_keyframe for entry in self._stream.index_entries) > len(self.index.keys)

    def frame_time(self, index: int) -> float:
        """Seconds from the first frame to frame `index`."""
        self.check_range([index])
        return float(self._times[index])

    @timed("decode")
    def get_frames(self, indices: Sequence[int]) -> Tensor:
        """See `Video.get_frames`. A damaged file may look sound to NVDEC: the CPU decoder sees more."""
        asked = [operator.index(index) for index in indices]
        self.check_range(asked)
        wanted = sorted(set(asked))
        try:
            frames = self._decode({index: slot for slot, index in enumerate(wanted)})
        except (FFmpegError, OSError) as error:
            raise VideoError(self.path, "the file can't be read any more") from error
        if wanted != asked:
            frames = frames[[bisect.bisect_left(wanted, index) for index in asked]]
        return frames

    def _decode(self, slots: _Slots) -> Tensor:
        if self._nvdec:
            try:
                return self._decode_on_gpu(slots)
            except NotOnHardware as reason:
                self._nvdec = False
                cuda.fall_back(self.path, str(reason))
        self._hardware = None
        pictures: Pictures | None = None

        def put(slot: int, frame: VideoFrame) -> None:
            nonlocal pictures
            if pictures is None:
                pictures = gather(len(slots), self._look_by(frame), self._reformatter, self.device)
            pictures.put(slot, frame)

        if self.index is not None:
            missing = self._decode_indexed(self.index, slots, put)
            if missing:
                self._distrust_index(self.index, missing[0])
        if self.index is None:
            self._decode_from_front(slots, put)
        pictures = pictures or gather(0, self.look(), self._reformatter, self.device)  # none was asked for
        return pictures.finish().to(self.device)

    def _look_by(self, frame: VideoFrame) -> Look:
        """See `look`; any frame will do if it has the size of the first one."""
        if self._look is None:
            if (frame.width, frame.height) == self._first_size:
                self._look = Look.of(frame)
            else:
                with PyAVVideo(self.path) as other:  # this one is being decoded
                    self._look = other.look()
        return self._look

    def _decode_on_gpu(self, slots: _Slots) -> Tensor:
        if self.index is None:
            raise NotOnHardware("its timestamps are no index of its frames")
        look = self.look()
        for anew in (False, True):
            self._hardware = cuda.decoder_for(self._stream, look.pix_fmt, self.device, anew=anew)
            pictures = PlanePictures(len(slots), look, self._reformatter, self.device)
            if not self._decode_indexed(self.index, slots, pictures.put):
                return pictures.finish()
            if self._hardware.is_new:  # a kept one may have too few surfaces for this file's references
                break
        raise NotOnHardware("NVDEC did not give all frames")  # the CPU decoder says what is wrong

    def check_range(self, indices: Sequence[int]) -> None:
        """Raises `ValueError` for an index that no frame has."""
        for index in indices:
            if not 0 <= index < self.num_frames:
                raise ValueError(f"frame {index} was asked of {self.path}, which has {self.num_frames}")

    # Opening

    @timed("demux")
    def _open(self) -> None:
        try:
            # "file:" keeps FFmpeg from taking a name like "http://x" or "a:b.mp4" for a protocol, the white
            # list keeps playlists from fetching anything. PyAV silences FFmpeg's log by default.
            self._container = av.open(
                f"file:{self.path}",
                "r",
                container_options={"protocol_whitelist": "file", **self._probing},
                options=_PROBE,
                metadata_errors="replace",
            )
        except (FFmpegError, OSError, ValueError) as error:
            raise VideoError(self.path, why_not_opened(self.path, error)) from error
        if self._probing and len(self._container.streams.video) > 1:  # which is best, FFmpeg sees by packets
            self._probing = {}
            self._container.close()
            self._open()
            return
        stream = self._container.streams.best("video")
        try:
            self._stream = self._usable(cast("VideoStream | None", stream))
        except VideoError:
            self._container.close()
            raise
        self.container_format = _short_name(self._container.format.name)
        self._codec = self._stream.codec_context
        self.codec = self._codec.codec.canonical_name  # "av1", whichever decoder is at work
        self._codec.thread_type = "NONE"  # clips are decoded in parallel instead: same speed, less CPU time
        self._codec.thread_count = 1
        sized = self.container_format in _SIZED
        self._first_size = (self._codec.width, self._codec.height) if sized else None
        self._codec.options = {"err_detect": "explode"}  # fail where FFmpeg would paint over damage
        self._demuxer = self._demux()
        self._position = 0

    def _demux(self) -> Iterator[Packet[VideoStream]]:
        packets = filled(self._container.demux(self._stream))
        if self._times_shown is not None:
            packets = mpeg4.unpacked(self._stream, packets, self._times_shown)
        return packets

    def _usable(self, stream: VideoStream | None) -> VideoStream:
        if stream is None or stream.disposition & Disposition.attached_pic:
            raise VideoError(self.path, "the file has no video stream")
        if cast("object | None", stream.codec_context) is None:
            raise VideoError(self.path, "FFmpeg has no decoder for its video stream")
        return stream

    @timed("demux")
    def _read_index(self) -> Index | None:
        """None where it would mislead."""
        packets = PacketList(self.codec, self.container_format)
        kinds: list[int | None] = []  # of pictures whose time depends on it
        self.has_guessed_times = self.container_format == "avi" and bool(self._codec.has_b_frames)
        if self.has_guessed_times and self.codec == "mpeg4":
            self._times_shown = {}
            self._demuxer = self._demux()
        try:
            for packet in self._demuxer:
                packets.add(packet)
                if self._times_shown is not None:
                    kinds.append(mpeg4.kind_of(packet))
        except FFmpegError as error:
            raise VideoError(self.path, "the file can't be read to its end, it is damaged") from error
        entries = self._stream.index_entries if self.container_format in _LISTED else ()
        listed = len(packets) if len(entries) <= len(packets) else sum(entry.size > 0 for entry in entries)
        if listed > len(packets):
            raise VideoError(
                self.path, f"the file is cut off: {len(packets)} of its {listed} frames are there"
            )
        self._position = len(packets)
        self.holes = find_holes(packets)
        if self.has_guessed_times:
            self._times_shown = mpeg4.times_shown(packets.dts, kinds)
            if self._times_shown is None:
                return None
            packets.pts = array("q", [self._times_shown[time] for time in packets.dts])
        index = build_index(packets)
        if index is None:
            self._times_shown = None
        return index

    def _set_times(self, pts: Sequence[int | None]) -> None:
        self.num_frames = len(pts)
        tick = float(self._stream.time_base or 0)  # seconds
        self.start_ticks = next((p for p in pts if p is not None), 0)
        self.start = self.start_ticks * tick  # seconds on the stream's clock
        self.fps = float(self._stream.average_rate or self._stream.guessed_rate or 25)
        times = (np.array(pts, np.float64) - self.start_ticks) * tick  # NaN where a frame has no time
        if len(pts) > 1 and not np.isnan(times).any() and times[-1] > 0:
            ticks = cast(int, pts[-1]) - self.start_ticks
            # In fractions: 29.999999999999996 for 30 costs a clip's last frame.
            self.fps = float((len(pts) - 1) / (ticks * cast(Fraction, self._stream.time_base)))
        else:
            times = np.arange(len(pts)) / self.fps
        self._times: npt.NDArray[Any] = times
        self.duration = len(pts) / self.fps

    # Decoding by the index

    def _decode_indexed(self, index: Index, slots: _Slots, put: _Put) -> list[int]:
        """Gather the frames; returns those that did not come."""
        missing: list[int] = []
        for stretch in plan(index, list(slots)):
            late = self._decode_stretch(index, stretch, slots, put)
            if late and stretch.key > 0:  # a decoder may need a longer run-up, as with periodic intra refresh
                longer = Stretch(stretch.key - 1, stretch.last, late)
                late = self._decode_stretch(index, longer, slots, put)
            missing += late
        return missing

    def _decode_stretch(self, index: Index, stretch: Stretch, slots: _Slots, put: _Put) -> list[int]:
        key = index.keys[stretch.key]
        wanted = {index.pts[i]: i for i in stretch.frames}
        came: set[int] = set()
        damage = list(self.holes)  # positions of packets that are lost or don't decode well
        newest, is_first = key.pts, key.is_shown
        (self._hardware or self._codec).flush_buffers()
        for packet in self._packets(index, key, stretch.last):
            pts = None if packet is None else packet.pts  # decoding may empty the packet
            decoder = self._hardware or self._codec  # the latter may have been opened anew
            try:
                # Pictures that nobody wants or refers to are dropped undecoded: it is lossless. In a doubtful
                # order all are decoded, and have to come in the order of their times. The key frame is asked
                # for in any case: dav1d goes by what it is opened with.
                needed = packet is None or pts in wanted or pts == key.pts or self.is_order_doubtful
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
                    return stretch.frames
                newest, is_first = frame.pts, False
                if frame.is_corrupt:
                    damage.append(position)
                elif frame.pts in wanted:
                    came.add(wanted[frame.pts])
                    put(slots[wanted[frame.pts]], frame)
        return [i for i in stretch.frames if i not in came or index.is_spoilt(i, damage)]

    def _packets(self, index: Index, key: Key, last: int) -> Iterator[Packet[VideoStream] | None]:
        """Packets from a key frame to position `last`, then None to force out what the decoder holds."""
        packet = self._go_to(index, key)
        while packet is not None:
            yield packet
            delay = _LONGEST_DELAY if self.is_order_doubtful else 0
            packet = self._next_packet() if self._position <= last + delay else None
            self._position += packet is not None
        yield None

    @timed("demux")
    def _next_packet(self) -> Packet[VideoStream] | None:
        return next(self._demuxer, None)

    @timed("demux")
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
            self._container.close()
            self._open()
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

    def _distrust_index(self, index: Index, missing: int) -> None:
        """A promised frame did not come: either the file is damaged or its packets are no index of it."""
        promised = self.num_frames
        times, self._times_shown = self._times_shown, None
        self._count_frames()
        if self._sound < self.num_frames:
            self._times_shown = times
            self._set_times(index.pts)
            raise VideoError(
                self.path, f"frame {missing} of {promised} can't be decoded, the file is damaged"
            )
        self.index = None

    def _count_frames(self) -> None:
        pts: list[int | None] = []
        last_key = 0
        sound: int | None = None
        for frame in self._shown():
            if frame is not None and frame.key_frame:
                last_key = len(pts)
            if frame is not None and self._look is None:
                self._look = Look.of(frame)
            lost = frame is None or frame.is_corrupt or (not pts and _is_predicted(frame))
            if lost and sound is None:
                sound = last_key  # pictures in between may refer to the damaged one
            if frame is not None:
                pts.append(frame.pts)
        self._sound = len(pts) if sound is None else sound
        self._set_times(pts)

    def _decode_from_front(self, slots: _Slots, put: _Put) -> None:
        for index in slots:
            if index >= self._sound:
                which = f"frame {index} of {max(self.num_frames, index + 1)}"
                raise VideoError(self.path, f"{which} can't be decoded, the file is damaged")
        last = max(slots, default=-1)
        shown = (frame for frame in self._shown() if frame is not None)
        for number in range(last + 1):
            frame = next(shown, None)
            if frame is None:
                raise VideoError(self.path, "the file changed while it was read")
            if number in slots:
                put(slots[number], frame)

    def _shown(self) -> Iterator[VideoFrame | None]:
        """All pictures in the order shown, with None for each damaged packet."""
        self._container.close()
        self._open()
        try:
            for position, packet in enumerate(self._demuxer):
                self._position = position + 1
                if position in self.holes:
                    yield None
                yield from self._decode_or_none(packet)
        except FFmpegError:
            yield None
        yield from self._decode_or_none(None)

    @timed("decode")
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
