"""Command lines as people type them, for Hydra's grammar: files apart, special characters quoted."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

from mvit_video.cli.schema import Group, hint_of, members
from mvit_video.data.files import VIDEO_EXTENSIONS

STDIN = "-"
# Options of Hydra's that take their value as the next argument.
_HYDRA_VALUE_OPTIONS = {
    "--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn",
    "--config-dir", "-cd", "--experimental-rerun", "--info", "-i",
}  # fmt: skip
_OVERRIDE = re.compile(r"(?P<key>\+{0,2}[A-Za-z_][\w/@.]*)=(?P<value>.*)", re.DOTALL)


def split_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate Hydra's own options and their values, which it wants in front, from all else."""
    options, others = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("-") and argument != STDIN and not argument.lower().endswith(VIDEO_EXTENSIONS):
            options += [argument, *islice(rest, argument in _HYDRA_VALUE_OPTIONS)]
        else:
            others.append(argument)
    return options, others


def split_files(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate files and folders from overrides: what exists on disk or has no "=" is a file."""
    files, overrides = [], []
    for argument in arguments:
        if "=" not in argument or "://" in argument.partition("=")[0] or Path(argument).exists():
            files.append(expand_home(argument))
        else:
            overrides.append(argument)
    return files, overrides


def expand_home(path: str) -> str:
    """``~/x`` below the home folder; a file of this folder whose name begins with ``~`` stays one."""
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)  # noqa: PTH111  # Path.expanduser raises for an unknown user
    return expanded if expanded != path else f"./{path}"


def quote(argument: str, group: type[Group], *, sweep: bool = False) -> str:
    """An argument ``key=value`` with quotes where text would be read as something else, or not at all.

    Args:
        group: the command's, which says where text is meant.
        sweep: commas part the values of several jobs (``--multirun``).
    """
    found = _OVERRIDE.fullmatch(argument)
    if found is None or "${" in argument:
        return argument
    key, text = found["key"], found["value"]
    kinds = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in _kinds(key, group)]
    lists = [get_args(kind)[0] for kind in kinds if get_origin(kind) is list]
    is_text = str in kinds or str in lists
    override = parsed(argument)
    if override is None:
        if text[:1] == "[" and text[-1:] == "]":
            return f"{key}=[{_entries(text[1:-1], is_text)}]"
        if text[:1] in ("[", "{", "'", '"'):
            return argument
        return f"{key}={_entries(text, is_text) if sweep else _quoted(text)}"
    if override.value_type is ValueType.SIMPLE_CHOICE_SWEEP and not sweep:
        if lists:
            return f"{key}=[{_entries(text, is_text)}]"
        return f"{key}={_quoted(text)}" if is_text else argument
    value = override.value() if override.value_type is ValueType.ELEMENT else None
    if is_text and (isinstance(value, bool | int | float) or text.startswith("~")):
        return f"{key}={_quoted(text)}"
    return argument


def parsed(argument: str) -> Override | None:
    """What Hydra reads in an argument; None where it can't."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def _kinds(key: str, group: type[Group]) -> tuple[Any, ...]:
    return members(hint_of(key.lstrip("+"), group))


def _entries(text: str, is_text: bool) -> str:
    """Values between commas, each quoted if it is text or can't be read otherwise."""
    return ",".join(
        entry if not is_text and parsed(f"key={entry}") else _quoted(entry) for entry in text.split(",")
    )


def _quoted(text: str) -> str:
    escaped = re.sub(r'(\\*)("|$)', lambda end: end[1] * 2 + '\\"' * bool(end[2]), expand_home(text))
    return f'"{escaped}"'
