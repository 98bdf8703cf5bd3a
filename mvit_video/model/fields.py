"""Dataclasses of settings: values checked against the annotated types, and replaced by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mvit_video.errors import ConfigError, did_you_mean

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    NoneType: "null",
    Ellipsis: "...",
}


def replace_fields(config: Any, overrides: dict[str, Any]) -> Any:
    """A copy of a dataclass with other values; ConfigError for a field that it doesn't have.

    Lists, as yaml has them, become tuples.
    """
    names = [field.name for field in dataclasses.fields(config)]
    for key in overrides:
        if key not in names:
            kind = type(config).__name__
            raise ConfigError(f"{kind} has no {key!r}{did_you_mean(key, names)}; it has: {', '.join(names)}")
    return dataclasses.replace(config, **{key: _as_tuples(value) for key, value in overrides.items()})


def _as_tuples(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_as_tuples(item) for item in value)
    return value


def check_types(config: Any) -> None:
    """Raises ValueError, with name and value, where a field of a dataclass isn't of its annotated type."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _is_of(value, hint):
            raise ValueError(f"{name} must be {_text(hint)}, got {value!r}")


def _is_of(value: Any, hint: Any) -> bool:
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Literal:
        return isinstance(value, str) and value in arguments
    if kind in (Union, UnionType):
        return any(_is_of(value, argument) for argument in arguments)
    if kind is tuple:
        if not isinstance(value, tuple):
            return False
        hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(value) == len(hints) and all(map(_is_of, value, hints))
    if hint is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    return type(value) is hint


def _text(hint: Any) -> str:
    """A type as people write its values: "one of conv, max", "[int, int, int] or null"."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Literal:
        return f"one of {', '.join(arguments)}"
    if kind in (Union, UnionType):
        return " or ".join(map(_text, arguments))
    if kind is tuple:
        return f"[{', '.join(map(_text, arguments))}]"
    return _WORDS.get(hint, str(hint))
