"""What a result came from: whoever goes on with a run of before compares its fingerprint with their own.

A fingerprint is a nested dictionary of plain JSON values: ``{"weights": {"sha256": ...}, "views": ...}``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mvit_video.errors import ConfigError
from mvit_video.io.writing import keep_former, replacing

Fingerprint = dict[str, Any]

_MISSING = object()


def fingerprint(**parts: Any) -> Fingerprint:
    """The parts as JSON would read them back: tuples become lists, paths and other objects text."""
    values: Fingerprint = json.loads(json.dumps(parts, default=str))
    return values


def write_fingerprint(path: Path, values: Mapping[str, Any]) -> None:
    """Leave it for the next run; a file of that name that is no fingerprint is kept as ``<name>.former``."""
    if not read_fingerprint(path):
        keep_former(path)
    with replacing(path, "w") as file:
        json.dump(values, file, indent=2)


def read_fingerprint(path: Path) -> Fingerprint:
    """What a former run has left, {} where there is nothing, or something else. Raises OSError."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs, by dotted key, each as ``"old -> new"``; hexadecimal hashes are shortened."""
    old, new = _flat(before), _flat(now)
    return {
        key: f"{_short(old.get(key, _MISSING))} -> {_short(new.get(key, _MISSING))}"
        for key in {**old, **new}
        if old.get(key, _MISSING) != new.get(key, _MISSING)
    }


def require_same(
    before: Mapping[str, Any], now: Mapping[str, Any], *, what: str, remedy: str, free: Collection[str] = ()
) -> None:
    """Refuse to go on with other work than before.

    Args:
        what: the file or folder that the former run has left.
        remedy: what to type instead, such as ``"name another output, or resume=false"``.
        free: dotted keys that may differ.

    Raises:
        ConfigError: it names what differs: ``weights: sha256 1822f9... -> cb223a...; name another output``.
    """
    found = {key: change for key, change in differences(before, now).items() if key not in free}
    if found:
        listed = "; ".join(f"{key.replace('.', ': ', 1)} {change}" for key, change in found.items())
        raise ConfigError(f"{what} comes from other settings: {listed}; {remedy}")


def file_sha256(*paths: str | Path) -> str:
    """The hexadecimal SHA-256 of a file's content, or of the contents of several one behind the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:  # noqa: PTH123 (thousands of pictures)
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def file_stamp(path: str | Path) -> Fingerprint:
    """Size in bytes and time of the last change in nanoseconds; nothing for what is no file on a disk.

    It tells a file that was replaced without reading it.
    """
    try:
        stat = os.stat(path)  # noqa: PTH116 (many files)
    except OSError:
        return {}
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _short(value: Any) -> str:
    if value is _MISSING:
        return "(none)"
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) == 64 and not set(text) - set("0123456789abcdef"):
        return f"{text[:6]}..."
    return text if len(text) <= 60 else f"{text[:57]}..."
