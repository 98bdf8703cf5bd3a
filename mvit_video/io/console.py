"""Text that leaves for a person's eyes: the terminal, spreadsheets, subtitles.

Names of files and classes come from outside. What a terminal, a spreadsheet or a player would take for a
command is made visible here, in one place.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import re
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mvit_video.io.writing import replacing

Item = TypeVar("Item")

_asked: list[KeyboardInterrupt | SystemExit] = []  # to end, by signals

# Control and formatting characters (some turn the direction of text), lone surrogates, and ends of lines.
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # scripts and emoji need them
_HYDRA_FORMATS = ("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s", "%(message)s")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a cell that begins so is one in every spreadsheet
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def valid_text(text: str | os.PathLike[str]) -> str:
    """Text that can be encoded: bytes of a name that aren't UTF-8, and lone surrogates, become escapes."""
    text = os.fspath(text)
    if text.isascii():
        return text
    try:
        return os.fsencode(text).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()


def printable(text: object, keep: str = "") -> str:
    """Text for a terminal or a picture: escapes such as ``\\x1b`` in the place of what isn't shown but acts.

    Args:
        keep: characters to let through, such as the line ends of a message of several lines.
    """
    text = valid_text(str(text))
    if text.isascii() and text.isprintable():
        return text
    unsafe = {c for c in set(text) if unicodedata.category(c) in _UNSAFE} - set(keep + _JOINERS)
    return text.translate({ord(c): c.encode("unicode_escape").decode() for c in unsafe})


def csv_cell(value: Any) -> Any:
    """A cell of a csv file: text that a spreadsheet would compute gets an apostrophe in front.

    Control characters other than line ends and tabs become escapes, as the file may go to a terminal. Numbers
    and other values stay as they are.
    """
    if not isinstance(value, str):
        return value
    value = _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", valid_text(value))
    return f"'{value}" if value.startswith(_FORMULA) else value


def csv_text(rows: Iterable[Iterable[Any]], lineterminator: str = "\n") -> str:
    """Lines of a csv file, each cell a ``csv_cell``."""
    text = io.StringIO()
    csv.writer(text, lineterminator=lineterminator).writerows(map(csv_cell, row) for row in rows)
    return text.getvalue()


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Replace a csv file by one with these rows, see ``csv_text``."""
    with replacing(path, "w", newline="") as file:
        file.write(csv_text([columns, *rows], "\r\n"))


def caption(text: str) -> str:
    """One line of a subtitle: nothing in it ends the subtitle or begins another."""
    return " ".join(printable(text, keep="\n\r\t").split()).replace("-->", "->")


class SafeFormatter(logging.Formatter):
    """Another formatter's messages, ``printable`` but for line ends; without one, messages alone."""

    def __init__(self, inner: logging.Formatter | None = None) -> None:
        super().__init__("%(message)s")
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter.format``."""
        text = self._inner.format(record) if self._inner else super().format(record)
        if self._inner is None and record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        return printable(text, keep="\n\t")


def protect_terminal() -> None:
    """Make the log and the standard streams safe for text from outside, in any locale.

    A terminal is shown messages alone, unless a format other than Hydra's (66 columns of its own) is set.
    """
    accept_all_text()
    for handler in logging.getLogger().handlers:
        inner, stream = handler.formatter, getattr(handler, "stream", None)
        if not isinstance(inner, SafeFormatter):
            is_hydras = getattr(inner, "_fmt", None) in _HYDRA_FORMATS
            is_terminal = stream is not None and stream.isatty()
            handler.setFormatter(SafeFormatter(None if is_hydras and is_terminal else inner))


@contextmanager
def show_log() -> Iterator[None]:
    """Show this package's messages for as long as a call from Python takes, as its commands do.

    They go to standard output, or where the root logger's handlers lead. A level of their own is kept:
    ``logging.getLogger("mvit_video").setLevel("WARNING")`` leaves all but warnings out.
    """
    root, own = logging.getLogger(), logging.getLogger("mvit_video")
    handler, level = logging.StreamHandler(sys.stdout), own.level
    handler.setFormatter(SafeFormatter())
    if not own.hasHandlers():
        root.addHandler(handler)
    own.setLevel(level or logging.INFO)
    try:
        yield
    finally:
        own.setLevel(level)
        root.removeHandler(handler)


def accept_all_text() -> None:
    """Let standard output and error escape what the locale's encoding lacks, not fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def end_by_signal(number: int, _: object) -> NoReturn:
    """A handler that raises; should a library drop the exception, ``end_if_asked`` raises it again."""
    _asked.append(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number))
    raise _asked[-1]


def end_if_asked() -> None:
    """Raise what a signal has raised in this job."""
    if _asked:
        raise _asked[-1]


def begin_job() -> None:
    """Forget the signals of former jobs of this process."""
    _asked.clear()


def hide_dropped(found: Any) -> None:
    """In the place of ``sys.unraisablehook``: what ``end_if_asked`` raises again is no news."""
    if found.exc_value not in _asked:
        sys.__unraisablehook__(found)


def track(
    items: Iterable[Item], total: int, *, done: int = 0, what: str, note: Callable[[], str] = str
) -> Iterator[Item]:
    """The same items; a bar on standard error, where that is a terminal, shows how many and what is left.

    Args:
        note: gives what stands behind it, such as the accuracy so far.
    """
    console = Console(stderr=True)
    columns = (what, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn())
    with Progress(
        *columns, "{task.description}", console=console, disable=not console.is_terminal, transient=True
    ) as progress:
        task = progress.add_task("", total=total, completed=done)
        for item in items:
            end_if_asked()
            progress.update(task, advance=1, description=note())
            yield item


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A line and a table on standard output; numbers are right-aligned, long paths broken behind a ``/``."""
    accept_all_text()
    console = Console()
    table = Table()
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        table.add_column(printable(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        # As text, for a name such as "[b] 1.mp4" isn't meant as markup.
        cells = (f"{cell:.4f}" if isinstance(cell, float) else printable(cell, keep="\n") for cell in row)
        table.add_row(*(Text(_break_path(cell, console.width // 2)) for cell in cells))
    if title:
        console.print(Text(printable(title)))
    console.print(table)


def _break_path(text: str, width: int) -> str:
    """Lines of at most ``width`` columns where the parts of the path allow it."""
    lines = [""]
    for part in text.split("/") if len(text) > width else ():
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += f"{part}/"
    return "\n".join(lines).removesuffix("/") or text
