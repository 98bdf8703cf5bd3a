"""Images and objects from a json file in COCO's form (https://cocodataset.org/#format-data).

Whatever can't be used is left out, counted and named: a job doesn't end because of one image.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from mvit_video.data.decode.container import open_picture
from mvit_video.data.files import existing
from mvit_video.detection.augment import Objects
from mvit_video.detection.masks import to_mask
from mvit_video.errors import DataError, VideoError, brief

log = logging.getLogger(__name__)

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
    if train is None:
        found = _find_json(folder)
        names = {file: file.relative_to(folder).as_posix().lower() for file in found}
        held_out = [file for kind in ("val", "test") for file in found if kind in names[file]]
        trained = sorted((f for f in found if f not in held_out), key=lambda file: "train" not in names[file])
        if not trained:
            raise DataError(f"{folder} holds no json file in COCO's form; name it: data.train=FILE")
        train_file, val_file = trained[0], held_out[0] if held_out and val is None else None
    else:
        train_file, val_file = folder / train, None
    val_file = folder / val if val is not None else val_file
    first = _read_split(train_file, folder, train_images, max_missing)
    if val_file is not None:
        second = _read_split(val_file, folder, val_images, max_missing)
        if first.class_names != second.class_names:
            raise DataError(f"{train_file} and {val_file} have different categories")
        return CocoSplits(first, second)
    if len(first) < 2:
        raise DataError(f"{train_file} has one image; training and validation need one each")
    order = list(first.images)
    random.Random(seed).shuffle(order)
    count = min(max(round(val_fraction * len(order)), 1), len(order) - 1)
    return CocoSplits(
        replace(first, images=tuple(order[count:])), replace(first, images=tuple(order[:count]), problems=())
    )


def _find_json(folder: Path) -> list[Path]:
    """Files of COCO's form in a folder and those in it."""
    found = []
    for file in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        try:
            _read_json(file)
        except DataError:
            continue
        found.append(file)
    return found


def _read_split(file: Path, root: Path, images: str | None, max_missing: float) -> CocoImages:
    if images is None:
        stem = file.stem.rpartition("_")[2]
        places = [
            *(file.parent, file.parent / stem, file.parent.parent / stem),
            *(root / stem, root / "images" / stem, root / "images", root),
        ]
    else:
        places = [root / images]
    content = _read_json(file)
    names = [str(entry["file_name"]) for entry in content["images"][:20]]
    folder = max(places, key=lambda place: sum(is_file(place / name) for name in names))
    coco = read_coco(file, folder, content)
    listed = len(content["images"])
    if listed - len(coco) > max_missing * listed:
        raise DataError(
            f"{file}: {listed - len(coco)} of its {listed} images can't be used with the folder {folder}, "
            f"and max_missing allows {max_missing:g} of them; the first: {': '.join(coco.problems[0])}"
        )
    return coco


def read_coco(file: str | Path, folder: str | Path, content: Mapping[str, Any] | None = None) -> CocoImages:
    """The images that a json file lists, with the objects that can be used.

    Args:
        folder: where the images lie.
        content: of the file, where it is known.

    Raises:
        DataError: the file can't be read, or isn't of this form, or nothing in it can be used.
    """
    content = content or _read_json(Path(file))
    categories = sorted(content["categories"], key=lambda category: int(category["id"]))
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
        path = Path(folder, str(entry["file_name"]))
        try:
            height, width = (int(entry.get(side) or 0) for side in ("height", "width"))
        except (TypeError, ValueError):
            problems.append(Problem(f"image {image_id}", "its height and width are no numbers"))
            continue
        if is_file(path):
            images.append(AnnotatedImage(image_id, str(path), height, width, tuple(objects[image_id])))
        else:
            problems.append(Problem(str(path), "no such file"))
    if not images:
        raise DataError(f"{file}: none of its {len(listed)} images can be found in {folder}")
    names = tuple(str(category["name"]) for category in categories)
    return CocoImages(tuple(images), names, tuple(labels), tuple(problems))


