"""Images and objects from a json file in COCO's form (https://cocodataset.org/#format-data).

Whatever can't be used is left out, counted and named: a job doesn't end because of one image.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from mvit_video.data.decode.container import open_picture
from mvit_video.data.decode.images import to_rgb
from mvit_video.data.files import existing, quoted
from mvit_video.detection.augment import Masks, Objects
from mvit_video.detection.masks import run_lengths, to_mask
from mvit_video.errors import DataError, VideoError, brief

log = logging.getLogger(__name__)

MAX_PIXELS = 178_956_970  # of an image, as many as Pillow opens without an error
OpenImage = Callable[[str], Image.Image]
_MOST = 1e5  # no coordinate is larger; pycocotools takes memory for each pixel between two points


class Problem(NamedTuple):
    """Something that isn't used: ``what`` names the image or annotation."""

    what: str
    reason: str


Segmentation = list[list[float]] | dict[str, Any] | None


class Annotation(NamedTuple):
    """An object of an image.

    Attributes:
        box: x0, y0, x1, y1 in pixels.
        segmentation: polygons, each [x0, y0, x1, y1, ...]; a run-length encoding; or None, for a box alone.
        crowd: a region of several objects, which training leaves out and testing ignores.
    """

    label: int
    box: tuple[float, float, float, float]
    segmentation: Segmentation
    crowd: bool
    area: float

    @property
    def outline(self) -> list[list[float]] | dict[str, Any]:
        """The segmentation; of a box alone its border."""
        x0, y0, x1, y1 = self.box
        return self.segmentation or [[x0, y0, x1, y0, x1, y1, x0, y1]]


@dataclass(frozen=True)
class AnnotatedImage:
    """An image's file, its identity in the json file, its size in pixels and its objects."""

    id: int
    path: str
    height: int
    width: int
    annotations: tuple[Annotation, ...]


@dataclass(frozen=True)
class CocoImages:
    """The images of a json file.

    Attributes:
        category_ids: the json file's number of each class; labels count from 0.
        problems: images and annotations that are left out.
    """

    images: tuple[AnnotatedImage, ...]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    problems: tuple[Problem, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.images)

    @property
    def with_objects(self) -> CocoImages:
        """The images that a detector is trained on: those with an object that is no crowd."""
        kept = (image for image in self.images if not all(a.crowd for a in image.annotations))
        return replace(self, images=tuple(kept))

    def with_classes(self, names: Sequence[str]) -> CocoImages:
        """The same, with labels that count from 0 in ``names``: all of its own classes, or more."""
        if tuple(names) == self.class_names:
            return self
        ids = dict(zip(self.class_names, self.category_ids, strict=True))
        unused = itertools.count(max(self.category_ids) + 1)
        labels = [names.index(name) for name in self.class_names]
        images = (
            replace(i, annotations=tuple(a._replace(label=labels[a.label]) for a in i.annotations))
            for i in self.images
        )
        category_ids = tuple(ids[name] if name in ids else next(unused) for name in names)
        return replace(self, images=tuple(images), class_names=tuple(names), category_ids=category_ids)

    def sha256(self) -> str:
        """Of the images' names and objects, in their order."""
        digest = hashlib.sha256()
        for image in self.images:
            objects = [(a.label, a.box, a.crowd) for a in image.annotations]  # outlines would take a minute
            digest.update(f"{image.id}\0{Path(image.path).name}\0{objects}\n".encode(errors="replace"))
        return digest.hexdigest()


class CocoSplits(NamedTuple):
    """Images to train on and images to measure with, of the same classes."""

    train: CocoImages
    val: CocoImages


