"""Decoding on a GPU: up to the driver anywhere, beyond it in the tests marked gpu."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.codec import CodecContext
from videos import numbered_frame, read_number, write_numbered_video, write_video

from mvit_video.data.decode import choice, cuda, open_video
from mvit_video.data.decode.frames import NotOnHardware
from mvit_video.data.decode.pyav import PyAVVideo
from mvit_video.errors import ConfigError

CPU = torch.device("cpu")
X264 = {"preset": "veryfast", "g": "30", "bf": "2"}
no_gpu_here = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@no_gpu_here
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:3"])
@pytest.mark.parametrize("backend", ["auto", "pyav", "torchcodec"])
def test_cuda_without_a_gpu_is_a_clear_error(tmp_path: Path, device: str, backend: str) -> None:
    with pytest.raises(ConfigError, match=f"'{device}' is not possible here: .*; 'auto' or 'cpu' is"):
        open_video(tmp_path / "any.mp4", device=device, backend=backend)


@no_gpu_here
def test_auto_falls_back_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_numbered_video(tmp_path / "any.mp4", 5)
    choice._best.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            with open_video(path, device="auto") as video:
                assert video.get_frames([0]).device == CPU
    (message,) = [record.getMessage() for record in caplog.records if "decoding with" in record.getMessage()]
    assert message.startswith("decoding with PyAV on the CPU: ")


def test_the_faster_of_cpu_and_gpu_is_chosen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choice, "why_no_gpu", lambda index=0: None)
    monkeypatch.setattr(choice, "why_no_nvdec", lambda index=0: None)
    for speeds, expected in (({True: 90.0, False: 40.0}, True), ({True: 30.0, False: 40.0}, False)):
        choice._best.cache_clear()
        monkeypatch.setattr(choice, "_clips_a_second", lambda device, nvdec, speeds=speeds: speeds[nvdec])
        with caplog.at_level(logging.INFO):
            assert choice.resolve("auto") == (torch.device("cuda", 0) if expected else CPU, expected)
        assert f"{speeds[True]:.0f} small clips/s on cuda:0, {speeds[False]:.0f} on cpu" in caplog.text
    choice._best.cache_clear()


def test_the_packaged_clip_can_be_measured() -> None:
    assert choice._clips_a_second(CPU, nvdec=False) > 1


def test_pictures_are_looked_at_before_a_decoder_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "why_no_gpu", lambda index: None)
    calls: list[Any] = []
    num_right = 4

    def frames(video: PyAVVideo, indices: Any) -> torch.Tensor:
        calls.append(indices)
        with PyAVVideo(video.path) as exact:
            return exact.get_frames(indices).roll(0 if len(calls) <= num_right else 9, -1)

    monkeypatch.setattr(PyAVVideo, "decode_on_gpu", frames)
    assert choice.why_no_nvdec.__wrapped__(0) is None
    calls.clear()
    num_right = 2
    assert "gives other pictures than the CPU decoder" in (choice.why_no_nvdec.__wrapped__(0) or "")


# Kept decoders, with software contexts in the place of NVDEC's


@pytest.fixture
def software(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_acceleration", lambda device: nullcontext())
    monkeypatch.setattr(cuda, "_thread", cuda._Thread())
    monkeypatch.setattr(cuda, "fallbacks", type(cuda.fallbacks)())
    monkeypatch.setattr(cuda, "_lacking", set())


def test_software_frames_are_noticed_and_the_file_is_decoded_on_the_cpu(
    tmp_path: Path, software: None, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.mp4", "b.mp4"):
        path = write_numbered_video(tmp_path / name, 40, options=X264)
        with PyAVVideo(path, device=CPU, nvdec=True) as video, open_video(path) as exact:
            for indices in ([30, 2], [39]):
                torch.testing.assert_close(video.get_frames(indices), exact.get_frames(indices))
    assert cuda.fallbacks == {"NVDEC can't decode this kind of h264": 2}
    assert len(caplog.records) == 1
    assert "a.mp4: NVDEC can't decode this kind of h264, so the CPU decodes it" in caplog.text


def test_a_kept_decoder_that_fails_gives_way_to_a_new_one(
    tmp_path: Path, software: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that was made for a file of fewer references. Frames need not be on a GPU here."""
    monkeypatch.setattr(
        cuda.HardwareDecoder,
        "decode",
        lambda self, packet: self._decode(packet) if self.is_new else [],
    )
    path = write_numbered_video(tmp_path / "a.mp4", 40, options=X264)
    for _ in range(3):
        with PyAVVideo(path, device=CPU, nvdec=True) as video:
            assert [read_number(frame) for frame in video.get_frames([30, 2])] == [30, 2]
    assert not cuda.fallbacks


