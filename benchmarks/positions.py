"""What decomposed relative positions save over joint ones, in time and memory, as the resolution grows.

    python benchmarks/positions.py

Each case is a training step (forward and backward) of MViTv2-T for images in a process of its own, so that
its peak memory can be told; cases of one resolution take turns, and medians and ratios go to the table. The
paper reports that decomposed positions train 3.9 times as fast as joint ones at detection resolution.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from model import resident

import mvit_video as mv

POSITIONS: dict[str, dict[str, Any]] = {
    "none": {"rel_pos_spatial": False},
    "decomposed": {},
    "joint": {"rel_pos_joint": "space"},
}


def measure(positions: str, size: int, steps: int) -> dict[str, float]:
    """Median seconds of a step and peak memory above the bare process (MB), in this process."""
    model = mv.create_model("mvitv2_t_224", crop_size=size, **POSITIONS[positions])
    clips = torch.randn(1, 3, 1, size, size)
    bare = resident("VmRSS")
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        model(clips).sum().backward()
        model.zero_grad()
        seconds.append(time.perf_counter() - start)
    peak = resident("VmHWM")
    return {"seconds": statistics.median(seconds[1:]), "megabytes": (peak - bare) / 1024}


def measured_apart(positions: str, size: int, steps: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--case", positions, str(size), str(steps)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[160, 224, 320])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        positions, size, steps = arguments.case
        print(json.dumps(measure(positions, int(size), int(steps))))
        return
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| pixels | none | decomposed | joint | joint / decomposed |")
    print("|---|---|---|---|---|")
    for size in arguments.sizes:
        rounds = [
            {name: measured_apart(name, size, 2) for name in POSITIONS} for _ in range(arguments.rounds)
        ]
        found = {
            name: {key: statistics.median(r[name][key] for r in rounds) for key in ("seconds", "megabytes")}
            for name in POSITIONS
        }
        cells = [f"{found[n]['seconds']:.2f} s, {found[n]['megabytes']:.0f} MB" for n in POSITIONS]
        ratios = [found["joint"][key] / found["decomposed"][key] for key in ("seconds", "megabytes")]
        cells.append("{:.1f}x, {:.1f}x".format(*ratios))
        print(f"| {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
