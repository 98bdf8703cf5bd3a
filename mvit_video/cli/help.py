"""The pages of ``--help``: every option of a command, with its comment in conf/ or else what it may be."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from mvit_video.cli.conf import CONF_DIR, groups, options, read, values_of
from mvit_video.cli.schema import in_yaml, kinds_of

_WIDTH = 80
_MORE = "--cfg job shows the whole config, --hydra-help all of Hydra's options."
_ARGUMENTS = {"predict": "[FILE ...] ", "data": "prepare|check ", "info": "[system|speed] "}


def help_page(command: str, config: DictConfig) -> str:
    """Every option of a command with its value in ``config``, which has Hydra's part, too; in 80 columns."""
    about, values = read(CONF_DIR / f"{command}.yaml")
    usage = f"Usage: mvit-{command} {_ARGUMENTS.get(command, '')}[KEY=VALUE ...] [GROUP=OPTION ...]"
    lines = [*textwrap.wrap(about, _WIDTH), "", usage, ""]
    if values:
        lines.append("Options, with their defaults")
        for value in values:
            lines += _line(value.key, OmegaConf.select(config, value.key), value.meaning)
        lines.append("")
    lines.append("Groups, with the keys of the option that is chosen")
    for group in groups(command):
        lines += ["", *_group_lines(command, group, config)]
    return "\n".join([*lines, "", config.hydra.help.footer, "", _MORE])


def _group_lines(command: str, group: str, config: DictConfig) -> Iterator[str]:
    key, chosen = group.replace("/", "."), config.hydra.runtime.choices.get(group)
    names = f"{group}: {', '.join(options(group))}"
    yield from textwrap.wrap(names, _WIDTH, initial_indent="  ", subsequent_indent="      ")
    node = OmegaConf.select(config, key)
    if isinstance(node, DictConfig):
        meanings = {v.key: v.meaning for v in values_of(group, chosen) if v.meaning}
        own = {value.key for value in read(CONF_DIR / f"{command}.yaml")[1]}  # shown above
        leaves = _leaves(OmegaConf.to_container(node))
        for name, value in ((name, value) for name, value in leaves if f"{key}.{name}" not in own):
            kinds = kinds_of(command).get(f"{key}.{name}", ())
            yield from _line(f"{key}.{name}", value, meanings.get(name) or " or ".join(map(str, kinds)))


def _leaves(node: object, parent: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys and values, without those that Hydra builds objects by."""
    if not isinstance(node, dict):
        yield parent, node
        return
    for name, value in node.items():
        if not name.startswith("_"):
            yield from _leaves(value, f"{parent}.{name}" if parent else name)


def _line(key: str, value: object, meaning: str) -> list[str]:
    head = f"  {key}={'(needed)' if value == '???' else in_yaml(value)}"
    if not meaning:
        return [head]
    pad = " " * 36
    if len(head) > 34:
        return [head, *textwrap.wrap(meaning, _WIDTH, initial_indent=pad, subsequent_indent=pad)]
    return textwrap.wrap(meaning, _WIDTH, initial_indent=f"{head:<36}", subsequent_indent=pad)
