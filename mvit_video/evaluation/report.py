"""The page of an evaluation and its figures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from av.error import FFmpegError
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from mvit_video.data.datasets import OpenVideo
from mvit_video.data.pixels import resize_bytes
from mvit_video.errors import VideoError
from mvit_video.evaluation.metrics import Confusion, Metrics, most_confused, reliability, worst_mistakes
from mvit_video.evaluation.scores import ScoreTable
from mvit_video.io.clips import write_clip
from mvit_video.io.console import printable
from mvit_video.io.figures import new_figure
from mvit_video.io.pages import data_uri, write_page

_MAX_NAMED_CLASSES = 60  # more names than this don't fit beside a matrix or below bars
_MAX_COUNTED_CLASSES = 20  # more numbers than this don't fit into a matrix
_LISTED_PAIRS = 20
_STRIP_FRAMES, _STRIP_HEIGHT = 6, 96  # of a worst mistake; pixels
_CLIP_FRAMES, _CLIP_HEIGHT = 16, 160

_BLUE, _RED, _GRAY = "#2f6db5", "#c0392b", "#888888"


def write_report(
    folder: Path,
    table: ScoreTable,
    metrics: Metrics,
    *,
    results: Mapping[str, Any],
    num_mistakes: int,
    open_file: OpenVideo | None,
) -> None:
    """Write report.html, which needs no other file, and its figures as PNGs beside it.

    Args:
        results: what results.json holds; shown as it is.
        num_mistakes: how many of the worst mistakes to show; with frames, where ``open_file`` is given.
    """
    names = table.class_names
    pairs = most_confused(metrics.confusion, names, _LISTED_PAIRS)
    per_class = sorted(results["per_class"].items(), key=lambda row: row[1]["top1"])
    titles = {
        "confusion": "Confusion matrix",
        "per_class": "Accuracy of each class",
        "calibration": "Calibration",
        "views": "Accuracy against the number of views",
    }
    _plot_confusion(folder / "confusion.png", metrics.confusion, names, pairs)
    accuracies = [(name, row["top1"]) for name, row in per_class]
    mean = metrics.mean_class_accuracy
    plot_per_class(folder / "per_class.png", accuracies, mean, "top-1 accuracy", "mean class accuracy")
    _plot_calibration(folder / "calibration.png", metrics)
    _plot_views(folder / "views.png", metrics.by_views, len(metrics.labels))
    confused = list(dict.fromkeys(name for pair in pairs for name in (pair.true, pair.predicted)))
    if len(names) > _MAX_NAMED_CLASSES and confused:
        confused = confused[:_MAX_NAMED_CLASSES]
        chosen = [names.index(name) for name in confused]
        _plot_confusion(folder / "confusion_part.png", metrics.confusion[chosen][:, chosen], confused, ())
        titles["confusion_part"] = "The classes that are most confused"
    mistakes: list[dict[str, Any]] = [
        {
            "video": table.videos[row].id,
            "true": names[metrics.labels[row]],
            "predicted": names[metrics.scores[row].argmax()],
            "confidence": float(metrics.scores[row].max()),
            "true_score": float(metrics.scores[row, metrics.labels[row]]),
            "strip": None,
            "clip": None,
            **(
                frames_of(table.videos[row].path, most_wrong_view(table, row), open_file) if open_file else {}
            ),
        }
        for row in worst_mistakes(metrics.scores, metrics.labels, num_mistakes)
    ]
    if any(mistake["strip"] for mistake in mistakes):
        _plot_mistakes(folder / "worst_mistakes.png", mistakes)
    for mistake in mistakes:
        for what, kind in (("strip", "image/jpeg"), ("clip", "video/mp4")):
            mistake[what] = mistake[what] and data_uri(mistake[what], kind)
    _render(folder, titles, results=results, pairs=pairs, classes=per_class, mistakes=mistakes)


def write_multi_label_report(folder: Path, *, results: Mapping[str, Any]) -> None:
    """Write report.html of average precisions, and per_class.png."""
    per_class = sorted(results["per_class"].items(), key=lambda row: row[1]["average_precision"])
    precisions = [(name, row["average_precision"]) for name, row in per_class]
    plot_per_class(folder / "per_class.png", precisions, results["map"], "average precision", "mean")
    _render(folder, {"per_class": "Average precision of each class"}, results=results, classes=per_class)


def write_comparison(
    folder: Path, class_names: Sequence[str], measured: Mapping[str, Metrics], *, results: Mapping[str, Any]
) -> None:
    """Write report.html on several models' scores of the same videos, and comparison.png."""
    _plot_comparison(folder / "comparison.png", measured, class_names)
    differences = []
    for comparison in results["comparisons"]:
        found = [row for row in comparison["per_class"].items() if row[1]]
        found.sort(key=lambda row: -abs(row[1]))
        differences.append({**comparison, "classes": found[:_LISTED_PAIRS]})
    titles = {"comparison": "Accuracy of each class"}
    _render(folder, titles, results=results, comparisons=results["comparisons"], differences=differences)


