"""The page of an evaluation and its figures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch.nn.functional as F
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from mvit_video.data.datasets import OpenVideo
from mvit_video.errors import VideoError
from mvit_video.evaluation.metrics import Confusion, Metrics, most_confused, reliability
from mvit_video.io.console import printable
from mvit_video.io.writing import replacing

MAX_NAMED_CLASSES = 60  # more names than this don't fit beside a matrix or below bars
MAX_COUNTED_CLASSES = 20  # more numbers than this don't fit into a matrix
LISTED_PAIRS = 20
STRIP_FRAMES, STRIP_HEIGHT = 6, 96  # of a worst mistake; pixels

_BLUE, _RED, _GRAY = "#2f6db5", "#c0392b", "#888888"


@dataclass(frozen=True)
class Mistake:
    """A video that was predicted as another class, and a strip of its frames (JPEG), where there is one."""

    video: str
    true: str
    predicted: str
    confidence: float
    true_score: float
    strip: bytes | None


def frame_strip(path: str, open_file: OpenVideo) -> bytes | None:
    """JPEG of ``STRIP_FRAMES`` frames of a video, evenly spaced, side by side; None if it can't be read."""
    try:
        with open_file(path) as video:
            last = video.num_frames - 1
            numbers = sorted({round(last * i / (STRIP_FRAMES - 1)) for i in range(STRIP_FRAMES)})
            frames = video.get_frames(numbers).cpu().float()  # (T, 3, H, W)
    except VideoError:
        return None
    width = max(round(frames.shape[3] * STRIP_HEIGHT / frames.shape[2]), 1)
    frames = F.interpolate(frames, size=(STRIP_HEIGHT, width), mode="bilinear", antialias=True)
    picture = F.pad(frames, (0, 2), value=255).permute(2, 0, 3, 1).flatten(1, 2)  # (H, T * (W + 2), 3)
    buffer = io.BytesIO()
    Image.fromarray(picture.round().clamp(0, 255).byte().numpy()).save(buffer, "jpeg", quality=85)
    return buffer.getvalue()


def write_report(
    folder: Path,
    metrics: Metrics,
    class_names: Sequence[str],
    *,
    results: Mapping[str, Any],
    mistakes: Sequence[Mistake],
) -> None:
    """Write report.html, which needs no other file, and its figures as PNGs beside it.

    Args:
        results: what results.json holds; shown as it is.
    """
    pairs = most_confused(metrics.confusion, class_names, LISTED_PAIRS)
    per_class = sorted(results["per_class"].items(), key=lambda row: row[1]["top1"])
    figures = {
        "confusion": ("Confusion matrix", plot_confusion(metrics.confusion, class_names, pairs)),
        "per_class": ("Accuracy of each class", plot_per_class(per_class, metrics.mean_class_accuracy)),
        "calibration": ("Calibration", plot_calibration(metrics)),
        "views": ("Accuracy against the number of views", plot_views(metrics.by_views)),
    }
    confused = list(dict.fromkeys(name for pair in pairs for name in (pair.true, pair.predicted)))
    if len(class_names) > MAX_NAMED_CLASSES and confused:
        confused = confused[:MAX_NAMED_CLASSES]
        chosen = [class_names.index(name) for name in confused]
        part = plot_confusion(metrics.confusion[chosen][:, chosen], confused, ())
        figures["confusion_part"] = ("The classes that are most confused", part)
    if any(mistake.strip for mistake in mistakes):
        figures["worst_mistakes"] = ("Worst mistakes", plot_mistakes(mistakes))
    _render(
        folder / "report.html",
        results=results,
        figures=_save(figures, folder),
        pairs=pairs,
        classes=per_class,
        mistakes=[{**vars(m), "strip": _data_uri(m.strip, "jpeg") if m.strip else None} for m in mistakes],
    )


def write_comparison(
    folder: Path, class_names: Sequence[str], measured: Mapping[str, Metrics], *, results: Mapping[str, Any]
) -> None:
    """Write report.html on several models' scores of the same videos, and comparison.png."""
    figures = {"comparison": ("Accuracy of each class", plot_comparison(measured, class_names))}
    differences = []
    for comparison in results["comparisons"]:
        found = [row for row in comparison["per_class"].items() if row[1]]
        found.sort(key=lambda row: -abs(row[1]))
        differences.append({**comparison, "classes": found[:LISTED_PAIRS]})
    _render(
        folder / "report.html",
        results=results,
        figures=_save(figures, folder),
        comparisons=results["comparisons"],
        differences=differences,
    )


# Figures


