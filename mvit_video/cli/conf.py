"""What conf/ holds: the groups of a command, their options, and every value with default and comment."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

_PACKAGE = Path(__file__).parents[1]
# A wheel carries conf/ inside the package; a checkout has it beside the package.
CONF_DIR = next(d for d in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if d.is_dir())

_LINE = re.compile(r"(?P<indent> *)(?P<key>[\w@/.]+):(?: (?P<value>.*?))??(?:  # (?P<comment>.*))?")


class Value(NamedTuple):
    """A line of a configuration: the dotted key, its default as it is written, and what is said of it."""

    key: str
    default: str
    meaning: str


def read(path: Path) -> tuple[str, list[Value]]:
    """What the file says of itself in its first comment, and its values, without Hydra's own."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = takewhile(lambda line: not line or line.startswith("#"), lines)
    about = " ".join(line[2:] for line in comments if line and not line.startswith("# @"))
    values: list[Value] = []
    parents: list[str] = []
    for found in filter(None, map(_LINE.fullmatch, lines)):
        parents = [*parents[: len(found["indent"]) // 2], found["key"]]
        if parents[0] not in ("defaults", "hydra") and (found["value"] or found["comment"]):
            values.append(Value(".".join(parents), found["value"] or "", found["comment"] or ""))
    return about, values


def groups(command: str) -> dict[str, str | None]:
    """The config groups that a command has, and the option that each has by default."""
    entries = OmegaConf.load(CONF_DIR / f"{command}.yaml").defaults
    chosen = {str(k): v for entry in entries if isinstance(entry, DictConfig) for k, v in entry.items()}
    return {name: option for name, option in chosen.items() if not name.startswith("override ")}


def options(group: str) -> list[str]:
    """The names that a config group offers."""
    return sorted(file.stem for file in (CONF_DIR / group).glob("*.yaml") if not file.stem.startswith("_"))


def bases(path: Path) -> list[str]:
    """The options of the same group that a file builds on."""
    entries = OmegaConf.select(OmegaConf.load(path), "defaults", default=[])
    return [entry for entry in entries if isinstance(entry, str) and entry != "_self_"]


def values_of(group: str, option: str) -> Iterator[Value]:
    """The values of an option, those of what it builds on first."""
    path = CONF_DIR / group / f"{option}.yaml"
    for base in bases(path):
        yield from values_of(group, base)
    yield from read(path)[1]


def defaults(command: str) -> Iterator[tuple[str, str]]:
    """Each dotted key of a command with each default, as it is written, that an option has for it."""
    for path in [
        CONF_DIR / f"{command}.yaml",
        *(f for g in groups(command) for f in CONF_DIR.glob(f"{g}/*.yaml")),
    ]:
        package = path.parent.relative_to(CONF_DIR).parts[:1]
        prefix = "" if package in ((), ("experiment",)) else f"{package[0]}."
        for value in read(path)[1]:
            if not value.key.endswith(("_target_", "_partial_")):
                yield f"{prefix}{value.key}", value.default


def compose(command: str, arguments: list[str]) -> DictConfig:
    """The config, with Hydra's part, as the chosen group options leave it, without any other value."""
    choices = [a for a in arguments if a.partition("=")[0].lstrip("+") in groups(command)]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        try:
            return hydra.compose(command, choices, return_hydra_config=True)
        except HydraException:  # a choice is the mistake
            return hydra.compose(command, return_hydra_config=True)
