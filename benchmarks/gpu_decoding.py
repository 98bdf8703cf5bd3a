"""Decoding, for benchmarks/gpu.py: whether NVDEC's frames are the CPU's, and what each engine gives."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import torch
from decode import scene
from torch import Tensor
from videos import write_video  # type: ignore[import-not-found]

from mvit_video.data import timing
from mvit_video.data.decode import choice, cuda, open_video
from mvit_video.errors import VideoError

if TYPE_CHECKING:
    from gpu import Run

Json = dict[str, Any]
Decode = Callable[[Path, list[int]], Tensor]  # a file and indices -> uint8 (T, 3, H, W)

FAST = {"preset": "veryfast", "g": "30", "bf": "2"}
X265 = {"preset": "ultrafast", "x265-params": "log-level=none"}
FILES: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264": ("libx264", "yuv420p", FAST),
    "h264 interlaced": ("libx264", "yuv420p", FAST | {"x264-params": "tff=1"}),
    "hevc": ("libx265", "yuv420p", X265),
    "hevc 10 bit": ("libx265", "yuv420p10le", X265),
    "vp9": ("libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}),
    "av1": ("libsvtav1", "yuv420p", {"preset": "12"}),
}
# What one kept decoder of H.264 has to go on with, from file to file.
CHANGES = {"aspect": "sar=64/51", "matrix": "colormatrix=bt709", "references": "ref=5", "no B": "bframes=0"}
CLOSE = 3  # levels between swscale's colours and ours


def make_file(
    run: Run,
    name: str,
    num_frames: int,
    options: dict[str, str] | None = None,
    size: tuple[int, int] = (256, 256),
) -> Path:
    """A video with details of all sizes that move; size: height and width."""
    codec, pix_fmt, usual = FILES[name]
    suffix = "webm" if name == "vp9" else "mp4"
    path = run.folder / f"{len(list(run.folder.iterdir()))} {name}.{suffix}"
    options = usual if options is None else options
    write_video(path, scene(*size, num_frames), codec=codec, pix_fmt=pix_fmt, options=options)
    return path


def check_decoding(run: Run) -> None:
    for name in FILES:
        run.case(f"planes {name}", same_planes, run, name)
    run.case("frames held on a side stream", held_frames, run)
    run.case("a kept decoder", kept_decoder, run)


def planes_of(path: Path, pix_fmt: str, device: torch.device) -> list[list[Tensor]]:
    """Luma and interleaved chroma of each frame as the device's decoder gives them."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if device.type == "cpu":
            layout = "p010le" if "10" in pix_fmt else "nv12"
            frames = [frame.reformat(format=layout) for frame in container.decode(stream)]
        else:
            decoder = cuda.decoder_for(stream, pix_fmt, device)
            decoder.flush_buffers()
            frames = [frame for packet in container.demux(stream) for frame in decoder.decode(packet)]
        return [
            [torch.utils.dlpack.from_dlpack(plane.__dlpack__()).cpu().clone() for plane in frame.planes]
            for frame in frames
        ]


def same_planes(run: Run, name: str) -> Json:
    """How many frames differ, in luma and in chroma."""
    path, pix_fmt = make_file(run, name, 24 if run.quick else 60), FILES[name][1]
    expected = planes_of(path, pix_fmt, torch.device("cpu"))
    found = planes_of(path, pix_fmt, run.device)
    differing = [0, 0]
    for ours, others in zip(found, expected, strict=True):
        for index in range(2):
            differing[index] += not torch.equal(ours[index], others[index])
    return {"frames": len(found), "luma differs": differing[0], "chroma differs": differing[1]}


def held_frames(run: Run) -> Json:
    """Frames of four clips, decoded on a side stream while the default one is busy, and looked at late."""
    busy = torch.randn(2048 if run.on_gpu else 64, 2048 if run.on_gpu else 64, device=run.device)
    with open_video(choice.SAMPLE) as exact:
        indices = range(min(64, exact.num_frames))
        expected = exact.get_frames(indices).int()
    side = torch.cuda.stream(torch.cuda.Stream()) if run.on_gpu else contextlib.nullcontext()
    held = []
    for _ in range(1 if run.quick else 4):
        for _ in range(100 if run.on_gpu else 1):
            busy = busy @ busy * 1e-2
        with side, open_video(choice.SAMPLE, device=run.device.type) as video:
            held.append(video.get_frames(indices))
    run.wait()
    worst = max(int((frames.cpu().int() - expected).abs().max()) for frames in held)
    return {"levels": worst, "ok": worst <= CLOSE, "on the CPU instead": dict(cuda.fallbacks)}