def coco_splits(
    root: str,
    *,
    train: str | None = None,
    val: str | None = None,
    train_images: str | None = None,
    val_images: str | None = None,
    val_fraction: float = 0.2,
    max_missing: float = 0.2,
    seed: int = 0,
) -> CocoSplits:
    """Two json files and the folders of their images, or one file that is divided.

    Args:
        root: where relative names start.
        train, val: json files. None: what is found below ``root``, the one with "val" (or, without, "test")
            in its path for validation. Of a single file a share of the images validates.
        train_images, val_images: where the images lie. None: beside the json file, or in a folder that is
            called like it, as ``train2017`` for ``instances_train2017.json``, or in ``images``.
        val_fraction: the share that is held out of a single file.
        max_missing: the share of a file's images that may be missing on disk.

    Raises:
        DataError: files can't be found or read, too many images are missing, or the classes differ.
    """
    folder = existing(root, folder=True)
    first_file, second_file = (folder / name if name is not None else None for name in (train, val))
    if first_file is None:
        found = _find_json(folder)
        names = {file: file.relative_to(folder).as_posix().lower() for file in found}
        held_out = [file for kind in ("val", "test") for file in found if _is_of(kind, names[file])]
        trained = sorted((f for f in found if f not in held_out), key=lambda file: "train" not in names[file])
        first_file = (trained or found)[0]
        if second_file is None and trained and held_out:
            second_file = held_out[0]
        unread = ", ".join(names[file] for file in found if file not in (first_file, second_file)) or "-"
        log.info("training: %s; validation: %s; not read: %s", first_file, second_file or "a part", unread)
    first = _read_split(first_file, folder, train_images, max_missing)
    if second_file is not None:
        second = _read_split(second_file, folder, val_images, max_missing)
        if unknown := {*second.class_names} - {*first.class_names}:
            raise DataError(f"{first_file} lacks categories of {second_file}: {', '.join(sorted(unknown))}")
        return CocoSplits(first, second.with_classes(first.class_names))
    if len(first) < 2:
        raise DataError(f"{first_file} has one image; training and validation need one each")
    order = list(first.images)
    random.Random(seed).shuffle(order)
    count = min(max(round(val_fraction * len(order)), 1), len(order) - 1)
    return CocoSplits(
        replace(first, images=tuple(order[count:])), replace(first, images=tuple(order[:count]), problems=())
    )


def _is_of(kind: str, name: str) -> bool:
    """Whether a word of a file's path is "val" or "test", or one like it."""
    return re.search(rf"(?<![a-z]){kind}(id|idation|ing|s|set)?(?![a-z])", name) is not None


def _find_json(folder: Path) -> list[Path]:
    """Files of COCO's form in a folder and those in it. Raises DataError where there is none."""
    found, why = [], ""
    for file in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        try:
            _read_json(file)
        except DataError as error:
            why = why or f" ({error})"
            continue
        found.append(file)
    if not found:
        raise DataError(f"{folder} holds no json file in COCO's form{why}; name it: data.train=FILE")
    return found


