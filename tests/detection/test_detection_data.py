"""Images as batches: files that are found, objects that are odd, the order of an epoch."""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvit_video.data.samplers import EpochBatches
from mvit_video.detection.augment import LargeScaleJitter, MultiScale
from mvit_video.detection.coco import AnnotatedImage, coco_splits, load_objects, summary
from mvit_video.detection.data import TestImages, TrainingImages, by_aspect, image_loader
from mvit_video.errors import DataError

CATEGORIES = [{"id": 4, "name": "dog"}, {"id": 2, "name": "cat"}]
BOX = {"category_id": 4, "bbox": [2, 3, 10, 12]}


def write(file: Path, names: list[str], folder: Path, **changes: Any) -> None:
    """A json file of images of 40 x 30 pixels, each with one object, and the images."""
    file.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    images = [
        {"id": number, "file_name": name, "height": 30, "width": 40} for number, name in enumerate(names)
    ]
    content = {
        "images": images,
        "categories": CATEGORIES,
        "annotations": [{"id": n, "image_id": n, **BOX} for n in range(len(names))],
    }
    file.write_text(json.dumps(content | changes))
    for name in names:
        Image.fromarray(np.zeros((30, 40, 3), dtype=np.uint8)).save(folder / name)


@pytest.mark.parametrize(
    ("files", "folders"),
    [
        (["annotations/instances_train9.json", "annotations/instances_val9.json"], ["train9", "val9"]),
        (["train/_annotations.coco.json", "valid/_annotations.coco.json"], ["train", "valid"]),
        (["train.json", "test.json"], ["images", "images"]),
        (["result.json"], ["images"]),
        (["labels_latest.json"], ["."]),
    ],
)  # fmt: skip
def test_files_are_found_where_tools_put_them(tmp_path: Path, files: list[str], folders: list[str]) -> None:
    for number, (file, folder) in enumerate(zip(files, folders, strict=True)):
        write(tmp_path / file, [f"{number}{n}.png" for n in range(5)], tmp_path / folder)
    (tmp_path / "settings.json").write_text("{}")
    train, val = coco_splits(str(tmp_path), val_fraction=0.4)
    assert train.class_names == val.class_names == ("cat", "dog")
    assert not {image.path for image in train.images} & {image.path for image in val.images}
    assert (len(train), len(val)) == ((5, 5) if len(files) == 2 else (3, 2))
    if len(files) == 2:
        assert all(Path(image.path).name[0] == "1" for image in val.images)


def test_data_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="COCO's form"):
        coco_splits(str(tmp_path))
    write(tmp_path / "train.json", ["a.png", "b.png"], tmp_path)
    write(tmp_path / "val.json", ["c.png"], tmp_path, categories=[{"id": 4, "name": "bird"}])
    with pytest.raises(DataError, match="categories"):
        coco_splits(str(tmp_path))
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="max_missing"):
        coco_splits(str(tmp_path), train="train.json")


def test_classes_are_told_by_their_names(tmp_path: Path) -> None:
    """The second file has another order and fewer of them."""
    write(tmp_path / "train.json", ["a.png"], tmp_path)
    write(tmp_path / "val.json", ["b.png"], tmp_path, categories=[{"id": 4, "name": "cat"}])
    train, val = coco_splits(str(tmp_path))
    assert val.class_names == train.class_names == ("cat", "dog")
    assert (train.category_ids, val.category_ids) == ((2, 4), (4, 5))
    assert [coco.images[0].annotations[0].label for coco in (train, val)] == [1, 0]


def test_boxes_alone_and_odd_outlines_are_objects(tmp_path: Path) -> None:
    """A box without a mask is its own mask; one flat polygon is a list of one."""
    flat = [2, 3, 12, 3, 12, 15]
    objects = [{"image_id": 0, **BOX, "segmentation": value} for value in ([], [[]], flat, [flat])]
    write(tmp_path / "a.json", ["a.png", "b.png"], tmp_path, annotations=objects)
    train, val = coco_splits(str(tmp_path), train="a.json", val="a.json")
    assert train.problems == ()
    assert summary(train)["without_mask"] == 2
    assert len(train.with_objects) == 1
    image, target = load_objects(val.images[0]).target()
    assert image.shape == (3, 30, 40)
    assert target["masks"] == [[[2, 3, 12, 3, 12, 15, 2, 15]]] * 2 + [[flat]] * 2


