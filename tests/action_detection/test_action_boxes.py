"""Key frames and moving boxes against PySlowFast's figures (287ec007)."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvit_video.action_detection import key_frame_indices
from mvit_video.action_detection.boxes import (
    clip_boxes,
    clip_view,
    flip_boxes,
    move_boxes,
    resize_boxes,
    to_pixels,
)
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


@pytest.mark.parametrize(
    "case",
    [case for case in BOXES["pipeline"] if "force" not in case["options"]],
    ids=lambda case: case["tag"],
)
def test_boxes_go_where_the_pixels_go(case: dict[str, Any]) -> None:
    height, width, crop = case["height"], case["width"], case["crop_size"]
    spec = ClipSpec(short_side=crop, crop=crop)
    view, size = clip_view(height, width, spec, case["split"], rng=NumpyRandom(case["numpy_seed"]))
    boxes = torch.tensor(case["boxes_in_0_1"], dtype=torch.float64)
    expected = case["backends"]["cv2"]
    assert [3, case["frames"], *size] == expected["image_shape_CTHW"]
    found = move_boxes(boxes, height, width, view, size)
    torch.testing.assert_close(found, torch.tensor(expected["boxes"], dtype=torch.float64), atol=1e-5, rtol=0)


def test_short_side_range_below_the_crop_are_refused() -> None:
    with pytest.raises(ConfigError, match="short_side_range"):
        clip_view(90, 120, ClipSpec(), "train", short_side_range=(200, 250), rng=random.Random(0))


@pytest.mark.parametrize("name", ["half_length", "stride", "num_frames"])
def test_lengths_are_positive(name: str) -> None:
    lengths = {"half_length": 32, "stride": 4, "num_frames": 90} | {name: 0}
    with pytest.raises(ValueError, match=name):
        key_frame_indices(60, **lengths)
