"""Images and objects from a json file in COCO's form (https://cocodataset.org/#format-data).

Whatever can't be used is left out, counted and named: a job doesn't end because of one image.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mvit_video.detection.augment import Objects
from mvit_video.errors import DataError

MAX_PIXELS = 178_956_970  # of an image, as many as Pillow opens without an error


class Problem(NamedTuple):
    """Something that isn't used: ``what`` names the image or annotation."""

    what: str
    reason: str


class Annotation(NamedTuple):
    """An object of an image.

    Attributes:
        box: x0, y0, x1, y1 in pixels.
        segmentation: polygons, each [x0, y0, x1, y1, ...]; a run-length encoding; or None, for a box alone.
        crowd: a region of several objects, which training leaves out and testing ignores.
    """

    label: int
    box: tuple[float, float, float, float]
    segmentation: list[list[float]] | dict[str, Any] | None
    crowd: bool
    area: float


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


def read_coco(file: str | Path, folder: str | Path) -> CocoImages:
    """The images that a json file lists, with the objects that can be used.

    Args:
        folder: where the images lie.

    Raises:
        DataError: the file can't be read, or isn't of this form, or nothing in it can be used.
    """
    content = _read_json(Path(file))
    categories = sorted(content["categories"], key=lambda category: category["id"])
    labels = {category["id"]: label for label, category in enumerate(categories)}
    if len(labels) < len(categories) or not categories:
        raise DataError(f"{file}: categories must have different ids, and there must be some")
    problems: list[Problem] = []
    listed: dict[int, Mapping[str, Any]] = {}
    for entry in content["images"]:
        if entry["id"] in listed:
            problems.append(Problem(f"image {entry['id']}", "listed twice"))
        else:
            listed[entry["id"]] = entry
    objects: dict[int, list[Annotation]] = {image_id: [] for image_id in listed}
    for number, entry in enumerate(content.get("annotations", [])):
        name = (
            f"annotation {entry.get('id', f'number {number}')}" if isinstance(entry, dict) else f"#{number}"
        )
        try:
            image_id, annotation = _annotation(entry, labels, listed)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            problems.append(Problem(name, " ".join(reason.split())[:200]))
        else:
            objects[image_id].append(annotation)
    images = []
    for image_id, entry in listed.items():
        path = Path(folder) / str(entry["file_name"])
        if not path.is_file():
            problems.append(Problem(str(path), "no such file"))
            continue
        size = int(entry.get("height") or 0), int(entry.get("width") or 0)
        images.append(AnnotatedImage(image_id, str(path), *size, tuple(objects[image_id])))
    if not images:
        raise DataError(f"{file}: none of its {len(listed)} images can be found in {folder}")
    names = tuple(str(category["name"]) for category in categories)
    return CocoImages(tuple(images), names, tuple(labels), tuple(problems))


def load_objects(image: AnnotatedImage) -> Objects:
    """Open an image, upright, with the objects that a detector is trained on.

    Polygons stay polygons where all objects have them; else every object has a bitmap.

    Raises:
        DataError: the image can't be read, or has another size than its json file says.
    """
    pixels = read_image(image.path)
    if image.height and (pixels.height, pixels.width) != (image.height, image.width):
        raise DataError(
            f"{image.path}: {pixels.width} x {pixels.height} pixels, not {image.width} x {image.height}"
        )
    used = [annotation for annotation in image.annotations if not annotation.crowd]
    boxes = np.array([annotation.box for annotation in used], dtype=np.float64).reshape(-1, 4)
    labels = np.array([annotation.label for annotation in used], dtype=np.int64)
    segmentations = [annotation.segmentation for annotation in used]
    if any(isinstance(segmentation, dict) for segmentation in segmentations):
        masks: Any = np.stack([to_mask(s, pixels.height, pixels.width) for s in segmentations])
    else:
        masks = [
            [np.array(part, dtype=np.float64).reshape(-1, 2) for part in parts or []]
            for parts in segmentations
        ]
    return Objects(pixels, boxes, labels, masks)


def read_image(path: str) -> Image.Image:
    """An RGB image, turned as its EXIF orientation says. Raises DataError."""
    try:
        with Image.open(path) as file:
            if file.width * file.height > MAX_PIXELS:
                raise DataError(f"{path}: {file.width} x {file.height} pixels are more than {MAX_PIXELS}")
            return ImageOps.exif_transpose(file).convert("RGB")
    except DataError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever they meet
        raise DataError(f"{path}: can't be read as an image ({' '.join(str(error).split())[:160]})") from None