def test_a_decoder_is_told_how_far_pictures_are_out_of_order(tmp_path: Path, software: None) -> None:
    path = write_numbered_video(tmp_path / "a.mp4", 40, options=X264)
    with av.open(str(path)) as container:
        decoder = cuda.decoder_for(container.streams.video[0], "yuv420p", CPU)
        assert decoder.context.reorder_depth == container.streams.video[0].codec_context.reorder_depth > 0


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("mpeg4.mp4", {"codec": "mpeg4"}, "NVDEC doesn't decode mpeg4"),
        ("h264.avi", {"options": X264}, "its timestamps are no index of its frames"),
        ("high.mp4", {"pix_fmt": "yuv420p10le"}, "NVDEC doesn't decode h264 in yuv420p10le"),
        (
            "odd.webm",
            {"codec": "libvpx-vp9", "height": 121, "width": 161, "options": {"deadline": "realtime"}},
            "NVDEC doesn't decode odd sizes",
        ),
        ("dense.mp4", {"pix_fmt": "yuv444p"}, "NVDEC doesn't decode h264 in yuv444p"),
    ],
)
def test_codecs_that_nvdec_lacks_go_to_the_cpu(
    tmp_path: Path, software: None, name: str, arguments: dict[str, Any], reason: str
) -> None:
    path = write_numbered_video(tmp_path / name, 10, **arguments)
    with PyAVVideo(path, device=CPU, nvdec=True) as video:
        assert [read_number(frame) for frame in video.get_frames([9, 1])] == [9, 1]
    assert cuda.fallbacks == {reason: 1}


def test_av1_is_decoded_by_name(tmp_path: Path, software: None) -> None:
    """av.open would take libdav1d, which knows no GPU."""
    path = write_numbered_video(
        tmp_path / "av1.mp4", 5, height=128, width=192, codec="libsvtav1", options={"preset": "12"}
    )
    with av.open(str(path)) as container:
        decoder = cuda.decoder_for(container.streams.video[0], "yuv420p", CPU)
        assert decoder.context.codec.name == "av1"


def test_a_kept_decoder_gives_the_pictures_of_a_new_one(tmp_path: Path, software: None) -> None:
    """Files of one size but other parameter sets share a decoder, from the middle as from the front."""
    codecs: list[dict[str, Any]] = [
        {"options": X264 | {"x264-params": "cabac=0"}},
        {"options": X264 | {"x264-params": "open-gop=1:ref=5", "g": "8"}},
        {"options": X264 | {"profile": "main", "x264-params": "fullrange=on"}},
    ]
    paths = [
        write_video(tmp_path / f"{i}.mp4", (numbered_frame(k + i, 144, 176) for k in range(40)), **codec)
        for i, codec in enumerate(codecs)
    ]
    contexts = set()
    for start in (0, 17, 0, 30):
        for path in paths:
            with av.open(str(path)) as container:
                expected = {f.pts: f.to_ndarray() for f in container.decode(video=0)}
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                decoder = cuda.decoder_for(stream, "yuv420p", CPU)
                contexts.add(id(decoder.context))
                decoder.flush_buffers()
                container.seek(int(start / 25 / stream.time_base), stream=stream)
                packets = [packet for packet in container.demux(stream) if packet.size]
                frames = [f for packet in [*packets[:9], None] for f in decoder._decode(packet)]
            assert len(frames) >= 9 - 3  # leading pictures of an open group need what was not read
            sound = [f for f in frames if f.pts >= packets_start(path, start)]
            for frame in sound:
                np.testing.assert_array_equal(frame.to_ndarray(), expected[frame.pts])
    assert len(contexts) <= 2  # one a profile