def most_wrong_view(table: ScoreTable, row: int) -> tuple[float, float]:
    """Seconds that the view spans whose wrong class leads the right one by most; nan where unknown."""
    views = table.views[row]
    lead = views.max(-1).values - views[:, table.labels[row]]
    start, end = table.spans[row, lead.argmax()].tolist()
    return start, end


def frames_of(path: str, span: tuple[float, float], open_file: OpenVideo) -> dict[str, bytes]:
    """What is shown of a video: a strip of the whole of it, and a clip that plays; {} if it can't be read.

    - strip: JPEG of ``_STRIP_FRAMES`` frames, evenly spaced, side by side.
    - clip: MP4 of ``_CLIP_FRAMES`` frames, evenly spaced in ``span`` (seconds), as fast as they were.
    """
    try:
        with open_file(path) as video:
            first, final = 0, (last := video.num_frames - 1)
            if all(map(isfinite, span)):
                first, final = (min(round(second * video.fps), last) for second in span)
            if final <= first:  # of a still, or where no view has a length
                first, final = 0, last
            strip, clip = _spaced(0, last, _STRIP_FRAMES), _spaced(first, final, _CLIP_FRAMES)
            small, larger = (
                video.get_frames(numbers, transform=partial(_resized, height=height)).cpu()
                for numbers, height in ((strip, _STRIP_HEIGHT), (clip, _CLIP_HEIGHT))
            )
            rate = len(clip) * video.fps / (final - first + 1)
    except VideoError:
        return {}
    shown = {"strip": _strip(small)}
    with suppress(FFmpegError, ValueError):  # H.264 can't hold such frames, or FFmpeg lacks it
        write_clip(encoded := io.BytesIO(), larger.permute(0, 2, 3, 1).numpy(), rate, crf="26")
        shown["clip"] = encoded.getvalue()
    return shown


def _spaced(first: int, last: int, count: int) -> list[int]:
    return sorted({round(first + (last - first) * i / (count - 1)) for i in range(count)})


def _strip(frames: Tensor) -> bytes:
    picture = F.pad(frames, (0, 2), value=255).permute(2, 0, 3, 1).flatten(1, 2)  # (H, T * (W + 2), 3)
    buffer = io.BytesIO()
    Image.fromarray(picture.numpy()).save(buffer, "jpeg", quality=85)
    return buffer.getvalue()


def _resized(frames: Tensor, height: int) -> Tensor:
    return resize_bytes(frames, height, max(round(frames.shape[3] * height / frames.shape[2]), 2), "bilinear")


# Figures


