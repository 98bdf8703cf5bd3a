"""Opening containers: only files of video and pictures, which name no other file, host or device.

FFmpeg goes by the content, so a playlist under any name would make it open what the playlist says. Its white
lists of formats and protocols hold for what is opened and for all that is opened on behalf of it.
"""

from __future__ import annotations

import functools
import math
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias, cast

import av
from av.container import InputContainer
from av.error import ArgumentError, FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream

from mvit_video.errors import VideoError

if TYPE_CHECKING:  # at run time where a picture is opened: videos need no Pillow
    from PIL import Image

# Two frames of 8K (7680 x 4320) fit; converted to RGB, a frame of this size takes 192 MB.
MAX_PIXELS = 8192 * 8192

# FFmpeg's demuxers of files that hold their pictures themselves. Left out are playlists, descriptions
# (concat, hls, dash, sdp, ...), patterns of names (image2), devices (lavfi, x11grab, ...), files with parts
# in other files (mlv, vobsub), subtitles, and formats of sound alone.
FILE_FORMATS = (
    "3g2,3gp,asf,asf_o,av1,avi,flv,gxf,ivf,ivr,kux,live_flv,lmlm4,lxf,m4v,matroska,mj2,mov,mp4,mpeg,mpegts,mxf,"
    "mxg,nsv,nut,nuv,obu,ogg,pva,rm,ty,webm,wtv,"  # containers
    "apv,avs2,avs3,cavsvideo,dirac,dnxhd,dv,evc,h261,h263,h264,hevc,ingenient,mjpeg,mjpeg_2000,mpegvideo,"
    "mpjpeg,smjpeg,vc1,vc1test,vvc,yuv4mpegpipe,"  # streams without a container
    "dhav,hxvs,ifv,iv8,mgsts,simbiosis_imx,"  # of cameras
    "4xm,amv,anm,avs,bethsoftvid,bfi,bink,bmv,c93,cdxl,dfa,dsicin,dxa,ea,film_cpk,filmstrip,flic,frm,gdv,hnm,"
    "idcin,ipu,jv,mm,moflex,mtv,mv,mvi,nc,paf,pmp,rl2,roq,rpl,siff,smk,smush,swf,thp,tmv,usm,vidc,vividas,"
    "vivo,vmd,wc3movie,wsvqa,xmv,yop,"  # of games and old machines
    "apng,cine,gif,jpegxl_anim,ser,bmp_pipe,dpx_pipe,exr_pipe,gif_pipe,j2k_pipe,jpeg_pipe,jpegls_pipe,"
    "jpegxl_pipe,pam_pipe,pbm_pipe,pcx_pipe,pgm_pipe,png_pipe,ppm_pipe,psd_pipe,qoi_pipe,sgi_pipe,"
    "sunrast_pipe,tiff_pipe,webp_pipe"  # pictures
)
_NETWORK = (
    "crypto,ftp,http,httpproxy,https,mmsh,mmst,rtmp,rtmpe,rtmps,rtmpt,rtmpte,rtmpts,rtp,rtsp,rtsps,sctp,srt,"
    "srtp,tcp,tls,udp,udplite"
)
_ALLOWED = {  # formats and protocols
    "file": (FILE_FORMATS, "file,subfile"),
    "pipe": (FILE_FORMATS, "pipe"),
    "address": (f"{FILE_FORMATS},hls,dash,rtsp,rtp", _NETWORK),  # whoever gives an address trusts its host
    "camera": ("v4l2", "file"),
}

_NO_LIMIT = str((1 << 31) - 1)  # bytes that a hole in a transport stream may have, as in players

Origin: TypeAlias = Literal["file", "pipe", "address", "camera"]

_REFUSED = (
    "not a video file of a kind that is opened here (playlists and other files that refer to files or hosts "
    "are not)"
)


def open_container(source: str | IO[bytes] | Any, origin: Origin, **options: Any) -> InputContainer:
    """Open what may be opened; `options` as of `av.open`.

    Raises `FFmpegError`, `OSError` or `ValueError`.
    """
    formats, protocols = _ALLOWED[origin]
    given = options.pop("container_options", {})
    limits = {"format_whitelist": formats, "protocol_whitelist": protocols, "resync_size": _NO_LIMIT}
    return av.open(source, "r", metadata_errors="replace", container_options=given | limits, **options)


def open_file(path: str, *, size: int | None = None, **options: Any) -> InputContainer:
    """Open a file on the disk, or its first `size` bytes. Raises `VideoError`."""
    # "file:" keeps FFmpeg from taking a name like "http://x" or "a:b.mp4" for a protocol.
    place = f"file:{path}" if size is None else f"subfile,,start,0,end,{size},,:file:{path}"
    try:
        return open_container(place, "file", **options)
    except (FFmpegError, OSError, ValueError) as error:
        raise VideoError(path, why_not_opened(path, error)) from error


def best_video_stream(container: InputContainer, name: str, max_pixels: int = MAX_PIXELS) -> VideoStream:
    """The stream to decode; its decoder refuses pictures of more than `max_pixels`. Raises `VideoError`."""
    stream = cast("VideoStream | None", container.streams.best("video"))
    if stream is None or stream.disposition & Disposition.attached_pic:
        raise VideoError(name, "the file has no video stream")
    codec = cast("Any", stream.codec_context)
    if codec is None:
        raise VideoError(name, "FFmpeg has no decoder for its video stream")
    require_pixels(codec.width, codec.height, max_pixels, name)
    if not codec.width:  # so a decoder that has refused the size leaves it
        _require_declared_pixels(name, max_pixels)
    codec.options = decoder_limit(max_pixels)
    return stream


def declared_rate(stream: VideoStream) -> Fraction:
    """Frames a second, as the container says."""
    return stream.average_rate or stream.guessed_rate or Fraction(25)


