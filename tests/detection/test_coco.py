"""Annotations in COCO's form: what can be used is, what can't is named."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_shapes import CLASSES, generate
from PIL import Image
from pycocotools import mask as coco_mask

from mvit_video.detection.augment import MultiScale
from mvit_video.detection.coco import coco_dataset, load_objects, read_coco, summary
from mvit_video.detection.masks import to_mask
from mvit_video.errors import DataError, VideoError

BOX = {"image_id": 1, "category_id": 7, "bbox": [2, 3, 10, 12], "segmentation": [[2, 3, 12, 3, 12, 15]]}


def write(tmp_path: Path, annotations: list[Any], **changes: Any) -> Path:
    """A json file of one image, 40 x 30 pixels, and two categories."""
    Image.fromarray(np.zeros((30, 40, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 30, "width": 40}],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": annotations,
    }
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content | changes))
    return file


def test_labels_follow_the_numbers_of_categories(tmp_path: Path) -> None:
    coco = read_coco(write(tmp_path, [BOX]), tmp_path)
    assert coco.class_names == ("cat", "dog")
    assert coco.category_ids == (3, 7)
    ((annotation,),) = (image.annotations for image in coco.images)
    assert annotation.label == 1
    assert annotation.box == (2, 3, 12, 15)
    assert coco.problems == ()
    (again,) = coco_dataset(coco)["annotations"]
    assert again["category_id"] == 7
    assert again["bbox"] == [2, 3, 10, 12]


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_id": 2},
        {"category_id": 5},
        {"bbox": [2, 3, 0, 12]},
        {"bbox": [2, 3, float("nan"), 12]},
        {"bbox": [2, 3, 4]},
        {"bbox": "box"},
        {"segmentation": [[1, 2, 3, 4]]},
        {"segmentation": [["a"] * 6]},
        {"segmentation": {"size": [30, 41], "counts": "x"}},
        {"segmentation": {"size": [30, 40], "counts": [5, 5]}},
        {"segmentation": {"counts": [5, 5]}},
        {"segmentation": {"size": [30, 40], "counts": "x"}},
        {"segmentation": {"size": [30, 40], "counts": [600.5, 599.5]}},
        {"segmentation": [[1, 2, 3e9, 4, 5, 6]]},
        {"segmentation": "x"},
        {"bbox": [10**400, 2, 3, 4]},
        {"bbox": [41, 3, 5, 5]},
        {"bbox": [0.1, 0.2, 0.3, 0.4]},
        5,
        None,
    ],
    ids=str,
)
def test_what_cannot_be_used_is_named(tmp_path: Path, wrong: Any) -> None:
    broken = {**BOX, "id": 9, **wrong} if isinstance(wrong, dict) else wrong
    coco = read_coco(write(tmp_path, [BOX, broken]), tmp_path)
    assert [len(image.annotations) for image in coco.images] == [1]
    (problem,) = coco.problems
    assert problem.what in ("annotation 9", "annotation #1")
    assert summary(coco)["problems"] == {problem.reason: 1}


def test_rows_of_images_and_categories_can_be_odd(tmp_path: Path) -> None:
    """Each is used or named; what has an id that other things have, too, is not used."""
    odd: list[Any] = [5, None, {"file_name": "a.png"}, {"id": [1], "file_name": "a.png"}, {"id": 3}]
    odd += [{"id": i, "file_name": f, "height": 30, "width": 40} for i, f in ((1, "a.png"), (4, "a.png"))]
    odd += [{"id": 5, "file_name": f, "height": 30, "width": 40} for f in ("b.png", "d.png")]
    odd += [{"id": 6, "file_name": "sub\\c.png"}, {"id": 7, "file_name": "e.png", "height": float("inf")}]
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "d.png", "e.png", "sub/c.png"):
        Image.new("L", (40, 30)).save(tmp_path / name)
    names: list[Any] = [(8, " dog"), (3, "cat"), (9, "a"), (9, "b"), (10, None), ("11", "c")]
    categories = [{"id": number, "name": name} for number, name in names] + [{"id": 12}, 5]
    annotations = [{**BOX, "image_id": number, "category_id": 8} for number in (1, 5, 6)]
    file = write(tmp_path, [BOX, {**BOX, "category_id": 9}, *annotations])
    content = json.loads(file.read_text())
    content["images"] += odd
    content["categories"] += categories
    file.write_text(json.dumps(content))
    coco = read_coco(file, tmp_path)
    found = [(image.id, image.height, len(image.annotations)) for image in coco.images]
    assert found == [(1, 30, 2), (6, 30, 1)]
    assert (coco.class_names, coco.category_ids) == (("cat", "dog"), (3, 7))
    assert [image.annotations[-1].label for image in coco.images] == [1, 1]
    assert len(coco.problems) == 9 + 5 + 1


@pytest.mark.parametrize(
    "changes",
    [
        {"images": []},
        {"images": [{"id": 1}]},
        {"categories": []},
        {"images": [{"id": 1, "file_name": "b.png"}]},
    ],
)
def test_files_without_anything_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"instances\.json"):
        read_coco(write(tmp_path, [BOX], **changes), tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"images": 5}', "\udcff"])
def test_files_of_another_form_are_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "instances.json"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"instances\.json"):
        read_coco(file, tmp_path)


def test_run_lengths_and_polygons_become_bitmaps_together(tmp_path: Path) -> None:
    bitmap = np.zeros((30, 40), dtype=np.uint8)
    bitmap[5:20, 8:30] = 1
    encoded = coco_mask.encode(np.asfortranarray(bitmap))
    compressed = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    runs = np.diff(np.flatnonzero(np.diff(bitmap.T.ravel(), prepend=2, append=2)))
    plain = {"size": [30, 40], "counts": runs.tolist()}
    both = [{**BOX, "segmentation": compressed}, {**BOX, "segmentation": plain}]
    coco = read_coco(write(tmp_path, [BOX, *both, {**both[0], "bbox": None, "area": None}]), tmp_path)
    objects = load_objects(coco.images[0])
    assert [a.box for a in coco.images[0].annotations[3:]] == [(8, 5, 30, 20)]
    assert [a.area for a in coco.images[0].annotations[3:]] == [bitmap.sum()]
    assert isinstance(objects.masks, np.ndarray)
    assert (objects.masks[1] == bitmap).all()
    assert (objects.masks[2] == bitmap).all()
    assert (objects.masks[0] == to_mask(BOX["segmentation"], 30, 40)).all()


def test_crowds_are_kept_for_testing_alone(tmp_path: Path) -> None:
    coco = read_coco(write(tmp_path, [BOX, {**BOX, "iscrowd": 1}]), tmp_path)
    assert summary(coco)["crowds"] == 1
    assert len(load_objects(coco.images[0]).boxes) == 1
    assert [row["iscrowd"] for row in coco_dataset(coco)["annotations"]] == [0, 1]


def test_images_are_upright_and_of_the_size_that_is_listed(tmp_path: Path) -> None:
    file = write(tmp_path, [BOX], images=[{"id": 1, "file_name": "a.jpg", "height": 40, "width": 30}])
    image = Image.fromarray(np.zeros((30, 40, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    (listed,) = read_coco(file, tmp_path).images
    assert load_objects(listed).image.size == (30, 40)
    Image.fromarray(np.full((40, 30), 100 * 257, dtype=np.uint16)).save(tmp_path / "a.jpg", "png")
    assert load_objects(listed).image.getextrema() == ((100, 100),) * 3
    image.save(tmp_path / "a.jpg")
    with pytest.raises(VideoError, match="40 x 30"):
        load_objects(listed)
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(VideoError, match=r"a\.jpg"):
        load_objects(listed)


def test_generated_shapes_can_be_trained_on(tmp_path: Path) -> None:
    for name in ("first", "second"):
        generate(tmp_path / name, "train", 6, seed=1)
    content = [(tmp_path / name / "annotations" / "train.json").read_text() for name in ("first", "second")]
    assert content[0] == content[1]
    coco = read_coco(tmp_path / "first" / "annotations" / "train.json", tmp_path / "first" / "train")
    assert coco.class_names == CLASSES
    assert coco.problems == ()
    assert sum(len(image.annotations) for image in coco.images) >= 6
    for image in coco.images:
        pixels, target = MultiScale()(load_objects(image), random.Random(0))
        assert pixels.dtype.is_floating_point is False
        assert pixels.shape[0] == 3
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
