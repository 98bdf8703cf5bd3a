"""The journal of a run: an entry for each piece of work that is done, from which a killed run is resumed.

An entry is a line of JSON with a checksum, so that lines that a kill or a power loss has torn don't count.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mvit_video.io.writing import append, growing, replacing

Entry = dict[str, Any]

_SECONDS_PER_SYNC = 1.0  # what a power loss may cost


@contextmanager
def journal(path: Path) -> Iterator[Callable[[Entry], None]]:
    """Add to a journal, or begin one: gives a function that adds an entry, which then survives a kill.

    Raises OSError with the file's name.
    """
    synced_at = -math.inf
    path.parent.mkdir(parents=True, exist_ok=True)
    with growing(path) as file:
        append(file, b"\n")  # ends a line that was torn

        def add(entry: Entry) -> None:
            nonlocal synced_at
            is_due = time.monotonic() - synced_at > _SECONDS_PER_SYNC
            append(file, _sealed(entry), sync=is_due)
            synced_at = time.monotonic() if is_due else synced_at

        try:
            yield add
        finally:
            append(file, b"")


def read_journal(path: Path) -> Iterator[Entry]:
    """The entries that are as they were written, in order; none where there is no file."""
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                seal, _, rest = line.removesuffix(b"\n").partition(b", ")
                if seal == _seal(text := b"{" + rest):
                    yield json.loads(text)


def rewrite_journal(path: Path, entries: Iterable[Entry]) -> None:
    """Put a journal of these entries, which may be some of its own, in the place of another, in one step."""
    with replacing(path) as file:
        file.writelines(map(_sealed, entries))


def _sealed(entry: Entry) -> bytes:
    text = json.dumps(entry).encode()
    return _seal(text) + b", " + text[1:] + b"\n"


def _seal(text: bytes) -> bytes:
    return b'{"crc32": %d' % zlib.crc32(text)
