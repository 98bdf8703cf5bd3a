"""mvit-eval: measure a model on labelled videos with several views of each."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.progress import track
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from mvit_video import cli
from mvit_video.bad_videos import BadVideos, allowed_bad_videos
from mvit_video.data.clips import BadVideo
from mvit_video.data.index import VideoIndex, VideoSplits
from mvit_video.errors import ConfigError, DataError
from mvit_video.model import MViT
from mvit_video.report import plot_confusion, print_table
from mvit_video.scoring import VideoScores, score_videos

log = logging.getLogger(__name__)


def main() -> None:
    cli.run(evaluate, "eval")


def evaluate(config: DictConfig) -> None:
    """Score every video of a split once with all its views; print and save the metrics."""
    output = Path(HydraConfig.get().runtime.output_dir)
    if config.split not in ("train", "val"):
        raise ConfigError(f"split is {config.split!r}; it must be train or val")
    cli.check_loading(config)
    allowed_bad_videos(config.max_bad_videos, 0)
    device = cli.choose_device(config.device)
    open_file = cli.build_decoder(config)
    model = cli.build_model(config) if "model" not in config else None
    splits: VideoSplits = cli.build(config.data)
    if model is None:
        model = cli.build_model(config, num_classes=splits.num_classes)
    _check_classes(model, splits.class_names)
    index: VideoIndex = getattr(splits, config.split)

    log.info("%d videos; %s", len(index), model.protocol)
    scores = score_videos(
        model,
        index.videos,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        loader=config.loader,
        device=device,
        open_file=open_file,
    )
    bad = BadVideos(
        output / "bad_videos.csv",
        allowed=allowed_bad_videos(config.max_bad_videos, len(index)),
        total=len(index),
    )
    good = _good_scores(track(scores, "scoring", total=len(index)), bad)
    results = {
        "weights": config.weights,
        "protocol": str(model.protocol),
        "videos": len(good),
        "bad_videos": [video._asdict() for video in bad.found.values()],
        **accuracies(good, splits.num_classes),
    }
    write_scores(good, output / "scores.parquet")
    (output / "results.json").write_text(json.dumps(results, indent=2))
    plot_confusion(confusion(good, splits.num_classes), splits.class_names, output / "confusion.png")
    _print_results(results)
    log.info("results.json, scores.parquet and confusion.png are in %s", output)


def accuracies(scores: Sequence[VideoScores], num_classes: int) -> dict[str, float]:
    """Top-1 and top-5 (or all classes, where there are fewer) of clips and of whole videos, in [0, 1]."""
    top_k = min(5, num_classes)
    metrics = MetricCollection(
        {
            "top1": MulticlassAccuracy(num_classes, average="micro"),
            "top5": MulticlassAccuracy(num_classes, average="micro", top_k=top_k),
        }
    )
    clip_metrics, video_metrics = metrics.clone(prefix="clip_"), metrics.clone(prefix="video_")
    for video in scores:
        label = torch.tensor([video.video.label])
        clip_metrics.update(video.views, label.expand(len(video.views)))
        video_metrics.update(video.mean[None], label)
    computed = {**video_metrics.compute(), **clip_metrics.compute()}
    return {name: float(value) for name, value in computed.items()}


def confusion(scores: Iterable[VideoScores], num_classes: int) -> torch.Tensor:
    """int64 (num_classes, num_classes): videos of class i that were taken for class j."""
    matrix = MulticlassConfusionMatrix(num_classes)
    for video in scores:
        matrix.update(video.mean[None], torch.tensor([video.video.label]))
    return matrix.compute()


def write_scores(scores: Sequence[VideoScores], path: Path) -> None:
    """One row per view: id, path, label, view, start and end in seconds, and the softmax scores."""
    rows = [(video.video, view, *span) for video in scores for view, span in enumerate(video.spans)]
    probabilities = torch.cat([video.views for video in scores])
    columns = {
        "id": [video.id for video, *_ in rows],
        "path": [video.path for video, *_ in rows],
        "label": [video.label for video, *_ in rows],
        "view": [view for _, view, *_ in rows],
        "start": [start for _, _, start, _ in rows],
        "end": [end for *_, end in rows],
        "scores": pa.FixedSizeListArray.from_arrays(probabilities.flatten().numpy(), probabilities.shape[1]),
    }
    pq.write_table(pa.table(columns), path)


def _good_scores(scores: Iterable[VideoScores], bad: BadVideos) -> list[VideoScores]:
    """Note the videos that can't be read, all of them; DataError at the end where there are too many."""
    good: list[VideoScores] = []
    for video in scores:
        if video.error is None:
            good.append(video)
        else:
            bad.note([BadVideo(video.video.path, video.error)])
    bad.check()
    if not good:
        raise DataError("no video could be read")
    return good


def _check_classes(model: MViT, class_names: Sequence[str]) -> None:
    num_classes = model.config.num_classes
    if num_classes != len(class_names):
        raise DataError(f"the weights know {num_classes} classes, the data set has {len(class_names)}")
    for index, (known, named) in enumerate(zip(model.class_names or class_names, class_names, strict=True)):
        if known != named:
            raise DataError(
                f"the weights call class {index} {known!r}, the data set calls it {named!r}; "
                "their lists of classes must be the same, in the same order"
            )


def _print_results(results: dict[str, Any]) -> None:
    rows = [(level, results[f"{level}_top1"], results[f"{level}_top5"]) for level in ("video", "clip")]
    print_table(f"{results['videos']} videos; {results['protocol']}", ("level", "top-1", "top-5"), rows)


if __name__ == "__main__":
    main()