def _plot_confusion(
    path: Path, counts: Tensor, class_names: Sequence[str], pairs: Sequence[Confusion]
) -> None:
    """``counts[i, j]`` videos of class i were predicted as class j; rows shown as shares.

    ``pairs`` are named beside the matrix, and ringed and numbered where cells have no counts.
    """
    num_classes = len(class_names)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    named = num_classes <= _MAX_NAMED_CLASSES
    labels = [_short(name, 28) for name in class_names] if named else []
    beside = 0.09 * max(map(len, labels), default=0)  # inches that names take at the left and below
    size = min(max(4.0, 0.45 * num_classes), 14.0) if named else 9.0  # inches, without the names
    list_width = 6.5 if pairs else 0.01
    with new_figure(path, (size + beside + 1.5 + list_width, size + beside + 0.5)) as figure:
        axes, text_axes = figure.subplots(1, 2, width_ratios=(size + beside + 1.5, list_width))
        text_axes.axis("off")
        # Few of many classes are confused: the square root makes small shares visible.
        norm = PowerNorm(1 if named else 0.5, vmin=0, vmax=1)
        image = axes.imshow(shares.numpy(), cmap="Blues", norm=norm)
        figure.colorbar(image, ax=axes, label="share of the class", fraction=0.04, pad=0.01)
        axes.set(xlabel="predicted", ylabel="true")
        if named:
            axes.set_xticks(range(num_classes), labels, rotation=90)
            axes.set_yticks(range(num_classes), labels)
        if num_classes <= _MAX_COUNTED_CLASSES:
            for i, j in counts.nonzero().tolist():
                colour = "white" if shares[i, j] > 0.5 else "black"
                axes.text(j, i, str(int(counts[i, j])), ha="center", va="center", color=colour)
        taken: list[tuple[float, float]] = []
        lines = ["most confused (true → predicted)\n"] if pairs else []
        for number, pair in enumerate(pairs, start=1):
            lines.append(
                f"{number}. {_short(pair.true, 36)} → {_short(pair.predicted, 36)}: "
                f"{pair.videos} ({pair.share:.0%})"
            )
            if num_classes > _MAX_COUNTED_CLASSES:
                x, y = class_names.index(pair.predicted), class_names.index(pair.true)
                axes.scatter(x, y, s=90, facecolors="none", edgecolors=_RED, linewidths=1)
                if _take((x / num_classes, y / num_classes), taken, 0.04, 0.03):
                    offset: Any = {"xytext": (6, 4), "textcoords": "offset points"}
                    axes.annotate(str(number), (x, y), color=_RED, fontsize=9, **offset)
        text_axes.text(0, 1, "\n".join(lines), va="top", fontsize=9, linespacing=1.6)


def plot_per_class(
    path: Path, values: Sequence[tuple[str, float]], mean: float, what: str, mean_is: str
) -> None:
    """Bars by class, worst first; of many classes the worst and the best."""
    half, rows = _MAX_NAMED_CLASSES // 2, list(values)
    cut = len(rows) > _MAX_NAMED_CLASSES
    if cut:
        rows = rows[:half] + rows[-half:]
    with new_figure(path, (9, 1.5 + 0.2 * len(rows))) as figure:
        axes = figure.subplots()
        colours = [_RED] * half + [_BLUE] * half if cut else _BLUE
        axes.barh(range(len(rows)), [value for _, value in rows], color=colours, height=0.7)
        axes.set_yticks(range(len(rows)), [_short(name, 40) for name, _ in rows], fontsize=8)
        axes.axvline(mean, color=_GRAY, linestyle="--", linewidth=1, label=mean_is)
        axes.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6), xlabel=what)
        if cut:
            axes.set_title(f"the {half} worst and the {half} best of {len(values)} classes")
        figure.legend(loc="outside lower right")


def _plot_calibration(path: Path, metrics: Metrics) -> None:
    bins = reliability(metrics.scores, metrics.labels)
    confidences = [b.confidence for b in bins]
    with new_figure(path, (5, 5.5)) as figure:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        _draw_diagonal(axes)
        axes.plot(confidences, [b.accuracy for b in bins], marker="o", color=_BLUE)
        axes.set(xlim=(0, 1), ylim=(-0.02, 1.02), ylabel="top-1 accuracy")
        axes.set_title(f"expected calibration error {metrics.calibration_error:.4f}")
        below.bar(confidences, [b.videos for b in bins], width=0.04, color=_BLUE)
        below.set(xlabel="confidence", ylabel="videos")


