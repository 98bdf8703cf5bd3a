"""Clips a second of each decoder: python benchmarks/decode.py [VIDEO ...] [--rounds 15] [--write]

On files made here and on videos of your own.

All contenders decode the same clips (pytorchvideo: clips of the same length) in random turns, in one process
bound to one core and then to two; each reported time is a median over the rounds. Peak memory is measured in
a process of its own. Frames are left at their size: uint8 from all, float from pytorchvideo, which converts
whatever it decodes.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch

from mvit_video.data.decode import open_video

FRAMES, STRIDE, VIEWS = 16, 4, 5
SPAN = (FRAMES - 1) * STRIDE + 1
HEADING = "## Decoding"
HERE = Path(__file__).parent

Decode = Callable[[Path, list[int]], Any]  # a file, first frames of the clips -> what the library gives


class File(NamedTuple):
    codec: str
    width: int
    height: int
    num_frames: int
    options: dict[str, str]


FILES = {
    "h264 340x256, long GOP, B-frames": File(
        "libx264", 340, 256, 300, {"g": "250", "bf": "3", "preset": "medium", "crf": "20"}
    ),
    "vp9 426x240": File(
        "libvpx-vp9", 426, 240, 300, {"deadline": "realtime", "cpu-used": "6", "crf": "33", "b": "0"}
    ),
    "h264 1920x1080": File("libx264", 1920, 1080, 90, {"g": "60", "bf": "3", "preset": "fast", "crf": "26"}),
}


def write_file(path: Path, file: File) -> Path:
    """A moving texture with some noise, about as hard to code as a Kinetics clip."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (file.height // 8 + 40, file.width // 8 + 40, 3)).astype(np.float32)
    texture = np.asarray(
        torch.nn.functional.interpolate(
            torch.from_numpy(small).permute(2, 0, 1)[None], scale_factor=8, mode="bicubic"
        )[0].permute(1, 2, 0)
    )
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(file.codec, rate=Fraction(30), options=file.options)
        stream.width, stream.height, stream.pix_fmt = file.width, file.height, "yuv420p"
        for i in range(file.num_frames):
            y, x = int(100 + 90 * np.sin(i / 19)), int(100 + 90 * np.cos(i / 23))
            view = texture[y : y + file.height, x : x + file.width]
            noisy = np.clip(view + rng.normal(0, 5, view.shape), 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noisy, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def indices_of(starts: list[int]) -> list[list[int]]:
    return [list(range(start, start + SPAN, STRIDE)) for start in starts]


def ours(path: Path, starts: list[int]) -> Any:
    needed = sorted({index for clip in indices_of(starts) for index in clip})
    with open_video(path) as video:
        return video.get_frames(needed)


def ours_view_by_view(path: Path, starts: list[int]) -> Any:
    return [ours(path, [start]) for start in starts]


def torchcodec_backend(path: Path, starts: list[int]) -> Any:
    needed = sorted({index for clip in indices_of(starts) for index in clip})
    with open_video(path, backend="torchcodec") as video:
        return video.get_frames(needed)


def decord_backend(path: Path, starts: list[int]) -> Any:
    needed = sorted({index for clip in indices_of(starts) for index in clip})
    with open_video(path, backend="decord") as video:
        return video.get_frames(needed)


def decord_alone(path: Path, starts: list[int]) -> Any:
    decord: Any = importlib.import_module("decord")
    reader = decord.VideoReader(str(path), num_threads=1)
    return reader.get_batch(sorted({index for clip in indices_of(starts) for index in clip}))


def torchcodec_samplers(path: Path, starts: list[int]) -> Any:
    decoders: Any = importlib.import_module("torchcodec.decoders")
    samplers: Any = importlib.import_module("torchcodec.samplers")
    sample = samplers.clips_at_random_indices if len(starts) == 1 else samplers.clips_at_regular_indices
    return sample(
        decoders.VideoDecoder(str(path), num_ffmpeg_threads=1),
        num_clips=len(starts),
        num_frames_per_clip=FRAMES,
        num_indices_between_frames=STRIDE,
        sampling_range_start=starts[0],  # the same clips as all others
        sampling_range_end=starts[-1] + 1,
    )


def pytorchvideo(path: Path, starts: list[int], *, decoder: str) -> Any:
    from pytorchvideo.data import LabeledVideoDataset, make_clip_sampler

    seconds = SPAN / 30
    kind = ("random", seconds) if len(starts) == 1 else ("constant_clips_per_video", seconds, len(starts))
    random.seed(starts[0])
    dataset = LabeledVideoDataset(
        [(str(path), {"label": 0})], make_clip_sampler(*kind), decode_audio=False, decoder=decoder
    )
    decord: Any = importlib.import_module("decord")
    decord.bridge.set_bridge("torch")  # a setting of each thread; pytorchvideo sets it in one
    for clip in dataset:
        frames = clip["video"][:, ::STRIDE]
    return frames


CONTENDERS: dict[str, Decode] = {
    "mvit_video (pyav)": ours,
    "mvit_video, view by view": ours_view_by_view,
    "mvit_video (torchcodec)": torchcodec_backend,
    "mvit_video (decord)": decord_backend,
    "torchcodec samplers": torchcodec_samplers,
    "decord": decord_alone,
    "pytorchvideo (pyav)": lambda path, starts: pytorchvideo(path, starts, decoder="pyav"),
    "pytorchvideo (decord)": lambda path, starts: pytorchvideo(path, starts, decoder="decord"),
}


def usable(path: Path) -> dict[str, Decode]:
    """The contenders that are installed and can decode the file; the others are named on standard error."""
    found = {}
    for name, decode in CONTENDERS.items():
        try:
            decode(path, [0])
        except Exception as error:
            print(f"left out: {name} ({type(error).__name__}: {str(error)[:120]})", file=sys.stderr)
            continue
        found[name] = decode
    return found


def measure(
    decoders: dict[str, Decode], path: Path, num_frames: int, rounds: int, cores: int, views: int
) -> dict[str, float]:
    """Seconds for one video on each core, by contender: the median over the rounds."""
    os.sched_setaffinity(0, set(sorted(ALL_CORES)[:cores]))
    torch.set_num_threads(1)
    rng = random.Random(0)
    last = num_frames - SPAN
    times: dict[str, list[float]] = {name: [] for name in decoders}
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(rounds):
            starts = [rng.randrange(last)] if views == 1 else [i * last // (views - 1) for i in range(views)]
            for name in rng.sample(list(decoders), len(decoders)):
                decode = decoders[name]
                # The first call is not timed: it pays for memory that the one before gave back.
                for _ in range(2):
                    begin = time.perf_counter()
                    list(pool.map(decode, [path] * cores, [starts] * cores))
                    end = time.perf_counter()
                times[name].append((end - begin) / cores)
    os.sched_setaffinity(0, ALL_CORES)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_megabytes(name: str, path: Path) -> float:
    """Growth of a fresh process over its imports and a tiny first decode, for five views."""
    command = [sys.executable, __file__, "--memory", name, str(path)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_growth(name: str, path: Path) -> None:
    decode = CONTENDERS[name]
    with tempfile.TemporaryDirectory() as folder:
        tiny = write_file(Path(folder) / "tiny.mp4", File("libx264", 64, 64, SPAN + 9, {}))
        decode(tiny, [0])
    before = _peak_kilobytes()
    with av.open(str(path)) as container:
        last = container.streams.video[0].frames or 300
    for _ in range(3):
        decode(path, [i * (last - SPAN) // (VIEWS - 1) for i in range(VIEWS)])
    print((_peak_kilobytes() - before) / 1024)


def _peak_kilobytes() -> int:
    # Not getrusage: a child process inherits the peak of the one that started it.
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def report(videos: list[Path], rounds: int) -> str:
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("av", "torch", "torchcodec", "decord", "pytorchvideo")
    )
    lines = [HEADING, "", f"`make bench` on {machine()}; {versions}.", ""]
    lines += [
        f"Training: one clip of {FRAMES} x {STRIDE} frames a video; evaluation: {VIEWS} clips a video.",
        "Videos a second by one core and by two (two threads), medians of alternating runs; in brackets the",
        "share of mvit_video (pyav); memory is the growth of the peak over a decode of a tiny file.",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for title, file in FILES.items():
            suffix = ".webm" if "vp9" in file.codec else ".mp4"
            path = write_file(Path(folder) / f"file{len(lines)}{suffix}", file)
            lines += ["", *table(title, path, rounds)]
    for path in videos:
        lines += ["", *table(path.name, path, rounds)]
    return "\n".join(lines) + "\n"


def table(title: str, path: Path, rounds: int) -> list[str]:
    decoders = usable(path)
    with open_video(path) as video:
        num_frames, seconds_long = video.num_frames, video.duration
    jobs = [(1, 1), (2, 1), (1, VIEWS), (2, VIEWS)]
    seconds = [
        measure(decoders, path, num_frames, rounds=rounds, cores=cores, views=views) for cores, views in jobs
    ]
    kilobits = path.stat().st_size * 8 / seconds_long / 1000
    lines = [
        f"{title} ({kilobits:.0f} kbit/s)",
        "",
        f"| | training, 1 core | 2 cores | {VIEWS} views, 1 core | 2 cores | memory |",
        "|---|---|---|---|---|---|",
    ]
    for name in decoders:
        cells = [f"{1 / job[name]:.1f} ({job['mvit_video (pyav)'] / job[name]:.2f})" for job in seconds]
        lines.append(f"| {name} | {' | '.join(cells)} | {peak_megabytes(name, path):.0f} MB |")
    return lines


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    return f"{len(ALL_CORES)} cores of {names[0] if names else platform.processor()}"


def write(section: str, heading: str = HEADING) -> None:
    """Replace a benchmark's section of README.md."""
    path = HERE / "README.md"
    text = path.read_text() if path.exists() else "# Benchmarks\n"
    before, _, rest = text.partition(heading)
    _, mark, after = rest.partition("\n## ")
    path.write_text(f"{before.rstrip()}\n\n{section}{mark}{after}")


ALL_CORES = os.sched_getaffinity(0)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("videos", nargs="*", type=Path, help="videos to measure besides")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/README.md")
    parser.add_argument("--memory", nargs=2, metavar=("CONTENDER", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print_growth(arguments.memory[0], Path(arguments.memory[1]))
    else:
        section = report(arguments.videos, arguments.rounds)
        print(section)
        if arguments.write:
            write(section)
