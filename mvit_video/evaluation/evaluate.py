"""An evaluation from Python."""

from __future__ import annotations

from pathlib import Path

import torch

from mvit_video.data.class_names import check_same_classes
from mvit_video.data.decode import open_video
from mvit_video.data.index import VideoIndex
from mvit_video.evaluation.classes import require_same_kind
from mvit_video.evaluation.metrics import Metrics, MultiLabelMetrics
from mvit_video.evaluation.provenance import provenance_of
from mvit_video.evaluation.results import report
from mvit_video.evaluation.run import remove_journals, score_data_set
from mvit_video.evaluation.score_files import write_scores
from mvit_video.evaluation.scores import Combination
from mvit_video.io.writing import sole_writer
from mvit_video.model import VideoModel
from mvit_video.model.variants import change_views


def evaluate(
    model: VideoModel,
    videos: VideoIndex,
    output: str | Path,
    *,
    num_clips: int | None = None,
    num_crops: int | None = None,
    combine: Combination = "mean",
    batch_size: int = 8,
    num_workers: int = 2,
    device: str | torch.device = "cpu",
    max_bad_videos: float = 0.0,
) -> Metrics | MultiLabelMetrics:
    """Measure a model on labelled videos with several views of each, as ``mvit-eval`` does.

    What an interrupted call has scored in ``output`` counts. In the end it holds ``scores.parquet``,
    ``results.json`` and ``report.html``.

    Args:
        videos: with labels, such as ``folder_splits(root).val``.
        num_clips, num_crops: views of a video, such as 5 and 1; None: those of ``model.protocol``.
        combine: how views become one prediction, see ``scores.combine``.
        batch_size: clips at once.
        max_bad_videos: how many may be unreadable, below 1 a share of all.

    Returns:
        The metrics; MultiLabelMetrics, average precisions, where a video may be of several classes.

    Raises:
        ConfigError: ``output`` holds an unfinished evaluation of something else, or ``model`` is of one class
            a video and ``videos`` of several, or vice versa.
        DataError: classes differ, too many videos are unreadable, or the model gives NaN.
    """
    output = Path(output).expanduser().resolve()
    require_same_kind(model, videos.multi_label, class_map=False)
    check_same_classes(model.class_names, model.config.num_classes, videos.class_names)
    own = model.protocol
    model.protocol = change_views(own, num_clips=num_clips, num_crops=num_crops)
    try:
        settings = dict.fromkeys(("class_map", "model_classes", "decoder", "split", "data"))
        with sole_writer(output):
            table = score_data_set(
                model,
                videos,
                output,
                provenance=provenance_of(model, "given in Python", **settings),
                max_bad_videos=max_bad_videos,
                combination=combine,
                batch_size=batch_size,
                num_workers=num_workers,
                device=device,
            )
            assert table is not None  # of one process
            write_scores(table, output / "scores.parquet")
            metrics = report({"": table}, output, how=combine, seed=0, num_mistakes=12, open_file=open_video)
            assert metrics is not None  # of one table
            remove_journals(output)
            return metrics
    finally:
        model.protocol = own
