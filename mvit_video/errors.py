"""Errors that a user can act on. Commands print them as one line; a stack trace means a bug."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

Found = TypeVar("Found")


class MVitVideoError(Exception):
    """Base of the toolkit's errors: its text names the file, key or shape, and what to do."""


class ConfigError(MVitVideoError):
    """A setting is misspelt, missing or out of range."""


class DataError(MVitVideoError):
    """An index of videos can't be read or contradicts itself."""


class VideoError(MVitVideoError):
    """A video file can't give the frames that were asked for."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type[VideoError], tuple[str, str]]:
        return type(self), (self.path, self.reason)  # crosses from loader workers intact


class CheckpointError(MVitVideoError):
    """A weight file can't be read or doesn't fit the model."""


class TrainingError(MVitVideoError):
    """A training run can't go on: its loss isn't finite, or memory isn't enough."""


def did_you_mean(word: str, known: Iterable[str], form: str = "{!r}") -> str:
    """The known word nearest to ``word`` as a question in brackets, or nothing where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {form.format(close[0])}?)" if close else ""


def look_up(name: str, known: Mapping[str, Found], what: str) -> Found:
    """What a name stands for. Raises ConfigError, with the nearest and all others, for a name of nothing."""
    if name not in known:
        names = ", ".join(sorted(known))
        raise ConfigError(f"unknown {what} {name!r}{did_you_mean(name, known)}; known: {names}")
    return known[name]


def import_extra(module: str, extra: str, who: str) -> Any:
    """A module that only ``who`` needs. Raises ConfigError, with the extra to install, without it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = f"{module.partition('.')[0]} isn't installed: pip install 'mvit-video[{extra}]'"
        raise ConfigError(f"{missing} ({who} needs it: {error})") from None


@contextmanager
def refusing(kind: type[MVitVideoError], what: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Whatever a file or a library makes go wrong becomes an error of a kind: what, and in brackets why.

    Those of this kind, and ``but`` those, stay as they are.
    """
    try:
        yield
    except (kind, *but):
        raise
    except Exception as error:  # without a common base
        raise kind(f"{what} ({brief(error)})") from None


def brief(error: BaseException) -> str:
    """A library's error on one line, whatever a file has put into it."""
    return " ".join(f"{type(error).__name__}: {error}"[:1000].split())[:200]
