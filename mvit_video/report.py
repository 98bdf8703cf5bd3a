"""Pictures and tables of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

MAX_NAMED_CLASSES = 60  # more names than this don't fit a confusion matrix


def plot_history(epochs: Sequence[dict[str, float]], path: Path) -> None:
    """Learning curves: loss and accuracy against epochs, training and validation."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, metric, label in zip(
        figure.subplots(1, 2), ("loss", "top1"), ("loss", "top-1 accuracy"), strict=True
    ):
        for split, style in (("train", "--"), ("val", "-")):
            points = [
                (row["epoch"], row[f"{split}/{metric}"]) for row in epochs if f"{split}/{metric}" in row
            ]
            if points:
                axes.plot(*zip(*points, strict=True), style, marker=".", label=split)
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)


def plot_durations(seconds: Sequence[float], path: Path) -> None:
    """Histogram of the durations of videos; the longest hundredth shares the last bar."""
    ordered = sorted(seconds)
    longest = ordered[int(0.99 * (len(ordered) - 1))]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist([min(value, longest) for value in ordered], bins=50)
    axes.set(
        xlabel="seconds", ylabel="videos", title=f"{len(ordered)} videos, the longest {ordered[-1]:.1f} s"
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_confusion(counts: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Confusion matrix: ``counts[i, j]`` videos of class i were taken for class j; rows shown as shares."""
    num_classes = len(class_names)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    size = min(max(4.0, 0.45 * num_classes), 16.0)  # inches, without the names
    figure = Figure(figsize=(size + 4, size + 2.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.05)
    axes.set(xlabel="predicted", ylabel="true")
    if num_classes <= MAX_NAMED_CLASSES:
        axes.set_xticks(range(num_classes), class_names, rotation=90)
        axes.set_yticks(range(num_classes), class_names)
    if num_classes <= 20:
        for i, j in counts.nonzero().tolist():
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(int(counts[i, j])), ha="center", va="center", color=colour)
    figure.savefig(path, dpi=120)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A line and a table on standard output; numbers are right-aligned."""
    table = Table()
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row))
    console = Console()
    if title:
        console.print(title)
    console.print(table)
