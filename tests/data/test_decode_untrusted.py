"""Files that would make FFmpeg open other files or hosts, or unpack to any size, are refused by every way."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from videos import numbered_frame, read_number, write_numbered_video, write_video

from mvit_video.data.decode import Decoder, device_of, frames, open_video
from mvit_video.data.probe import probe
from mvit_video.errors import VideoError
from mvit_video.prediction.prediction import Segment
from mvit_video.prediction.render import annotate_video
from mvit_video.prediction.stream import iter_windows

X264 = {"preset": "ultrafast"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a video that playlists can name."""
    folder = tmp_path_factory.mktemp("untrusted")
    write_numbered_video(folder / "private.ts", 30, options=X264)
    for number in range(3):
        Image.fromarray(numbered_frame(number)).save(folder / f"p{number}.png")
    return folder


def _hls(folder: Path) -> str:
    return "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1.2,\nprivate.ts\n#EXT-X-ENDLIST\n"


def _hls_absolute(folder: Path) -> str:
    return _hls(folder).replace("private.ts", f"file:{folder}/private.ts")


def _concat(folder: Path) -> str:
    return "ffconcat version 1.0\nfile private.ts\n"


def _sdp(folder: Path) -> str:
    return (
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
    )


def _dash(folder: Path) -> str:
    return (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT1S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period>'
        '<AdaptationSet mimeType="video/mp2t"><Representation id="1"><BaseURL>private.ts</BaseURL>'
        "</Representation></AdaptationSet></Period></MPD>"
    )


def _subtitles(folder: Path) -> str:
    return "# VobSub index file, v7 (do not modify this line!)\nsize: 160x120\nid: en, index: 0\n"


def _opened(path: Path) -> None:
    with open_video(path) as video:
        video.get_frames([0])


def _windows(path: Path) -> None:
    list(iter_windows(path, length=1, stride=1))


def _followed(path: Path) -> None:
    list(iter_windows(path, length=1, stride=1, follow=0.1))


def _file_object(path: Path) -> None:
    with path.open("rb") as file:
        list(iter_windows(file, length=1, stride=1))


def _annotated(path: Path) -> None:
    try:
        annotate_video(str(path), [Segment(0, 1, "a", 0.5)], path.with_name("copy.mp4"))
    finally:
        assert not path.with_name("copy.mp4").exists()


def _probed(path: Path) -> None:
    error = probe(str(path)).error
    if error is not None:
        raise VideoError(path, error)


WAYS = [_opened, _windows, _followed, _file_object, _annotated, _probed]


@pytest.mark.parametrize("text", [_hls, _hls_absolute, _concat, _sdp, _dash, _subtitles])
@pytest.mark.parametrize(
    ("suffix", "enter"),
    [*((".mp4", way) for way in WAYS), *((suffix, _opened) for suffix in (".m3u8", ".ts", ".sdp"))],
)
def test_files_that_refer_to_others_are_refused(
    folder: Path, suffix: str, text: Callable[[Path], str], enter: Callable[[Path], None]
) -> None:
    path = folder / f"list{suffix}"
    path.write_text(text(folder))
    with pytest.raises(VideoError):
        enter(path)


@pytest.mark.parametrize("enter", [_opened, _windows, _annotated, _probed])
@pytest.mark.parametrize("name", ["p%d.png.mp4", "p%d.tiff.mp4", "glob*.tga", "concat:private.ts|private.ts"])
def test_names_are_no_patterns(folder: Path, name: str, enter: Callable[[Path], None]) -> None:
    with pytest.raises(VideoError, match="no such file"):
        enter(folder / name)
    (folder / "p%d.tga").write_bytes(b"TRUEVISION")
    with pytest.raises(VideoError):
        enter(folder / "p%d.tga")


WRITERS: dict[str, dict[str, Any]] = {
    "a.mp4": {"options": X264},
    "a.mkv": {"options": X264},
    "a.ts": {"options": X264},
    "a.h264": {"options": X264},
    "a.avi": {"codec": "mpeg4"},
    "a.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "a.gif": {"codec": "gif", "pix_fmt": "rgb8", "fps": 10},
    "a.y4m": {"codec": "wrapped_avframe"},
}


