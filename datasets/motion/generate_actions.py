"""Write films with several moving things in one picture, each with its own motion, and where each of them is.

A thing is a class of its own (``generate.MOTIONS``), its box is known, and the box files have AVA's form:
``root/videos/*.mp4``, ``root/{train,val}.csv``, ``root/classes.txt``. What the picture as a whole shows says
nothing of one thing, and neither does one frame: where things are at the key frame, and how large, is drawn
without looking at the class.
"""

from __future__ import annotations

import argparse
import json
import math
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import generate
import numpy as np
import torch
from generate import CLASSES, MOTIONS, SHAPES, SPLITS, TEXTURES, FloatArray, Thing
from numpy.typing import NDArray

FPS = Fraction(30)
NUM_FRAMES = 64
KEY_SECOND = 1  # of a film, whose boxes are written
PHASES = (0.2, 0.5)  # on the size circle at the key frame
MARGIN = 0.02  # between two things at the key frame, and to the border, in sides of the picture


class MovingThing(NamedTuple):
    thing: Thing
    velocity: tuple[float, float, float, float]  # a second: x and y in pixels, radians, phase
    class_id: int  # from 1
    box: tuple[float, float, float, float]  # at the key frame, shares of the picture


def generate_actions(
    root: str | Path,
    *,
    train: int = 800,
    val: int = 120,
    things: int = 3,
    seed: int = 0,
    size: int = 96,
    workers: int | None = None,
) -> None:
    """Write ``train`` and ``val`` square films of ``size`` pixels with so many ``things`` in each.

    The pixels depend on the arguments only. Files that are there from the same arguments stay. Raises
    FileExistsError where ``root`` has videos that aren't ours.
    """
    root = Path(root)
    arguments = {"train": train, "val": val, "things": things, "seed": seed, "size": size}
    note = root / "actions.json"
    if (root / "videos").exists():
        if note.exists() and json.loads(note.read_text()) == arguments:
            return
        raise FileExistsError(
            f"{root / 'videos'} exists, of other arguments or other work: choose another root"
        )
    (root / "videos").mkdir(parents=True)
    jobs = [
        (split, index) for split, count in zip(SPLITS, (train, val), strict=True) for index in range(count)
    ]

    def make(job: tuple[str, int]) -> list[str]:
        split, index = job
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        moving = plan_things(rng, split, things, size)
        name = f"{split}_{index:04d}"
        generate.write_mp4(root / "videos" / f"{name}.mp4", render(rng, moving, size), FPS)
        boxes = (",".join(f"{value:.3f}" for value in one.box) for one in moving)
        rows = zip(boxes, moving, strict=True)
        return [f"{name},{KEY_SECOND},{box},{one.class_id},{k}" for k, (box, one) in enumerate(rows)]

    torch_threads = torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        rows = list(pool.map(make, jobs))
    torch.set_num_threads(torch_threads)
    for split in SPLITS:
        lines = [line for (of, _), film in zip(jobs, rows, strict=True) if of == split for line in film]
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    note.write_text(json.dumps(arguments))


def plan_things(rng: np.random.Generator, split: str, count: int, size: int) -> list[MovingThing]:
    """Things that don't touch at the key frame, each of a class that is drawn by itself."""
    while True:
        phases = rng.uniform(*PHASES, size=count)
        radii = generate.SMALLEST_RADIUS * generate.SIZE_RANGE**phases
        centres = rng.uniform(radii[:, None] + MARGIN, 1 - radii[:, None] - MARGIN, size=(count, 2))
        gaps = np.abs(centres[:, None] - centres[None]).max(2) - (radii[:, None] + radii[None])
        if (gaps + 9 * np.eye(count) > MARGIN).all():
            break
    return [
        _plan_thing(rng, split, size, centre, phase)
        for centre, phase in zip(centres, phases.tolist(), strict=True)
    ]


def _plan_thing(
    rng: np.random.Generator, split: str, size: int, centre: FloatArray, phase: float
) -> MovingThing:
    class_id = int(rng.integers(len(CLASSES))) + 1
    motion = MOTIONS[CLASSES[class_id - 1]]
    velocity = (
        motion.x * size * rng.uniform(*generate.SHIFT_SPEED),
        motion.y * size * rng.uniform(*generate.SHIFT_SPEED),
        motion.turn * math.radians(rng.uniform(*generate.TURN_SPEED)),
        motion.grow * math.log(rng.uniform(*generate.GROWTH)) / math.log(generate.SIZE_RANGE),
    )
    looks = [
        (shape, texture)
        for i, shape in enumerate(SHAPES)
        for j, texture in enumerate(TEXTURES)
        if ((i + j) % len(TEXTURES) == 0) == (split == "val")  # val: pairs that training never shows
        and shape != "disc"  # which may look the same whatever its angle
    ]
    shape, texture = looks[rng.integers(len(looks))]
    x, y = centre.tolist()
    thing = Thing(
        sprite=generate._draw_sprite(rng, shape, texture, size // 2),
        x=x - velocity[0] * KEY_SECOND / size,
        y=y - velocity[1] * KEY_SECOND / size,
        angle=rng.uniform(0, 2 * math.pi),
        phase=(phase - velocity[3] * KEY_SECOND) % 1,
    )
    radius = generate.SMALLEST_RADIUS * generate.SIZE_RANGE**phase
    return MovingThing(thing, velocity, class_id, (x - radius, y - radius, x + radius, y + radius))


def render(rng: np.random.Generator, moving: list[MovingThing], size: int) -> NDArray[np.uint8]:
    """The frames of a film: (T, H, W, 3)."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    background = generate._paint(rng, TEXTURES[rng.integers(len(TEXTURES))], x, y, value=(0.1, 0.4))
    canvas = torch.from_numpy(background).repeat(NUM_FRAMES, 1, 1, 1)
    seconds = torch.arange(NUM_FRAMES) / float(FPS)
    for part, times in zip(canvas.split(16), seconds.split(16), strict=True):
        for one in moving:
            generate._draw(part, one.thing, one.velocity, times)
    pixels: NDArray[np.uint8] = (canvas * 255 + 0.5).clamp_(0, 255).to(torch.uint8).numpy()
    return pixels


def main() -> None:
    parser = argparse.ArgumentParser(description="Write films of several things, each with its own motion.")
    parser.add_argument("--root", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=800, help="films to train on")
    parser.add_argument("--val", type=int, default=120, help="films to validate on")
    parser.add_argument("--things", type=int, default=3, help="in each film")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=96, help="pixels, even")
    parser.add_argument("--workers", type=int, help="threads (default: one per core and four more)")
    arguments = vars(parser.parse_args())
    generate_actions(arguments.pop("root"), **arguments)


if __name__ == "__main__":
    main()
