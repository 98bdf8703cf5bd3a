"""What a job does about videos that can't be used: say so, list them at once, stop at too many."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mvit_video.data.datasets import BadVideo
from mvit_video.errors import ConfigError, DataError
from mvit_video.io.console import csv_cell, csv_text, printable
from mvit_video.io.writing import append, keep_whole_lines

log = logging.getLogger(__name__)


class BadVideos:
    """Every unreadable video of a job once, by path as the file has it.

    Each is logged and added to a csv file (path, reason) as soon as it is found; the first makes the file.
    The processes of a job share the file, and each counts all of its rows.

    Args:
        file: the csv file.
        allowed: how many the job bears.
        total: how many videos the job has.
        go_on: count what the file lists already, as a resumed job does; else one process has to move away
            what a former run has left.
    """

    def __init__(self, file: Path, *, allowed: int, total: int, go_on: bool = False) -> None:
        self.file, self.allowed, self.total = file, allowed, total
        self.found: dict[str, BadVideo] = {}
        if go_on and file.is_file():
            keep_whole_lines(file)
            self.found = self._listed()

    def note(self, videos: Iterable[BadVideo]) -> None:
        """List those that are new. Raises DataError as soon as they are more than the job bears."""
        new = {csv_cell(video.path): video for video in videos}
        if not new.keys() - self.found.keys():
            return
        listed = self._listed()  # others have found some of them, perhaps
        for path, video in new.items():
            if path not in listed:
                log.warning("unreadable file %s: %s", printable(video.path), printable(video.reason))
                self._append(video)
        self.found = self._listed()
        self.check()

    def check(self) -> None:
        """Raise DataError when there are more than the job bears, such as of several processes together."""
        if len(self.found) > self.allowed:
            named = "; ".join(f"{path}: {reason}" for path, reason in list(self.found.values())[:3])
            raise DataError(
                f"{len(self.found)} of {self.total} videos can't be read, and max_bad_videos allows "
                f"{self.allowed}; {self.file} lists them: {named}"
            )

    def _listed(self) -> dict[str, BadVideo]:
        if not self.file.is_file():
            return {}
        with self.file.open(newline="", encoding="utf-8") as rows:
            found = [BadVideo(*row) for row in csv.reader(rows) if len(row) == 2]
        return {video.path: video for video in found if video != BadVideo._fields}

    def _append(self, video: BadVideo) -> None:
        # Headers and rows go out in one piece each, to the end of the file: processes share it.
        with suppress(FileExistsError), open(self.file, "xb", opener=_for_appending) as file:
            append(file, csv_text([BadVideo._fields], "\r\n").encode())
        with self.file.open("ab") as file:
            append(file, csv_text([video], "\r\n").encode())


def _for_appending(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_APPEND, 0o666)


def allowed_bad_videos(max_bad_videos: float, total: int) -> int:
    """How many of ``total`` videos may be bad: a number of them, or below 1 a share, rounded down.

    Raises ConfigError for a negative or broken number.
    """
    if not (0 <= max_bad_videos <= 1 or (max_bad_videos > 1 and float(max_bad_videos).is_integer())):
        raise ConfigError(f"max_bad_videos must be a share below 1 or a whole number, got {max_bad_videos}")
    return int(max_bad_videos * total + 1e-9) if max_bad_videos < 1 else int(max_bad_videos)