def packets_start(path: Path, start: int) -> int:
    """Time stamp of the key frame that a seek to frame `start` reaches."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        container.seek(int(start / 25 / stream.time_base), stream=stream)
        return next(packet.pts for packet in container.demux(stream) if packet.is_keyframe)


def test_few_decoders_are_kept_and_none_is_shared_between_threads(
    tmp_path: Path, software: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_KEPT", 2)
    files = [write_numbered_video(tmp_path / f"{i}.mp4", 2, height=64 + 16 * i) for i in range(3)]

    def get(number: int, anew: bool = False) -> cuda.HardwareDecoder:
        with av.open(str(files[number])) as container:
            return cuda.decoder_for(container.streams.video[0], "yuv420p", CPU, anew=anew)

    first, second = get(0), get(1)
    assert get(0) is first
    assert not first.is_new
    get(2)
    assert get(0) is first
    assert get(1) is not second
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(get, 0).result() is not first
    assert get(0, anew=True) is not first


@pytest.mark.parametrize(("device", "expected"), [("cuda", 3), ("cuda:1", 1)])
def test_a_device_without_a_number_is_the_current_one(
    software: None, monkeypatch: pytest.MonkeyPatch, device: str, expected: int
) -> None:
    made: list[int] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(cuda, "_acceleration", lambda index: made.append(index) or nullcontext())
    with av.open(str(choice.SAMPLE)) as container:
        cuda.decoder_for(container.streams.video[0], "yuv420p", torch.device(device))
    assert made == [expected]


def _decode_all(decoder: cuda.HardwareDecoder, container: Any) -> None:
    for packet in container.demux(video=0):
        decoder.decode(packet)


def _decoder(path: Path) -> tuple[Any, cuda.HardwareDecoder]:
    container = av.open(str(path))
    return container, cuda.decoder_for(container.streams.video[0], "yuv420p", CPU)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_files_that_would_make_ffmpeg_create_its_decoder_anew_have_others(
    tmp_path: Path, software: None, codec: str
) -> None:
    """The same size in another aspect ratio or colour matrix; of HEVC also other parameter sets."""
    key = "x264-params" if codec == "libx264" else "x265-params"
    params = ["", "sar=4\\:3", "colormatrix=bt709:colorprim=bt709:transfer=bt709", "sar=4\\:3"]
    contexts = []
    for number, value in enumerate(params):
        value = ":".join(filter(None, [value, "log-level=none" if codec == "libx265" else ""]))
        path = write_numbered_video(
            tmp_path / f"{number}.mp4", 5, codec=codec, options={"preset": "ultrafast", key: value}
        )
        container, decoder = _decoder(path)
        contexts.append(decoder.context)
        container.close()
    assert contexts[1] is contexts[3]
    assert len(set(map(id, contexts))) == 3


def test_a_decoder_that_went_over_to_software_is_forgotten(tmp_path: Path, software: None) -> None:
    path = write_numbered_video(tmp_path / "small.mp4", 10, options=X264)
    for _ in range(2):
        container, decoder = _decoder(path)
        assert decoder.is_new
        with pytest.raises(NotOnHardware), decoder:
            _decode_all(decoder, container)
        container.close()
    assert not cuda._thread.decoders


def test_a_kind_that_the_gpu_lacks_is_tried_once(tmp_path: Path, software: None) -> None:
    """Shown by a picture of usual size: NVDEC refuses very small ones of any kind."""
    sizes = {"tiny.mp4": (64, 64), "usual.mp4": (240, 320), "other.mp4": (360, 480)}
    paths = {
        name: write_numbered_video(tmp_path / name, 10, height=height, width=width, options=X264)
        for name, (height, width) in sizes.items()
    }
    made: list[str] = []
    create = CodecContext.create
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cuda, "CodecContext", SimpleNamespace(create=lambda *a, **k: made.append(a[0]) or create(*a, **k))
        )
        for path in (*paths.values(), *paths.values()):
            with PyAVVideo(path, device=CPU, nvdec=True) as video:
                assert read_number(video.get_frames([4])[0]) == 4
    assert len(made) == 2
    assert cuda.fallbacks == {"NVDEC can't decode this kind of h264": 6}


def test_a_full_gpu_means_the_cpu(tmp_path: Path, software: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda.HardwareDecoder, "decode", full)
    path = write_numbered_video(tmp_path / "a.mp4", 10, options=X264)
    with PyAVVideo(path, device=CPU, nvdec=True) as video:
        assert read_number(video.get_frames([4])[0]) == 4
    assert cuda.fallbacks == {"the GPU's memory is full": 1}

    def none_left(*_: Any, **__: Any) -> None:
        raise av.error.MemoryError(12, "Cannot allocate memory")

    monkeypatch.setattr(cuda, "CodecContext", SimpleNamespace(create=none_left))
    with PyAVVideo(path, device=CPU, nvdec=True) as video:
        assert read_number(video.get_frames([4])[0]) == 4
    assert cuda.fallbacks == {"the GPU's memory is full": 2}


@no_gpu_here
def test_a_decoder_that_can_not_be_made_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = av.codec.hwaccel.HWAccel("cuda", device="0", is_hw_owned=True)
    monkeypatch.setattr(cuda, "_acceleration", lambda device: nullcontext(accelerate))
    with (
        av.open(str(choice.SAMPLE)) as container,
        pytest.raises(NotOnHardware, match="no NVDEC decoder for h264 could be made"),
    ):
        cuda.decoder_for(container.streams.video[0], "yuv420p", CPU)


# With a GPU

GPU_FILES: dict[str, dict[str, Any]] = {
    "h264.mp4": {"options": X264},
    "open_gop.mp4": {"options": X264 | {"x264-params": "open-gop=1", "g": "12"}},
    "full_range.mp4": {"options": X264 | {"x264-params": "fullrange=on:colormatrix=bt709"}},
    "hevc.mp4": {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": "log-level=none"}},
    "hevc10.mp4": {
        "codec": "libx265",
        "pix_fmt": "yuv420p10le",
        "options": {"preset": "ultrafast", "x265-params": "log-level=none"},
    },
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12"}},
    "interlaced.mp4": {"options": X264 | {"x264-params": "tff=1"}},
    "turned.mp4": {"options": X264, "rotation": 90},
    "odd.webm": {
        "codec": "libvpx-vp9",
        "options": {"deadline": "realtime", "cpu-used": "8"},
        "height": 257,
        "width": 341,
    },
    "mpeg4.avi": {"codec": "mpeg4"},
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_FILES)
def test_gpu_frames_are_the_cpu_frames(tmp_path: Path, name: str) -> None:
    arguments = {"height": 256, "width": 340} | GPU_FILES[name]
    path = write_numbered_video(tmp_path / name, 60, **arguments)
    torch.zeros(1, device="cuda")
    cuda.fallbacks.clear()
    with open_video(path, device="cuda") as video, open_video(path) as exact:
        for indices in ([0], [59], [30, 4, 30], list(range(60))):
            frames = video.get_frames(indices)
            assert frames.device.type == "cuda"
            difference = (frames.cpu().int() - exact.get_frames(indices).int()).abs().float()
            assert difference.max() <= 3
            assert difference.mean() < 1.5
    assert bool(cuda.fallbacks) == (name in ("odd.webm", "mpeg4.avi"))  # or NVDEC was never asked


@pytest.mark.gpu
def test_gpu_frames_are_safe_on_a_side_stream_and_after_the_decoder_goes_on() -> None:
    with open_video(choice.SAMPLE) as exact:
        expected = exact.get_frames(range(64)).int()
    with torch.cuda.stream(torch.cuda.Stream()):
        held = []
        for _ in range(4):
            with open_video(choice.SAMPLE, device="cuda") as video:
                held.append(video.get_frames(range(64)))
        for frames in held:
            assert (frames.cpu().int() - expected).abs().max() <= 3


@pytest.mark.gpu
def test_two_thousand_opens_leak_nothing() -> None:
    def used() -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free

    for opens in range(2000):
        with open_video(choice.SAMPLE, device="cuda") as video:
            video.get_frames([0, 5])
        if opens == 100:
            before, resident = used(), _resident_kilobytes()
    assert used() - before < 64 << 20
    assert _resident_kilobytes() - resident < 100_000


def _resident_kilobytes() -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


@pytest.mark.gpu
def test_threads_decode_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    speeds = {}
    for threads in (1, 2, 4, 8, 16):
        start = time.perf_counter()
        workers = [threading.Thread(target=_decode_clips, args=(20,)) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        torch.cuda.synchronize()
        speeds[threads] = 20 * threads / (time.perf_counter() - start)
    with capsys.disabled():
        print("\nNVDEC clips/s by threads:", {k: round(v) for k, v in speeds.items()})
    if (os.cpu_count() or 1) >= 4:
        assert max(speeds.values()) > 1.5 * speeds[1]


def _decode_clips(count: int) -> None:
    for _ in range(count):
        with open_video(choice.SAMPLE, device="cuda") as video:
            video.get_frames(range(0, 64, 4))
