"""What happens when in a long video: scores over time, segments, subtitles."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mvit_video.errors import ConfigError
from mvit_video.io.console import caption
from mvit_video.io.writing import keep_former, replacing
from mvit_video.prediction.prediction import Segment


@dataclass(frozen=True)
class Timeline:
    """Scores of a video's windows.

    Attributes:
        spans: first and last second of each window, in order.
        scores: (windows, num_classes), softmax.
        stride: seconds from one window to the next.
    """

    path: str
    class_names: tuple[str, ...]
    spans: list[tuple[float, float]]
    scores: Tensor
    stride: float

    def smoothed(self, seconds: float) -> Timeline:
        """Each window's scores averaged with those of windows that start within half of ``seconds``.

        Raises ConfigError for what is no length of time.
        """
        if not 0 <= seconds < math.inf:
            raise ConfigError(f"smoothing={seconds} isn't possible; expected seconds, from 0 on")
        reach = int(seconds / 2 / self.stride + 1e-6)
        if reach == 0:
            return self
        starts = torch.tensor([start for start, _ in self.spans], dtype=torch.float64)
        first = torch.searchsorted(starts, starts - reach * self.stride - self.stride / 2)
        last = torch.searchsorted(starts, starts + reach * self.stride + self.stride / 2)
        sums = torch.cat([torch.zeros(1, self.scores.shape[1]), self.scores]).double().cumsum(0)
        means = (sums[last] - sums[first]) / (last - first)[:, None]
        return replace(self, scores=means.float())

    def edges(self) -> list[tuple[float, float]]:
        """The stretch that each window speaks for: up to the middle between it and its neighbours."""
        centres = [(start + end) / 2 for start, end in self.spans]
        edges = []
        for index, (start, end) in enumerate(self.spans):
            if self._touches(index - 1):
                start = (centres[index - 1] + centres[index]) / 2
            if self._touches(index):
                end = (centres[index] + centres[index + 1]) / 2
            edges.append((start, end))
        return edges

    def _touches(self, index: int) -> bool:
        """Whether window ``index`` and the next follow each other, without a gap in the recording."""
        if not 0 <= index < len(self.spans) - 1:
            return False
        return self.spans[index + 1][0] - self.spans[index][0] < 1.5 * self.stride

    def segments(self, min_score: float = 0.0) -> tuple[Segment, ...]:
        """Neighbouring windows with the same best class, merged; those below ``min_score`` are left out.

        Raises ConfigError for what is no score.
        """
        if not 0 <= min_score <= 1:
            raise ConfigError(f"min_score={min_score} isn't possible; expected a score from 0 to 1")
        best, classes = self.scores.max(1)
        found: list[tuple[int, list[int]]] = []  # class and windows
        for index, (score, label) in enumerate(zip(best.tolist(), classes.tolist(), strict=True)):
            if score < min_score:
                continue
            if found and found[-1][0] == label and found[-1][1][-1] == index - 1 and self._touches(index - 1):
                found[-1][1].append(index)
            else:
                found.append((label, [index]))
        edges = self.edges()
        return tuple(
            Segment(edges[w[0]][0], edges[w[-1]][1], self.class_names[label], best[w].mean().item())
            for label, w in found
        )


def write_srt(segments: Sequence[Segment], path: Path) -> None:
    """SubRip subtitles, one for each segment; others of that name are kept, see ``keep_former``."""
    blocks = [
        f"{number}\n{_clock(s.start, ',')} --> {_clock(s.end, ',')}\n{_line(s)}\n"
        for number, s in enumerate(segments, start=1)
    ]
    _write("\n".join(blocks), path)


def write_vtt(segments: Sequence[Segment], path: Path) -> None:
    """WebVTT subtitles, else as ``write_srt``."""
    blocks = [
        f"{_clock(s.start, '.')} --> {_clock(s.end, '.')}\n{html.escape(_line(s), quote=False)}\n"
        for s in segments
    ]
    _write("\n".join(["WEBVTT\n", *blocks]), path)


def _write(text: str, path: Path) -> None:
    if path.is_file() and path.read_bytes() != text.encode():
        keep_former(path)  # it may be someone's work: subtitles beside a film are called so
    with replacing(path, "w") as file:
        file.write(text)


def _line(segment: Segment) -> str:
    return f"{caption(segment.class_name)} ({segment.score:.0%})"


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
