"""Command lines as people type them, for Hydra's grammar: files apart, special characters quoted."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import islice

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from mvit_video.cli.conf import groups
from mvit_video.cli.schema import TEXT, ListOf, kinds_of
from mvit_video.data.files import VIDEO_EXTENSIONS

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
        if argument.startswith("-") and argument != "-" and not argument.lower().endswith(VIDEO_EXTENSIONS):
            options += [argument, *islice(rest, argument in _HYDRA_VALUE_OPTIONS)]
        else:
            others.append(argument)
    return options, others


def split_files(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate files and folders from overrides: what exists on disk or has no "=" is a file."""
    files, overrides = [], []
    for argument in arguments:
        is_file = os.path.exists(argument)  # noqa: PTH110 (False for what is too long for a name)
        if "=" not in argument or "://" in argument.partition("=")[0] or is_file:
            files.append(expand_home(argument))
        else:
            overrides.append(argument)
    return files, overrides


def without_null_groups(arguments: Sequence[str], command: str) -> list[str]:
    """All but groups set to null that are null by default anyway, which Hydra can't set to it."""
    absent = {f"{group}=null" for group, option in groups(command).items() if option is None}
    return [argument for argument in arguments if argument not in absent]


def expand_home(path: str) -> str:
    """``~/x`` below the home folder; a file of this folder whose name begins with ``~`` stays one."""
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)  # noqa: PTH111  # Path.expanduser raises for an unknown user
    return expanded if expanded != path else f"./{path}"


def parsed(argument: str) -> Override | None:
    """What Hydra reads in an argument; None where it can't."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def quote(argument: str, command: str, *, sweep: bool = False) -> str:
    """An argument ``key=value`` with quotes where text would be read as something else, or not at all.

    Args:
        sweep: commas part the values of several jobs (``--multirun``).
    """
    found = _OVERRIDE.fullmatch(argument)
    if found is None or "${" in argument:
        return argument
    key, text = found["key"], found["value"]
    kinds = kinds_of(command).get(key.lstrip("+"), ())
    entries = [kind.entry for kind in kinds if isinstance(kind, ListOf)]
    is_text = TEXT in (*kinds, *entries)

    def quoted(value: str) -> str:
        """A value alone, in quotes if it can't be read or reads as something that isn't text."""
        read = parsed(f"{key}={value}")
        if read is not None and not read.is_sweep_override():
            is_misread = isinstance(read.value(), bool | int | float) or value.startswith("~")
            if not (is_text and is_misread):
                return value
        value = expand_home(value) if is_text or not kinds else value
        escaped = re.sub(r'(\\*)("|$)', lambda end: end[1] * 2 + '\\"' * bool(end[2]), value)
        return f'"{escaped}"'

    read, values = parsed(argument), text.split(",")
    if read is None and text[:1] + text[-1:] == "[]":
        return f"{key}=[{','.join(map(quoted, text[1:-1].split(',')))}]"
    if read is None and text[:1] in ("[", "{", "'", '"'):
        return argument
    if read is None and sweep:
        return f"{key}={','.join(map(quoted, values))}"
    if read is not None and read.is_sweep_override() and (sweep or not (entries or is_text)):
        return argument
    if read is not None and read.is_sweep_override() and entries:
        return f"{key}=[{','.join(map(quoted, values))}]"
    return f"{key}={quoted(text)}"
