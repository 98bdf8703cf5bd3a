"""Make a small data set of objects to detect: textured polygons over cloudy backgrounds, in COCO's form.

Objects overlap, have several sizes and are cut by the border; the outline alone tells the class. The same
seed gives the same files.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

CLASSES = ("triangle", "star", "disc")
HEIGHT, WIDTH = 96, 128  # pixels
VISIBLE = 0.5  # share of an object that others leave
CONTRAST = 60.0  # of an object's mean colour to what is behind it, grey levels of one channel at least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--train", type=int, default=1500, help="images")
    parser.add_argument("--val", type=int, default=100, help="images")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for split, count in (("train", arguments.train), ("val", arguments.val)):
        generate(arguments.root, split, count, seed=arguments.seed)


def generate(root: Path, split: str, count: int, *, seed: int = 0) -> None:
    """Write ``root/<split>/*.png`` and ``root/annotations/<split>.json``."""
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        rng = random.Random(f"{seed} {split} {number}")
        image, objects = draw(rng)
        name = f"{number:05d}.png"
        image.save(root / split / name)
        images.append({"id": number + 1, "file_name": name, "height": HEIGHT, "width": WIDTH})
        for label, polygon in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": label + 1,
                    **_fields(polygon),
                }
            )
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"{split}.json").write_text(json.dumps(content))


def draw(rng: random.Random) -> tuple[Image.Image, list[tuple[int, NDArray[np.float64]]]]:
    """An image, and the class and outline (points, 2) of each object."""
    noise = np.random.default_rng(rng.getrandbits(32))
    # As in photos, the coarser the structure, the stronger it is.
    canvas = sum(_texture(noise, coarse, contrast) for coarse, contrast in ((40, 35.0), (14, 18.0), (5, 8.0)))
    canvas = canvas + noise.uniform(70, 185, 3)
    owner = np.full((HEIGHT, WIDTH), -1)  # the object on top
    drawn: list[tuple[int, NDArray[np.float64]]] = []
    sizes: list[int] = []  # pixels of each object, seen or hidden
    for _ in range(rng.randint(2, 6)):
        label = rng.randrange(len(CLASSES))
        radius = 2 ** rng.uniform(3.7, 5.0)
        outline = _outline(CLASSES[label], rng.uniform(0, 2 * math.pi)) * radius
        outline += [rng.uniform(radius / 2, WIDTH - radius / 2), rng.uniform(radius / 2, HEIGHT - radius / 2)]
        mask = _filled(outline)
        covered = np.where(mask, len(drawn), owner)
        if any((covered == number).sum() < VISIBLE * size for number, size in enumerate(sizes)):
            continue  # it would hide another
        owner = covered
        texture = _texture(noise, coarse=rng.randint(2, 6), contrast=20.0)
        behind, colour = canvas[mask].mean(0), noise.uniform(40, 215, 3)
        while np.abs(colour - behind).max() < CONTRAST:
            colour = noise.uniform(40, 215, 3)
        canvas = np.where(mask[..., None], texture + colour, canvas)
        drawn.append((label, outline))
        sizes.append(int(mask.sum()))
    pixels = np.rint(canvas + noise.normal(0, 4, canvas.shape))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), drawn


def _outline(name: str, turn: float) -> NDArray[np.float64]:
    """Corners (points, 2) of a shape in a circle of radius 1."""
    corners = {"triangle": 3, "star": 10, "disc": 24}[name]
    angles = turn + np.arange(corners) * 2 * math.pi / corners
    radii = np.where(np.arange(corners) % 2, 0.45, 1.0) if name == "star" else np.ones(corners)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]


def _texture(noise: np.random.Generator, coarse: int, contrast: float) -> NDArray[np.float64]:
    """Spots of about ``coarse`` pixels, mostly in brightness, (HEIGHT, WIDTH, 3) of mean 0."""
    shape = max(HEIGHT // coarse, 2), max(WIDTH // coarse, 2)
    small = noise.normal(0, contrast, (*shape, 1)) + noise.normal(0, contrast / 2, (*shape, 3))
    channels = [Image.fromarray(channel) for channel in small.astype(np.float32).transpose(2, 0, 1)]
    resized = [channel.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC) for channel in channels]
    return np.stack([np.asarray(channel, dtype=np.float64) for channel in resized], 2)


def _filled(outline: NDArray[np.float64]) -> NDArray[np.bool_]:
    picture = Image.new("1", (WIDTH, HEIGHT))
    ImageDraw.Draw(picture).polygon([(x, y) for x, y in outline.tolist()], fill=1)
    return np.asarray(picture)


def _fields(outline: NDArray[np.float64]) -> dict[str, Any]:
    """Segmentation, box and area of an outline, clipped to the image."""
    low, high = outline.min(0).clip(min=0), outline.max(0).clip(max=[WIDTH, HEIGHT])
    return {
        "segmentation": [np.round(outline.clip([0, 0], [WIDTH, HEIGHT]), 2).ravel().tolist()],
        "bbox": np.round([*low, *(high - low)], 2).tolist(),
        "area": int(_filled(outline).sum()),
        "iscrowd": 0,
    }


if __name__ == "__main__":
    main()
