"""Exact frames out of video files, as fast as one CPU core gives them.

Frame i is the i-th picture that a plain front-to-back decode of the file shows: never a header's count,
never time x rate. Opening a video reads all its packets (no decoding) into an index; asking for frames
plans which stretches of packets to decode, seeks to each and decodes only what is needed. A file whose
timestamps can't be trusted is decoded from the front and its pictures are counted instead.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias, cast

import av
import numpy as np
import numpy.typing as npt
import torch
from av.error import FFmpegError
from av.packet import Packet
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from mvit_video.errors import ConfigError, VideoError

# Reading on is cheaper than a seek when the next key frame is at most this many packets away.
_SHORT_GAP = 32

_Picture: TypeAlias = npt.NDArray[np.uint8]  # (H, W, 3)


def open_video(path: str | Path, *, device: str = "cpu", backend: str = "auto") -> Video:
    """Open a video file; use it as a context manager or `close()` it.

    `device` is "cpu" or "auto", `backend` is "pyav" or "auto"; anything else raises `ConfigError`.
    A file that can't be used raises `VideoError` with the reason.
    """
    if device not in ("auto", "cpu"):
        raise ConfigError(f"decoder device {device!r} is not possible, choose 'auto' or 'cpu'")
    if backend not in ("auto", "pyav"):
        raise ConfigError(f"decoder backend {backend!r} is not possible, choose 'auto' or 'pyav'")
    return Video(path)


class Video:
    """An open video file. Not thread-safe: each thread opens its own.

    Attributes:
        path: as given, as a string.
        num_frames: how many frames the file shows.
        fps: frames a second, measured: (num_frames - 1) / (time of the last - time of the first frame).
        duration: seconds, num_frames / fps.
        height, width: pixels of the upright picture (after rotation) of the first frame.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._reformatter = VideoReformatter()  # kept: setting it up costs more than converting a frame
        self._demuxer: Iterator[Packet[VideoStream]] = iter(())
        self._position = 0  # of the packet that `_demuxer` gives next, in decoding order
        self._holes: list[int] = []
        self._sound = 0  # frames before the first damage; only of files without an index
        check_file(self.path)
        self._open()
        try:
            self._index, first = self._read_index()
            if self._index is not None:
                self._set_times(self._index.pts)
            else:
                self._count_frames()
            if first is None or not self.num_frames:
                raise VideoError(self.path, "no frame can be decoded, the file is damaged")
        except BaseException:
            self.close()
            raise
        self._stored_size = (first.height, first.width)
        self._turn = _Turn.of(first)
        self.height, self.width = self._stored_size[:: -1 if self._turn.transpose else 1]

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file and the decoder."""
        self._demuxer = iter(())
        self._container.close()

    def frame_time(self, index: int) -> float:
        """Seconds from the first frame to frame `index`."""
        self._check_range([index])
        return self._times[index]

    def get_frames(self, indices: Sequence[int]) -> torch.Tensor:
        """Decode frames: uint8 (T, 3, H, W), RGB, upright, in the order asked; indices may repeat.

        The memory is laid out as (T, H, W, 3), as decoders give pictures. Raises `VideoError` when the file
        can't give one of the frames, `ValueError` for an index outside of 0 <= index < num_frames.
        """
        asked = [operator.index(index) for index in indices]
        self._check_range(asked)
        wanted = sorted(set(asked))
        frames = torch.empty(len(wanted), self.height, self.width, 3, dtype=torch.uint8)
        slots = dict(zip(wanted, frames.numpy(), strict=True))
        try:
            self._fill(slots)
        except (FFmpegError, OSError) as error:
            raise VideoError(self.path, "the file can't be read any more") from error
        if wanted != asked:
            frames = frames[[bisect.bisect_left(wanted, index) for index in asked]]
        return frames.permute(0, 3, 1, 2)

    def _fill(self, slots: dict[int, _Picture]) -> None:
        """Decode into the slots: frame index, rising -> (H, W, 3) array."""
        if self._index is not None:
            missing = self._decode_indexed(self._index, slots)
            if missing:
                self._distrust_index(self._index, missing[0])
        if self._index is None:
            self._decode_from_front(slots)

    def _check_range(self, indices: Sequence[int]) -> None:
        for index in indices:
            if not 0 <= index < self.num_frames:
                raise ValueError(f"frame {index} was asked of {self.path}, which has {self.num_frames}")

    # Opening

    def _open(self) -> None:
        try:
            # "file:" keeps FFmpeg from taking a name like "http://x" or "a:b.mp4" for a protocol, the white
            # list keeps playlists from fetching anything. PyAV silences FFmpeg's log by default.
            self._container = av.open(
                f"file:{self.path}",
                "r",
                container_options={"protocol_whitelist": "file"},
                metadata_errors="replace",
            )
        except (FFmpegError, OSError, ValueError) as error:
            raise VideoError(self.path, why_not_opened(self.path, error)) from error
        stream = self._container.streams.best("video")
        try:
            self._stream = self._usable(cast("VideoStream | None", stream))
        except VideoError:
            self._container.close()
            raise
        self._codec = self._stream.codec_context
        self._codec.thread_type = "NONE"  # clips are decoded in parallel instead: same speed, less CPU time
        self._codec.thread_count = 1
        self._codec.options = {"err_detect": "explode"}  # fail where FFmpeg would paint over damage
        self._demuxer = self._container.demux(self._stream)
        self._position = 0

    def _usable(self, stream: VideoStream | None) -> VideoStream:
        if stream is None or stream.disposition & Disposition.attached_pic:
            raise VideoError(self.path, "the file has no video stream")
        if cast("object | None", stream.codec_context) is None:
            raise VideoError(self.path, "FFmpeg has no decoder for its video stream")
        return stream

    def _read_index(self) -> tuple[Index | None, VideoFrame | None]:
        """The index, None where it would mislead, and some early frame for the size and orientation."""
        packets = []
        first = None
        try:
            for packet in filled(self._demuxer):
                packets.append(PacketInfo.of(packet))
                if first is None:
                    first = self._try_decode(packet)
        except FFmpegError as error:
            raise VideoError(self.path, "the file can't be read to its end, it is damaged") from error
        # A table of all packets (MP4, AVI) tells when some are missing; others list key frames or nothing.
        entries = self._stream.index_entries
        listed = len(packets) if len(entries) <= len(packets) else sum(entry.size > 0 for entry in entries)
        if listed > len(packets):
            raise VideoError(
                self.path, f"the file is cut off: {len(packets)} of its {listed} frames are there"
            )
        self._position = len(packets)
        self._holes = find_holes(packets)
        # AVI has no presentation times: with B-frames FFmpeg guesses them, often wrongly (UCF101's XviD).
        guessed = self._container.format.name == "avi" and self._codec.has_b_frames
        return None if guessed else build_index(packets), first

    def _try_decode(self, packet: Packet[VideoStream]) -> VideoFrame | None:
        try:
            frames = self._codec.decode(packet)
            if not frames and not packet.is_discard:  # the decoder holds it back to reorder: force it out
                frames = self._codec.decode(None)
                self._codec.flush_buffers()
        except FFmpegError:
            self._codec.flush_buffers()
            return None
        return frames[0] if frames else None

    def _set_times(self, pts: Sequence[int | None]) -> None:
        self.num_frames = len(pts)
        tick = float(self._stream.time_base or 0)  # seconds
        known = [p for p in pts if p is not None]
        times = [(p - known[0]) * tick for p in known]
        rate = float(self._stream.average_rate or self._stream.guessed_rate or 25)
        if len(times) == len(pts) > 1 and times[-1] > 0:
            rate = (len(times) - 1) / times[-1]
        else:
            times = [i / rate for i in range(len(pts))]
        self._times, self.fps, self.duration = times, rate, len(pts) / rate

    # Decoding by the index

    def _decode_indexed(self, index: Index, slots: dict[int, _Picture]) -> list[int]:
        """Fill the slots (frame index -> (H, W, 3) array); returns the frames that did not come."""
        missing: list[int] = []
        for stretch in plan(index, list(slots)):
            late = self._decode_stretch(index, stretch, slots)
            if late and stretch.key > 0:  # a decoder may need a longer run-up, as with periodic intra refresh
                longer = Stretch(stretch.key - 1, stretch.last, late)
                late = self._decode_stretch(index, longer, slots)
            missing += late
        return missing

    def _decode_stretch(self, index: Index, stretch: Stretch, slots: dict[int, _Picture]) -> list[int]:
        key = index.keys[stretch.key]
        wanted = {index.pts[i]: i for i in stretch.frames}
        came: set[int] = set()
        damage = list(self._holes)  # positions of packets that are lost or don't decode well
        newest = key.pts
        self._codec.flush_buffers()
        for packet in self._packets(index, key, stretch.last):
            try:
                # Pictures that nobody wants and nobody refers to are dropped undecoded: lossless.
                needed = packet is None or packet.pts in wanted
                self._codec.skip_frame = "DEFAULT" if needed else "NONREF"
                frames = self._codec.decode(packet)
            except FFmpegError:
                frames = []
                if packet is not None and packet.pts is not None and packet.pts >= key.pts:
                    damage.append(index.position[packet.pts])
            for frame in frames:
                # Pictures shown before the key frame but coded after it refer to what was not decoded.
                if frame.pts is None or frame.pts < key.pts:
                    continue
                if frame.pts < newest or frame.pts not in index.position:
                    return stretch.frames  # not the order of the timestamps: the index is wrong
                newest = frame.pts
                if frame.is_corrupt:
                    damage.append(index.position[frame.pts])
                elif frame.pts in wanted:
                    came.add(wanted[frame.pts])
                    self._convert(frame, slots[wanted[frame.pts]])
        return [i for i in stretch.frames if i not in came or index.is_spoilt(i, damage)]

    def _packets(self, index: Index, key: Key, last: int) -> Iterator[Packet[VideoStream] | None]:
        """Packets from a key frame to position `last`, then None to force out what the decoder holds."""
        packet = self._go_to(index, key)
        while packet is not None:
            yield packet
            packet = next(filled(self._demuxer), None) if self._position <= last else None
            self._position += packet is not None
        yield None

    def _go_to(self, index: Index, key: Key) -> Packet[VideoStream] | None:
        """Read the key frame's packet, seeking if it is not near."""
        if 0 <= key.position - self._position <= _SHORT_GAP:
            packet = self._read_until(index, key)
            if packet is not None:
                return packet
        try:
            self._container.seek(key.seek_time, stream=self._stream)
            self._demuxer = self._container.demux(self._stream)
            packet = self._read_until(index, key)
        except FFmpegError:
            packet = None
        if packet is None:  # the seek failed or went too far: read from the front
            self._container.close()
            self._open()
            packet = self._read_until(index, key)
        return packet

    def _read_until(self, index: Index, key: Key) -> Packet[VideoStream] | None:
        for packet in filled(self._demuxer):
            position = -1 if packet.pts is None else index.position.get(packet.pts, -1)
            if position > key.position:
                return None
            if position == key.position:
                self._position = position + 1
                return packet
        return None

    # Decoding from the front

    def _distrust_index(self, index: Index, missing: int) -> None:
        """A promised frame did not come: either the file is damaged or its packets are no index of it."""
        promised = self.num_frames
        self._count_frames()
        if self._sound < self.num_frames:
            self._set_times(index.pts)
            raise VideoError(
                self.path, f"frame {missing} of {promised} can't be decoded, the file is damaged"
            )
        self._index = None

    def _count_frames(self) -> None:
        pts: list[int | None] = []
        last_key = 0
        sound: int | None = None
        for frame in self._shown():
            if frame is not None and frame.key_frame:
                last_key = len(pts)
            lost = frame is None or frame.is_corrupt or not (pts or frame.key_frame)
            if lost and sound is None:
                sound = last_key  # pictures in between may refer to the damaged one
            if frame is not None:
                pts.append(frame.pts)
        self._sound = len(pts) if sound is None else sound
        self._set_times(pts)

    def _decode_from_front(self, slots: dict[int, _Picture]) -> None:
        for index in slots:
            if index >= self._sound:
                which = f"frame {index} of {self.num_frames}"
                raise VideoError(self.path, f"{which} can't be decoded, the file is damaged")
        last = max(slots, default=-1)
        shown = (frame for frame in self._shown() if frame is not None)
        for number in range(last + 1):
            frame = next(shown, None)
            if frame is None:
                raise VideoError(self.path, "the file changed while it was read")
            if number in slots:
                self._convert(frame, slots[number])

    def _shown(self) -> Iterator[VideoFrame | None]:
        """All pictures in the order shown, with None for each damaged packet."""
        self._container.close()
        self._open()
        try:
            for position, packet in enumerate(filled(self._demuxer)):
                if position in self._holes:
                    yield None
                yield from self._decode_or_none(packet)
        except FFmpegError:
            yield None
        yield from self._decode_or_none(None)

    def _decode_or_none(self, packet: Packet[VideoStream] | None) -> Sequence[VideoFrame | None]:
        try:
            return self._codec.decode(packet)
        except FFmpegError:
            return [None]

    def _convert(self, frame: VideoFrame, slot: _Picture) -> None:
        """Write the frame as upright RGB into an (H, W, 3) array."""
        height, width = self._stored_size  # swscale's defaults: what the published weights were trained on
        rgb = self._reformatter.reformat(frame, width=width, height=height, format="rgb24", threads=1)
        plane = rgb.planes[0]
        rows = np.frombuffer(cast(Any, plane), np.uint8).reshape(-1, plane.line_size)[:height, : width * 3]
        slot[:] = self._turn.apply(rows.reshape(height, width, 3))
