"""Text from outside does nothing on a terminal, in a spreadsheet or in a subtitle."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from mvit_video.io.console import (
    SafeFormatter,
    accept_all_text,
    caption,
    csv_cell,
    print_table,
    printable,
    protect_terminal,
    valid_text,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain name.mp4", "plain name.mp4"),
        ("Größe 視頻 👩\u200d🚀", "Größe 視頻 👩\u200d🚀"),
        ("\x1b[31mred\x1b]0;title\x07", "\\x1b[31mred\\x1b]0;title\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("two\nlines\r", "two\\nlines\\r"),
        ("gpj.\u202eexe", "gpj.\\u202eexe"),
        ("a\u2028b", "a\\u2028b"),
        ("no utf-8 \udcff", "no utf-8 \\xff"),
        ("lone \ud800", "lone \\ud800"),
    ],
)
def test_what_acts_on_a_terminal_is_made_visible(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert valid_text(text).encode("utf-8")


def test_a_message_of_several_lines_keeps_them() -> None:
    record = logging.LogRecord("a", logging.INFO, "", 0, "weights:\n%s", ("\x1b[2Jx",), None)
    assert SafeFormatter().format(record) == "weights:\n\\x1b[2Jx"


@pytest.mark.parametrize(
    ("is_terminal", "format", "lines"),
    [
        (True, "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s", "epoch 1/2\nwarning: one\\x1b\n"),
        (False, "%(levelname)s - %(message)s", "INFO - epoch 1/2\nWARNING - one\\x1b\n"),
        (True, "%(levelname)s - %(message)s", "INFO - epoch 1/2\nWARNING - one\\x1b\n"),  # a user's own
    ],
)
def test_a_terminal_shows_messages_alone(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, format: str, lines: str
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal, raising=False)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(format))
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    protect_terminal()
    for level, text in ((logging.INFO, "epoch 1/2"), (logging.WARNING, "one\x1b")):
        logging.getLogger().handle(logging.LogRecord("a", level, "", 0, text, (), None))
    assert stream.getvalue() == lines


@pytest.mark.parametrize("begin", list("=+-@\t\r"))
def test_a_cell_is_no_formula(begin: str) -> None:
    assert csv_cell(f"{begin}1+1") == f"'{begin}1+1"
    assert csv_cell(f"a{begin}1") == f"a{begin}1"


def test_a_cell_of_csv_does_nothing_on_a_terminal() -> None:
    assert csv_cell("a\x1b]0;x\x07\x9b\0.mp4") == "a\\x1b]0;x\\x07\\x9b\\x00.mp4"
    assert csv_cell("two\nlines\tof \u200eGröße") == "two\nlines\tof \u200eGröße"


def test_cells_that_are_no_text_stay() -> None:
    assert [csv_cell(value) for value in (-1.5, None, 3)] == [-1.5, None, 3]


@pytest.mark.parametrize(
    "text", ["a\n\nb", "a\r\n00:00 --> 00:01\n", "a\u2028\u2028b --> c", "\x1b[1ma\n2\n"]
)
def test_a_caption_is_one_line(text: str) -> None:
    line = caption(text)
    assert len(line.splitlines()) == 1
    assert "-->" not in line
    assert line.isprintable()


def test_a_table_in_any_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "60")
    path = "videos/of_the_first_day/of_the_second_camera/視頻_with_a_name.mp4"
    print_table("classes \x1b[2J", ("video", "score"), [(path, 0.5)])
    accept_all_text()
    out.flush()
    text = out.buffer.getvalue().decode("latin-1")
    assert "\x1b" not in text
    assert "_with_a_name.mp4" in text
    assert "0.5000" in text
