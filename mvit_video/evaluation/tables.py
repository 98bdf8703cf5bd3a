"""Tables of results to paste: csv, Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mvit_video.io.console import printable, write_csv
from mvit_video.io.writing import replacing

METRICS = {
    "video_top1": "top-1",
    "video_top5": "top-5",
    "clip_top1": "top-1 of single views",
    "clip_top5": "top-5 of single views",
    "mean_class_accuracy": "mean class accuracy",
    "macro_f1": "macro F1",
}
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
    """Rows of a name, or several, and then numbers as text."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def write_tables(folder: Path, results: Mapping[str, Any]) -> None:
    """Write per_class.csv, and tables.md and tables.tex with the headline and the classes.

    Args:
        results: what results.json holds.
    """
    classes = [
        (name, row["support"], row["precision"], row["recall"], *row["recall_interval"], row["f1"])
        for name, row in results["per_class"].items()
    ]
    write_csv(folder / "per_class.csv", _CLASS_COLUMNS, classes)
    headline = [
        (label, _percent(results[key]), _interval(results[f"{key}_interval"]))
        for key, label in METRICS.items()
    ]
    per_class = [
        (name, str(support), _percent(precision), _percent(recall), _interval((low, high)), _percent(f1))
        for name, support, precision, recall, low, high, f1 in classes
    ]
    title = f"{results['videos']} videos; {results['protocol']}"
    columns = ("class", "support", "precision", "recall", "95 % interval", "F1")
    _write(
        folder,
        Table(title, ("metric", "%", "95 % interval"), headline),
        Table("Classes, in %", columns, per_class),
    )


def write_multi_label_tables(folder: Path, results: Mapping[str, Any]) -> None:
    """The same of average precisions, where a video may be of several classes."""
    classes = [(name, row["videos"], row["average_precision"]) for name, row in results["per_class"].items()]
    write_csv(folder / "per_class.csv", ("class", "support", "average_precision"), classes)
    title = f"{results['videos']} videos; {results['protocol']}"
    rows = [(name, str(support), _percent(value)) for name, support, value in classes]
    _write(
        folder,
        Table(title, ("metric", "%"), [("mAP", _percent(results["map"]))]),
        Table("Classes, in %", ("class", "support", "AP"), rows),
    )


def write_comparison_tables(folder: Path, results: Mapping[str, Any]) -> None:
    """Write tables.md and tables.tex with the headline of each model and the differences."""
    models = [
        (
            name,
            *(_percent(model["video_top1"]), _interval(model["video_top1_interval"])),
            *(_percent(model[key]) for key in ("video_top5", "mean_class_accuracy", "macro_f1")),
        )
        for name, model in results["models"].items()
    ]
    differences = [
        (
            *(c["first"], c["second"], f"{100 * c['difference']:+.2f}", _interval(c["interval"], "+.2f")),
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


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _interval(pair: Sequence[float] | None, form: str = ".2f") -> str:
    return "–" if pair is None else f"{100 * pair[0]:{form}} to {100 * pair[1]:{form}}"


def _write(folder: Path, *tables: Table) -> None:
    for name, form in (("tables.md", markdown), ("tables.tex", latex)):
        with replacing(folder / name, "w") as file:
            file.write("\n".join(form(table) for table in tables))


def markdown(table: Table) -> str:
    """A table as GitHub and the Hub show it, under its title."""
    rule = [
        "---" if column.isalpha() and index == 0 else "---:" for index, column in enumerate(table.columns)
    ]
    lines = (" | ".join(map(_markdown, row)) for row in (table.columns, *table.rows))
    first, *rest = (f"| {line} |" for line in lines)
    return "\n".join([f"**{_markdown(table.title)}**", "", first, f"| {' | '.join(rule)} |", *rest, ""])


def latex(table: Table) -> str:
    """A longtable, which breaks over pages; needs the packages booktabs and longtable."""
    names = sum(1 for column in table.columns if column in ("class", "metric", "scores", "first", "second"))
    form = "l" * names + "r" * (len(table.columns) - names)
    first, *rest = (f"{' & '.join(map(_latex, row))} \\\\" for row in (table.columns, *table.rows))
    head = [rf"\begin{{longtable}}{{{form}}}", rf"\caption{{{_latex(table.title)}}} \\", r"\toprule", first]
    lines = [*head, r"\midrule", r"\endhead", *rest, r"\bottomrule", r"\end{longtable}", ""]
    return "\n".join(["% \\usepackage{booktabs,longtable}", *lines])


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|&#~])", r"\\\1", printable(text))


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in printable(text)).replace("–", "--")
