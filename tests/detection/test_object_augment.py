"""Augmentation against detectron2's pixels, boxes and polygons (``configs/common/data`` at 02b5c4e2)."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import golden_weights_det as golden
import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from mvit_video.detection.augment import (
    LargeScaleJitter,
    MultiScale,
    Objects,
    jittered_size,
    shortest_edge,
)
from mvit_video.detection.masks import to_mask
from mvit_video.detection.roi_heads import Target

GOLDEN = json.loads((Path(__file__).parents[1] / "reference" / "detection" / "augmentation.json").read_text())


class Drawn(random.Random):
    """Numbers that were drawn before, whatever is asked for."""

    def __init__(self, *numbers: float) -> None:
        super().__init__()
        self._numbers = iter(numbers)

    def random(self) -> float:
        return next(self._numbers)

    def choice(self, seq: Any) -> Any:
        return next(self._numbers)

    def randint(self, a: int, b: int) -> int:
        return int(next(self._numbers))

    def uniform(self, a: float, b: float) -> float:
        return next(self._numbers)


def objects_of(height: int, width: int) -> Objects:
    boxes, labels, polygons = golden.targets(height, width)
    masks = [[np.asarray(part).reshape(-1, 2) for part in parts] for parts in polygons]
    image = Image.fromarray(golden.image_u8(height, width, "aug").transpose(1, 2, 0))
    return Objects(image, boxes.astype(np.float64), labels, masks)


def area(polygon: list[float]) -> float:
    x, y = np.array(polygon[::2]), np.array(polygon[1::2])
    return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2


def check(found: tuple[Tensor, Target], expected: dict[str, Any], boxes: str) -> None:
    image, target = found
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == expected["sha256"]
    np.testing.assert_allclose(target["boxes"].numpy(), expected[boxes], atol=1e-3)
    kept = [label for label, is_kept in zip((0, 17, 56, 79), expected["kept"], strict=True) if is_kept]
    assert target["labels"].tolist() == kept
    areas = [sum(area(part) for part in parts) for parts in target["masks"]]
    np.testing.assert_allclose(areas, expected["polygon_areas"], rtol=1e-5)


@pytest.mark.parametrize("case", GOLDEN["resize_shortest_edge"])
def test_sizes_by_the_short_side(case: dict[str, Any]) -> None:
    assert list(shortest_edge(case["h"], case["w"], case["short"], case["max"])) == case["out"]


@pytest.mark.parametrize("case", GOLDEN["resize_scale"])
def test_sizes_of_large_scale_jitter(case: dict[str, Any]) -> None:
    assert list(jittered_size(case["h"], case["w"], case["scale"])) == case["out"]


@pytest.mark.parametrize("case", GOLDEN["lsj"])
def test_large_scale_jitter(case: dict[str, Any]) -> None:
    drawn = Drawn(not case["flip"], case["scale"], case["offset"])
    found = LargeScaleJitter(size=case["size"])(objects_of(case["h"], case["w"]), drawn)
    check(found, case, "boxes_recomputed")


@pytest.mark.parametrize("case", GOLDEN["resize_crop_resize_flip"])
def test_multi_scale(case: dict[str, Any]) -> None:
    left, top, width, height = case["crop_x0_y0_w_h"] or [0] * 4
    crop = (0, case["first_short"], height, width, top, left) if width else (1,)
    found = MultiScale()(objects_of(case["h"], case["w"]), Drawn(*crop, case["short"], not case["flip"]))
    check(found, case, "boxes")


@pytest.mark.parametrize("recipe", [MultiScale(), LargeScaleJitter()])
def test_bitmaps_follow_polygons(recipe: Any) -> None:
    polygons = objects_of(240, 320)
    bitmaps = np.stack([to_mask([p.ravel() for p in parts], 240, 320) for parts in polygons.masks])
    for seed in range(4):
        image, drawn = recipe(polygons, random.Random(seed))
        again, pixels = recipe(
            Objects(polygons.image, polygons.boxes, polygons.labels, bitmaps), random.Random(seed)
        )
        assert image.equal(again)
        shared = [label for label in drawn["labels"].tolist() if label in pixels["labels"].tolist()]
        assert len(shared) >= len(drawn["labels"]) - 1
        for label in shared:
            parts = drawn["masks"][drawn["labels"].tolist().index(label)]
            mask = pixels["masks"][pixels["labels"].tolist().index(label)].numpy()
            outline = to_mask(parts, *image.shape[1:])
            # Pixels at the outline may differ.
            perimeter = 4 * np.sqrt(outline.size)
            assert (outline != mask).sum() < 2 * perimeter


def test_the_same_numbers_give_the_same_picture() -> None:
    first, second = (MultiScale()(objects_of(240, 320), random.Random(3)) for _ in range(2))
    assert first[0].equal(second[0])
    assert first[1]["boxes"].equal(second[1]["boxes"])
