"""What went wrong on a command line, in one line that names it and what is possible."""

from __future__ import annotations

import re
import sys

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue

from mvit_video.cli.arguments import parsed
from mvit_video.cli.help import CONF_DIR, groups, options
from mvit_video.errors import did_you_mean

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
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        text = one_line(error.__cause__)
        where = "" if isinstance(error.__cause__, MissingMandatoryValue) else where
    text = " ".join(text.split()) or type(error).__name__
    return f"{key}: {text}" if where else text


def explain_composition(error: BaseException, command: str) -> str:
    """Why Hydra can't compose a configuration: an unknown key, option or override."""
    arguments = [a for a in sys.argv[1:] if "=" in a and not a.startswith("-")]
    unreadable = next((a for a in arguments if parsed(a) is None), None)
    if unreadable is not None and isinstance(error, HydraException):
        key, _, value = unreadable.partition("=")
        return f"{key}={value} can't be read; put its text in quotes inside quotes: '{key}=\"...\"'"
    for key, _, value in (argument.partition("=") for argument in arguments):
        if key in groups(command) and value in ("null", ""):
            return f"{key}={value} isn't possible; {key} has: {', '.join(options(key))}"
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        known = [option for option in error.options if not option.startswith("_")]
        return f"{group} has no {choice!r}{did_you_mean(choice, known, '{}')}; it has: {', '.join(known)}"
    unknown = re.search(r"Could not override '([^'@]+)'", str(error))
    return _explain_unknown_key(unknown[1], command) if unknown else one_line(error)


def _explain_unknown_key(key: str, command: str) -> str:
    """Name the nearest key and what the composed config has in the place of ``key``."""
    if f"~{key.partition('.')[0]}" in sys.argv:
        return f"there is no {key!r}: ~{key.partition('.')[0]} takes it away"
    config = compose_defaults(command, sys.argv[1:], with_hydra=key.startswith("hydra."))
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if parent and node is None:
        return _explain_unknown_key(parent, command)
    if not isinstance(node, DictConfig):
        return f"there is no {key!r}: {parent} is a value ({node})"
    known = sorted({str(k) for k in node if k != "_target_"} | (set() if parent else set(groups(command))))
    if not parent and name in {folder.name for folder in CONF_DIR.iterdir() if folder.is_dir()}:
        return f"mvit-{command} has no group {name!r}; it has: {', '.join(sorted(groups(command)))}"
    names = (name, _OTHER_NAMES.get(name))
    deeper = [] if parent else [found for found in _keys(config) if found.rpartition(".")[2] in names]
    if deeper:
        nearest = f" (did you mean {' or '.join(deeper[:3])}?)"
    else:
        nearest = did_you_mean(name, known, f"{parent}.{{}}" if parent else "{}")
    return f"there is no {key!r}{nearest}; {parent or 'the top level'} has: {', '.join(known)}"


def _keys(config: DictConfig, parent: str = "") -> list[str]:
    found = []
    for name in map(str, config):
        found.append(f"{parent}{name}")
        if not OmegaConf.is_missing(config, name) and isinstance(config._get_node(name), DictConfig):
            found += _keys(config[name], f"{parent}{name}.")
    return found


def compose_defaults(command: str, arguments: list[str], *, with_hydra: bool = False) -> DictConfig:
    """The config as the chosen group options leave it, without any value from the command line."""
    choices = [a for a in arguments if a.partition("=")[0].lstrip("+") in groups(command)]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        try:
            return hydra.compose(command, choices, return_hydra_config=with_hydra)
        except HydraException:  # a choice is the mistake
            return hydra.compose(command, return_hydra_config=with_hydra)
