"""What went wrong on a command line, in one line that names it and what is possible."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
)
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from mvit_video.cli.arguments import parsed
from mvit_video.cli.conf import CONF_DIR, compose, groups, options, values_of
from mvit_video.cli.schema import in_yaml, kinds_of
from mvit_video.errors import MVitVideoError, did_you_mean

_ABSENT = object()  # in the place of a value
# What other toolkits call a key.
_OTHER_NAMES = {
    "epochs": "max_epochs", "steps": "max_steps", "gpus": "devices", "workers": "num_workers",
    "learning_rate": "lr", "batch": "batch_size", "checkpoint": "weights", "resume_from": "ckpt_path",
    "dataset": "data", "amp": "precision", "num_epochs": "max_epochs", "wd": "weight_decay",
}  # fmt: skip


def one_line(error: BaseException) -> str:
    """The text of an error without line breaks, behind the key that it speaks of."""
    if isinstance(error, ValueError) and isinstance(error.__cause__, OSError):  # a log file can't be opened
        return one_line(error.__cause__)
    if isinstance(error, OSError) and error.strerror:  # a folder without permission, a full disk
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text, _, where = str(error).partition("full_key: ")  # of Hydra and OmegaConf
    key = where.split()[0] if where else str(error).rsplit(" ", 1)[-1]
    if isinstance(error, MissingMandatoryValue):
        return f"{key} isn't set; give {key}=..."
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        return f"there is no {key}, which the command needs; give it, or leave ~{key} out"
    if isinstance(error, ConfigCompositionException) and error.__cause__ is not None:
        return one_line(error.__cause__)
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        text = one_line(error.__cause__)
        where = "" if isinstance(error.__cause__, MissingMandatoryValue) else where
    text = " ".join(text.split()) or type(error).__name__
    return f"{key}: {text}" if where else text


def is_users(error: BaseException) -> bool:
    """Whether it tells of something that a user can mend, and not of a bug."""
    is_log_file = isinstance(error, ValueError) and isinstance(error.__cause__, OSError)  # can't be opened
    return is_log_file or isinstance(
        error, MVitVideoError | InstantiationException | OmegaConfBaseException | OSError
    )


def explain_composition(error: BaseException, command: str, arguments: Sequence[str]) -> str:
    """Why Hydra can't compose a configuration of arguments: an unknown key, option or override."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        known = [option for option in error.options if not option.startswith("_")]
        return f"{group} has no {choice!r}{did_you_mean(choice, known, '{}')}; it has: {', '.join(known)}"
    unknown = re.search(r"Could not (?:override|delete from config\.) '([^'@]+)'", str(error))
    is_overriding = isinstance(error, HydraException | ValueError)
    faults = (_fault_of(a, command, arguments) for a in arguments if is_overriding and not a.startswith("-"))
    found = next(filter(None, faults), None)
    return found or (_explain_unknown_key(unknown[1], command, arguments) if unknown else one_line(error))


def _fault_of(argument: str, command: str, arguments: Sequence[str]) -> str | None:
    """What is wrong with an argument by itself."""
    key, equals, _ = argument.partition("=")
    if not key or not (equals or key.startswith("~")):
        return f"{argument!r} isn't KEY=VALUE; mvit-{command} --help shows the keys"
    override = parsed(argument)
    if override is None:
        return f"{argument} can't be read; put its text in quotes inside quotes: '{key}=\"...\"'"
    if override.is_sweep_override():
        is_sweep = {"-m", "--multirun"} & set(arguments)
        return None if is_sweep else f"{argument} has several values, which --multirun tries in turn"
    if key in {folder.name for folder in CONF_DIR.iterdir() if folder.is_dir()} - set(groups(command)):
        return f"mvit-{command} has no group {key!r}; it has: {', '.join(sorted(groups(command)))}"
    is_name = isinstance(override.value(), str) and override.value() not in ("", "???")
    if key in groups(command) and not is_name:
        return f"{argument} isn't possible; {key} has: {', '.join(options(key))}"
    return None


def _explain_unknown_key(key: str, command: str, arguments: Sequence[str]) -> str:
    """Name the nearest key and what the composed config has in the place of ``key``."""
    taken = [a[1:] for a in arguments if a.startswith("~") and f"{key}.".startswith(f"{a[1:]}.")]
    if taken and f"~{key}" not in arguments:
        return f"there is no {key!r}: ~{taken[0]} takes it away"
    config: Any = OmegaConf.to_container(compose(command, list(arguments)))  # as written: nothing is resolved
    if not key.startswith("hydra."):
        config.pop("hydra", None)
    if f"~{key}" in arguments and _part(config, key) is None:
        return f"~{key} isn't possible, for it is null; leave it out"
    parent, _, name = key.rpartition(".")
    node = _part(config, parent)
    if parent in groups(command) and node is _ABSENT:
        return f"there is no {key!r} without {parent}=...; it has: {', '.join(options(parent))}"
    if node is _ABSENT:
        return _explain_unknown_key(parent, command, arguments)
    if not isinstance(node, dict):
        return f"there is no {key!r}: {parent} is a value ({in_yaml(node)})"
    known = {str(k) for k in node if not str(k).startswith("_")}
    if parent:
        near = _owners(key) or did_you_mean(name, known, f"{parent}.{{}}")
        return f"there is no {key!r}{near}; {parent} has: {', '.join(sorted(known))}"
    names = {name, _OTHER_NAMES.get(name)}
    same = [k for k in (*kinds_of(command), *groups(command)) if k.rpartition(".")[2] in names]
    near = (
        f" (did you mean {' or '.join(same[:3])}?)"
        if same
        else did_you_mean(name, {*known, *groups(command)}, "{}")
    )
    return f"there is no {key!r}{near}; mvit-{command} --help shows the keys"


def _part(node: Any, key: str) -> Any:
    """What nested dictionaries have at a key such as ``a.b``, or ``_ABSENT``; all of them at ""."""
    for name in filter(None, key.split(".")):
        if not isinstance(node, dict) or name not in node:
            return _ABSENT
        node = node[name]
    return node


def _owners(key: str) -> str:
    """The options of the key's group that have it, as a question in brackets."""
    group, _, rest = key.partition(".")
    found = [
        f"{group}={option}"
        for option in options(group)
        if any(f"{value.key}.".startswith(f"{rest}.") for value in values_of(group, option))
    ]
    return f" (did you mean {' or '.join(found[:3])}, which has it?)" if found else ""