@pytest.mark.parametrize(
    "changes",
    [
        {"images": [{"id": 0, "file_name": "a.png", "height": "tall"}]},
        {"images": [{"id": 0, "file_name": "a\0.png"}]},
        {"images": [{"id": "x", "file_name": "a.png"}]},
        {"categories": [{"id": [1], "name": "dog"}]},
        {"annotations": 5},
    ],
    ids=str,
)
def test_odd_files_end_in_one_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    write(tmp_path / "a.json", ["a.png"], tmp_path, **changes)
    with pytest.raises(DataError, match=r"a\.json"):
        coco_splits(str(tmp_path), train="a.json", val="a.json")


def listed(path: Path, wide: bool = True) -> AnnotatedImage:
    return AnnotatedImage(0, str(path), *((30, 40) if wide else (40, 30)), ())


def test_a_broken_image_is_replaced_and_named(tmp_path: Path) -> None:
    write(tmp_path / "a.json", ["a.png"], tmp_path)
    (tmp_path / "b.png").write_bytes(b"no image")
    images = [listed(tmp_path / "b.png"), listed(tmp_path / "a.png")]
    recipe = MultiScale(short_sides=(32,), crop_probability=0.0)
    sample = TrainingImages(images, recipe, seed=0)[0, 0]
    assert sample.paths == [str(tmp_path / "a.png")]
    assert {bad.path for bad in sample.bad} == {str(tmp_path / "b.png")}
    whole = TestImages(images, short_side=60, max_side=70)
    assert "image" in whole[0].bad[0].reason
    assert whole[1].images[0].shape == (3, 53, 70)
    assert whole[1].sizes == [(30, 40)]
    with pytest.raises(DataError, match=r"b\.png"):
        TrainingImages(images[:1], recipe, seed=0)[0, 0]


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_a_step_has_images_of_one_kind(num_replicas: int) -> None:
    wide = [random.Random(index).random() < 0.6 for index in range(50)]
    order: dict[str, Any] = {
        "seed": 1,
        "num_replicas": num_replicas,
        "arrange": partial(by_aspect, wide=wide),
    }
    ranks = [EpochBatches(len(wide), 2, rank=rank, **order) for rank in range(num_replicas)]
    for epoch in (0, 1):
        for batches in ranks:
            batches.set_epoch(epoch)
        steps = [[key for batch in step for key in batch] for step in zip(*map(iter, ranks), strict=True)]
        assert len(steps) == len(ranks[0]) == 50 // (2 * num_replicas)
        seen = Counter(index for step in steps for _, index in step)
        assert set(seen.values()) == {1}
        mixed = [step for step in steps if len({wide[index] for _, index in step}) > 1]
        assert len(mixed) <= 1


def test_batches_don_t_depend_on_workers(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(6)]
    write(tmp_path / "a.json", names, tmp_path)
    train, _ = coco_splits(str(tmp_path), train="a.json", val="a.json")
    dataset = TrainingImages(train.images, MultiScale(short_sides=(32, 48)), seed=0)
    found = []
    for workers in (0, 2):
        loader = image_loader(dataset, batch_size=2, num_workers=workers)
        found.append([batch.paths for batch in loader])
        shapes = {tuple(image.shape) for batch in loader for image in batch.images}
        assert shapes <= {(3, 32, 43), (3, 48, 64), *(shape for shape in shapes if shape[1] in (32, 48))}
        loader.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("recipe", [MultiScale(), LargeScaleJitter(size=64)])
def test_recipes_give_images_no_larger_than_they_say(tmp_path: Path, recipe: Any) -> None:
    write(tmp_path / "a.json", ["a.png"], tmp_path)
    (image,) = coco_splits(str(tmp_path), train="a.json", val="a.json").val.images
    for seed in range(3):
        pixels, _ = recipe(load_objects(image), random.Random(seed))
        assert pixels[0].numel() <= recipe.largest
