"""Clips a second of each decoder: python benchmarks/decode.py [VIDEO ...] [--rounds 5] [--write]

On files made here and on videos of your own.

All contenders decode the same clips (pytorchvideo: clips of the same length) in random turns, in one process
bound to one core and then to two. A video's time is the least over the rounds, as other programs can only add
to it, and the mean over several places in the video; with one core it is the processor's time. Peak memory
is measured in a process of its own. Frames are left at their size: uint8 from all, float from pytorchvideo,
which converts whatever it decodes. --long compares random clips of an hour with those of ten seconds.
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch

from mvit_video.data.decode import Decoder, index_cache, open_video

FRAMES, STRIDE, VIEWS = 16, 4, 5
PLACES = 4  # where training clips start
ENOUGH = 10  # seconds after which one round has to do
SPAN = (FRAMES - 1) * STRIDE + 1
REPEATS = 360  # of ten seconds in an hour
HEADING = "## Decoding"
HERE = Path(__file__).parent

Decode = Callable[[Path, list[int]], Any]  # a file, first frames of the clips -> what the library gives


class File(NamedTuple):
    codec: str
    width: int
    height: int
    num_frames: int
    options: dict[str, str]
    shrunk: int = 2  # how much larger it was filmed


FILES = {
    "h264 340x256, long GOP, B-frames": File("libx264", 340, 256, 300, {}),  # libx264's defaults
    "vp9 427x240": File(
        "libvpx-vp9", 427, 240, 300, {"deadline": "realtime", "cpu-used": "6", "crf": "33", "b": "0"}
    ),
    "h264 1920x1080": File("libx264", 1920, 1080, 90, {"g": "60", "preset": "fast"}, shrunk=1),
}


def write_file(path: Path, file: File) -> Path:
    """A scene that is filmed with some noise, uploaded, and coded again, smaller.

    That is how Kinetics' files come about, and how they are mostly prepared: the short side scaled to 256,
    with libx264's defaults (crf 23, preset medium, three B-frames, a key frame every 250).
    """
    height, width = file.height * file.shrunk // 2 * 2, file.width * file.shrunk // 2 * 2
    upload = path.with_name(f"upload_{path.stem}.mp4")
    _encode(upload, scene(height, width, file.num_frames), "libx264", (width, height), {"crf": "26"})
    with av.open(str(upload)) as container:
        frames = (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
        _encode(path, frames, file.codec, (file.width, file.height), file.options)
    return path


def scene(height: int, width: int, num_frames: int) -> Iterator[np.ndarray]:
    """Something moves before a background, both with details of all sizes; the camera pans."""
    rng = np.random.default_rng(0)
    back, front = _texture(rng, height + 300, width + 300), _texture(rng, height // 2, width // 3)
    for i in range(num_frames):
        y, x = int(100 + 60 * np.sin(i / 37)), int(100 + 60 * np.cos(i / 41))
        view = back[y : y + height, x : x + width].copy()
        top, left = (1 + np.sin(i / 11)) * height / 4, (1 + np.sin(i / 17)) * width / 3
        view[int(top) : int(top) + len(front), int(left) : int(left) + front.shape[1]] = front
        yield np.clip(view + rng.normal(0, 6, view.shape), 0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    total = np.full((height, width, 3), 128.0, np.float32)
    for size, contrast in ((64, 90), (16, 40), (4, 18)):
        coarse = rng.normal(0, contrast, (3, height // size + 4, width // size + 4))
        fine = torch.nn.functional.interpolate(
            torch.from_numpy(coarse)[None].float(), scale_factor=size, mode="bicubic"
        )
        total += fine[0].permute(1, 2, 0).numpy()[:height, :width]
    return total


def _encode(
    path: Path, frames: Iterable[np.ndarray], codec: str, size: tuple[int, int], options: dict[str, str]
) -> None:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(30), options=options)
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        stream.codec_context.gop_size = int(options.get("g", 250))
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(*size, format="yuv420p", interpolation="BICUBIC")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


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

    seconds, count = SPAN / 30, len(starts)
    kind = ("constant_clips_per_video" if count == VIEWS else "random_multi", seconds, count)
    random.seed(starts[0])
    dataset = LabeledVideoDataset(
        [(str(path), {"label": 0})], make_clip_sampler(*kind), decode_audio=False, decoder=decoder
    )
    decord: Any = importlib.import_module("decord")
    decord.bridge.set_bridge("torch")  # a setting of each thread; pytorchvideo sets it in one
    for clip in dataset:
        videos = clip["video"] if isinstance(clip["video"], list) else [clip["video"]]
        frames = [video[:, ::STRIDE] for video in videos]
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
    decoders: dict[str, Decode], path: Path, num_frames: int, rounds: int, cores: int, clips: int
) -> dict[str, float]:
    """Seconds for one video on each core, by contender; see above."""
    os.sched_setaffinity(0, set(sorted(ALL_CORES)[:cores]))
    torch.set_num_threads(1)
    rng = random.Random(0)
    last = num_frames - SPAN
    if clips == VIEWS:
        places = [[i * last // (VIEWS - 1) for i in range(VIEWS)]]
    else:  # a clip in each part of the video, as late ones take longest
        parts = [i * last // PLACES for i in range(PLACES)]
        firsts = [part + rng.randrange(last // PLACES) for part in parts]
        places = [sorted((first + clip * last // 3) % last for clip in range(clips)) for first in firsts]
    seconds = {name: [float("inf")] * len(places) for name in decoders}
    spent = dict.fromkeys(decoders, 0.0)
    clock = time.process_time if cores == 1 else time.perf_counter
    with ThreadPoolExecutor(cores) as pool:
        for turn in range(rounds):
            for place, starts in enumerate(places):
                for name in rng.sample(list(decoders), len(decoders)):
                    if turn and spent[name] > ENOUGH:
                        continue
                    begin = clock()
                    list(pool.map(decoders[name], [path] * cores, [starts] * cores))
                    taken = clock() - begin
                    spent[name] += taken
                    seconds[name][place] = min(seconds[name][place], taken / cores)
    os.sched_setaffinity(0, ALL_CORES)
    return {name: statistics.fmean(values) for name, values in seconds.items()}


def peak_megabytes(name: str, path: Path) -> float:
    """Growth of a fresh process over its imports and a tiny first decode, for five views."""
    command = [sys.executable, __file__, "--memory", name, str(path)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_growth(name: str, path: Path) -> None:
    decode = CONTENDERS[name]
    with tempfile.TemporaryDirectory() as folder:
        tiny = write_file(Path(folder) / "tiny.mp4", File("libx264", 64, 64, SPAN + 9, {}, shrunk=1))
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
        f"Training: one clip of {FRAMES} x {STRIDE} frames a video, or two; evaluation: {VIEWS} clips.",
        "Videos a second by one core (in processor time) and by two (two threads, by the clock): least times",
        f"of {rounds} alternating rounds, means over {PLACES} places; in brackets the share of",
        "mvit_video (pyav). Memory is the growth of the peak over a decode of a tiny file.",
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
    jobs = [(1, 1), (2, 1), (1, 2), (1, VIEWS), (2, VIEWS)]
    seconds = [
        measure(decoders, path, num_frames, rounds=rounds, cores=cores, clips=clips) for cores, clips in jobs
    ]
    kilobits = path.stat().st_size * 8 / seconds_long / 1000
    lines = [
        f"{title} ({kilobits:.0f} kbit/s)",
        "",
        f"| | training, 1 core | 2 cores | 2 clips, 1 core | {VIEWS} views, 1 core | 2 cores | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in decoders:
        cells = [f"{1 / job[name]:.1f} ({job['mvit_video (pyav)'] / job[name]:.2f})" for job in seconds]
        lines.append(f"| {name} | {' | '.join(cells)} | {peak_megabytes(name, path):.0f} MB |")
    print("\n".join(lines), flush=True)
    return lines


def long_files() -> str:
    """Processor time of random clips of an hour, over that of clips of ten seconds of the same packets."""
    lines = ["| | index in memory | kept in a folder | first reading of the hour |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        short = write_file(Path(folder) / "short.mp4", next(iter(FILES.values())))
        for suffix in (".mp4", ".mkv", ".ts"):
            paths = [repeated(short, Path(folder) / f"{n}{suffix}", n) for n in (1, REPEATS)]
            decoder = Decoder(index_cache=Path(folder) / f"kept{suffix}")
            begin = time.process_time()
            decoder(paths[1]).close()
            first = time.process_time() - begin
            ratios = [random_clips(paths, decoder, forget) for forget in (False, True)]
            lines.append(f"| {suffix} | {ratios[0]:.2f} | {ratios[1]:.2f} | {first:.2f} s |")
    return "\n".join(lines)


def repeated(short: Path, path: Path, times: int) -> Path:
    """The packets of ten seconds, again and again."""
    with av.open(str(short)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy: Any = target.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        ticks = len(packets) * int(packets[0].duration or 0)
        for repeat in range(times):
            for packet in packets:
                again = av.Packet(bytes(packet))
                again.pts, again.dts = (int(time or 0) + repeat * ticks for time in (packet.pts, packet.dts))
                again.time_base, again.stream, again.is_keyframe = packet.time_base, copy, packet.is_keyframe
                target.mux(again)
    os.utime(path, (1e9, 1e9))  # indices of files that have just changed aren't kept
    return path


def random_clips(paths: list[Path], decoder: Decoder, forget: bool, clips: int = 24) -> float:
    """The time of the second file's clips over that of the first's, which are read in turns."""
    rng, seconds = random.Random(0), [0.0, 0.0]
    for turn in range(2 * clips + 2):
        if forget:
            index_cache._memory = index_cache._Memory()  # as another process would
        begin = time.process_time()
        with decoder(paths[turn % 2]) as video:
            start = rng.randrange(video.num_frames - SPAN)
            video.get_frames(range(start, start + SPAN, STRIDE))
        seconds[turn % 2] += (time.process_time() - begin) * (turn > 1)
    return seconds[1] / seconds[0]


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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/README.md")
    parser.add_argument("--memory", nargs=2, metavar=("CONTENDER", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--long", action="store_true", help="only a file of an hour against ten seconds")
    arguments = parser.parse_args()
    if arguments.long:
        print(long_files())
    elif arguments.memory:
        print_growth(arguments.memory[0], Path(arguments.memory[1]))
    else:
        section = report(arguments.videos, arguments.rounds)
        if arguments.write:
            write(section)
