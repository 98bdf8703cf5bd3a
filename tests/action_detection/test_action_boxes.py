"""Key frames and moving boxes against PySlowFast's figures (287ec007)."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import golden_weights
import numpy as np
import pytest
import torch

from mvit_video.action_detection import key_frame_indices
from mvit_video.action_detection.annotations import KeyFrame
from mvit_video.action_detection.boxes import (
    clip_boxes,
    clip_view,
    flip_boxes,
    move_boxes,
    resize_boxes,
    to_pixels,
)
from mvit_video.action_detection.clips import ActionAugment, Colours, read_clip
from mvit_video.data.pixels import finish_clips
from mvit_video.errors import ConfigError
from mvit_video.model import ClipSpec

REFERENCE = Path(__file__).parents[1] / "reference" / "ava"
BOXES = json.loads((REFERENCE / "boxes.json").read_text())
SEQUENCES = json.loads((REFERENCE / "sequences.json").read_text())["cases"]


@pytest.mark.parametrize("case", SEQUENCES, ids=lambda case: f"{case['center_idx']}-{case['half_len']}")
def test_key_frames(case: dict[str, Any]) -> None:
    indices = key_frame_indices(
        case["center_idx"],
        half_length=case["half_len"],
        stride=case["sample_rate"],
        num_frames=case["num_frames"],
    )
    assert indices == case["sequence"]


@pytest.mark.parametrize("case", BOXES["single"], ids=lambda case: f"{case['width']}x{case['height']}")
def test_single_steps(case: dict[str, Any]) -> None:
    height, width, size = case["height"], case["width"], case["size"]
    boxes = torch.tensor(case["boxes_in_0_1"], dtype=torch.float64)

    def is_near(found: torch.Tensor, name: str) -> bool:
        return bool((found - torch.tensor(case[name], dtype=torch.float64)).abs().max() < 1e-5)

    pixels = to_pixels(boxes, height, width)
    assert is_near(pixels, "clipped")
    resized = resize_boxes(pixels, height, width, size)
    assert is_near(resized, "scaled")
    flipped = flip_boxes(resized, case["scaled_width"])
    assert is_near(flipped, "flipped")
    shown = clip_boxes(flipped, case["scaled_height"], case["scaled_width"])
    assert is_near(shown, "flipped_then_clipped")


class NumpyRandom(random.Random):
    """The draws of a `random.Random` from numpy's generator, which made the figures."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.draws = np.random.RandomState(seed)

    def uniform(self, a: float, b: float) -> float:
        return self.draws.uniform(a, b)

    def randrange(self, start: int, *_: Any) -> int:  # type: ignore[override]
        return int(self.draws.randint(0, start))

    def random(self) -> float:
        return self.draws.uniform()

    def sample(self, population: Any, k: int, *_: Any) -> list[Any]:  # type: ignore[override]
        return [population[index] for index in self.draws.permutation(k)]

    def gauss(self, mu: float = 0.0, sigma: float = 1.0) -> float:
        return self.draws.normal(mu, sigma)


class Film:
    """Two frames: cells of 8 x 8 pixels, each of one colour."""

    path, times = "film", np.arange(2) / 30

    def __init__(self, height: int, width: int, tag: str) -> None:
        self.size = height, width
        cells = golden_weights.frames_u8(2, -(-height // 8), -(-width // 8), tag)
        bgr = cells.repeat(8, 1).repeat(8, 2)[:, :height, :width]
        self.frames = torch.from_numpy(bgr[..., ::-1].copy()).permute(0, 3, 1, 2)  # RGB

    def get_frames(self, indices: list[int], *, transform: Any = torch.clone) -> torch.Tensor:
        return transform(self.frames[indices])


@pytest.mark.parametrize("case", BOXES["pipeline"], ids=lambda case: case["tag"])
def test_boxes_and_pixels_are_the_official_ones(case: dict[str, Any]) -> None:
    height, width, crop, options = case["height"], case["width"], case["crop_size"], case["options"]
    spec = ClipSpec(short_side=crop, crop=crop, clip_frames=2, stride=1)
    augment = ActionAugment(
        short_side_range=options.get("jitter"),
        colour_jitter=0.4 * (not options.get("pca", True)),
        lighting=0.1 * options.get("color", False),
    )
    rng = NumpyRandom(case["numpy_seed"])
    sides = augment.short_side_range
    view, size = clip_view(height, width, spec, case["split"], short_side_range=sides, rng=rng)
    view = replace(view, flip=view.flip or options.get("force", False))
    boxes = torch.tensor(case["boxes_in_0_1"], dtype=torch.float64)
    expected = case["backends"]["cv2"]
    assert [3, case["frames"], *size] == expected["image_shape_CTHW"]
    found = move_boxes(boxes, height, width, view, size)
    torch.testing.assert_close(found, torch.tensor(expected["boxes"], dtype=torch.float64), atol=1e-5, rtol=0)

    film: Any = Film(height, width, case["tag"])
    frame = KeyFrame("film", "film", 1 / 30, 0.0, (), ())
    (clip,) = finish_clips(read_clip(film, frame, spec, view, size, Colours.draw(augment, rng)))
    clip = clip.flip(0) if options.get("bgr") else clip  # as it can be turned on there
    # There resized pixels are rounded, which the change of colours enlarges.
    near = 1.4 * 0.5 / 255 / 0.225 + 1e-3
    picked = clip.flatten()[expected["sample_index"]]
    torch.testing.assert_close(picked, torch.tensor(expected["sample"]), atol=near, rtol=0)
    assert clip.mean().item() == pytest.approx(expected["mean"], abs=1e-3)
    assert clip.std().item() == pytest.approx(expected["std"], abs=2e-3)
    assert clip.mean((1, 2, 3)).tolist() == pytest.approx(expected["channel_means"], abs=2e-3)


def test_short_side_range_below_the_crop_are_refused() -> None:
    with pytest.raises(ConfigError, match="short_side_range"):
        clip_view(90, 120, ClipSpec(), "train", short_side_range=(200, 250), rng=random.Random(0))


@pytest.mark.parametrize("name", ["half_length", "stride", "num_frames"])
def test_lengths_are_positive(name: str) -> None:
    lengths = {"half_length": 32, "stride": 4, "num_frames": 90} | {name: 0}
    with pytest.raises(ValueError, match=name):
        key_frame_indices(60, **lengths)
