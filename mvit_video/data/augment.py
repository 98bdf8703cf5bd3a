"""Random changes to a training clip, the same for all its frames, from a `random.Random` alone.

RandAugment's operations are Pillow's, as in the official recipe and in timm: torchvision's on tensors round
and interpolate differently. They run on the CPU, on bytes; everything else runs where the frames are.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from mvit_video.data.pixels import RGB, PendingClips, cut, cut_and_resize, normalise, resize_bytes
from mvit_video.data.sampling import CropBox, SpatialView, random_resized_crop, random_short_side_crop


class RandAugment(NamedTuple):
    """Draws ``operations`` and applies each with ``probability``, at a normally distributed magnitude."""

    magnitude: float
    operations: int
    std: float = 0.0
    probability: float = 0.5


Colour = tuple[int, int, int]  # red, green, blue, 0 to 255

# Picture, level in [0, 1], sign, what to show beyond the border -> picture.
Operation = Callable[[Image.Image, float, float, Colour], Image.Image]


@dataclass(frozen=True)
class Augment:
    """How training clips are varied.

    Attributes:
        short_side: frames are first resized to this short side (pixels); None: they stay as decoded.
        rand_augment: in timm's notation, for example "rand-m7-n4-mstd0.5-inc1"; None: off.
        fill: red, green and blue (0 to 255) that RandAugment's geometric operations show beyond the border.
        bgr: RandAugment sees red and blue swapped, as with the official loader for Something-Something.
        colour_jitter: brightness, contrast and saturation change by factors of at most 1 +- this.
        crop_first: cut the box out and resize it before RandAugment, on bytes, bicubic, as image recipes do.
        area, aspect: share of the picture's area, and width / height, of the box that is cut out.
        short_side_range: instead of such a box, resize the short side to one of these pixels, ends included,
            and cut a square of the model's size.
        flip_probability: of mirroring left and right.
        erase_probability: of replacing a box by noise, in ``erase_count`` boxes at most.
        repeats: clips made of each video that is decoded; a batch holds that many clips a video.

    Raises:
        ValueError: a value is out of range or can't be understood.
    """

    short_side: int | None = None
    rand_augment: str | None = None
    fill: Colour = (128, 128, 128)
    bgr: bool = False
    colour_jitter: float = 0.0
    crop_first: bool = False
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    short_side_range: tuple[int, int] | None = None
    flip_probability: float = 0.5
    erase_probability: float = 0.0
    erase_count: int = 1
    repeats: int = 1

    def __post_init__(self) -> None:
        for name in ("area", "aspect", "short_side_range", "fill"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        if self.rand_augment is not None:
            parse_rand_augment(self.rand_augment)
        sides = self.short_side_range
        rules = {
            "short_side must be at least 1 pixel": self.short_side is None or self.short_side >= 1,
            "colour_jitter must be in [0, 1]": 0 <= self.colour_jitter <= 1,
            "erase_probability must be in [0, 1]": 0 <= self.erase_probability <= 1,
            "erase_count must be at least 1": self.erase_count >= 1,
            "repeats must be at least 1": self.repeats >= 1,
            "short_side_range must be two sizes in order": sides is None or 0 < sides[0] <= sides[1],
            "crop_first cuts boxes out, it doesn't go with short_side_range": not (self.crop_first and sides),
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"{rule}, got {getattr(self, rule.split()[0])}")
        # Any plan checks the ranges: find a bad one before data are read.
        _spatial_view(8, 8, 1, self, random.Random(0))


@dataclass(frozen=True)
class _Finish:
    """What is left to do with one version of a clip when its bytes are where the model is."""

    view: CropBox | SpatialView
    size: int
    mean: RGB
    std: RGB
    erased: list[CropBox]
    noise_seed: int

    def to_clip(self, frames: Tensor) -> Tensor:
        return self.erase(self.to_floats(frames))

    def to_floats(self, frames: Tensor) -> Tensor:
        return normalise(cut_and_resize(frames, self.view, self.size), self.mean, self.std)

    def erase(self, frames: Tensor) -> Tensor:
        """Frames (T, 3, H, W) -> a clip (1, 3, T, H, W), with independent N(0, 1) noise in the boxes."""
        clip = frames.transpose(0, 1)[None].contiguous()
        if self.erased:
            generator = torch.Generator(clip.device).manual_seed(self.noise_seed)
            for box in self.erased:
                area = cut(clip, box)
                area.copy_(torch.randn(area.shape[1:], generator=generator, device=clip.device))
        return clip


class _Plan(NamedTuple):
    """The random choices for one version of a clip."""

    operations: list[tuple[Operation, float, float]]  # with level and sign
    colours: list[tuple[Callable[[Tensor, float], Tensor], float]]  # with factor
    finish: _Finish


class ClipAugmentation:
    """Makes ``augment.repeats`` training clips of the same frames, each with its own random choices.

    All is chosen when the size of the frames is known; after that each frame is by itself, so a decoder may
    hand over a few at a time (``Video.get_frames``) and need not hold the whole pictures of a clip. What
    comes after RandAugment (resizing a box, normalisation, erasing) is pending, unless the boxes' bytes are
    more than the floats that they are resized to.

    Args:
        size: pixels of the square that the model sees.
    """

    def __init__(self, augment: Augment, size: int, *, mean: RGB, std: RGB, rng: random.Random) -> None:
        self._augment, self._size, self._mean, self._std, self._rng = augment, size, mean, std, rng
        self._plans: list[_Plan] = []
        self._pending: list[tuple[_Finish, torch.Size]] = []  # of each version, with its pictures' shape

    def __call__(self, frames: Tensor) -> Tensor:
        """uint8 (n, 3, H, W) -> what ``to_clips`` takes, (n, ...)."""
        if self._augment.short_side is not None:
            sides = frames.shape[-2:]
            height, width = (side * self._augment.short_side // min(sides) for side in sides)
            frames = resize_bytes(frames, height, width, "bilinear")
        if not self._plans:
            height, width = frames.shape[-2:]
            self._plans = [self._draw_plan(height, width) for _ in range(self._augment.repeats)]
        changed = [self._change(plan, frames) for plan in self._plans]
        floats = 4 * 3 * self._size**2 * len(self._plans)  # bytes
        if sum(frames[0].numel() for frames, _ in changed) > floats:
            return torch.stack([finish.to_floats(frames) for frames, finish in changed], 1)
        self._pending = [(finish, frames.shape[1:]) for frames, finish in changed]
        # With the channels last, as they come.
        return torch.cat([frames.permute(0, 2, 3, 1).flatten(1) for frames, _ in changed], 1)

    def to_clips(self, frames: Tensor) -> list[PendingClips | Tensor]:
        """All frames of the clip, in order -> each version, (1, 3, T, size, size)."""
        if not self._pending:
            versions = zip(frames.unbind(1), self._plans, strict=True)
            return [plan.finish.erase(floats) for floats, plan in versions]
        parts = frames.split([shape.numel() for _, shape in self._pending], 1)
        return [  # a method, since Lightning looks into dataclasses and refuses frozen ones
            PendingClips(part.unflatten(1, (*sizes, 3)).permute(0, 3, 1, 2), finish.to_clip)
            for part, (finish, (_, *sizes)) in zip(parts, self._pending, strict=True)
        ]

    def _draw_plan(self, height: int, width: int) -> _Plan:
        augment, rng, size = self._augment, self._rng, self._size
        view = _spatial_view(height, width, size, augment, rng)
        operations = [] if augment.rand_augment is None else draw_operations(augment.rand_augment, rng)
        colours = _draw_colours(augment.colour_jitter, rng) if augment.colour_jitter else []
        boxes = random_erase_boxes(
            size, size, probability=augment.erase_probability, max_count=augment.erase_count, rng=rng
        )
        noise_seed = rng.getrandbits(63) if boxes else 0
        return _Plan(operations, colours, _Finish(view, size, self._mean, self._std, boxes, noise_seed))

    def _change(self, plan: _Plan, frames: Tensor) -> tuple[Tensor, _Finish]:
        """What is done to bytes, and what is left to do."""
        augment, view = self._augment, plan.finish.view
        if augment.crop_first and isinstance(view, CropBox):
            frames = resize_bytes(cut(frames, view), self._size, self._size, "bicubic")
            view = CropBox(0, 0, self._size, self._size, view.flip)
        if plan.operations:
            frames = frames.flip(1) if augment.bgr else frames
            frames = apply_operations(frames, plan.operations, augment.fill)
            frames = frames.flip(1) if augment.bgr else frames
        for change, factor in plan.colours:
            frames = change(frames, factor)
        if isinstance(view, CropBox):
            frames, view = cut(frames, view), replace(view, top=0, left=0)
        return frames, replace(plan.finish, view=view)


def _spatial_view(
    height: int, width: int, size: int, augment: Augment, rng: random.Random
) -> CropBox | SpatialView:
    flip, sides = augment.flip_probability, augment.short_side_range
    if sides is not None:
        return random_short_side_crop(
            height, width, short_sides=sides, crop=size, flip_probability=flip, rng=rng
        )
    return random_resized_crop(
        height, width, area=augment.area, aspect=augment.aspect, flip_probability=flip, rng=rng
    )


def parse_rand_augment(notation: str) -> RandAugment:
    """Read timm's notation: magnitude m, number of operations n, mstd, probability p, and inc1.

    Only the operations that grow with the magnitude (inc1) are there. Raises ValueError for anything else.
    """
    kind, *parts = notation.split("-")
    values: dict[str, float] = {"m": 10.0, "n": 2, "mstd": 0.0, "p": 0.5, "inc": 0}
    for part in parts:
        found = re.fullmatch(r"(m|n|mstd|p|inc)(\d+(?:\.\d+)?)", part)
        if found is None:
            raise ValueError(
                f"rand_augment is {notation!r}; {part!r} isn't understood, expected m, n, mstd, p or inc "
                "with a number, as in rand-m7-n4-mstd0.5-inc1"
            )
        values[found[1]] = float(found[2])
    if kind != "rand" or values["inc"] != 1:
        raise ValueError(f"rand_augment is {notation!r}; expected the form rand-m7-n4-mstd0.5-inc1")
    if values["m"] > 10 or values["p"] > 1 or values["n"] != int(values["n"]):
        raise ValueError(f"rand_augment is {notation!r}; m is at most 10, p at most 1, n a whole number")
    return RandAugment(values["m"], int(values["n"]), values["mstd"], values["p"])


def draw_operations(notation: str, rng: random.Random) -> list[tuple[Operation, float, float]]:
    """Operations drawn with replacement, each with the level in [0, 1] and the sign that all frames get."""
    settings = parse_rand_augment(notation)
    drawn = []
    for name in rng.choices(list(OPERATIONS), k=settings.operations):
        if rng.random() > settings.probability:
            continue
        magnitude = rng.gauss(settings.magnitude, settings.std) if settings.std else settings.magnitude
        level = min(max(magnitude, 0.0), 10.0) / 10.0
        drawn.append((OPERATIONS[name], level, rng.choice((-1.0, 1.0))))
    return drawn


def apply_operations(
    frames: Tensor, operations: Sequence[tuple[Operation, float, float]], fill: Colour = (128, 128, 128)
) -> Tensor:
    """Apply drawn operations to uint8 frames (N, 3, H, W).

    Args:
        fill: what geometric operations show beyond the border.
    """
    images = [Image.fromarray(frame) for frame in frames.permute(0, 2, 3, 1).contiguous().cpu().numpy()]
    for operation, level, sign in operations:
        images = [operation(image, level, sign, fill) for image in images]
    changed = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return changed.permute(0, 3, 1, 2).to(frames.device)


def _solarize_add(image: Image.Image, level: float, sign: float, fill: Colour) -> Image.Image:
    added = min(128, int(level * 110))
    return image.point([min(255, i + added) if i < 128 else i for i in range(256)] * 3)


def _enhancing(kind: type[Any]) -> Operation:
    return lambda image, level, sign, fill: kind(image).enhance(max(0.1, 1.0 + sign * (level * 0.9)))


def _moving(matrix: Callable[[Image.Image, float], tuple[float, ...]]) -> Operation:
    """Pixel (x, y) becomes the one at (a x + b y + c, d x + e y + f) of the picture."""

    def move(image: Image.Image, level: float, sign: float, fill: Colour) -> Image.Image:
        affine, bicubic = Image.Transform.AFFINE, Image.Resampling.BICUBIC
        return image.transform(image.size, affine, matrix(image, sign * level), bicubic, fillcolor=fill)

    return move


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda image, level, sign, fill: ImageOps.autocontrast(image),
    "Equalize": lambda image, level, sign, fill: ImageOps.equalize(image),
    "Invert": lambda image, level, sign, fill: ImageOps.invert(image),
    "Rotate": lambda image, level, sign, fill: image.rotate(
        sign * level * 30.0, Image.Resampling.BICUBIC, fillcolor=fill
    ),
    "PosterizeIncreasing": lambda image, level, sign, fill: ImageOps.posterize(image, 4 - int(level * 4)),
    "SolarizeIncreasing": lambda image, level, sign, fill: ImageOps.solarize(image, 256 - int(level * 256)),
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": _enhancing(ImageEnhance.Color),
    "ContrastIncreasing": _enhancing(ImageEnhance.Contrast),
    "BrightnessIncreasing": _enhancing(ImageEnhance.Brightness),
    "SharpnessIncreasing": _enhancing(ImageEnhance.Sharpness),
    "ShearX": _moving(lambda image, much: (1, much * 0.3, 0, 0, 1, 0)),
    "ShearY": _moving(lambda image, much: (1, 0, 0, much * 0.3, 1, 0)),
    "TranslateXRel": _moving(lambda image, much: (1, 0, much * 0.45 * image.width, 0, 1, 0)),
    "TranslateYRel": _moving(lambda image, much: (1, 0, 0, 0, 1, much * 0.45 * image.height)),
}


def _draw_colours(
    strength: float, rng: random.Random
) -> list[tuple[Callable[[Tensor, float], Tensor], float]]:
    """Changes of brightness, contrast and saturation in random order, with their factors."""
    from torchvision.transforms.v2 import functional as vision

    changes = [vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation]
    return [(change, rng.uniform(1 - strength, 1 + strength)) for change in rng.sample(changes, k=3)]


def random_erase_boxes(
    height: int, width: int, *, probability: float, max_count: int, rng: random.Random
) -> list[CropBox]:
    """The boxes of a picture that random erasing replaces, none with probability 1 - ``probability``.

    Together they cover 2 % to a third of the picture; height / width is 0.3 to 1 / 0.3, log-uniform. A box
    that doesn't fit is drawn again, a hundred times at most.
    """
    if rng.random() > probability:
        return []
    boxes = []
    count = rng.randint(1, max_count) if max_count > 1 else 1
    for _ in range(count):
        for _ in range(100):
            pixels = rng.uniform(0.02, 1 / 3) * height * width / count
            ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            box_height, box_width = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
            if box_height < height and box_width < width:
                top, left = rng.randint(0, height - box_height), rng.randint(0, width - box_width)
                boxes.append(CropBox(top, left, box_height, box_width))
                break
    return boxes