def plot_confusion(counts: Tensor, class_names: Sequence[str], pairs: Sequence[Confusion]) -> Figure:
    """``counts[i, j]`` videos of class i were predicted as class j; rows shown as shares.

    ``pairs`` are named beside the matrix, and ringed where cells have no numbers.
    """
    num_classes = len(class_names)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    named = num_classes <= MAX_NAMED_CLASSES
    size = min(max(4.0, 0.45 * num_classes), 14.0) if named else 9.0  # inches, without the names
    figure = Figure(figsize=(size + 3 + 5 * bool(pairs), size + 2.5 * named), layout="constrained")
    axes, text_axes = figure.subplots(1, 2, width_ratios=(size, 5 if pairs else 0.01))
    text_axes.axis("off")
    # Few of many classes are confused: the square root makes small shares visible.
    norm = PowerNorm(1 if named else 0.5, vmin=0, vmax=1)
    image = axes.imshow(shares.numpy(), cmap="Blues", norm=norm)
    figure.colorbar(image, ax=axes, label="share of the class", fraction=0.04, pad=0.01)
    axes.set(xlabel="predicted", ylabel="true")
    if named:
        labels = [_plain(name) for name in class_names]
        axes.set_xticks(range(num_classes), labels, rotation=90)
        axes.set_yticks(range(num_classes), labels)
    if num_classes <= MAX_COUNTED_CLASSES:
        for i, j in counts.nonzero().tolist():
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(int(counts[i, j])), ha="center", va="center", color=colour)
    if pairs:
        position = {name: index for index, name in enumerate(class_names)}
        where = [(position[pair.predicted], position[pair.true]) for pair in pairs]
        columns, rows = zip(*where, strict=True)
        if num_classes > MAX_COUNTED_CLASSES:
            axes.scatter(columns, rows, s=90, facecolors="none", edgecolors=_RED, linewidths=1)
        if not named:
            for number, (x, y) in enumerate(where, start=1):
                axes.annotate(str(number), (x, y), (6, 4), textcoords="offset points", color=_RED, fontsize=9)
        lines = [
            f"{number}. {_plain(pair.true)} → {_plain(pair.predicted)}: {pair.videos} ({pair.share:.0%})"
            for number, pair in enumerate(pairs, start=1)
        ]
        text = "most confused (true → predicted)\n\n" + "\n".join(lines)
        text_axes.text(0, 1, text, va="top", fontsize=9, linespacing=1.6)
    return figure


def plot_per_class(per_class: Sequence[tuple[str, Mapping[str, Any]]], mean: float) -> Figure:
    """Bars of top-1 by class, worst first; of many classes the worst and the best."""
    known = [(row["top1"], _plain(name)) for name, row in per_class]
    cut = len(known) > MAX_NAMED_CLASSES
    half = MAX_NAMED_CLASSES // 2
    rows = known[:half] + known[-half:] if cut else known
    figure = Figure(figsize=(9, 1.5 + 0.2 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colours = [_RED] * half + [_BLUE] * half if cut else _BLUE
    axes.barh(range(len(rows)), [accuracy for accuracy, _ in rows], color=colours, height=0.7)
    axes.set_yticks(range(len(rows)), [name for _, name in rows], fontsize=8)
    axes.axvline(mean, color=_GRAY, linestyle="--", linewidth=1, label="mean class accuracy")
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6), xlabel="top-1 accuracy")
    if cut:
        axes.set_title(f"the {half} worst and the {half} best of {len(known)} classes")
    axes.legend(loc="lower right")
    return figure


def plot_calibration(metrics: Metrics) -> Figure:
    """Accuracy against confidence in bins, and how many videos each bin has."""
    bins = reliability(metrics.scores, metrics.labels)
    figure = Figure(figsize=(5, 5.5), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot([0, 1], [0, 1], color=_GRAY, linestyle="--", linewidth=1)
    axes.plot([b.confidence for b in bins], [b.accuracy for b in bins], marker="o", color=_BLUE)
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="top-1 accuracy")
    axes.set_title(f"expected calibration error {metrics.calibration_error:.4f}")
    axes.grid(alpha=0.3)
    below.bar([b.confidence for b in bins], [b.videos for b in bins], width=0.04, color=_BLUE)
    below.set(xlabel="confidence", ylabel="videos")
    return figure


def plot_views(by_views: Sequence[float]) -> Figure:
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(by_views) + 1), by_views, marker="o", color=_BLUE)
    axes.set(xlabel="views of a video (random ones)", ylabel="top-1 accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    return figure


def plot_mistakes(mistakes: Sequence[Mistake]) -> Figure:
    """The strips of the worst mistakes below each other."""
    shown = [mistake for mistake in mistakes if mistake.strip]
    figure = Figure(figsize=(9, 1.9 * len(shown)), layout="constrained")
    for axes, mistake in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
        assert mistake.strip is not None
        axes.imshow(Image.open(io.BytesIO(mistake.strip)))
        axes.axis("off")
        text = f"{mistake.video}: {mistake.true} → {mistake.predicted} ({mistake.confidence:.2f})"
        axes.set_title(_plain(text), fontsize=9)
    return figure


def plot_comparison(measured: Mapping[str, Metrics], class_names: Sequence[str]) -> Figure:
    """Each class's accuracy with the first model against that with the others."""
    (first_name, first), *others = measured.items()
    figure = Figure(figsize=(6.5, 6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=_GRAY, linestyle="--", linewidth=1)
    for name, metrics in others:
        axes.scatter(first.per_class, metrics.per_class, s=18, alpha=0.6, label=_plain(name))
        gain = (metrics.per_class - first.per_class).nan_to_num(0)
        for index in gain.abs().topk(min(8, len(class_names))).indices.tolist():
            if gain[index]:
                point = (float(first.per_class[index]), float(metrics.per_class[index]))
                axes.annotate(
                    _plain(class_names[index]), point, (3, 3), textcoords="offset points", fontsize=7
                )
    axes.set(xlabel=f"top-1 of each class, {_plain(first_name)}", ylabel="top-1 of each class, the others")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    return figure


def _plain(text: str) -> str:
    return printable(text).replace("$", r"\$")  # or matplotlib reads it as a formula


def _save(figures: Mapping[str, tuple[str, Figure]], folder: Path) -> dict[str, dict[str, str]]:
    saved = {}
    for name, (title, figure) in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110, format="png", bbox_inches="tight")
        with replacing(folder / f"{name}.png") as file:
            file.write(buffer.getvalue())
        saved[name] = {"title": title, "uri": _data_uri(buffer.getvalue(), "png")}
    return saved


# The page


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _render(path: Path, **values: Any) -> None:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    with replacing(path, "w", errors="replace") as file:
        file.write(template.render(**values))
