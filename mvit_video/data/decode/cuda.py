"""NVDEC through PyAV: decoders that are kept from file to file.

Making a decoder takes about 0.1 s, more than decoding a clip, so each thread keeps those it used last.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from av.bitstream import BitStreamFilterContext
from av.codec import CodecContext
from av.codec.hwaccel import HWAccel
from av.error import FFmpegError
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from mvit_video.data.decode.frames import NotOnHardware

log = logging.getLogger(__name__)

# Decoders of the codecs that NVDEC decodes bit for bit as the standard says, and what it decodes of them.
# av.open would take libdav1d for AV1, which knows no GPU, so contexts are made by these names.
_DECODERS = {"h264": "h264", "hevc": "hevc", "vp8": "vp8", "vp9": "vp9", "av1": "av1", "libdav1d": "av1"}
_PIX_FMTS = {"h264": {"yuv420p", "yuvj420p"}, "vp8": {"yuv420p"}}
_PIX_FMTS_10_BIT = {"yuv420p", "yuvj420p", "yuv420p10le"}
_USUAL_SIZES = range(128, 4097)  # NVDEC refuses very small pictures of any kind
_KEPT = 8  # decoders a thread; each holds some 20 surfaces of its picture size
_MEMORY_FULL = "the GPU's memory is full"

fallbacks: Counter[str] = Counter()  # files decoded on the CPU though the GPU was asked for, by reason
_lock = threading.Lock()


class _Key(NamedTuple):
    """What a decoder can be kept for."""

    kind: tuple[int, str, str, str | None]  # device, codec, pixel format, profile
    look: tuple[object, ...]  # where it differs, FFmpeg makes its hardware decoder anew
    headers: bytes | None


class _Thread(threading.local):
    """A decoder is for one thread only, and holds no state between the clips it decodes."""

    def __init__(self) -> None:
        self.decoders: dict[_Key, HardwareDecoder] = {}  # those used last at the end


_thread = _Thread()
_lacking: set[tuple[int, str, str, str | None]] = set()  # as an H100 lacks AV1, found by trying


class HardwareDecoder:
    """A ``context`` for the packets of the file that it was last got for, which ``decode`` filters first.

    As a context manager it is forgotten where it turns out to be of no use: one that went over to software
    would stay there.
    """

    def __init__(self, key: _Key, extradata: bytes | None) -> None:
        self._key, self.is_new = key, True
        device, codec, *_ = key.kind
        with _acceleration(device) as acceleration:
            created = CodecContext.create(codec, "r", hwaccel=acceleration)
        self.context = cast(VideoCodecContext, created)
        self.context.thread_count = 1
        if extradata:
            self.context.extradata = extradata
        self.context.options = {"err_detect": "explode"}

    def begin(self, stream: VideoStream) -> None:
        """Be ready for the packets of a file."""
        # The container may know better than the decoder how far pictures are out of order.
        depth = stream.codec_context.reorder_depth
        self.context.reorder_depth = max(self.context.reorder_depth, depth)
        self._filter: BitStreamFilterContext | None = None
        if self.context.name in ("h264", "hevc"):
            # The parameter sets go before every key frame, or the decoder would use a former file's.
            filters = f"{self.context.name}_mp4toannexb,dump_extra"
            self._filter = BitStreamFilterContext(filters, in_stream=stream)

    def __enter__(self) -> HardwareDecoder:
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if error is not None:
            _thread.decoders.pop(self._key, None)
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()  # FFmpeg can't take what PyTorch has in reserve
            raise NotOnHardware(_MEMORY_FULL) from error

    def flush_buffers(self) -> None:
        self.context.flush_buffers()

    def decode(self, packet: Packet[VideoStream] | None) -> list[VideoFrame]:
        """Frames on the GPU; empties the packet.

        Raises `NotOnHardware` when the decoder took to software, FFmpegError for a bad packet.
        """
        frames = self._decode(packet)
        if any(frame.format.name != "cuda" for frame in frames):
            if self.is_new and self.context.width in _USUAL_SIZES and self.context.height in _USUAL_SIZES:
                _lacking.add(self._key.kind)
            raise NotOnHardware(f"NVDEC can't decode this kind of {self.context.name}")
        return frames

    def _decode(self, packet: Packet[VideoStream] | None) -> list[VideoFrame]:
        if self._filter is None or packet is None:
            return self.context.decode(packet)
        packets = cast("list[Packet[VideoStream]]", self._filter.filter(packet))
        return [frame for filtered in packets for frame in self.context.decode(filtered)]


def decoder_for(
    stream: VideoStream, pix_fmt: str, device: torch.device, *, anew: bool = False
) -> HardwareDecoder:
    """This thread's kept decoder for a stream, or a new one; with ``anew`` a new one in the place of it.

    Raises `NotOnHardware` for a codec or pixel format that NVDEC lacks, or when no decoder can be made.
    """
    codec = stream.codec_context
    name = _DECODERS.get(codec.name)
    if name is None:
        raise NotOnHardware(f"NVDEC doesn't decode {codec.name}")
    if pix_fmt not in _PIX_FMTS.get(name, _PIX_FMTS_10_BIT):
        raise NotOnHardware(f"NVDEC doesn't decode {name} in {pix_fmt}")
    if codec.width % 2 or codec.height % 2:
        # FFmpeg would look for the chroma a row too early, and give a picture that is padded to even sizes.
        raise NotOnHardware("NVDEC doesn't decode odd sizes")
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    kind = (index or 0, name, pix_fmt, codec.profile)
    if kind in _lacking:
        raise NotOnHardware(f"NVDEC can't decode this kind of {name}")
    look = (codec.width, codec.height, codec.sample_aspect_ratio, codec.colorspace, codec.color_range)
    # H.264 carries its headers in the packets, HEVC too; for others they are part of what a decoder is.
    key = _Key(kind, look, None if name == "h264" else codec.extradata)
    kept = _thread.decoders
    try:
        decoder = kept.pop(key, None)
        if decoder is None or anew:
            decoder = None  # freed before another is made
            decoder = HardwareDecoder(key, None if name in ("h264", "hevc") else codec.extradata)
        else:
            decoder.is_new = False
        decoder.begin(stream)
    except (MemoryError, torch.OutOfMemoryError) as error:  # FFmpeg's too is a MemoryError
        raise NotOnHardware(_MEMORY_FULL) from error
    except FFmpegError as error:
        raise NotOnHardware(f"no NVDEC decoder for {name} could be made ({error.strerror})") from error
    kept[key] = decoder
    if len(kept) > _KEPT:
        del kept[next(iter(kept))]
    return decoder


@contextmanager
def _acceleration(device: int) -> Iterator[HWAccel]:
    # FFmpeg refuses the primary context once PyTorch has made it, for its other scheduling flags; but it
    # takes the one that is current on this thread. "Software fallback" makes odd pictures come as ordinary
    # frames, which are noticed, where an error would look like damage.
    with torch.cuda.device(device):
        torch.zeros(1, device="cuda")  # the first work of a thread on a device makes its context current
        yield HWAccel(
            "cuda",
            device=str(device),
            is_hw_owned=True,
            allow_software_fallback=True,
            options={"primary_ctx": "0", "current_ctx": "1"},
        )


def fall_back(path: str, reason: str) -> None:
    """Count a file that the CPU decodes; each reason is logged once."""
    with _lock:
        fallbacks[reason] += 1
        first = fallbacks[reason] == 1
    if first:
        log.warning("%s: %s, so the CPU decodes it (further such files are only counted)", path, reason)
