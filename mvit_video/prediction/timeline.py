"""What happens when in a long video: scores over time, and segments of one class."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mvit_video.errors import ConfigError
from mvit_video.prediction.prediction import Segment


@dataclass(frozen=True)
class Timeline:
    """Scores of a video's windows.

    Attributes:
        spans: first and last second of each window, in order.
        scores: (windows, num_classes), softmax; sigmoid where windows may be of several classes.
        stride: seconds from one window to the next.
        multi_label: whether they may.
    """

    path: str
    class_names: tuple[str, ...]
    spans: list[tuple[float, float]]
    scores: Tensor
    stride: float
    multi_label: bool = False

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
        first = torch.searchsorted(starts, starts - (reach + 0.5) * self.stride)
        last = torch.searchsorted(starts, starts + (reach + 0.5) * self.stride)
        sums = torch.cat([torch.zeros(1, self.scores.shape[1]), self.scores]).double().cumsum(0)
        means = (sums[last] - sums[first]) / (last - first)[:, None]
        return replace(self, scores=means.float())

    def segments(self, min_score: float = 0.0) -> tuple[Segment, ...]:
        """Neighbouring windows with the same best class, merged; those below ``min_score`` are left out.

        A window speaks for the time up to the middle between it and its neighbours. Where it may be of
        several classes, it is of all from ``min_score`` on (0.5 where that is 0): segments may overlap.

        Raises ConfigError for what is no score.
        """
        if not 0 <= min_score <= 1:
            raise ConfigError(f"min_score={min_score} isn't possible; expected a score from 0 to 1")
        shown = self.scores >= (min_score or 0.5 * self.multi_label)
        if not self.multi_label:
            shown &= F.one_hot(self.scores.argmax(1), len(self.class_names)).bool()
        # Whether each window follows the one before, without a gap in the recording.
        follows = [False, *(b[0] - a[0] < 1.5 * self.stride for a, b in pairwise(self.spans)), False]
        centres = [(start + end) / 2 for start, end in self.spans]
        found: list[tuple[int, list[int]]] = []  # class and windows
        for label, index in shown.T.nonzero().tolist():
            if found and follows[index] and found[-1][0] == label and found[-1][1][-1] == index - 1:
                found[-1][1].append(index)
            else:
                found.append((label, [index]))
        segments = []
        for label, windows in found:
            first, last = windows[0], windows[-1]
            start, end = self.spans[first][0], self.spans[last][1]
            if follows[first]:
                start = (centres[first - 1] + centres[first]) / 2
            if follows[last + 1]:
                end = (centres[last] + centres[last + 1]) / 2
            score = self.scores[windows, label].mean().item()
            segments.append(Segment(start, end, self.class_names[label], score))
        return tuple(sorted(segments, key=lambda segment: (segment.start, -segment.score)))