def _read_split(file: Path, root: Path, images: str | None, max_missing: float) -> CocoImages:
    content = _read_json(file)
    rows, split = content["images"], file.stem.rpartition("_")[2]
    places = [
        place / kind
        for place in (file.parent, file.parent.parent, root)
        for kind in ("", split, "images", f"images/{split}")
    ]
    sample = [row for row in rows[:: max(len(rows) // 20, 1)] if isinstance(row, dict) and "file_name" in row]
    folder = max(
        places if images is None else [root / images],
        key=lambda place: sum(os.path.isfile(_path_of(row, place)) for row in sample),  # noqa: PTH113 (any name)
    )
    coco = read_coco(file, folder, content)
    if len(rows) - len(coco) > max_missing * len(rows):
        raise DataError(
            f"{file}: {len(rows) - len(coco)} of its {len(rows)} images can't be used with the folder "
            f"{folder}, and max_missing allows {max_missing:g} of them; the first: "
            f"{': '.join(coco.problems[0])}"
        )
    return coco


def read_coco(file: str | Path, folder: str | Path, content: Mapping[str, Any] | None = None) -> CocoImages:
    """The images that a json file lists, with the objects that can be used.

    Categories of one name are one class. Where ids come twice for different things, none of them is used.

    Args:
        folder: where the images lie.
        content: of the file, where it is known.

    Raises:
        DataError: the file can't be read, or isn't of this form, or nothing in it can be used.
    """
    content = content or _read_json(Path(file))
    problems: list[Problem] = []
    labels, categories = _read_categories(content["categories"], problems)
    listed = _read_images(content["images"], Path(folder), problems)
    for what, usable in (("categories", categories), ("images", {*listed.values()} - {None})):
        if not usable:
            first = "".join(f"; the first: {': '.join(problem)}" for problem in problems[:1])
            count = len(content[what])
            raise DataError(f"{file}: none of its {count} {what} can be used with {folder}{first}")
    objects: dict[int, list[Annotation]] = {image_id: [] for image_id in listed}
    for number, row in enumerate(content.get("annotations") or ()):
        with _noting(problems, "annotation", row, number):
            if (annotation := _annotation(row, labels, listed)) is not None:
                objects[row["image_id"]].append(annotation)
    images = (replace(image, annotations=tuple(objects[id])) for id, image in listed.items() if image)
    return CocoImages(tuple(images), tuple(categories), tuple(categories.values()), tuple(problems))


def _read_categories(rows: list[Any], problems: list[Problem]) -> tuple[dict[int, int], dict[str, int]]:
    """The label of each category by its id, and the id of each class by its name, in the order of labels."""
    names: dict[int, str | None] = {}
    for number, row in enumerate(rows):
        with _noting(problems, "category", row, number):
            category, name = _whole(row["id"]), str(row["name"]).strip()
            if row["name"] is None or not name:
                raise DataError("it has no name")
            if names.setdefault(category, name) != name:
                names[category] = None
                raise DataError("its id has another name, too")
    named = {category: name for category, name in sorted(names.items()) if name is not None}
    ids: dict[str, int] = {}
    for category, name in named.items():
        ids.setdefault(name, category)
    labels = {name: label for label, name in enumerate(ids)}
    return {category: labels[name] for category, name in named.items()}, ids


def _read_images(rows: list[Any], folder: Path, problems: list[Problem]) -> dict[int, AnnotatedImage | None]:
    """By id, still without objects; None for those that can't be used, which are named."""
    found: dict[int, AnnotatedImage | None] = {}
    ids: dict[str, int] = {}  # by file
    for number, row in enumerate(rows):
        with _noting(problems, "image", row, number):
            image_id, path = _whole(row["id"]), str(_path_of(row, folder))
            again, first = image_id in found, found.setdefault(image_id, None)
            if again:
                if first is None or first.path != path:
                    found[image_id] = None  # whose objects are whose?
                    raise DataError("its id has another file, too")
                raise DataError("listed twice")
            if path in ids:
                raise DataError(f"it has the file of image {ids[path]}")
            ids[path] = image_id
            found[image_id] = AnnotatedImage(image_id, path, *_size(row, path), ())
    return found


@contextmanager
def _noting(problems: list[Problem], kind: str, row: Any, number: int) -> Iterator[None]:
    """Whatever a row of another form raises becomes a problem."""
    name = f"{kind} #{number}"
    try:
        yield
    except VideoError as error:
        problems.append(Problem(error.path, error.reason))
    except (DataError, KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        if isinstance(row, dict) and "id" in row:
            name = f"{kind} {quoted(row['id'])}"
        missing = f"no {error}" if isinstance(error, KeyError) else "not of COCO's form"
        problems.append(Problem(name, str(error) if isinstance(error, DataError) else missing))


def _path_of(row: Mapping[str, Any], folder: Path) -> Path:
    """Where an image lies; tools on Windows write backslashes."""
    path = folder / str(row["file_name"])
    is_there = os.path.isfile(path)  # noqa: PTH113 (any name)
    return path if is_there else folder / str(row["file_name"]).replace("\\", "/")


def _size(row: Mapping[str, Any], path: str) -> tuple[int, int]:
    """Height and width of an image as its row says, or its file. Raises VideoError too."""
    if not os.path.isfile(path):  # noqa: PTH113 (any name)
        raise VideoError(path, "no such file")
    height, width = (int(row.get(side) or 0) for side in ("height", "width"))
    if height <= 0 or width <= 0:
        width, height = read_image(path).size
    return height, width


def read_image(path: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB image, turned as its EXIF orientation says. Raises VideoError."""
    try:
        with open_picture(path, max_pixels, path) as file:
            return Image.fromarray(to_rgb(ImageOps.exif_transpose(file)))
    except VideoError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever they meet
        raise VideoError(path, f"can't be read as an image ({brief(error)})") from None


def open_listed(image: AnnotatedImage, open_file: OpenImage = read_image) -> Image.Image:
    """An image's pixels, upright.

    Raises:
        VideoError: it can't be read, or has another size than its json file says.
    """
    pixels = open_file(image.path)
    if pixels.size != (image.width, image.height):
        reason = f"{pixels.width} x {pixels.height} pixels, {image.width} x {image.height} in the json file"
        if pixels.size == (image.height, image.width):
            reason += ", which swaps them or leaves its EXIF orientation out"
        raise VideoError(image.path, reason)
    return pixels


def load_objects(image: AnnotatedImage, open_file: OpenImage = read_image) -> Objects:
    """Open an image, upright, with the objects that a detector is trained on.

    Polygons stay polygons where all objects have them; else every object has a bitmap.

    Raises:
        VideoError: as of ``open_listed``.
    """
    pixels = open_listed(image, open_file)
    used = [annotation for annotation in image.annotations if not annotation.crowd]
    boxes = np.array([annotation.box for annotation in used], dtype=np.float64).reshape(-1, 4)
    labels = np.array([annotation.label for annotation in used], dtype=np.int64)
    outlines: list[Any] = [annotation.outline for annotation in used]
    masks: Masks
    if any(isinstance(outline, dict) for outline in outlines):
        masks = np.stack([to_mask(outline, pixels.height, pixels.width) for outline in outlines])
    else:
        masks = [[np.array(part, float).reshape(-1, 2) for part in parts] for parts in outlines]
    return Objects(pixels, boxes, labels, masks)


def _whole(value: Any) -> int:
    if type(value) is not int or abs(value) >= 1 << 63:
        raise DataError("its id is no whole number")
    return value


def _numbers(values: Any, what: str) -> list[float]:
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise DataError(f"{what} is no list of numbers")
    if not all(abs(value) < _MOST for value in values):
        raise DataError(f"{what} has numbers that are no pixels")
    return [float(value) for value in values]


def _annotation(
    row: Mapping[str, Any], labels: Mapping[int, int], images: Mapping[int, AnnotatedImage | None]
) -> Annotation | None:
    """None for an object of an image that can't be used."""
    for kind, known in (("image", images), ("category", labels)):
        if row[f"{kind}_id"] not in known:
            raise DataError(f"{kind} {quoted(row[f'{kind}_id'])} isn't listed")
    image = images[row["image_id"]]
    if image is None:
        return None
    size = image.height, image.width
    segmentation = _segmentation(row.get("segmentation"), *size)
    box = _numbers(row.get("bbox") or _box_around(segmentation, *size), "its box")
    if len(box) != 4 or min(box[2:]) <= 0:
        raise DataError("an empty box" if len(box) == 4 else f"a box of {len(box)} numbers")
    x, y, width, height = box
    if x >= image.width or y >= image.height or x + width <= 0 or y + height <= 0:
        raise DataError("a box outside of its image")
    if min(x, y) >= 0 and max(x + width, y + height) <= 1 < min(size):
        raise DataError("a box of less than a pixel: its numbers must be pixels, not shares of the image")
    area = float(row.get("area") or 0)
    if not 0 < area < np.inf:
        area = float(to_mask(segmentation, *size).sum()) if segmentation else width * height
    crowd = bool(int(row.get("iscrowd") or 0))
    return Annotation(labels[row["category_id"]], (x, y, x + width, y + height), segmentation, crowd, area)


def _box_around(segmentation: Segmentation, height: int, width: int) -> list[float]:
    """x, y, width, height"""
    if segmentation is None:
        raise KeyError("bbox")
    if isinstance(segmentation, dict):
        low, high = (f(np.argwhere(to_mask(segmentation, height, width)), axis=0) for f in (np.min, np.max))
        return [*low[::-1].tolist(), *(high - low + 1)[::-1].tolist()]
    points = np.concatenate([np.reshape(part, (-1, 2)) for part in segmentation])
    return [*points.min(0).tolist(), *np.ptp(points, axis=0).tolist()]


def _segmentation(value: Any, height: int, width: int) -> Segmentation:
    """Polygons of three points or more, or a run-length encoding of the image's size; None for nothing."""
    if not value or value == [[]]:
        return None
    if isinstance(value, list):
        parts = value if isinstance(value[0], list) else [value]
        polygons = [_numbers(part, "a polygon") for part in parts]
        usable = [part for part in polygons if len(part) >= 6 and len(part) % 2 == 0]
        if not usable:
            raise DataError("no polygon of three points or more")
        return usable
    size, counts = value["size"], value["counts"]
    if size != [height, width]:
        raise DataError(f"a mask of height and width {quoted(size)}, its image has {[height, width]}")
    runs = run_lengths(counts)
    if not len(runs) or not 0 <= runs.min() <= runs.max() <= height * width or runs.sum() != height * width:
        raise DataError("a run-length encoding that doesn't fill its image")
    return {"size": size, "counts": runs.tolist() if isinstance(counts, list) else counts}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} can't be read as json ({brief(error)})") from None
    for name in ("images", "categories", "annotations"):
        rows = content.get(name) if isinstance(content, dict) else None
        if not isinstance(rows, list) and (rows is not None or name != "annotations"):
            raise DataError(
                f"{file} isn't of COCO's form: it needs lists of images, categories and annotations"
            )
    return content


def summary(coco: CocoImages) -> dict[str, Any]:
    """Counts for people: images, objects by class, crowds, images without objects, problems by reason."""
    objects = [annotation for image in coco.images for annotation in image.annotations]
    counts = Counter(annotation.label for annotation in objects if not annotation.crowd)
    return {
        "images": len(coco.images),
        "images_without_objects": sum(not image.annotations for image in coco.images),
        "objects": {name: counts[label] for label, name in enumerate(coco.class_names)},
        "crowds": sum(annotation.crowd for annotation in objects),
        "beyond_border": sum(
            min(a.box) < -1 or a.box[2] > image.width + 1 or a.box[3] > image.height + 1
            for image in coco.images
            for a in image.annotations
        ),
        "without_mask": sum(annotation.segmentation is None for annotation in objects),
        "problems": dict(Counter(problem.reason for problem in coco.problems)),
    }


def coco_dataset(coco: CocoImages) -> dict[str, Sequence[dict[str, Any]]]:
    """The images as pycocotools' ``COCO.dataset``, for its evaluation: ids and labels as in the json file."""
    numbers = itertools.count(1)
    return {
        "images": [{"id": i.id, "height": i.height, "width": i.width} for i in coco.images],
        "annotations": [
            {
                "id": next(numbers),
                "image_id": image.id,
                "category_id": coco.category_ids[annotation.label],
                "bbox": [*annotation.box[:2], *np.subtract(annotation.box[2:], annotation.box[:2])],
                "area": annotation.area,
                "iscrowd": int(annotation.crowd),
                "segmentation": annotation.outline,
            }
            for image in coco.images
            for annotation in image.annotations
        ],
        "categories": [
            {"id": number, "name": name}
            for number, name in zip(coco.category_ids, coco.class_names, strict=True)
        ],
    }
