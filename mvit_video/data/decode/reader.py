"""The packets of a file's video stream, from the front or from a key frame on."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from av.container import InputContainer
from av.error import FFmpegError
from av.format import Flags
from av.index import IndexEntry

from mvit_video.data.decode import mpeg4
from mvit_video.data.decode.container import (
    best_video_stream,
    decoder_limit,
    has_telling_header,
    open_file,
    size_without_padding,
)
from mvit_video.data.decode.packets import DTS, PTS, FileIndex, Key, VideoPacket, table_of
from mvit_video.data.timing import stage
from mvit_video.errors import VideoError

# Reading on is cheaper than a seek when the next key frame is at most this many packets away.
_SHORT_GAP = 32

# Probing a file decodes its first picture to learn the pixel format, which frames tell here anyway.
_PROBE = {"skip_frame": "all"}

# Of files whose header says all that is asked here, FFmpeg need not read packets.
_NO_PROBING = {"probesize": "32"}  # bytes, the least that FFmpeg takes

# Containers with a table of all packets, which tells when some are missing.
_HAS_SAMPLE_TABLE = ("mp4", "avi")

# Containers whose header gives the size of the first picture; of others it is guessed from some packets.
_HEADER_HAS_SIZE = ("mp4", "matroska", "avi")


class PacketReader:
    """An open file, read packet by packet in decoding order.

    Attributes:
        stream, codec: the best video stream and its decoder; others after each `open`.
        format: FFmpeg's short name of the container.
        guesses_times: AVI tells no times of presentation: FFmpeg guesses them, and may be wrong.
        first_size: width and height of the first picture, where the header tells.
        position: of the packet that comes next.
        shown_at: see `FileIndex`.

    Args:
        index: from an earlier reading. None: the file is to be read to its end once.

    Raises `VideoError`.
    """

    def __init__(self, path: str, max_pixels: int, index: FileIndex | None) -> None:
        self._path, self._max_pixels = path, max_pixels
        self._size = index.size if index else None  # bytes of the file, where not all count
        self.shown_at = index.shown_at if index else None
        self._probing = _NO_PROBING if has_telling_header(path) else {}
        self._container: InputContainer | None = None
        self.open()
        if index is None and self.format == "mpegts":
            self._size = size_without_padding(path)
            if self._size is not None:
                self.open()

    def close(self) -> None:
        self._packets: Iterator[VideoPacket] = iter(())
        if self._container is not None:
            self._container.close()

    @stage("demux")
    def open(self) -> None:
        """Begin at the front, with a new decoder."""
        self.close()
        options = {**_PROBE, **decoder_limit(self._max_pixels)}
        container = open_file(self._path, size=self._size, options=options, container_options=self._probing)
        self._container = container
        if self._probing and len(container.streams.video) > 1:  # which is best, FFmpeg sees by packets
            self._probing = {}
            return self.open()
        try:
            self.stream = best_video_stream(container, self._path, self._max_pixels)
        except VideoError:
            self.close()
            raise
        names = container.format.name.split(",")  # "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"
        self.format = "mp4" if "mp4" in names else names[0]
        self.clock_may_jump = Flags.ts_discont in Flags(container.format.flags)
        self.codec = self.stream.codec_context
        # Clips are decoded in parallel instead: same speed, less CPU time.
        self.codec.thread_type, self.codec.thread_count = "NONE", 1
        self.guesses_times = self.format == "avi" and bool(self.codec.has_b_frames)
        sized = self.format in _HEADER_HAS_SIZE
        self.first_size = (self.codec.width, self.codec.height) if sized else None
        # Fail where FFmpeg would paint over damage.
        self.codec.options = {"err_detect": "explode", **decoder_limit(self._max_pixels)}
        self._packets, self.position = self._demux(container), 0

    def _demux(self, container: InputContainer) -> Iterator[VideoPacket]:
        # Without the empty packets with which PyAV ends a stream, and those that stand for no picture.
        packets: Iterator[VideoPacket] = (p for p in container.demux(self.stream) if p.size)
        if self.shown_at is not None:
            packets = mpeg4.unpacked(self.stream, packets, self.shown_at)
        yield from packets

    @property
    def listed(self) -> Collection[IndexEntry]:
        """What the container's table, if it has one, says of each packet."""
        return list(self.stream.index_entries) if self.format in _HAS_SAMPLE_TABLE else ()

    @stage("demux")
    def read(self) -> VideoPacket | None:
        """The next packet; None at the end of the file."""
        packet = next(self._packets, None)
        self.position += packet is not None
        return packet

    @stage("demux")
    def read_all(self) -> FileIndex:
        """Read a file that was just opened to its end."""
        codec, packets = self.codec.codec.canonical_name, self._packets
        kinds: list[int | None] = []
        if self.guesses_times and codec == "mpeg4":
            self.shown_at = {}
            packets = mpeg4.noting_kinds(packets, kinds)
        try:
            table = table_of(packets, codec, self.format)
        except FFmpegError as error:
            padded = None if self._size else size_without_padding(self._path, packet=0)
            if padded is None:
                raise VideoError(self._path, "the file can't be read to its end, it is damaged") from error
            self._size = padded
            self.open()
            return self.read_all()
        self.position = len(table)
        listed = sum(entry.size > 0 for entry in self.listed) if len(self.listed) > len(table) else 0
        if listed > len(table):
            raise VideoError(
                self._path, f"the file is cut off: {len(table)} of its {listed} frames are there"
            )
        times = mpeg4.times_shown(table[:, DTS].tolist(), kinds) if kinds else None
        if times is not None:
            table[:, PTS] = times
        return FileIndex(table, guesses_times=times is not None, size=self._size)

    @stage("demux")
    def go_to(self, index: FileIndex, key: Key) -> VideoPacket | None:
        """The key frame's packet, after a seek if it is not near."""
        if 0 <= key.position - self.position <= _SHORT_GAP:
            packet = self._read_until(index, key)
            if packet is not None:
                return packet
        try:
            assert self._container is not None
            self._container.seek(key.seek_time, stream=self.stream)
            self._packets = self._demux(self._container)
            packet = self._read_until(index, key)
        except FFmpegError:
            packet = None
        if packet is None:  # the seek failed or went too far: read from the front
            self.open()
            packet = self._read_until(index, key)
        return packet

    def _read_until(self, index: FileIndex, key: Key) -> VideoPacket | None:
        for packet in self._packets:
            position = None if packet.pts is None else index.position(packet.pts)
            if position is not None and position > key.position:
                return None
            if position == key.position:
                if packet.size != key.size:  # after a seek, MPEG-PS gives times to halves of packets
                    return None
                self.position = position + 1
                return packet
        return None
