"""Softmax scores of every view of every video, and how they become one prediction per video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mvit_video.data.index import LabelledVideo
from mvit_video.errors import DataError

Combination = Literal["mean", "max", "logits"]


@dataclass(frozen=True)
class ScoreTable:
    """Scores of N videos with V views each, of C classes.

    Attributes:
        views: float32 (N, V, C), the softmax of each view; the sigmoid where videos may have several classes.
        spans: float64 (N, V, 2), first and last frame of each view in seconds; nan where unknown.
        class_names: C names; labels are positions in them.
        provenance: what the scores came from (weights, views, data, unreadable videos), plain JSON values.
    """

    videos: tuple[LabelledVideo, ...]
    views: Tensor
    spans: Tensor
    class_names: tuple[str, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.videos)

    @property
    def labels(self) -> Tensor:
        """int64 (N,). Raises DataError for a video without a label."""
        for video in self.videos:
            if video.label is None:
                raise DataError(f"{video.id} has scores but no label; give data=... with labels")
        return torch.tensor([video.label for video in self.videos], dtype=torch.int64)

    @property
    def multi_label(self) -> bool:
        """Whether a video may be of several classes."""
        return any(isinstance(video.label, tuple) for video in self.videos)


def combine(views: Tensor, how: Combination, *, multi_label: bool = False) -> Tensor:
    """Softmax scores of views (..., V, C) -> probabilities of videos (..., C).

    "mean" of the softmax scores (published accuracies), "max" (PySlowFast's other choice, scaled to sum to
    1), or "logits": the softmax of the mean of logits, which softmax scores determine up to a constant (as
    long as they don't underflow: 87 below the highest logit). With `multi_label` scores are sigmoids, and
    nothing is scaled.
    """
    if how == "mean":
        return views.mean(-2)
    if how == "max":
        highest = views.amax(-2)
        return highest if multi_label else highest / highest.sum(-1, keepdim=True)
    if multi_label:
        return views.logit(eps=torch.finfo(views.dtype).eps).mean(-2).sigmoid()
    return log_scores(views).mean(-2).softmax(-1)


def log_scores(views: Tensor) -> Tensor:
    """Logits up to a constant; finite for scores of 0."""
    return views.clamp(min=torch.finfo(views.dtype).tiny).log()


def with_labels(table: ScoreTable, videos: Sequence[LabelledVideo], class_names: Sequence[str]) -> ScoreTable:
    """A table with the labels and the order of a data set's ``videos``.

    Raises:
        DataError: a video has a label and no scores (and isn't among the table's unreadable ones), or scores
            and no label.
    """
    excused = {video["id"] for video in table.provenance.get("bad_videos", [])}
    excused -= {video.id for video in table.videos}
    wanted = [video for video in videos if video.id not in excused]
    return replace(_in_order(table, wanted, "scored", "in the data set"), class_names=tuple(class_names))


def aligned(tables: Mapping[str, ScoreTable]) -> dict[str, ScoreTable]:
    """The same videos and classes in the same order in every table; the first one's.

    Raises:
        DataError: their videos, labels or classes differ.
    """
    (first_name, first), *_ = tables.items()
    class_of = {video.id: _class_name(first, video) for video in first.videos}
    result = {}
    for name, table in tables.items():
        if odd := set(table.class_names) ^ set(first.class_names):
            raise DataError(f"{name} and {first_name} have different classes, such as {min(odd)!r}")
        for video in table.videos:
            here, there = _class_name(table, video), class_of.get(video.id)
            if there is not None and here != there:
                raise DataError(f"{video.id} is {here!r} in {name} and {there!r} in {first_name}")
        columns = [table.class_names.index(class_name) for class_name in first.class_names]
        table = _in_order(table, first.videos, f"in {name}", f"in {first_name}")
        result[name] = replace(table, views=table.views[..., columns], class_names=first.class_names)
    return result


def ensemble(tables: Mapping[str, ScoreTable], how: Combination) -> ScoreTable:
    """A table whose "views" are the tables: each one's videos as ``how`` combines them. See ``aligned``."""
    first = next(iter(tables.values()))
    views = torch.stack([combine(t.views, how, multi_label=t.multi_label) for t in tables.values()], dim=1)
    provenance = {
        "weights": "ensemble of " + ", ".join(tables),
        "protocol_text": " + ".join(table.provenance.get("protocol_text", "?") for table in tables.values()),
        "bad_videos": first.provenance.get("bad_videos", []),
    }
    spans = first.spans[:, :1].expand(-1, len(tables), -1)
    return replace(first, views=views, spans=spans, provenance=provenance)


def _in_order(table: ScoreTable, videos: Sequence[LabelledVideo], here: str, there: str) -> ScoreTable:
    row = {video.id: index for index, video in enumerate(table.videos)}
    wanted = {video.id for video in videos}
    for ids, problem in ((wanted - row.keys(), f"{there} but not {here}"), (row.keys() - wanted, None)):
        if ids:
            more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
            named = ", ".join(sorted(ids)[:3])
            raise DataError(f"{named}{more}: {problem or f'{here} but not {there}'}")
    order = [row[video.id] for video in videos]
    return replace(table, videos=tuple(videos), views=table.views[order], spans=table.spans[order])


def _class_name(table: ScoreTable, video: LabelledVideo) -> str | None:
    return None if video.label is None else "; ".join(table.class_names[label] for label in video.labels)