@pytest.mark.parametrize("name", WRITERS)
def test_larger_frames_than_allowed_are_refused(folder: Path, name: str) -> None:
    path = write_numbered_video(folder / name, 12, **WRITERS[name])
    with open_video(path, max_pixels=120 * 160) as video:
        assert read_number(video.get_frames([11])[0]) == 11
    message = r"160x120 have more than decoder\.max_pixels=19199"
    with pytest.raises(VideoError, match=message):
        open_video(path, max_pixels=120 * 160 - 1)
    with pytest.raises(VideoError, match=message):
        next(iter_windows(path, length=1, stride=1, max_pixels=120 * 160 - 1))


def test_frames_that_become_larger_than_allowed_are_not_decoded(folder: Path) -> None:
    small = write_numbered_video(folder / "small.ts", 20, options=X264)
    large = write_video(folder / "large.ts", [numbered_frame(i, 720, 960) for i in range(20, 40)])
    path = folder / "grows.ts"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    with open_video(path) as video:
        assert read_number(video.get_frames([39])[0]) == 39
    with open_video(path, max_pixels=120 * 160) as video, pytest.raises(VideoError):
        video.get_frames([video.num_frames - 1])


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_larger_pictures_than_allowed_are_refused(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(numbered_frame(3)).save(tmp_path / f"a{suffix}")
    with open_video(tmp_path / f"a{suffix}", max_pixels=120 * 160) as video:
        assert video.num_frames == 1
    with pytest.raises(VideoError, match="max_pixels"):
        open_video(tmp_path / f"a{suffix}", max_pixels=120 * 160 - 1)


BOMBS: dict[str, dict[str, Any]] = {
    "a.png": {},
    "a.webp": {},
    "a.tif": {"compression": "tiff_deflate"},
    "a.bmp": {},
    "a.gif": {},
    "a.jp2": {},
    "a.j2k": {},
    "a.pcx": {},
    "a.sgi": {},
    "a.ppm": {},
    "moves.gif": {"save_all": True},
    "moves.webp": {"save_all": True},
    "moves.png": {"save_all": True},
    "a.mkv": {"codec": "ffv1"},
    "a.mjpeg": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "a.mp4": {"codec": "jpeg2000", "pix_fmt": "rgb24"},
    "a.apng": {"codec": "apng", "pix_fmt": "rgb24"},
}


@pytest.mark.parametrize("name", BOMBS)
def test_pictures_far_larger_than_allowed_are_no_damage(tmp_path: Path, name: str) -> None:
    """Decoders that were told the limit don't even tell the size."""
    how, path = BOMBS[name], tmp_path / name
    pictures = [np.full((600, 900, 3), level, np.uint8) for level in (60, 200)]
    if "codec" in how:
        write_video(path, pictures, **how)
    else:
        more = {"append_images": [Image.fromarray(pictures[1])]} if "save_all" in how else {}
        Image.fromarray(pictures[0]).save(path, **how, **more)
    with open_video(path) as video:
        assert video.get_frames([video.num_frames - 1]).shape == (1, 3, 600, 900)
    message = r"900x600 have more than decoder\.max_pixels=100 pixels"
    with pytest.raises(VideoError, match=message):
        open_video(path, max_pixels=100)
    with pytest.raises(VideoError, match=message):
        next(iter_windows(path, length=1, stride=1, max_pixels=100))


def test_pictures_beyond_pillow_s_own_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (300, 200)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with open_video(path) as video:  # as many as are allowed here
        assert video.get_frames([0]).shape == (1, 3, 200, 300)
    for limit in (100, 40_000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(VideoError, match=f"more than decoder.max_pixels={limit} pixels"):
            open_video(path, max_pixels=limit)


def test_a_size_that_no_header_tells_is_named_as_a_reason(tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "a.mjpeg", [np.zeros((600, 900, 3), np.uint8)], codec="mjpeg", pix_fmt="yuvj420p"
    )
    path.write_bytes(b"\0" * 64 + path.read_bytes())  # so Pillow doesn't know it
    with pytest.raises(VideoError, match=r"damaged, or its pictures have more than decoder\.max_pixels=100"):
        open_video(path, max_pixels=100).get_frames([0])
    with pytest.raises(VideoError, match=r"or its pictures have more than decoder\.max_pixels=100"):
        next(iter_windows(path, length=1, stride=1, max_pixels=100))


@pytest.mark.parametrize(
    "run", ["a_[1-99999999].jpg", "a_[000001-99999999999].jpg", "a_[9-1].jpg", f"a_[1-{'9' * 5000}].jpg"]
)
def test_a_run_of_endless_length_builds_no_names(tmp_path: Path, run: str) -> None:
    with pytest.raises(VideoError):
        open_video(tmp_path / run)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "animation.png", "animation.webp"])
