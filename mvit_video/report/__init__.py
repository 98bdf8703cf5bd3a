"""Pictures and tables of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table


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
