"""Tables of results to paste: csv, Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mvit_video.io.console import printable, write_csv
from mvit_video.io.writing import replacing

_METRICS = {
    "video_top1": "top-1",
    "video_top5": "top-5",
    "clip_top1": "top-1 of single views",
    "clip_top5": "top-5 of single views",
    "mean_class_accuracy": "mean class accuracy",
    "macro_f1": "macro F1",
}
_NAMES = ("class", "metric", "scores", "first", "second")  # columns of names
_CLASS_COLUMNS = ("class", "support", "precision", "recall", "recall_low", "recall_high", "f1")
_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    "|": r"\textbar{}",
    ">": r"\textgreater{}",
}


class Table(NamedTuple):
    """Rows of names and then numbers: a float is a share, shown in %, a tuple the interval of one."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]


def write_tables(folder: Path, results: Mapping[str, Any]) -> None:
    """Write per_class.csv, and tables.md and tables.tex with the headline and the classes.

    Args:
        results: what results.json holds.
    """
    headline = [(label, results[key], results[f"{key}_interval"]) for key, label in _METRICS.items()]
    classes = [
        (name, row["support"], row["precision"], row["recall"], row["recall_interval"], row["f1"])
        for name, row in results["per_class"].items()
    ]
    cells = [(*others, *interval, f1) for *others, interval, f1 in classes]
    write_csv(folder / "per_class.csv", _CLASS_COLUMNS, cells)
    columns = ("class", "support", "precision", "recall", "95 % interval", "F1")
    title = f"{results['videos']} videos; {results['protocol']}"
    _write(
        folder,
        Table(title, ("metric", "%", "95 % interval"), headline),
        Table("Classes, in %", columns, classes),
    )


def write_multi_label_tables(folder: Path, results: Mapping[str, Any]) -> None:
    """The same of average precisions, where a video may be of several classes."""
    classes = [(name, row["videos"], row["average_precision"]) for name, row in results["per_class"].items()]
    write_csv(folder / "per_class.csv", ("class", "support", "average_precision"), classes)
    title = f"{results['videos']} videos; {results['protocol']}"
    _write(
        folder,
        Table(title, ("metric", "%"), [("mAP", results["map"])]),
        Table("Classes, in %", ("class", "support", "AP"), classes),
    )


def write_comparison_tables(folder: Path, results: Mapping[str, Any]) -> None:
    """Write tables.md and tables.tex with the headline of each model and the differences."""
    keys = ("video_top1", "video_top1_interval", "video_top5", "mean_class_accuracy", "macro_f1")
    models = [(name, *(model[key] for key in keys)) for name, model in results["models"].items()]
    differences = [
        (
            *(c["first"], c["second"], f"{100 * c['difference']:+.2f}"),
            "{:+.2f} to {:+.2f}".format(*(100 * end for end in c["interval"])),
            f"{c['p_value']:.3g}",
        )
        for c in results["comparisons"]
    ]
    columns = ("scores", "top-1", "95 % interval", "top-5", "mean class accuracy", "macro F1")
    changes = ("first", "second", "points", "95 % interval", "p (McNemar)")
    _write(
        folder,
        Table(f"{results['videos']} videos, in %", columns, models),
        Table("Differences of top-1, in percentage points", changes, differences),
    )


def _write(folder: Path, *tables: Table) -> None:
    for name, form in (("tables.md", _as_markdown), ("tables.tex", _as_latex)):
        with replacing(folder / name, "w") as file:
            file.write("\n".join(form(table) for table in tables))


def _as_markdown(table: Table) -> str:
    """As GitHub and the Hub show it, under its title."""
    rule = " | ".join("---" if column in _NAMES else "---:" for column in table.columns)
    lines = (" | ".join(map(_markdown, row)) for row in (table.columns, *table.rows))
    first, *rest = (f"| {line} |" for line in lines)
    return "\n".join([f"**{_markdown(table.title)}**", "", first, f"| {rule} |", *rest, ""])


def _as_latex(table: Table) -> str:
    """A longtable, which breaks over pages; needs the packages booktabs and longtable."""
    form = "".join("l" if column in _NAMES else "r" for column in table.columns)
    first, *rest = (f"{' & '.join(map(_latex, row))} \\\\" for row in (table.columns, *table.rows))
    head = [rf"\begin{{longtable}}{{{form}}}", rf"\caption{{{_latex(table.title)}}} \\", r"\toprule", first]
    lines = [*head, r"\midrule", r"\endhead", *rest, r"\bottomrule", r"\end{longtable}", ""]
    return "\n".join(["% \\usepackage{booktabs,longtable}", *lines])


def _markdown(cell: Any) -> str:
    return re.sub(r"([\\`*_\[\]<>|&#~])", r"\\\1", _text(cell))


def _latex(cell: Any) -> str:
    return "".join(_LATEX.get(character, character) for character in _text(cell)).replace("–", "--")


def _text(cell: Any) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, tuple):
        return " to ".join(map(_text, cell))
    return f"{100 * cell:.2f}" if isinstance(cell, float) else printable(cell)
