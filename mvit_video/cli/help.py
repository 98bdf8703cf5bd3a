"""What conf/ says of every value: the pages of ``--help`` and docs/configuration.md come from it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf

_PACKAGE = Path(__file__).parents[1]
# A wheel carries conf/ inside the package; a checkout has it beside the package.
CONF_DIR = next(d for d in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if d.is_dir())

_LINE = re.compile(r"(?P<indent> *)(?P<key>[\w@/.]+):(?: (?P<value>.*?))??(?:  # (?P<comment>.*))?$")
_WIDTH = 80


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


def _leading_comments(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        if line.startswith("# @") or not line:
            continue
        if not line.startswith("#"):
            return
        yield line


def groups(command: str) -> dict[str, str | None]:
    """The config groups of a command and the option that each has by default."""
    found: dict[str, str | None] = {}
    for entry in OmegaConf.load(CONF_DIR / f"{command}.yaml").defaults:
        if isinstance(entry, DictConfig):
            found |= {str(k): v for k, v in entry.items() if not str(k).startswith("override ")}
    return found


def options(group: str) -> list[str]:
    """The names that a config group offers."""
    return sorted(file.stem for file in (CONF_DIR / group).glob("*.yaml") if not file.stem.startswith("_"))


def help_page(command: str, config: DictConfig) -> str:
    """Every option of a command with its value in ``config``, which has Hydra's part, too; in 80 columns."""
    own = OmegaConf.load(CONF_DIR / f"{command}.yaml").hydra.help
    _, values = read(CONF_DIR / f"{command}.yaml")
    files = "[FILE ...] " if command == "predict" else "prepare|check " if command == "data" else ""
    lines = [*textwrap.wrap(own.header, _WIDTH), "", f"Usage: mvit-{command} {files}[KEY=VALUE ...]", ""]
    if values:
        plain = OmegaConf.to_container(config)
        assert isinstance(plain, dict)
        lines.append("Options, with their defaults")
        lines += [line for v in values for line in _line(v.key, plain[v.key], v.meaning)]
        lines.append("")
    lines.append("Groups (GROUP=OPTION), with the keys of the option that is chosen")
    for group in groups(command):
        lines += _group_lines(group, config)
    return "\n".join([*lines, "", own.footer.rstrip()])


def _group_lines(group: str, config: DictConfig) -> Iterator[str]:
    key = group.replace("/", ".")
    yield ""
    yield from textwrap.wrap(
        f"{group}: {', '.join(options(group))}", _WIDTH, initial_indent="  ", subsequent_indent="      "
    )
    node = OmegaConf.select(config, key)
    if isinstance(node, DictConfig):
        files = _files(group, config.hydra.runtime.choices.get(group))
        meanings = {value.key: value.meaning for file in files for value in read(file)[1] if value.meaning}
        for name, value in _leaves(OmegaConf.to_container(node)):
            yield from _line(f"{key}.{name}", value, meanings.get(name, ""))


def _files(group: str, option: str | None) -> Iterator[Path]:
    """The files that an option is made of, those that it builds on first."""
    file = CONF_DIR / group / f"{option}.yaml"
    if file.is_file():
        for base in OmegaConf.select(OmegaConf.load(file), "defaults", default=[]):
            if isinstance(base, str):
                yield from _files(group, base)
        yield file


def _leaves(node: object, parent: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys and values, without those that Hydra builds objects by."""
    if not isinstance(node, dict):
        yield parent, node
        return
    for name, value in node.items():
        if not name.startswith("_"):
            yield from _leaves(value, f"{parent}.{name}" if parent else name)


def _line(key: str, value: object, meaning: str) -> list[str]:
    head = f"  {key}={'(needed)' if value == '???' else _shown(value)}"
    if not meaning:
        return [head]
    pad = " " * 36
    if len(head) > 34:
        return [head, *textwrap.wrap(meaning, _WIDTH, initial_indent=pad, subsequent_indent=pad)]
    return textwrap.wrap(meaning, _WIDTH, initial_indent=f"{head:<36}", subsequent_indent=pad)


def _shown(value: object) -> str:
    """A value as it is typed on a command line."""
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