def kept_decoder(run: Run) -> Json:
    """Milliseconds and greatest difference of a clip whose file follows another kind of file."""
    paths = {"plain": make_file(run, "h264", 24)}
    paths |= {
        name: make_file(run, "h264", 24, FAST | {"x264-params": value}) for name, value in CHANGES.items()
    }
    found: Json = {}
    for turn, (name, path) in itertools.product(range(2), paths.items()):
        with open_video(path) as exact:
            expected = exact.get_frames(range(24)).int()
        start = time.perf_counter()
        frames = decode_on(run.device.type)(path, list(range(24)))
        run.wait()
        milliseconds = (time.perf_counter() - start) * 1e3
        levels = int((frames.cpu().int() - expected).abs().max())
        found[f"{name}, {'again' if turn else 'first'}"] = {"ms": milliseconds, "levels": levels}
    return found


def decode_on(device: str, backend: str = "pyav") -> Decode:
    def decode(path: Path, indices: list[int]) -> Tensor:
        with open_video(path, device=device, backend=backend) as video:
            return video.get_frames(indices)

    return decode


def pynvvideocodec(path: Path, indices: list[int]) -> Tensor:
    nvc: Any = importlib.import_module("PyNvVideoCodec")
    rgb = nvc.OutputColorType.RGBP
    decoder = nvc.SimpleDecoder(str(path), gpu_id=0, use_device_memory=True, output_color_type=rgb)
    return torch.stack(
        [torch.utils.dlpack.from_dlpack(frame) for frame in decoder.get_batch_frames_by_index(indices)]
    )


def clip_at(number: int, num_frames: int) -> list[int]:
    """Every fourth of 64 frames, from another place in the file for each number."""
    first = number * 37 % max(num_frames - 63, 1)
    return list(range(first, min(first + 64, num_frames), 4))


def kinetics_like(run: Run, num_frames: int) -> Path:
    """By libx264's defaults, as Kinetics is usually prepared."""
    return make_file(run, "h264", num_frames, {"preset": "veryfast"} if run.quick else {}, (256, 340))


def decoding(run: Run) -> None:
    num_frames, clips = (24, 2) if run.quick else (300, 20)
    path = kinetics_like(run, num_frames)
    run.case("a decoder", decoder_costs, run, path, num_frames)
    engines: dict[str, Decode] = {"cpu": decode_on("cpu"), "torchcodec cpu": decode_on("cpu", "torchcodec")}
    if run.on_gpu:
        engines = {"nvdec": decode_on("cuda"), "cpu": engines["cpu"]}
        engines |= {"torchcodec cuda": decode_on("cuda", "torchcodec"), "PyNvVideoCodec": pynvvideocodec}
    for name in ("nvdec", "cpu"):
        if name in engines:
            run.case(f"ms of a clip, {name}", stages_of_a_clip, run, engines[name], path, num_frames)
    for name, decode in engines.items():
        agrees = run.case(f"frames of {name}", same_frames, decode, path, num_frames)
        for threads in () if agrees is None else (1, 2) if run.quick else (1, 2, 4, 7, 8, 14, 16):
            at = f"{name}, {threads} threads"
            run.case(at, clips_a_second, run, functools.partial(decode, path), threads, clips, num_frames)
    run.case("on the CPU instead", lambda: dict(cuda.fallbacks))


def decoder_costs(run: Run, path: Path, num_frames: int) -> Json:
    """Of a thread's decoder: milliseconds to make and destroy one, and megabytes that it holds."""
    marks: list[float] = []

    def work() -> None:
        for _ in range(3):
            decode_on(run.device.type)(path, clip_at(0, num_frames))
            run.wait()
            marks.append(time.perf_counter())

    before, start = used_bytes(run), time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()
        held = used_bytes(run)
        ending = time.perf_counter()
    first, later = marks[0] - start, marks[2] - marks[1]
    found: Json = {"making, ms": (first - later) * 1e3, "end, ms": (time.perf_counter() - ending) * 1e3}
    return found | {"MB": None if before is None or held is None else (held - before) / 1e6}


