"""Write the motion data set: h264 clips whose class is a movement and nothing else.

Every clip shows two or three textured things on a still, textured background. The class says which one
of their four properties changes with time, and in which direction: x, y, angle or size.

Note [One frame tells nothing]: x and y live on a torus (what leaves on the left comes back on the right),
angles on a circle, and sizes on a circle too (what has grown to the largest size fades out and comes back
as the smallest). All start uniformly distributed, whatever the class. A uniform phase on a circle stays
uniform under any constant velocity, so every frame of every class, the first and the last included, is a
draw from one and the same distribution; and as velocities come in opposite pairs, a clip of a class played
backwards is a clip of the opposite class, so frames in shuffled order can't tell the two apart either.
"""

import argparse
import colorsys
import json
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch.nn.functional import grid_sample

FloatArray = NDArray[np.float32]


class Motion(NamedTuple):
    """What changes with time, each -1, 0 or 1. y points down, so turn=1 is clockwise on the screen."""

    x: int = 0
    y: int = 0
    turn: int = 0
    grow: int = 0


MOTIONS = {
    "moving_left": Motion(x=-1),
    "moving_right": Motion(x=1),
    "moving_up": Motion(y=-1),
    "moving_down": Motion(y=1),
    "rotating_clockwise": Motion(turn=1),
    "rotating_counterclockwise": Motion(turn=-1),
    "growing": Motion(grow=1),
    "shrinking": Motion(grow=-1),
}
CLASSES = tuple(MOTIONS)
SPLITS = ("train", "val")

SHAPES = ("disc", "square", "bar", "triangle", "star")
TEXTURES = ("stripes", "checks", "gradient", "halves", "noise")
FRAME_RATES = (
    Fraction(12), Fraction(15), Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30), Fraction(50),
)  # fmt: skip
ASPECTS = ((1, 1), (1, 1), (3, 4), (4, 3), (9, 16))  # height : width
SECONDS = (1.5, 4.0)
SHIFT_SPEED = (0.25, 0.5)  # short sides a second
TURN_SPEED = (90.0, 180.0)  # degrees a second
GROWTH = (1.5, 2.0)  # factor a second
SMALLEST_RADIUS, SIZE_RANGE = 0.12, 3.0  # of the short side; largest radius / smallest radius
FADE = 0.15  # part of the size circle over which things fade in, and out

FORMAT = 1  # raise it when the same arguments give other pixels


@dataclass(frozen=True)
class Thing:
    sprite: FloatArray  # (4, S, S), premultiplied RGB and alpha; spans -1..1 in units of the radius
    x: float  # start, in units of the picture's width
    y: float  # start, in units of its height
    angle: float  # start, radians
    phase: float  # start on the size circle, 0..1


@dataclass(frozen=True)
class Clip:
    fps: Fraction
    num_frames: int
    background: FloatArray  # (H, W, 3) in 0..1
    things: tuple[Thing, ...]
    velocity: tuple[float, float, float, float]  # a second: x and y in pixels, radians, phase


def generate(
    root: str | Path,
    *,
    train_per_class: int = 60,
    val_per_class: int = 16,
    seed: int = 0,
    size: int = 96,
    workers: int | None = None,
) -> None:
    """Write ``root/{train,val}/<class>/<id>.mp4``; files already there from the same arguments are kept.

    ``size`` is the short side in pixels. The pixels depend on the arguments only, never on ``workers``
    (threads; None: one per core). Raises ValueError for sizes and counts that make no sense, and
    FileExistsError where ``root`` has a train or val folder that isn't ours.
    """
    root = Path(root)
    if size < 32 or size % 2:
        raise ValueError(f"size={size}: the short side must be an even number of pixels, 32 or more")
    if min(train_per_class, val_per_class) < 1:
        raise ValueError(f"{train_per_class=}, {val_per_class=}: each class needs at least one of both")
    counts = (train_per_class, val_per_class)
    arguments = {
        "train_per_class": train_per_class,
        "val_per_class": val_per_class,
        "seed": seed,
        "size": size,
    }
    _claim(root, {"format": FORMAT, **arguments, "classes": list(CLASSES)})

    jobs = {
        root / split / name / f"{index:04d}.mp4": (split, name, index)
        for split, count in zip(SPLITS, counts, strict=True)
        for name in CLASSES
        for index in range(count)
    }
    missing = [path for path in jobs if not path.exists()]
    console = Console(stderr=True)
    if not missing:
        console.print(f"{root}: all {len(jobs)} clips are there, nothing to do")
        return
    for folder in {path.parent for path in missing}:
        folder.mkdir(parents=True, exist_ok=True)

    def make(path: Path) -> None:
        split, name, index = jobs[path]
        clip = plan_clip(split, name, index, seed=seed, size=size)
        write_mp4(path, render(clip), clip.fps)

    torch_threads = torch.get_num_threads()
    with ThreadPoolExecutor(
        workers or os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        done = pool.map(make, missing)
        for _ in track(done, f"clips to {root}", total=len(missing), console=console):
            pass
    torch.set_num_threads(torch_threads)


def _claim(root: Path, description: dict[str, Any]) -> None:
    note = root / "motion.json"
    folders = [root / split for split in SPLITS if (root / split).exists()]
    if note.exists():
        if json.loads(note.read_text()) == description:
            return
        for folder in folders:  # ours, from other arguments
            shutil.rmtree(folder)
    elif folders:
        raise FileExistsError(f"{folders[0]} exists, but no {note}: choose another root, or move it away")
    root.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(description, indent=2) + "\n")


