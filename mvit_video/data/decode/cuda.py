"""NVDEC through PyAV: whether it works here, and decoders that are kept from file to file.

Making a decoder takes about 0.1 s, more than decoding a clip, so each thread keeps those it used last.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import av
import torch
from av.bitstream import BitStreamFilterContext
from av.codec.hwaccel import HWAccel, hwdevices_available
from av.error import FFmpegError
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from mvit_video.data.decode.frames import NotOnHardware

log = logging.getLogger(__name__)

SAMPLE = Path(__file__).with_name("sample.mp4")  # NVDEC refuses very small pictures; this one is 256 x 256

# Decoders of the codecs that NVDEC decodes bit for bit as the standard says. av.open would take libdav1d
# for AV1, which knows no GPU, so contexts are made by these names.
_DECODERS = {"h264": "h264", "hevc": "hevc", "vp8": "vp8", "vp9": "vp9", "av1": "av1", "libdav1d": "av1"}
_PIX_FMTS = {"h264": {"yuv420p", "yuvj420p"}, "vp8": {"yuv420p"}}
_PIX_FMTS_10_BIT = {"yuv420p", "yuvj420p", "yuv420p10le"}
_KEPT = 8  # decoders a thread; each holds some 20 surfaces of its picture size

fallbacks: Counter[str] = Counter()  # files decoded on the CPU though the GPU was asked for, by reason
_lock = threading.Lock()

_Kind: TypeAlias = tuple["int | None", str, str, "str | None"]  # device, codec, pixel format, profile

# Kinds that this GPU lacks, as an H100 lacks AV1, found by trying a picture of usual size.
_lacking: set[_Kind] = set()
_USUAL_SIZES = range(128, 4097)


class HardwareDecoder:
    """A kept decoder, set up for the packets of one file. Used like a PyAV codec context.

    As a context manager it is forgotten where it turns out to be of no use: one that went over to software
    would stay there.
    """

    def __init__(self, context: VideoCodecContext, stream: VideoStream, key: _Key, *, is_new: bool) -> None:
        self._context, self._key, self.is_new = context, key, is_new
        # The container may know better than the decoder how far pictures are out of order.
        context.reorder_depth = max(context.reorder_depth, stream.codec_context.reorder_depth)
        self._filter: BitStreamFilterContext | None = None
        if context.name in ("h264", "hevc"):
            # The parameter sets go before every key frame, or the decoder would use a former file's.
            self._filter = BitStreamFilterContext(f"{context.name}_mp4toannexb,dump_extra", in_stream=stream)

    def __enter__(self) -> HardwareDecoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        _kept.forget(self._key)
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()  # FFmpeg can't take what PyTorch has in reserve
            raise NotOnHardware("the GPU's memory is full") from error

    @property
    def skip_frame(self) -> Literal["DEFAULT", "NONREF"]:
        """What may be dropped: nothing, or pictures that no other refers to."""
        return cast(Any, self._context.skip_frame)

    @skip_frame.setter
    def skip_frame(self, value: Literal["DEFAULT", "NONREF"]) -> None:
        self._context.skip_frame = value

    def decode(self, packet: Packet[VideoStream] | None) -> list[VideoFrame]:
        """Frames on the GPU; empties the packet.

        Raises `NotOnHardware` when the decoder took to software, FFmpegError for a bad packet.
        """
        frames = self._decode(packet)
        if any(frame.format.name != "cuda" for frame in frames):
            if self.is_new and self._context.width in _USUAL_SIZES and self._context.height in _USUAL_SIZES:
                _lacking.add(self._key.kind)
            raise NotOnHardware(f"NVDEC can't decode this kind of {self._context.name}")
        return frames

    def _decode(self, packet: Packet[VideoStream] | None) -> list[VideoFrame]:
        if self._filter is None or packet is None:
            return self._context.decode(packet)
        packets = cast("list[Packet[VideoStream]]", self._filter.filter(packet))
        return [frame for filtered in packets for frame in self._context.decode(filtered)]

    def flush_buffers(self) -> None:
        self._context.flush_buffers()


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
    kind = (device.index, name, pix_fmt, codec.profile)
    if kind in _lacking:
        raise NotOnHardware(f"NVDEC can't decode this kind of {name}")
    # H.264 and HEVC carry their headers in the packets; for others they are part of what a decoder is.
    headers = None if name in ("h264", "hevc") else codec.extradata
    # FFmpeg makes its hardware decoder anew where one of these differs, which takes longer than a clip.
    look = (codec.width, codec.height, codec.sample_aspect_ratio, codec.colorspace, codec.color_range)
    key = _Key(kind, look, headers if name != "hevc" else codec.extradata)
    try:
        context, is_new = _kept.get(key, functools.partial(_create, name, headers, device), anew=anew)
        return HardwareDecoder(context, stream, key, is_new=is_new)
    except (MemoryError, torch.OutOfMemoryError) as error:  # FFmpeg's too is a MemoryError
        raise NotOnHardware("the GPU's memory is full") from error
    except FFmpegError as error:
        raise NotOnHardware(f"no NVDEC decoder for {name} could be made ({error.strerror})") from error


class _Key(NamedTuple):
    """What a decoder can be kept for."""

    kind: _Kind
    look: tuple[object, ...]
    headers: bytes | None


class _KeptDecoders(threading.local):
    """A decoder is for one thread only, and holds no state between the clips it decodes."""

    def __init__(self) -> None:
        self._contexts: OrderedDict[object, VideoCodecContext] = OrderedDict()

    def get(
        self, key: object, create: functools.partial[VideoCodecContext], *, anew: bool = False
    ) -> tuple[VideoCodecContext, bool]:
        """The decoder, and whether it is a new one."""
        kept = self._contexts.pop(key, None)
        if anew:
            kept = None  # freed before another is made
        context = kept or create()
        self._contexts[key] = context
        if len(self._contexts) > _KEPT:
            self._contexts.popitem(last=False)
        return context, kept is None

    def forget(self, key: object) -> None:
        self._contexts.pop(key, None)


_kept = _KeptDecoders()


def _create(name: str, headers: bytes | None, device: torch.device) -> VideoCodecContext:
    with _acceleration(device) as acceleration:
        context = cast(VideoCodecContext, av.CodecContext.create(name, "r", hwaccel=acceleration))
    context.thread_count = 1
    if headers:
        context.extradata = headers
    context.options = {"err_detect": "explode"}
    return context


@contextmanager
def _acceleration(device: torch.device) -> Iterator[HWAccel]:
    # FFmpeg refuses the primary context once PyTorch has made it, for its other scheduling flags; but it
    # takes the one that is current on this thread. "Software fallback" makes odd pictures come as ordinary
    # frames, which are noticed, where an error would look like damage.
    with torch.cuda.device(device):
        torch.zeros(1, device=device)  # the first work of a thread on a device makes its context current
        yield HWAccel(
            "cuda",
            device=str(device.index),
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


@functools.cache
def why_no_gpu(index: int = 0) -> str | None:
    """Why PyTorch can't use a GPU here; None if it can."""
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA (pip install torch from https://pytorch.org/get-started)"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU, or no driver for it (nvidia-smi must work, in a container too)"
    if index >= torch.cuda.device_count():
        return f"there is no GPU {index}, only {torch.cuda.device_count()}"
    return None


@functools.cache
def why_no_nvdec(index: int = 0) -> str | None:
    """Why PyAV can't decode on a GPU here, found by trying; None if it can."""
    if "cuda" not in hwdevices_available():
        return "this PyAV is built without CUDA (pip install --force-reinstall av)"
    no_gpu = why_no_gpu(index)
    if no_gpu is not None:
        return no_gpu
    try:
        with av.open(str(SAMPLE)) as container:
            stream = container.streams.video[0]
            decoder = decoder_for(stream, "yuv420p", torch.device("cuda", index))
            frames = [frame for packet in container.demux(stream) for frame in decoder.decode(packet)]
            torch.utils.dlpack.from_dlpack(frames[0].planes[0].__dlpack__()).cpu()
    except (FFmpegError, NotOnHardware, NotImplementedError, RuntimeError, IndexError) as error:
        return (
            f"NVDEC does not work ({type(error).__name__}: {error}); in a container the driver's video part "
            "is needed (NVIDIA_DRIVER_CAPABILITIES=compute,video,utility)"
        )
    return None