def open_listed(image: AnnotatedImage, open_file: Callable[[str], Image.Image] | None = None) -> Image.Image:
    """An image's pixels, upright.

    Raises:
        VideoError: it can't be read, or has another size than its json file says.
    """
    pixels = (open_file or read_image)(image.path)
    if image.height and (pixels.height, pixels.width) != (image.height, image.width):
        listed = f"{image.width} x {image.height}"
        raise VideoError(image.path, f"{pixels.width} x {pixels.height} pixels, {listed} in the json file")
    return pixels


def load_objects(image: AnnotatedImage, open_file: Callable[[str], Image.Image] | None = None) -> Objects:
    """Open an image, upright, with the objects that a detector is trained on.

    Polygons stay polygons where all objects have them; else every object has a bitmap.

    Raises:
        VideoError: as of ``open_listed``.
    """
    pixels = open_listed(image, open_file)
    used = [annotation for annotation in image.annotations if not annotation.crowd]
    boxes = np.array([annotation.box for annotation in used], dtype=np.float64).reshape(-1, 4)
    labels = np.array([annotation.label for annotation in used], dtype=np.int64)
    segmentations = [annotation.outline for annotation in used]
    if any(isinstance(segmentation, dict) for segmentation in segmentations):
        try:
            masks: Any = np.stack([to_mask(s, pixels.height, pixels.width) for s in segmentations])
        except (ValueError, TypeError) as error:
            raise VideoError(image.path, f"a mask of it can't be decoded ({brief(error)})") from None
    else:
        masks = [
            [np.array(part, dtype=np.float64).reshape(-1, 2) for part in parts] for parts in segmentations
        ]
    return Objects(pixels, boxes, labels, masks)


def read_image(path: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB image, turned as its EXIF orientation says. Raises VideoError."""
    try:
        with open_picture(path, max_pixels, path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except VideoError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever they meet
        raise VideoError(path, f"can't be read as an image ({brief(error)})") from None


def is_file(path: Path) -> bool:
    """Whether it is; not for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


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
    area = float(entry.get("area") or 0)
    area = area if 0 < area < np.inf else width * height
    crowd = bool(entry.get("iscrowd", 0))
    box = (x, y, x + width, y + height)
    return entry["image_id"], Annotation(labels[entry["category_id"]], box, segmentation, crowd, area)


def _segmentation(value: Any, image: Mapping[str, Any]) -> list[list[float]] | dict[str, Any] | None:
    """Polygons of three points or more, or a run-length encoding of the image's size; None for nothing."""
    if value in (None, [], [[]]):
        return None
    if isinstance(value, list):
        value = value if isinstance(value[0], list) else [value]
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
            isinstance(row, dict) and type(row.get("id")) is int and {*keys} <= row.keys() for row in rows
        ):
            raise DataError(
                f"{file} isn't of COCO's form: it needs {name}, each with a whole number as id, and {keys[1]}"
            )
    if not isinstance(content.get("annotations", []), list):
        raise DataError(f"{file} isn't of COCO's form: annotations aren't a list")
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


def coco_dataset(
    coco: CocoImages, sizes: Mapping[int, tuple[int, int]] | None = None
) -> dict[str, Sequence[dict[str, Any]]]:
    """The images as pycocotools' ``COCO.dataset``, for its evaluation: ids and labels as in the json file.

    Args:
        sizes: height and width of the images that are wanted, by id; None: all, as the json file has them.
    """
    if sizes is None:
        sizes = {image.id: (image.height, image.width) for image in coco.images}
    wanted = [image for image in coco.images if image.id in sizes]
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
            "segmentation": annotation.outline,
        }
        for number, (image, annotation) in enumerate(
            ((image, annotation) for image in wanted for annotation in image.annotations), start=1
        )
    ]
    return {
        "images": [{"id": i.id, "height": sizes[i.id][0], "width": sizes[i.id][1]} for i in wanted],
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name}
            for number, name in zip(coco.category_ids, coco.class_names, strict=True)
        ],
    }