def plan_clip(split: str, name: str, index: int, *, seed: int, size: int) -> Clip:
    """Draw everything a clip shows. The class ``name`` decides which speeds count and their signs, only."""
    rng = np.random.default_rng([seed, SPLITS.index(split), CLASSES.index(name), index])
    fps = FRAME_RATES[rng.integers(len(FRAME_RATES))]
    num_frames = round(rng.uniform(*SECONDS) * fps)
    tall, wide = ASPECTS[rng.integers(len(ASPECTS))]
    height, width = (2 * round(size * side / min(tall, wide) / 2) for side in (tall, wide))

    speeds = (
        size * rng.uniform(*SHIFT_SPEED),
        size * rng.uniform(*SHIFT_SPEED),
        math.radians(rng.uniform(*TURN_SPEED)),
        math.log(rng.uniform(*GROWTH)) / math.log(SIZE_RANGE),
    )
    vx, vy, turn, grow = (sign * speed for sign, speed in zip(MOTIONS[name], speeds, strict=True))

    y, x = np.mgrid[:height, :width].astype(np.float32) / size
    background = _paint(rng, TEXTURES[rng.integers(len(TEXTURES))], x, y, value=(0.1, 0.4))
    return Clip(fps, num_frames, background, tuple(_plan_things(rng, split, size // 2)), (vx, vy, turn, grow))


def _plan_things(rng: np.random.Generator, split: str, sprite_size: int) -> Iterator[Thing]:
    looks = [
        (shape, texture)
        for i, shape in enumerate(SHAPES)
        for j, texture in enumerate(TEXTURES)
        if ((i + j) % len(TEXTURES) == 0) == (split == "val")  # val: pairs that training never shows
    ]
    count = int(rng.integers(2, 4))
    x, y, phase = rng.uniform(size=3)  # where the group is on its circles; members are spread around it
    rows = rng.permutation(count)
    for k in range(count):
        shape, texture = looks[rng.integers(len(looks))]
        jitter_x, jitter_y = rng.uniform(-0.15, 0.15, size=2) / count
        yield Thing(
            sprite=_draw_sprite(rng, shape, texture, sprite_size),
            x=x + k / count + jitter_x,
            y=y + rows[k] / count + jitter_y,
            angle=rng.uniform(0, 2 * math.pi),
            phase=phase + k / count,
        )


def _draw_sprite(rng: np.random.Generator, shape: str, texture: str, size: int) -> FloatArray:
    axis = ((np.arange(2 * size) + 0.5) / size - 1).astype(np.float32)  # twice the size, averaged below
    y, x = axis[:, None], axis[None, :]
    alpha = _inside(shape, x, y).astype(np.float32)[..., None]
    colour = _paint(rng, texture, *np.broadcast_arrays(x, y), value=(0.55, 1.0))
    rgba = np.concatenate([colour * alpha, alpha], axis=-1)  # (2S, 2S, 4)
    sprite: FloatArray = rgba.reshape(size, 2, size, 2, 4).mean(axis=(1, 3), dtype=np.float32)
    return sprite.transpose(2, 0, 1)


def _inside(shape: str, x: FloatArray, y: FloatArray) -> Any:
    if shape == "disc":
        return np.hypot(x, y) < 0.9
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.68
    if shape == "bar":
        return np.maximum(abs(x), 2 * abs(y)) < 0.88
    if shape == "triangle":
        return np.maximum(y, math.sqrt(0.75) * abs(x) - 0.5 * y) < 0.48
    if shape == "star":
        return np.hypot(x, y) < 0.66 + 0.3 * np.cos(5 * np.arctan2(x, y))
    raise ValueError(f"shape={shape!r}: know {SHAPES}")


def _paint(
    rng: np.random.Generator, texture: str, x: FloatArray, y: FloatArray, *, value: tuple[float, float]
) -> FloatArray:
    """Two colours, one dark and one bright within ``value``, mixed by a texture: (H, W) -> (H, W, 3)."""
    angle, wave = rng.uniform(0, 2 * math.pi), 2 * math.pi / rng.uniform(0.9, 1.5)
    u, v = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    mix: Any
    if texture == "stripes":
        mix = 0.5 + 0.5 * np.sin(wave * u)
    elif texture == "checks":
        mix = np.sin(wave * u) * np.sin(wave * v) > 0
    elif texture == "gradient":
        mix = (u - u.min()) / (u.max() - u.min())
    elif texture == "halves":
        mix = u > u.mean()
    elif texture == "noise":
        waves = rng.normal(scale=4, size=(5, 2)), rng.uniform(0, 2 * math.pi, size=5)
        mix = 0.5 + 0.25 * sum(np.sin(a * x + b * y + start) for (a, b), start in zip(*waves, strict=True))
        mix = mix.clip(0, 1)
    else:
        raise ValueError(f"texture={texture!r}: know {TEXTURES}")
    low, high = value
    colours = (
        colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.3, 0.9), low + part * (high - low))
        for part in (rng.uniform(0, 0.25), rng.uniform(0.75, 1))
    )
    dark, bright = (np.array(colour, np.float32) for colour in colours)
    painted: FloatArray = dark + mix[..., None].astype(np.float32) * (bright - dark)
    return painted


def render(clip: Clip) -> NDArray[np.uint8]:
    """The frames of a planned clip: (T, H, W, 3)."""
    canvas = torch.from_numpy(clip.background).repeat(clip.num_frames, 1, 1, 1)
    seconds = torch.arange(clip.num_frames) / float(clip.fps)
    few = 16  # frames at a time: what fits a core's cache
    for part, times in zip(torch.split(canvas, few), torch.split(seconds, few), strict=True):
        for thing in clip.things:
            _draw(part, thing, clip.velocity, times)
    pixels: NDArray[np.uint8] = (canvas * 255 + 0.5).clamp_(0, 255).to(torch.uint8).numpy()
    return pixels


def _draw(
    canvas: torch.Tensor, thing: Thing, velocity: tuple[float, float, float, float], seconds: torch.Tensor
) -> None:
    num_frames, height, width, _ = canvas.shape
    short = min(height, width)
    vx, vy, turn, grow = velocity
    x, y = thing.x * width + vx * seconds, thing.y * height + vy * seconds
    angle = thing.angle + turn * seconds
    phase = (thing.phase + grow * seconds) % 1
    radius = short * SMALLEST_RADIUS * SIZE_RANGE**phase
    alpha = (torch.minimum(phase, 1 - phase) / FADE).clamp(max=1)

    # A window of P x P whole pixels around the centre; the fraction of a pixel goes into the sampling.
    window = min(short, 2 * math.ceil(float(radius.max())) + 2)
    left, top = (x - window / 2).floor(), (y - window / 2).floor()
    pixel = torch.arange(window)
    dx = left[:, None, None] + pixel + 0.5 - x[:, None, None]  # (T, 1, P)
    dy = top[:, None, None] + pixel[:, None] + 0.5 - y[:, None, None]  # (T, P, 1)
    cos, sin = ((f(angle) / radius)[:, None, None] for f in (torch.cos, torch.sin))
    grid = torch.stack([cos * dx + sin * dy, cos * dy - sin * dx], dim=-1)  # (T, P, P, 2)
    sprite = torch.from_numpy(thing.sprite).expand(num_frames, -1, -1, -1)
    rgba = grid_sample(sprite, grid, align_corners=False).permute(0, 2, 3, 1) * alpha[:, None, None, None]

    frame = torch.arange(num_frames)[:, None, None]
    rows = ((top[:, None].long() + pixel) % height)[:, :, None]
    cols = ((left[:, None].long() + pixel) % width)[:, None, :]
    where = ((frame * height + rows) * width + cols).flatten()  # (T*P*P,), which pixel of the canvas
    flat = canvas.view(-1, 3)
    rgba = rgba.reshape(-1, 4)
    flat.index_copy_(0, where, torch.addcmul(rgba[:, :3], flat.index_select(0, where), 1 - rgba[:, 3:]))


def write_mp4(path: Path, frames: NDArray[np.uint8], fps: Fraction) -> None:
    """h264, yuv420p, with x264's own choice of B-frames and key frames; ``path`` appears when complete."""
    part = path.with_suffix(".part")
    with av.open(str(part), "w", format="mp4") as container:
        # x264's macroblock tree makes other bytes at every run where pictures are this small.
        options = {"preset": "veryfast", "crf": "18", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the motion data set: classes differ by motion alone.")
    parser.add_argument("--root", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train-per-class", type=int, default=60, help="training clips a class")
    parser.add_argument("--val-per-class", type=int, default=16, help="validation clips a class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=96, help="short side in pixels, even")
    parser.add_argument("--workers", type=int, help="threads (default: one per core)")
    generate(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
