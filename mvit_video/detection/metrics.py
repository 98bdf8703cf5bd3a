"""Average precision as COCO defines it, by pycocotools itself.

It takes masks as they are stored, and what several processes found as one list. (torchmetrics'
``MeanAveragePrecision`` runs it too, but with recalls rounded to float32, and on bitmaps and equally many
images of every process.)
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_convert

from mvit_video.detection.coco import CocoImages, coco_dataset

SUMMARY = ("AP", "AP50", "AP75", "APS", "APM", "APL", "AR1", "AR10", "AR100", "ARS", "ARM", "ARL")
LIKELY = 0.5  # a detection of this score that is none counts as a mistake of its image


class ImageResult(NamedTuple):
    """The objects detected in an image: rows of COCO's results format."""

    image_id: int
    detections: list[dict[str, Any]]


@dataclass(frozen=True)
class Precision:
    """How good boxes, or masks, are.

    Attributes:
        summary: COCO's twelve figures by ``SUMMARY``, in [0, 1]; -1 where there is no object of that kind.
        per_class: AP of each class; NaN for one without objects.
        curves: precision at recalls 0, 0.01, ..., 1 of the mean class, by IoU.
        mistakes: of each image by id, objects that were missed and likely detections of nothing (IoU 0.5).
    """

    summary: Mapping[str, float]
    per_class: NDArray[np.float64]
    curves: Mapping[float, NDArray[np.float64]]
    mistakes: Mapping[int, int]


def to_result(
    image_id: int, size: tuple[int, int], found: Mapping[str, Tensor], category_ids: Sequence[int]
) -> ImageResult:
    """A detector's output for an image, masks run-length encoded as text."""
    from pycocotools import mask as coco

    boxes = box_convert(found["boxes"].double().cpu(), "xyxy", "xywh")
    masks = np.asfortranarray(found["masks"].permute(1, 2, 0).cpu().numpy(), dtype=np.uint8)
    encoded = coco.encode(masks) if len(boxes) else []
    rows = [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": box,
            "score": score,
            "segmentation": {"size": list(size), "counts": mask["counts"].decode()},
        }
        for label, box, score, mask in zip(
            found["labels"].tolist(), boxes.tolist(), found["scores"].tolist(), encoded, strict=True
        )
    ]
    return ImageResult(image_id, rows)


def measure(coco: CocoImages, results: Sequence[ImageResult]) -> dict[str, Precision]:
    """The precision of "box" and "mask" on the images that there are results of."""
    from pycocotools.coco import COCO

    truth, measured = COCO(), {result.image_id for result in results}
    images = tuple(image for image in coco.images if image.id in measured)
    truth.dataset = coco_dataset(replace(coco, images=images))
    rows = [row for result in results for row in result.detections]
    with contextlib.redirect_stdout(io.StringIO()):  # it tells what it does
        truth.createIndex()
        # With its box, the box's area would decide whether a mask is small.
        bare = [{key: value for key, value in row.items() if key != "bbox"} for row in rows]
        return {"box": _precision(truth, rows, "bbox"), "mask": _precision(truth, bare, "segm")}


def _precision(truth: Any, rows: list[dict[str, Any]], kind: str) -> Precision:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if rows:
        found = truth.loadRes([dict(row) for row in rows])
    else:  # which it doesn't take
        found = COCO()
        found.dataset = {**truth.dataset, "annotations": []}
        found.createIndex()
    evaluation = COCOeval(truth, found, kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    # (IoU, recall, class) of all sizes; -1 for classes without objects, which pycocotools sorts by their ids
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    ids = [category["id"] for category in truth.dataset["categories"]]
    precision = np.where(precision < 0, np.nan, precision)[:, :, np.argsort(np.argsort(ids))]
    known: NDArray[np.bool_] = np.asarray(~np.isnan(precision).all((0, 1)))
    per_class = np.full(len(known), np.nan)
    per_class[known] = precision[:, :, known].mean((0, 1))
    curves = {
        round(float(iou), 2): precision[number][:, known].mean(1) if known.any() else np.zeros(101)
        for number, iou in enumerate(evaluation.params.iouThrs)
    }
    summary = dict(zip(SUMMARY, map(float, evaluation.stats), strict=True))
    return Precision(summary, per_class, curves, _mistakes(evaluation))


def _mistakes(evaluation: Any) -> dict[int, int]:
    mistakes: Counter[int] = Counter()
    everything = evaluation.params.areaRng[0]
    for image in evaluation.evalImgs:
        if image is None or image["aRng"] != everything:
            continue
        missed = (image["gtMatches"][0] == 0) & ~image["gtIgnore"].astype(bool)
        wrong = (image["dtMatches"][0] == 0) & ~image["dtIgnore"][0]
        likely = np.array(image["dtScores"]) >= LIKELY
        mistakes[int(image["image_id"])] += int(missed.sum() + (wrong & likely).sum())
    return dict(mistakes)