def to_mask(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """Polygons or a run-length encoding as a bitmap, bool (height, width)."""
    from pycocotools import mask as coco

    if not segmentation:
        return np.zeros((height, width), dtype=bool)
    encoded = (
        coco.frPyObjects(segmentation, height, width) if _is_uncompressed(segmentation) else segmentation
    )
    if isinstance(encoded, list):
        encoded = coco.merge(encoded)
    return coco.decode(encoded).astype(bool)


def _is_uncompressed(segmentation: Any) -> bool:
    return isinstance(segmentation, list) or isinstance(segmentation["counts"], list)


def _annotation(
    entry: Mapping[str, Any], labels: Mapping[int, int], images: Mapping[int, Mapping[str, Any]]
) -> tuple[int, Annotation]:
    """Raises KeyError, TypeError or ValueError for what can't be used."""
    if entry["image_id"] not in images:
        raise ValueError(f"image {entry['image_id']} isn't listed")
    if entry["category_id"] not in labels:
        raise ValueError(f"category {entry['category_id']} isn't listed")
    image = images[entry["image_id"]]
    segmentation = _segmentation(entry.get("segmentation"), image)
    if "bbox" in entry:
        x, y, width, height = (float(value) for value in entry["bbox"])
    elif isinstance(segmentation, list):
        points = np.concatenate([np.reshape(part, (-1, 2)) for part in segmentation])
        (x, y), (width, height) = points.min(0).tolist(), np.ptp(points, axis=0).tolist()
    else:
        raise KeyError("bbox")
    if not np.isfinite([x, y, width, height]).all() or width <= 0 or height <= 0:
        raise ValueError(f"an empty box {entry.get('bbox')}")
    area = float(entry.get("area") or width * height)
    crowd = bool(entry.get("iscrowd", 0))
    box = (x, y, x + width, y + height)
    return entry["image_id"], Annotation(labels[entry["category_id"]], box, segmentation, crowd, area)


def _segmentation(value: Any, image: Mapping[str, Any]) -> list[list[float]] | dict[str, Any] | None:
    """Polygons of three points or more, or a run-length encoding of the image's size; None for nothing."""
    if value is None or value == []:
        return None
    if isinstance(value, list):
        polygons = [[float(number) for number in part] for part in value]
        usable = [part for part in polygons if len(part) >= 6 and len(part) % 2 == 0]
        if not usable or not all(np.isfinite(part).all() for part in usable):
            raise ValueError("no polygon of three points or more")
        return usable
    size = [int(side) for side in value["size"]]
    if "height" in image and size != [image["height"], image["width"]]:
        raise ValueError(f"a mask of {size}, the image has {[image['height'], image['width']]}")
    if isinstance(value["counts"], list) and sum(value["counts"]) != size[0] * size[1]:
        raise ValueError("a run-length encoding that doesn't fill its image")
    return {"size": size, "counts": value["counts"]}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} can't be read as json ({' '.join(str(error).split())[:160]})") from None
    for name, keys in (("images", ("id", "file_name")), ("categories", ("id", "name"))):
        rows = content.get(name) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(
            isinstance(row, dict) and {*keys} <= row.keys() for row in rows
        ):
            raise DataError(f"{file} isn't of COCO's form: it needs {name}, each with {' and '.join(keys)}")
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
        "without_mask": sum(annotation.segmentation is None for annotation in objects),
        "problems": dict(Counter(problem.reason for problem in coco.problems)),
    }


def coco_dataset(coco: CocoImages) -> dict[str, Sequence[dict[str, Any]]]:
    """The images as pycocotools' ``COCO.dataset``, for its evaluation: ids and labels as in the json file."""
    annotations = [
        {
            "id": number,
            "image_id": image.id,
            "category_id": coco.category_ids[annotation.label],
            "bbox": [
                annotation.box[0],
                annotation.box[1],
                *np.subtract(annotation.box[2:], annotation.box[:2]),
            ],
            "area": annotation.area,
            "iscrowd": int(annotation.crowd),
            "segmentation": annotation.segmentation or [],
        }
        for number, (image, annotation) in enumerate(
            ((image, annotation) for image in coco.images for annotation in image.annotations), start=1
        )
    ]
    return {
        "images": [{"id": i.id, "height": i.height, "width": i.width} for i in coco.images],
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name}
            for number, name in zip(coco.category_ids, coco.class_names, strict=True)
        ],
    }
