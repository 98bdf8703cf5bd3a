"""Dataclasses of settings: values checked against the annotated types, and replaced by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from numbers import Integral, Real
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


def replace_fields(config: Any, overrides: Mapping[str, Any], others: Iterable[str] = ()) -> Any:
    """A copy of a dataclass with other values, of which None leaves a field as it is.

    Raises ConfigError for a field that it doesn't have; ``others`` are what may have been meant, too.
    """
    names = [field.name for field in dataclasses.fields(config)]
    for key in overrides:
        if key not in names:
            kind, near = type(config).__name__, did_you_mean(key, (*names, *others))
            raise ConfigError(f"{kind} has no {key!r}{near}; it has: {', '.join((*names, *others))}")
    return dataclasses.replace(config, **{key: v for key, v in overrides.items() if v is not None})


def check_types(config: Any) -> None:
    """Bring a dataclass's fields to their annotated types: lists to tuples, NumPy's numbers to Python's.

    Raises ValueError, with name and value, where that isn't possible.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        try:
            object.__setattr__(config, name, _fit(value, hint))
        except TypeError:
            raise ValueError(f"{name} must be {_text(hint)}, got {value!r}") from None


def _fit(value: Any, hint: Any) -> Any:
    """The value as a type has it; TypeError where it doesn't fit."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        for argument in arguments:
            with suppress(TypeError):
                return _fit(value, argument)
    elif kind is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(value) == len(hints):
            return tuple(map(_fit, value, hints))
    elif kind is Literal and isinstance(value, str) and value in arguments:
        return value
    elif hint in (int, float) and not isinstance(value, bool):
        if isinstance(value, Integral):
            return int(value)
        if hint is float and isinstance(value, Real) and math.isfinite(value):
            return float(value)
    elif type(value) is hint:
        return value
    raise TypeError


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
