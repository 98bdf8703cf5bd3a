"""When frames are shown, and how many a second: also where a recording's clock stops, restarts or jumps."""

from __future__ import annotations

import functools
import logging
from fractions import Fraction
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

log = logging.getLogger(__name__)

Integers: TypeAlias = npt.NDArray[np.int64]

NO_TIME = -(1 << 63)  # as FFmpeg has it
_GAP_SECONDS, _GAP_RATIO = 1.0, 10.0  # a gap is as long and as many usual distances
_MAX_GAPS = 0.05  # of all distances; where there are more, the rate just varies
# Seconds: as in FFmpeg's command line, formats with clocks that jump have no longer gaps.
_MAX_DISCONTINUITY = 10.0


class FrameTimes(NamedTuple):
    """Of all frames of a file.

    Attributes:
        seconds: from the first frame, rising.
        fps: frames a second: (frames - 1) / (time of the last - time of the first frame), or by the usual
            distance of two frames where the clock restarts or has gaps.
        start: seconds of the first frame on the stream's own clock.
        num_jumps: how often the clock restarts or has a gap.
    """

    seconds: npt.NDArray[np.float64]
    fps: float
    start: float
    num_jumps: int


def measure_times(pts: Integers, tick: Fraction, declared_fps: float, *, clock_may_jump: bool) -> FrameTimes:
    """Measure times and rate of frames in the order in which they are shown.

    Args:
        pts: in ticks; `NO_TIME` where the file does not tell.
        tick: seconds.
        declared_fps: what the file says, for frames without times.
        clock_may_jump: the format allows it, so a long gap is no pause.
    """
    told = pts[pts != NO_TIME]
    start = int(told[0]) if len(told) else 0
    declared = FrameTimes(np.arange(len(pts)) / declared_fps, declared_fps, float(start * tick), 0)
    if len(pts) < 2 or len(told) < len(pts):
        return declared
    ticks, steps = pts, np.diff(pts)
    if not (steps > 0).all():
        ordered = np.sort(pts)
        if (np.diff(ordered) > 0).all() and (steps > -_GAP_SECONDS / tick).all():
            ticks, start = ordered, int(ordered[0])  # frames that were told each other's times
            steps = np.diff(ticks)
    rising = steps[steps > 0]
    if not len(rising):
        return declared
    usual = float(np.median(rising))
    gap = max(_GAP_SECONDS / tick, _GAP_RATIO * usual)
    gaps = steps > gap
    if gaps.sum() > max(1, _MAX_GAPS * len(steps)):
        gaps[:] = False
    jumps = gaps | (steps <= 0)
    if not jumps.any():
        # In fractions: 29.999999999999996 for 30 costs a clip's last frame.
        fps = float((len(pts) - 1) / (int(ticks[-1] - ticks[0]) * tick))
        return FrameTimes((ticks - start).astype(np.float64) * float(tick), fps, float(start * tick), 0)
    near = rising[(rising > usual / 2) & (rising < usual * 3 / 2)]
    fps = float(len(near) / (int(near.sum()) * tick))
    bridged = steps <= 0
    if clock_may_jump:
        bridged |= gaps & (steps > _MAX_DISCONTINUITY / tick)
    seconds = np.where(bridged, 1 / fps, steps * float(tick)).cumsum()
    return FrameTimes(np.concatenate([[0.0], seconds]), fps, float(start * tick), int(jumps.sum()))


@functools.lru_cache(maxsize=10_000)
def warn_of_jumps(path: str, num_jumps: int, fps: float) -> None:
    """Once a file and process."""
    places = "1 place" if num_jumps == 1 else f"{num_jumps} places"
    rate = f"{fps:.6g} frames a second by the usual distance of two frames"
    log.warning("%s: its clock restarts or jumps in %s; %s", path, places, rate)
