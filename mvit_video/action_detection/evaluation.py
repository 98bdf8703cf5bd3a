"""One evaluation of key frames, shared by several processes and resumed where a killed one has ended."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvit_video.action_detection.annotations import ActionIndex, KeyFrame, write_boxes
from mvit_video.action_detection.clips import ActionBatch, ActionClips, collate
from mvit_video.action_detection.detector import ActionDetector
from mvit_video.action_detection.metrics import Row, mean_average_precision
from mvit_video.data.datasets import BadVideo, OpenVideo, validation_loader
from mvit_video.data.pixels import finish_clips
from mvit_video.data.ranks import Ranks
from mvit_video.errors import DataError
from mvit_video.evaluation.run import file_identity, resumable
from mvit_video.io.fingerprint import Fingerprint
from mvit_video.io.journal import Entry
from mvit_video.io.pages import data_uri, write_page
from mvit_video.io.writing import write_json
from mvit_video.prediction.prediction import NOT_FINITE

ORDERS = {"ActivityNet": "score", "PySlowFast": "file"}


class Scored(NamedTuple):
    """A key frame, and the scores (boxes, num_classes) of its people."""

    key_frame: KeyFrame
    scores: Tensor

    @property
    def key(self) -> tuple[str, float]:
        return self.key_frame.video, self.key_frame.second


def detections_of(scored: Iterable[Scored], class_ids: Iterable[int]) -> Iterator[Row]:
    """A row for each box and evaluated action; boxes are shares of the picture, as they came."""
    ids = list(class_ids)
    for frame, scores in scored:
        for box, row in zip(frame.boxes, scores.tolist(), strict=True):
            for number in ids:
                yield (frame.video, frame.second, *box, number, row[number - 1])


@torch.inference_mode()
def score_people(
    detector: ActionDetector,
    key_frames: Sequence[KeyFrame],
    *,
    batch_size: int,
    device: str,
    autocast: Any,
    open_file: OpenVideo,
    **loading: Any,
) -> Iterator[tuple[ActionBatch, Tensor]]:
    """Each key frame, in order, with the scores (boxes, num_classes) of its people; none of a bad video.

    Args:
        batch_size: clips of one size that go through the model together.
        autocast: the context that it runs in.
        loading: as of ``ClipLoader``.

    Raises:
        DataError: the model's output isn't finite.
    """
    spec, num_classes = detector.protocol, detector.config.num_classes
    clips = ActionClips(key_frames, spec, num_classes, "test", open_file=open_file, pending=True)
    with closing(validation_loader(clips, list, batch_size=batch_size, **loading)) as loader:
        for samples in loader:
            finished = (sample._replace(clips=finish_clips(sample.clips, device)) for sample in samples)
            for shape, same in groupby(finished, key=lambda sample: sample.clips.shape):
                group = list(same)
                if not math.prod(shape):
                    yield from ((sample, torch.empty(0, num_classes)) for sample in group)
                    continue
                batch = collate(group)
                with autocast:
                    logits = detector(batch.clips, batch.boxes.to(device)).float().cpu()
                if not logits.isfinite().all():
                    raise DataError(f"{batch.paths[0]}: {NOT_FINITE}")
                counts = [len(sample.boxes) for sample in group]
                yield from zip(group, logits.sigmoid().split(counts), strict=True)


def score_index(
    detector: ActionDetector,
    index: ActionIndex,
    output: Path,
    *,
    ranks: Ranks,
    identity: Fingerprint,
    max_bad_videos: float,
    **running: Any,
) -> list[Scored] | None:
    """Score every key frame once.

    Args:
        identity: what the scores depend on.
        running: as of ``score_people``.
        Others, returns and errors: see ``resumable``.
    """
    key_frames = {(frame.video, frame.second): frame for frame in index.key_frames}

    def describe() -> dict[tuple[str, float], Fingerprint]:
        found = {path: file_identity(path) for path in {frame.path for frame in index.key_frames}}
        return {key: found[frame.path] for key, frame in key_frames.items()}

    def score(keys: Sequence[tuple[str, float]]) -> Iterator[Entry | BadVideo]:
        for sample, scores in score_people(detector, [key_frames[key] for key in keys], **running):
            yield from sample.bad
            for frame in sample.key_frames:
                yield {"video": frame.video, "second": frame.second, "scores": scores.tolist()}

    outcome = resumable(
        output,
        identity,
        describe,
        score,
        key=_key,
        ranks=ranks,
        max_bad_videos=max_bad_videos,
        what="key frame",
    )
    if outcome is None:
        return None
    return [Scored(key_frames[_key(entry)], torch.tensor(entry["scores"])) for entry in outcome.entries]


def _key(entry: Entry) -> tuple[str, float]:
    return entry["video"], float(entry["second"])


def report(
    scored: Sequence[Scored],
    index: ActionIndex,
    names: Mapping[int, str],
    output: Path,
    *,
    settings: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Write detections.csv, and where actions are known results.json, per_class.png and report.html.

    Returns:
        What results.json holds, or None.
    """
    from mvit_video.evaluation.report import plot_per_class  # which imports matplotlib

    write_boxes(output / "detections.csv", detections_of(scored, names))
    if not index.ground_truth:
        return None
    found: dict[str, Any] = {}
    for evaluator, order in ORDERS.items():
        mean, precisions = mean_average_precision(
            index.ground_truth,
            detections_of(scored, names),
            class_ids=names,
            excluded=index.excluded,
            order=order,  # type: ignore[arg-type]
        )
        found[evaluator] = {"mAP": mean, "per_class": {names[k]: v for k, v in precisions.items()}}
    results = {"key_frames": len(scored), "evaluators": found, **settings}
    # JSON has no word for NaN.
    told = {
        name: one | {"mAP": None if math.isnan(one["mAP"]) else one["mAP"]} for name, one in found.items()
    }
    write_json(output / "results.json", results | {"evaluators": told})
    per_class = found["PySlowFast"]["per_class"]
    rows = sorted(((n, v) for n, v in per_class.items() if v is not None), key=lambda row: row[1])
    mean = found["PySlowFast"]["mAP"]
    plot_per_class(output / "per_class.png", rows, mean, "average precision at IoU 0.5", "mean")
    picture = data_uri((output / "per_class.png").read_bytes())
    template, page = Path(__file__).with_name("report.html"), output / "report.html"
    write_page(template, page, results=results, classes=rows[::-1], picture=picture)
    return results