def _require_declared_pixels(path: str, max_pixels: int) -> None:
    """Raises `VideoError` where a file's header tells of pictures that are too large; nothing is decoded."""
    if not os.path.isfile(path):  # noqa: PTH113 (a stream's name may be no path)
        return
    width = height = 0
    no_decoder = {"codec_whitelist": "none"}
    with (
        suppress(VideoError, FFmpegError, OSError, AttributeError),
        open_file(path, container_options=no_decoder) as container,
    ):
        codec = cast("Any", container.streams.best("video")).codec_context
        width, height = codec.width, codec.height
    require_pixels(width, height, max_pixels, path)
    try:
        with open_picture(path, max_pixels, path):
            pass
    except VideoError:
        raise
    except Exception:  # no picture that Pillow knows
        return


def decoder_limit(max_pixels: int) -> dict[str, str]:
    """FFmpeg's option that keeps a decoder from taking more memory, should frames become larger.

    Decoders count whole blocks and borders of up to 256 pixels more each way, so it is a little higher.
    """
    return {"max_pixels": str(max_pixels + 1024 * (math.isqrt(max_pixels) + 64))}


def require_pixels(width: int, height: int, max_pixels: int, name: str) -> None:
    """Raises `VideoError` for pictures that are too large."""
    if width * height > max_pixels:
        raise VideoError(name, _too_large(f" of {width}x{height}", max_pixels))


def _too_large(size: str, max_pixels: int) -> str:
    return f"its pictures{size} have more than decoder.max_pixels={max_pixels} pixels"


@contextmanager
def open_picture(file: str, max_pixels: int, name: str) -> Iterator[Image.Image]:
    """A picture of a format that Pillow knows, which is decoded when its pixels are asked for.

    Raises `VideoError` with `name` for one that is too large, and whatever Pillow raises.
    """
    pillow = _pillow()
    if pillow.MAX_IMAGE_PIXELS is not None and max_pixels > pillow.MAX_IMAGE_PIXELS:
        pillow.MAX_IMAGE_PIXELS = max_pixels  # its own limit gives way to a higher one that is asked for
    try:
        with pillow.open(file) as image:
            width, height = image.size
            require_pixels(width, height, max_pixels, name)
            yield image
    except pillow.DecompressionBombError as error:
        raise VideoError(name, _too_large("", max_pixels)) from error


@functools.cache
def _pillow() -> Any:
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # an error of ours, or allowed
    return Image


def check_file(path: str) -> None:
    """Raises `VideoError` for what is no file with content."""
    try:
        found = os.stat(path)  # noqa: PTH116 (for each clip)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # a null byte in its name
        reason = "an address isn't a file; live=true watches one" if "://" in path else "no such file"
        raise VideoError(path, reason) from error
    except OSError as error:
        raise VideoError(path, f"the file can't be read ({error})") from error
    if stat.S_ISDIR(found.st_mode):
        raise VideoError(path, "this is a directory, not a video file")
    if not stat.S_ISREG(found.st_mode):
        raise VideoError(path, "this is not a regular file")
    if found.st_size == 0:
        raise VideoError(path, "the file is empty")


def has_telling_header(path: str) -> bool:
    """Whether it is an MP4 or Matroska file, whose header describes the streams."""
    try:
        start = _first_bytes(path)
    except OSError:
        return False
    return start[4:8] == b"ftyp" or start.startswith(b"\x1a\x45\xdf\xa3")


def why_not_opened(path: str, error: Exception) -> str:
    """What is wrong with a file that FFmpeg can't open, in words that help."""
    if isinstance(error, PermissionError):
        return "no permission to read the file"
    if isinstance(error, ArgumentError):  # so FFmpeg calls what is not on its white lists
        return _REFUSED
    try:
        start = _first_bytes(path)
    except OSError as reading:
        return f"the file can't be read ({reading.strerror})"
    if start[4:8] == b"ftyp":
        return "an MP4 file without its table of frames: it is cut off or damaged"
    return "not a video file, or one that FFmpeg can't read"


def _first_bytes(path: str) -> bytes:
    with open(path, "rb") as file:  # noqa: PTH123 (for each clip)
        return file.read(8)


def unreadable(path: str, reason: str, *, max_pixels: int | None = None) -> VideoError:
    """The error of a video whose frames don't come.

    Args:
        max_pixels: where its size isn't known, so that this limit may be the reason.
    """
    if has_telling_header(path) and _is_encrypted(path):
        return VideoError(path, "the video is encrypted (DRM), and can't be decoded without its key")
    return VideoError(path, reason if max_pixels is None else f"{reason}, or {_too_large('', max_pixels)}")


def _is_encrypted(path: str) -> bool:
    """Whether a player's key is needed for the pictures of an MP4 or Matroska file."""
    try:
        with open_file(path) as container:
            stream = container.streams.video[0]
            return "enc_key_id" in stream.metadata or any(
                data.data_type == "encryption_info"
                for packet in container.demux(stream)
                for data in packet.iter_sidedata()
            )
    except (FFmpegError, OSError, IndexError, VideoError):
        return False


def size_without_padding(path: str, *, packet: int = 256) -> int | None:
    """Bytes of a file before the zeros or ones that fill its end; None where it ends otherwise.

    So cameras leave what they allocated ahead. Up to ``packet`` bytes of it stay, which may be content.
    """
    block = 1 << 20
    with open(path, "rb") as file:  # noqa: PTH123
        size = end = file.seek(0, os.SEEK_END)
        content = b""
        while end and not content:
            start = max(0, end - block)
            file.seek(start)
            content = file.read(end - start).rstrip(b"\0\xff")
            end = start + len(content)
    return end + packet if end + packet < size else None