def used_bytes(run: Run) -> int | None:
    if not run.on_gpu:
        return None
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def stages_of_a_clip(run: Run, decode: Decode, path: Path, num_frames: int) -> Json:
    times = 2 if run.quick else 20
    decode(path, clip_at(0, num_frames))
    number = itertools.count()
    with timing.measured("open") as clock:
        run.seconds(lambda: decode(path, clip_at(next(number), num_frames)), times)
    return {name: seconds / times * 1e3 for name, seconds in clock.seconds.items()}


def same_frames(decode: Decode, path: Path, num_frames: int) -> Json:
    """Differences to PyAV's frames on the CPU, and how many frames look more like another one."""
    indices = clip_at(3, num_frames)
    with open_video(path) as exact:
        every = exact.get_frames(range(indices[-1] + 1)).float()
    found = decode(path, indices).cpu().float()
    distances = torch.cdist(found[..., ::4, ::4].flatten(1), every[..., ::4, ::4].flatten(1))
    wrong = int((distances.argmin(1) != torch.tensor(indices)).sum())
    levels = (found - every[indices]).abs()
    return {"levels, most": levels.max().item(), "levels, mean": levels.mean().item(), "wrong frames": wrong}


def clips_a_second(
    run: Run, decode: Callable[[list[int]], Tensor], threads: int, clips: int, num_frames: int
) -> float:
    """Of some threads together, each of which has its decoder already."""
    barrier = threading.Barrier(threads + 1)

    def work(thread: int) -> None:
        try:
            decode(clip_at(thread, num_frames))
        except BaseException:
            barrier.abort()
            raise
        barrier.wait()
        for number in range(clips):
            decode(clip_at(thread * clips + number, num_frames))

    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(work, thread) for thread in range(threads)]
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait()
        start = time.perf_counter()
        for job in jobs:
            job.result()
        run.wait()
        return threads * clips / (time.perf_counter() - start)


def difficult(run: Run) -> None:
    tiny, av1 = (
        make_file(run, name, 12, size=size) for name, size in (("h264", (48, 48)), ("av1", (256, 256)))
    )
    plain = make_file(run, "h264", 24)
    damaged = run.folder / "damaged.mp4"
    data = bytearray(plain.read_bytes())
    data[len(data) // 4 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
    damaged.write_bytes(data)
    decode = decode_on(run.device.type)
    run.case("tiny picture", same_frames, decode, tiny, 12)
    run.case("AV1", same_frames, decode, av1, 12)
    run.case("damaged file", refusal, decode, damaged)
    run.case("many sizes", open_many, run, decode)
    if run.on_gpu:
        run.case("memory filled", with_full_memory, run, decode)
    run.case("on the CPU instead", lambda: dict(cuda.fallbacks))


def refusal(decode: Decode, path: Path) -> str:
    try:
        decode(path, list(range(24)))
    except VideoError as error:
        return str(error).replace(str(path), path.name)
    return "nothing was noticed"


def open_many(run: Run, decode: Decode) -> Json:
    """Clips of a file of each size in turn, and growth of the GPU's memory behind the first fifth."""
    sides = (160, 192) if run.quick else range(160, 352, 16)  # more than a thread keeps decoders for
    paths = [make_file(run, "h264", 8, size=(side, side + 32)) for side in sides]
    opens = 4 if run.quick else 500
    before, start = None, time.perf_counter()
    for number in range(opens):
        decode(paths[number % len(paths)], [0, 7])
        if number == opens // 5:
            before = used_bytes(run)
    seconds, after = time.perf_counter() - start, used_bytes(run)
    grown = None if before is None or after is None else (after - before) / 1e6
    return {"ms of a clip": seconds / opens * 1e3, "grown by MB": grown}


def with_full_memory(run: Run, decode: Decode) -> Json:
    """Frames of a decoder that has to be made where 16 MB are free."""
    path = make_file(run, "h264", 64, size=(704, 1280))
    free, _ = torch.cuda.mem_get_info()
    filling = torch.empty(free - (16 << 20), dtype=torch.uint8, device=run.device)
    found = same_frames(decode, path, 64)
    del filling
    torch.cuda.empty_cache()
    return found
