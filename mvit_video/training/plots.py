"""Pictures and tables of results."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from mvit_video.data.pixels import RGB, denormalise
from mvit_video.io.console import printable
from mvit_video.io.figures import new_figure


def plot_history(epochs: Sequence[dict[str, float]], path: Path, *, monitor: str) -> None:
    """Learning curves: the loss and the metric ``monitor`` against epochs, training and validation."""
    metrics = {"loss": "loss", monitor.removeprefix("val/"): monitor.removeprefix("val/")}
    if "top1" in metrics:
        metrics["top1"] = "top-1 accuracy"
    with new_figure(path, (5 * len(metrics), 4)) as figure:
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axes, (metric, label) in zip(panels, metrics.items(), strict=True):
            for split, style in (("train", "--"), ("val", "-")):
                name = f"{split}/{metric}"
                points = [(row["epoch"], row[name]) for row in epochs if name in row]
                if points:
                    axes.plot(*zip(*points, strict=True), style, marker=".", label=split)
            axes.set(xlabel="epoch", ylabel=label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend()


def plot_batch(
    clips: Tensor,
    labels: Tensor,
    lam: float,
    class_names: Sequence[str] | None,
    path: Path,
    *,
    mean: RGB,
    std: RGB,
) -> None:
    """A row for each of the first six clips, as the model sees them: eight frames and the classes.

    Args:
        clips: normalised float (B, 3, T, H, W), mixed with their reverse.
        labels: int64 (B,), before they were mixed; or (B, K), several classes filled up with -1.
        lam: share of a clip's own class; 1 for a batch that wasn't mixed.
    """
    times = torch.linspace(0, clips.shape[2] - 1, min(8, clips.shape[2])).round().int().tolist()
    shown = clips[:6, :, times].detach().float().cpu()
    pairs = zip(shown, labels.tolist(), labels.flip(0).tolist(), strict=False)
    with new_figure(path, (1.6 * len(times), 1.9 * len(shown))) as figure:
        rows = figure.subfigures(len(shown), squeeze=False)[:, 0]
        for row, (clip, label, partner) in zip(rows, pairs, strict=True):
            frames = denormalise(clip.movedim(1, 0), mean, std).movedim(1, -1)  # (T, H, W, 3)
            for axes, frame in zip(row.subplots(1, len(times), squeeze=False)[0], frames, strict=True):
                axes.imshow(frame.numpy())
                axes.set_axis_off()
            name, other = (_names(found, class_names) for found in (label, partner))
            title = name if lam == 1 else f"{lam:.2f} {name} + {1 - lam:.2f} {other}"
            row.suptitle(title, x=0.01, ha="left", fontsize=8)
        mixed = "" if lam == 1 else ", each clip mixed with another: its shares of both"
        figure.suptitle(f"The first batch as the model sees it{mixed}", fontsize=10)


def _names(label: int | list[int], class_names: Sequence[str] | None) -> str:
    labels = [label] if isinstance(label, int) else [index for index in label if index >= 0]
    names = ", ".join(class_names[index] if class_names else str(index) for index in labels)
    return textwrap.shorten(printable(names), 60, placeholder=" ...") or "no class"


def describe_labels(labels: Sequence[int], class_names: Sequence[str]) -> str:
    """How many videos each class has, a line each; of more than 20 classes the rarest and commonest."""
    counts = np.bincount(labels, minlength=len(class_names)).tolist()
    order = sorted(range(len(counts)), key=counts.__getitem__)
    lines = []
    if len(order) > 20:
        middle = counts[order[len(order) // 2]]
        lines = [f"{len(order)} classes of {counts[order[0]]} to {counts[order[-1]]} videos, median {middle}"]
        order = order[:5] + order[-5:]
    most = max(counts) or 1
    width = max(len(class_names[index]) for index in order)
    for index in order:
        bar = "#" * round(30 * counts[index] / most)
        lines.append(f"{class_names[index]:{width}} {counts[index]:6d} {bar}".rstrip())
    return "\n".join(lines)
