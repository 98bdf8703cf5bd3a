"""Which parts of a clip are hidden: bool (T, H, W) over a coarse grid, True where masked.

A mask follows from its ``random.Random`` alone. Cuboids, whole frames and tubes are those of MaskFeat
(arXiv 2112.09133, section 4.3), drawn as in facebookresearch/SlowFast at 287ec007,
``datasets/transform.py``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mvit_video.model.config import Grid

_MAX_ASPECT = 1 / 0.3  # of height to width, or of width to height


def cube_mask(rng: random.Random, window: Grid, ratio: float) -> Tensor:
    """Cuboids that may overlap, until no further one fits into what is left of ``ratio``.

    Args:
        window: cells of a clip along time, height and width.
        ratio: share of the cells that is masked at the most; 40 % come out at 39.7 % on average.

    Raises:
        ValueError: the ratio isn't above 0 and below 1, or the window has no cells.
    """
    goal = _goal(math.prod(window), ratio, window)
    frames, height, width = window
    mask = torch.zeros(window, dtype=torch.bool)

    def propose(_: int) -> Tensor | None:
        h, w = _rectangle(rng, height * width // 5, height * width)
        t = rng.randint(1, frames)
        if h >= height or w >= width:
            return None
        top, side = rng.randint(0, height - h), rng.randint(0, width - w)
        start = rng.randint(0, frames - t)
        return mask[start : start + t, top : top + h, side : side + w]

    _fill(propose, goal, tries=100)
    return mask


def _fill(propose: Callable[[int], Tensor | None], left: int, *, tries: int) -> None:
    """Mask parts that are proposed for ``left`` cells, as long as one of ``tries`` has new cells and fits."""
    while left > 0:
        for _ in range(tries):
            part = propose(left)
            new = 0 if part is None else part.numel() - int(part.sum())
            if part is not None and 0 < new <= left:
                part.fill_(True)
                left -= new
                break
        else:
            return


def frame_mask(rng: random.Random, window: Grid, ratio: float) -> Tensor:
    """Whole frames; arguments and errors as of ``cube_mask``."""
    mask = torch.zeros(window, dtype=torch.bool)
    mask[rng.sample(range(window[0]), _goal(window[0], ratio, window))] = True
    return mask


def tube_mask(rng: random.Random, window: Grid, ratio: float) -> Tensor:
    """The same rectangles in all frames; arguments and errors as of ``cube_mask``."""
    frames, height, width = window
    goal = _goal(height * width, ratio, window)
    mask = torch.zeros(height, width, dtype=torch.bool)

    def propose(left: int) -> Tensor | None:
        h, w = _rectangle(rng, goal // 5, left)
        if h >= height or w >= width:
            return None
        top, side = rng.randint(0, height - h), rng.randint(0, width - w)
        return mask[top : top + h, side : side + w]

    _fill(propose, goal, tries=10)
    return mask.expand(frames, -1, -1).clone()


@dataclass(frozen=True)
class Masking:
    """How the masks of a training are drawn.

    Attributes:
        kind: cuboids, whole frames, or the same rectangles in all frames.
        ratio: share of a clip that is masked.
        cell: side of a mask's cells in pixels; in time, a cell is a token.

    Raises:
        ValueError: a value is out of range.
    """

    kind: Literal["cube", "frame", "tube"] = "cube"
    ratio: float = 0.4
    cell: int = 32

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {self.kind!r}")
        if self.cell < 1:
            raise ValueError(f"cell must be at least 1 pixel, got {self.cell}")
        _goal(1, self.ratio, (1, 1, 1))

    def window(self, clip_frames: int, crop: int, patch_frames: int) -> Grid:
        """Cells along time, height and width.

        Args:
            clip_frames, crop: frames and side (pixels) of a clip.
            patch_frames: frames from token to token.

        Raises:
            ValueError: the cells don't divide the crop, or are too few.
        """
        side = crop // self.cell
        if crop % self.cell or side < 2:
            raise ValueError(
                f"cells of {self.cell} pixels don't divide a crop of {crop} evenly into two or more"
            )
        return clip_frames // patch_frames, side, side

    def draw(self, rng: random.Random, window: Grid) -> Tensor:
        """bool (T, H, W), True where masked."""
        return _KINDS[self.kind](rng, window, self.ratio)


_KINDS = {"cube": cube_mask, "frame": frame_mask, "tube": tube_mask}


def _goal(cells: int, ratio: float, window: Grid) -> int:
    if len(window) != 3 or min(window) < 1:
        raise ValueError(f"window must be three positive numbers (T, H, W), got {window}")
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must be above 0 and below 1, got {ratio}")
    return round(cells * ratio)


def _rectangle(rng: random.Random, least_area: float, most_area: float) -> tuple[int, int]:
    """Height and width of a rectangle of random area and aspect."""
    area = rng.uniform(least_area, most_area)
    aspect = math.exp(rng.uniform(-math.log(_MAX_ASPECT), math.log(_MAX_ASPECT)))
    return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
