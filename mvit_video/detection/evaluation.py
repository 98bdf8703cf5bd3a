"""One evaluation of labelled images: by several processes, and resumed where a killed one has ended."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import box_convert

from mvit_video.data.datasets import BadVideo
from mvit_video.data.ranks import Ranks
from mvit_video.detection.coco import CocoImages, load_objects, summary
from mvit_video.detection.data import TestImages, whole_image_loader
from mvit_video.detection.detector import Detector
from mvit_video.detection.drawing import as_png, draw_objects, grid
from mvit_video.detection.metrics import LIKELY, ImageResult, Precision, measure, to_result
from mvit_video.errors import DataError, VideoError
from mvit_video.evaluation.run import file_identity, resumable
from mvit_video.io.console import printable
from mvit_video.io.figures import new_figure
from mvit_video.io.fingerprint import Fingerprint
from mvit_video.io.journal import Entry
from mvit_video.io.pages import data_uri, write_page
from mvit_video.io.writing import replacing, write_json
from mvit_video.prediction.prediction import NOT_FINITE

log = logging.getLogger(__name__)

CURVE_IOUS = (0.5, 0.75, 0.9)


def detect_in_images(
    detector: Detector,
    coco: CocoImages,
    output: Path,
    *,
    ranks: Ranks,
    identity: Fingerprint,
    max_bad_videos: float,
    device: str,
    autocast: Any,
    **loading: Any,
) -> list[ImageResult] | None:
    """Detect the objects of every image once.

    Args:
        identity: what the detections depend on.
        autocast: the context that the detector runs in.
        loading: as of ``ClipLoader``.
        Others, returns and errors: see ``resumable``.
    """
    images = {image.id: image for image in coco.images}
    short_side, max_side = detector.config.min_size, detector.config.max_size

    def detect(ids: Sequence[int]) -> Iterator[Entry | BadVideo]:
        dataset = TestImages([images[number] for number in ids], short_side=short_side, max_side=max_side)
        with closing(whole_image_loader(dataset, **loading)) as loader:
            for batch in loader:
                yield from batch.bad
                if batch.images:
                    try:
                        with torch.inference_mode(), autocast:
                            (found,) = detector([batch.images[0].to(device)], output_sizes=batch.sizes)
                    except FloatingPointError:
                        raise DataError(f"{batch.paths[0]}: {NOT_FINITE}") from None
                    yield to_result(batch.ids[0], batch.sizes[0], found, coco.category_ids)._asdict()

    outcome = resumable(
        output,
        identity,
        lambda: {number: file_identity(image.path) for number, image in images.items()},
        detect,
        key=itemgetter("image_id"),
        ranks=ranks,
        max_bad_videos=max_bad_videos,
        what="image",
    )
    if outcome is None:
        return None
    return [ImageResult(*(entry[name] for name in ImageResult._fields)) for entry in outcome.entries]


def report(
    coco: CocoImages,
    results: Sequence[ImageResult],
    output: Path,
    *,
    settings: Mapping[str, Any],
    num_worst: int,
) -> dict[str, Precision] | None:
    """Write detections.json, and where there are objects results.json, report.html and its pictures.

    Args:
        settings: what results.json says beside the figures.
        num_worst: how many of the images with most mistakes to show.
    """
    with replacing(output / "detections.json", "w") as file:
        json.dump([row for result in results for row in result.detections], file)
    if not any(image.annotations for image in coco.images):
        log.info("images without objects: only detections.json is written, in %s", output)
        return None
    measured, counts = measure(coco, results), summary(coco)["objects"]
    told = {**settings, "images": len(results), "objects": sum(counts.values())}
    told |= {
        kind: {name: None if value < 0 else value for name, value in precision.summary.items()}
        for kind, precision in measured.items()
    }
    per_class = {
        name: {kind: float(precision.per_class[label]) for kind, precision in measured.items()}
        for label, name in enumerate(coco.class_names)
    }
    told["per_class"] = {
        name: {"objects": counts[name]}
        | {f"{kind}_AP": None if math.isnan(value) else value for kind, value in row.items()}
        for name, row in per_class.items()
    }
    told["problems"] = [problem._asdict() for problem in coco.problems]
    write_json(output / "results.json", told)
    classes = [(printable(name), *row.values()) for name, row in per_class.items()]
    write_page(
        Path(__file__).with_name("report.html"),
        output / "report.html",
        settings={key: str(value) for key, value in settings.items()},
        images=len(results),
        measured={kind: precision.summary for kind, precision in measured.items()},
        figures=list(_figures(measured, output)),
        classes=sorted(classes, key=lambda row: (math.isnan(row[1]), row[1])),
        pictures=list(_worst(coco, results, measured["box"].mistakes, num_worst)),
    )
    return measured


def _figures(measured: Mapping[str, Precision], output: Path) -> Iterator[dict[str, str]]:
    for kind, precision in measured.items():
        with new_figure(curves := output / f"{kind}_curves.png", (5.5, 4)) as figure:
            axes = figure.subplots()
            for iou in CURVE_IOUS:
                axes.plot([i / 100 for i in range(101)], precision.curves[iou], label=f"IoU {iou:g}")
            axes.set(xlabel="recall", ylabel="precision (mean of the classes)", xlim=(0, 1), ylim=(0, 1.02))
            axes.legend(loc="lower left")
            axes.grid(alpha=0.3)
        yield {"title": f"Precision of each {kind}", "uri": data_uri(curves.read_bytes())}


def _worst(
    coco: CocoImages, results: Sequence[ImageResult], mistakes: Mapping[int, int], most: int
) -> Iterator[dict[str, Any]]:
    """Images with mistakes that aren't gone: their objects on the left, likely detections on the right."""
    listed = {image.id: image for image in coco.images}
    wrong = [result for result in results if mistakes.get(result.image_id)]
    for result in sorted(wrong, key=lambda result: -mistakes[result.image_id])[:most]:
        try:
            image, target = load_objects(listed[result.image_id]).target()
        except VideoError:
            continue
        rows = [row for row in result.detections if row["score"] >= LIKELY]
        found = draw_objects(
            image,
            box_convert(torch.tensor([row["bbox"] for row in rows]).reshape(-1, 4), "xywh", "xyxy"),
            torch.tensor([coco.category_ids.index(row["category_id"]) for row in rows]),
            [row["segmentation"] for row in rows],
            coco.class_names,
            torch.tensor([row["score"] for row in rows]),
        )
        truth = draw_objects(image, target["boxes"], target["labels"], target["masks"], coco.class_names)
        yield {
            "name": printable(Path(listed[result.image_id].path).name),
            "mistakes": mistakes[result.image_id],
            "uri": data_uri(as_png(grid([truth, found], columns=2))),
        }
