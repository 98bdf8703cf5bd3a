"""torchcodec and decord: the frames of our index, or a refusal that says why."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from videos import read_number, write_numbered_video

from mvit_video.data.decode import engines, open_video
from mvit_video.data.decode.pyav import PyAVVideo
from mvit_video.errors import ConfigError, VideoError

X264 = {"preset": "veryfast", "bf": "2", "g": "12"}
OPEN_GOP = X264 | {"bf": "3", "sc_threshold": "0", "x264-params": "open-gop=1:b-adapt=0"}
FILES = Path(__file__).parent / "files"
NO_TIMES = "relies on its timestamps, which are wrong or missing"


def usable(backend: str) -> str:
    try:
        {"torchcodec": engines.import_torchcodec, "decord": engines.import_decord}[backend]()
    except ConfigError as error:
        pytest.skip(str(error))
    return backend


@pytest.mark.parametrize("backend", ["torchcodec", "decord"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"options": X264},
        {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
        {"options": X264, "fps": 60, "rotation": 180},
    ],
    ids=["h264", "vp9", "turned"],
)
def test_frames_are_those_of_our_index(tmp_path: Path, backend: str, arguments: dict[str, Any]) -> None:
    suffix = ".webm" if "codec" in arguments else ".mp4"
    path = write_numbered_video(tmp_path / f"sound{suffix}", 40, **arguments)
    with open_video(path) as exact, open_video(path, backend=usable(backend)) as video:
        assert (video.num_frames, video.fps, video.duration) == (40, exact.fps, exact.duration)
        assert (video.height, video.width) == (exact.height, exact.width)
        assert video.frame_time(7) == exact.frame_time(7)
        for indices in ([0], [39], [20, 0, 39, 20], list(range(40)), []):
            frames = video.get_frames(indices)
            assert frames.shape == (len(indices), 3, 120, 160)
            difference = (frames.int() - exact.get_frames(indices).int()).abs()
            assert not indices or difference.float().mean() < 3
        with pytest.raises(ValueError, match=r"frame 40 was asked of .*, which has 40"):
            video.get_frames([40])


@pytest.mark.parametrize(
    ("backend", "name", "arguments", "reason"),
    [
        ("decord", "open_gop.mp4", {"options": OPEN_GOP}, "is a frame late after a seek in open groups"),
        ("decord", "late.ts", {"options": X264}, "loses frames of a clock that doesn't start at 0"),
        ("decord", "mjpeg.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}, "seeks badly in this container"),
        ("decord", "b_frames.avi", {"options": X264}, NO_TIMES),
        ("torchcodec", "b_frames.avi", {"options": X264}, NO_TIMES),
    ],
)
def test_files_that_an_engine_gets_wrong_are_refused(
    tmp_path: Path, backend: str, name: str, arguments: dict[str, Any], reason: str
) -> None:
    path = write_numbered_video(tmp_path / name, 40, **arguments)
    with pytest.raises(VideoError, match=f"{name}: {backend} {reason}.*; decode it with decoder=pyav"):
        open_video(path, backend=usable(backend))
    with open_video(path) as video:
        assert [read_number(frame) for frame in video.get_frames([25, 39])] == [25, 39]


def test_edit_lists_are_refused_by_decord() -> None:
    with pytest.raises(VideoError, match="decord does not follow its edit list"):
        open_video(FILES / "edit_list.mp4", backend=usable("decord"))


@pytest.mark.parametrize("backend", ["torchcodec", "decord"])
def test_wrong_frames_of_an_engine_are_noticed(
    tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_numbered_video(tmp_path / "shifted.mp4", 20, options=X264)
    module = usable(backend) and (
        engines.import_torchcodec() if backend == "torchcodec" else engines.import_decord()
    )
    if backend == "decord":
        monkeypatch.setattr(module.VideoReader, "__len__", lambda self: 19)
        with pytest.raises(VideoError, match="decord counts 19 frames"):
            open_video(path, backend=backend)
        return
    get = module.VideoDecoder.get_frames_at
    monkeypatch.setattr(module.VideoDecoder, "get_frames_at", lambda self, i: get(self, [k + 1 for k in i]))
    with (
        open_video(path, backend=backend) as video,
        pytest.raises(VideoError, match="torchcodec gives another picture as frame 5"),
    ):
        video.get_frames([5, 6])


def test_decord_is_refused_where_marks_of_key_frames_are_false(tmp_path: Path) -> None:
    path = write_numbered_video(tmp_path / "no_marks.mp4", 30, options={"g": "250", "bf": "0"})
    path.write_bytes(path.read_bytes().replace(b"stss", b"free"))  # every packet counts as a key frame then
    with pytest.raises(VideoError, match="wrongly marked as key frames; decode it with decoder=pyav"):
        open_video(path, backend="decord")
    with open_video(path) as video:
        assert [read_number(frame) for frame in video.get_frames([22, 26])] == [22, 26]


def test_auto_is_pyav(tmp_path: Path) -> None:
    path = write_numbered_video(tmp_path / "any.mp4", 5, options=X264)
    with open_video(path, backend="auto", device="auto") as video:
        assert isinstance(video, PyAVVideo)


@pytest.mark.parametrize(("backend", "module"), [("torchcodec", "torchcodec.decoders"), ("decord", "decord")])
def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, module: str
) -> None:
    engines.import_torchcodec.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ConfigError, match=rf"{backend} isn't installed: pip install 'mvit-video\[{backend}\]'"
    ):
        open_video(tmp_path / "any.mp4", backend=backend)


def test_missing_ffmpeg_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("Could not load libtorchcodec. Likely causes: ...")

    decoders = type(sys)("torchcodec.decoders")
    decoders.VideoDecoder = no_library  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None if name == "avfilter" else name)
    engines.import_torchcodec.cache_clear()
    with pytest.raises(ConfigError, match=r"not installed: avfilter\); try: apt-get install ffmpeg"):
        open_video(tmp_path / "any.mp4", backend="torchcodec")
