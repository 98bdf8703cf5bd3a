"""Clips a second that the loader hands over: python benchmarks/loader.py [VIDEO ...] [--rounds 9] [--write]

Threads of the process, processes of their own, and PyTorch's DataLoader, which make the same training clips
with the same two workers, in turns, an epoch each: clips a second of the clock, and a second of the time of
all processors, which other programs disturb less. Medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decode import FILES, machine, write, write_file
from torch.utils.data import DataLoader

from mvit_video.data.augment import Augment
from mvit_video.data.datasets import Batch, ClipDataset, training_loader
from mvit_video.data.index import LabelledVideo
from mvit_video.data.loader import ClipLoader
from mvit_video.model import ClipSpec

HEADING = "## Loader"
WORKERS, BATCH, VIDEOS = 2, 4, 24
AUGMENTATIONS = {
    "crop and mirror": Augment(),
    "RandAugment and erasing, 2 clips a video": Augment(
        short_side=256, rand_augment="rand-m7-n4-mstd0.5-inc1", erase_probability=0.25, repeats=2
    ),
}


class Epochs:
    """``run`` has what runs an epoch of each kind and gives its number of clips; workers stay."""

    def __init__(self, clips: ClipDataset) -> None:
        kinds: dict[str, Any] = {"threads": "thread", "processes": "process"}
        self._loaders = {
            name: training_loader(clips, batch_size=BATCH, num_workers=WORKERS, worker_type=kind)
            for name, kind in kinds.items()
        }
        keys: Any = [(0, index) for index in range(len(clips))]
        plain: Any = DataLoader(
            clips, BATCH, sampler=keys, num_workers=WORKERS, persistent_workers=True, collate_fn=_cat
        )
        self.run: dict[str, Callable[[], int]] = {
            name: partial(_count, loader) for name, loader in self._loaders.items()
        }
        self.run["DataLoader"] = lambda: sum(map(len, plain))

    def close(self) -> None:
        for loader in self._loaders.values():
            loader.close()


def _count(loader: ClipLoader[Batch]) -> int:
    return sum(len(batch.clips) for batch in loader)


def _cat(samples: list[Any]) -> torch.Tensor:
    return torch.cat([sample.clips for sample in samples])


def processor_seconds() -> float:
    """Of this process and of its children that live."""
    ticks = 0
    for child in Path("/proc/self/task").glob("*/children"):
        for process in child.read_text().split():
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def measure(paths: list[Path], rounds: int) -> list[str]:
    """Rows of a table: medians of clips a second, by the clock and by the processors' time."""
    rows = []
    protocol = ClipSpec(clip_frames=16, stride=4, target_fps=30, short_side=256, crop=224)
    videos = [LabelledVideo(str(paths[i % len(paths)]), 0, str(i)) for i in range(VIDEOS)]
    for name, augment in AUGMENTATIONS.items():
        clips = ClipDataset(videos, protocol, augment, seed=0)
        with closing(Epochs(clips)) as kinds:
            speeds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds.run}
            for turn in range(rounds + 1):
                for kind in random.Random(turn).sample(list(kinds.run), len(kinds.run)):
                    begin, used = time.perf_counter(), processor_seconds()
                    count = kinds.run[kind]()
                    seconds = time.perf_counter() - begin, processor_seconds() - used
                    if turn:  # workers start in the first epoch
                        speeds[kind].append((count / seconds[0], count / seconds[1]))
        medians = [
            [statistics.median(values) for values in zip(*kind, strict=True)] for kind in speeds.values()
        ]
        cells = [f"{clock:.1f}, {processor:.1f}" for clock, processor in medians]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return [f"| | {' | '.join(speeds)} |", "|---|---|---|---|", *rows]


def report(paths: list[Path], rounds: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        if not paths:
            file = next(iter(FILES.values()))
            paths = [write_file(Path(folder) / "file.mp4", file)]
        table = measure(paths, rounds)
    intro = (
        f"`python benchmarks/loader.py` on {machine()}: training clips of 16 x 224 x 224 a second",
        "from h264 of 340 x 256 by two workers, epochs of each kind in turns: of the clock, and of the time",
        "of both processors together; medians.",
    )
    return "\n".join([HEADING, "", *intro, "", *table]) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("videos", nargs="*", type=Path, help="videos to read instead of one made here")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/README.md")
    arguments = parser.parse_args()
    section = report(arguments.videos, arguments.rounds)
    print(section)
    if arguments.write:
        write(section, HEADING)