def _plot_views(path: Path, by_views: Sequence[float], num_videos: int) -> None:
    """Top-1 against the number of views, at a scale on which two videos are no trend."""
    middle = (min(by_views) + max(by_views)) / 2
    reach = max(0.6 * (max(by_views) - min(by_views)), 0.03, 3 / num_videos)
    with new_figure(path, (5.5, 4)) as figure:
        axes = figure.subplots()
        axes.plot(range(1, len(by_views) + 1), by_views, marker="o", color=_BLUE)
        axes.set(xlabel="views of a video (random ones)", ylabel="top-1 accuracy")
        axes.set(ylim=(max(middle - reach, -0.02), min(middle + reach, 1.02)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)


def _plot_mistakes(path: Path, mistakes: Sequence[Mapping[str, Any]]) -> None:
    shown = [mistake for mistake in mistakes if mistake["strip"]]
    with new_figure(path, (9, 1.9 * len(shown))) as figure:
        for axes, mistake in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
            axes.imshow(Image.open(io.BytesIO(mistake["strip"])))
            axes.axis("off")
            text = "{video}: {true} → {predicted} ({confidence:.2f})".format(**mistake)
            axes.set_title(printable(text), fontsize=9)


def _plot_comparison(path: Path, measured: Mapping[str, Metrics], class_names: Sequence[str]) -> None:
    """Each class's accuracy with the first model against that with the others."""
    (first_name, first), *others = measured.items()
    with new_figure(path, (6.5, 6)) as figure:
        axes = figure.subplots()
        _draw_diagonal(axes)
        taken: list[tuple[float, float]] = []
        for name, metrics in others:
            axes.scatter(first.per_class, metrics.per_class, s=18, alpha=0.6, label=printable(name))
            gain = (metrics.per_class - first.per_class).nan_to_num(0)
            for index in gain.abs().topk(min(8, len(class_names))).indices.tolist():
                point = (float(first.per_class[index]), float(metrics.per_class[index]))
                if gain[index] and _take(point, taken, 0.4, 0.03):
                    left = point[0] > 0.5  # of the point, lest the name leaves the figure
                    label = _short(class_names[index], 36)
                    offset: Any = {"xytext": (-4 if left else 4, 3), "textcoords": "offset points"}
                    axes.annotate(label, point, fontsize=7, ha="right" if left else "left", **offset)
        axes.set(xlabel=f"top-1 of each class, {printable(first_name)}")
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), ylabel="top-1 of each class, the others")
        figure.legend(loc="outside upper left")


def _short(name: str, length: int) -> str:
    """A name for a figure: of a long one the middle is left out, as names often differ at the end."""
    name = printable(name)
    return name if len(name) <= length else f"{name[: length // 2]}…{name[-(length // 2 - 1) :]}"


def _take(point: tuple[float, float], taken: list[tuple[float, float]], width: float, height: float) -> bool:
    """Whether a label of a size is clear of those at points that are taken; then it takes its own."""
    is_free = all(abs(x - point[0]) >= width or abs(y - point[1]) >= height for x, y in taken)
    taken += [point] * is_free
    return is_free


def _draw_diagonal(axes: Axes) -> None:
    axes.plot([0, 1], [0, 1], color=_GRAY, linestyle="--", linewidth=1)
    axes.grid(alpha=0.3)


# The page


def _render(folder: Path, titles: Mapping[str, str], **values: Any) -> None:
    figures = {
        name: {"title": title, "uri": data_uri((folder / f"{name}.png").read_bytes())}
        for name, title in titles.items()
    }
    write_page(Path(__file__).with_name("report.html"), folder / "report.html", figures=figures, **values)