def test_damaged_pictures_are_video_errors(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    pictures = [Image.fromarray(numbered_frame(number)) for number in range(3)]
    more: dict[str, Any] = {"save_all": True, "append_images": pictures[1:]} if "animation" in name else {}
    pictures[0].save(path, **more)
    sound = path.read_bytes()
    with open_video(path) as video:
        assert video.num_frames == (3 if more else 1)
    refused = 0
    for seed in range(60):
        some = random.Random(seed)
        damaged = bytearray(sound)
        for _ in range(5):
            damaged[some.randrange(min(len(sound), 1000))] = some.randrange(256)
        path.write_bytes(damaged[: some.choice((len(damaged), len(damaged) // 2))])
        try:
            with open_video(path) as video:
                assert video.get_frames([video.num_frames - 1]).shape[1] == 3
        except VideoError:
            refused += 1
    assert refused > 10


def _shrunk(video: Any, indices: list[int]) -> tuple[torch.Tensor, list[int]]:
    parts: list[int] = []

    def shrink(whole: torch.Tensor) -> torch.Tensor:
        assert whole.dtype == torch.uint8
        parts.append(len(whole))
        return whole[:, :, ::2, ::2].clone()

    return video.get_frames(indices, transform=shrink), parts


def _sources(tmp_path: Path) -> Iterator[Any]:
    yield open_video(
        write_numbered_video(tmp_path / "indexed.mp4", 40, options=X264 | {"bf": "2", "g": "12"})
    )
    yield open_video(
        write_numbered_video(tmp_path / "counted.avi", 40, options=X264 | {"bf": "2", "g": "12"})
    )
    (tmp_path / "pictures").mkdir()
    for number in range(40):
        Image.fromarray(numbered_frame(number)).save(tmp_path / "pictures" / f"{number:03}.png")
    yield open_video(tmp_path / "pictures")
    yield next(iter(iter_windows(tmp_path / "indexed.mp4", length=10, stride=10)))


def test_few_whole_frames_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "_PIXELS_AT_ONCE", 3 * 120 * 160 + 5)
    for indices in ([30, 2, 2, 39, 0, 17, 18, 19], list(range(40)), [5]):
        place = tmp_path / str(len(indices))
        place.mkdir()
        for video in _sources(place):
            with closing(video):
                found, parts = _shrunk(video, indices)
                assert max(parts) <= 3
                assert torch.equal(found, video.get_frames(indices)[:, :, ::2, ::2])


def test_an_opener_tells_its_device() -> None:
    assert device_of(Decoder()) == device_of(open_video) == torch.device("cpu")
    assert Decoder(device="auto").target.type in ("cpu", "cuda")


def test_levels_of_more_than_8_bits_are_scaled(tmp_path: Path) -> None:
    levels = np.tile(np.linspace(0, 1, 64), (48, 1))
    pictures = {
        "a.png": Image.fromarray((levels * 65535).round().astype(np.uint16)),
        "b.tif": Image.fromarray(levels.astype(np.float32)),
        "c.tif": Image.fromarray((levels * 255).astype(np.float32)),
        "d.tif": Image.fromarray((levels * 65535).round().astype(np.uint16)),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        with open_video(tmp_path / name) as video:
            (frame,) = video.get_frames([0])
        assert np.abs(frame.numpy() - levels * 255).max() <= 0.51, name


@pytest.mark.parametrize("suffix", [".webp", ".png", ".gif"])
@pytest.mark.parametrize("count", [2, 12])
def test_animations_are_videos(tmp_path: Path, suffix: str, count: int) -> None:
    pictures = [Image.fromarray(numbered_frame(number)) for number in range(count)]
    path = tmp_path / f"a{suffix}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40, loop=0, lossless=True)
    with open_video(path) as video:
        assert (video.num_frames, video.fps) == (count, pytest.approx(25))
        assert video.frame_time(count - 1) == pytest.approx((count - 1) / 25)
        found = video.get_frames([count - 1, 0, 1, count - 1])
        assert [read_number(frame) for frame in found] == [count - 1, 0, 1, count - 1]


def test_a_picture_in_front_of_an_animation_is_no_frame_of_it(tmp_path: Path) -> None:
    pictures = [Image.fromarray(numbered_frame(number)) for number in range(4)]
    pictures[0].save(
        tmp_path / "a.png", save_all=True, append_images=pictures[1:], duration=100, default_image=True
    )
    with open_video(tmp_path / "a.png") as video:
        assert [read_number(frame) for frame in video.get_frames(range(video.num_frames))] == [1, 2, 3]
