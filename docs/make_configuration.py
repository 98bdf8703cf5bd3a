"""Writes docs/configuration.md from conf/: every command, group, option and value with its default."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from mvit_video.cli.conf import bases, read

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "configuration.md"


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
    if said := [*filter(None, [about]), *(f"Builds on `{base}`." for base in bases(path))]:
        yield " ".join(said)
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
