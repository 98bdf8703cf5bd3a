"""Writes docs/configuration.md from conf/: every command, group, option and value with its default."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "configuration.md"
_LINE = re.compile(r"(?P<indent> *)(?P<key>[\w@/.]+):(?: (?P<value>.*?))??(?:  # (?P<comment>.*))?$")


class Value(NamedTuple):
    """A line of a configuration: the dotted key, its default and what is said of it."""

    key: str
    default: str
    meaning: str


def read(path: Path) -> tuple[str, list[Value]]:
    """What the file says of itself in its first comment, and its values, without Hydra's own."""
    lines = path.read_text(encoding="utf-8").splitlines()
    about = " ".join(line.removeprefix("# ") for line in _leading_comments(lines))
    values: list[Value] = []
    parents: list[str] = []
    for line in lines:
        found = _LINE.fullmatch(line)
        if found is None:
            continue
        parents = [*parents[: len(found["indent"]) // 2], found["key"]]
        if parents[0] in ("defaults", "hydra"):
            continue
        if found["value"] or found["comment"]:
            values.append(Value(".".join(parents), found["value"] or "", found["comment"] or ""))
    return about, values


def _leading_comments(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if line.startswith("# @") or not line:
            continue
        if not line.startswith("#"):
            return
        yield line


def page(conf: Path) -> str:
    """The whole reference as Markdown."""
    parts = [
        "# Configuration",
        "Made from `conf/` by `make docs`. `KEY=VALUE` on the command line overrides a value, `GROUP=OPTION` "
        "chooses a file of a group; `???` has to be given, `null` means what its line says.",
        "## Commands",
    ]
    for path in sorted(conf.glob("*.yaml")):
        parts += _section(f"### mvit-{path.stem}", path)
    parts.append("## Groups")
    for folder in sorted({path.parent for path in conf.glob("*/**/*.yaml")}):
        parts.append(f"### {folder.relative_to(conf).as_posix()}")
        for path in sorted(folder.glob("*.yaml")):
            parts += _section(f"#### {path.stem}", path)
    return "\n\n".join(parts) + "\n"


def _section(title: str, path: Path) -> Iterator[str]:
    about, values = read(path)
    yield title
    if about:
        yield about
    if values:
        rows = [
            f"| `{v.key}` | {f'`{_cell(v.default)}`' if v.default else ''} | {_cell(v.meaning)} |"
            for v in values
        ]
        yield "\n".join(["| value | default | |", "|---|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(page(ROOT / "conf"), encoding="utf-8")
    sys.stdout.write(f"{TARGET}\n")
