"""Batches of a fixed size from videos with any number of views."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mvit_video.data.datasets import VideoViews


def in_full_batches(
    videos: Iterable[VideoViews], run: Callable[[Tensor], Tensor], batch_size: int
) -> Iterator[tuple[VideoViews, Tensor]]:
    """Send the views of many videos through a model, exactly ``batch_size`` clips at once but for the last.

    Args:
        run: makes a row for each clip of a batch (B, 3, T, H, W).

    Yields:
        Each video, in order and as soon as it is done, without its clips but with its rows (V, ...).
    """
    unfinished: deque[VideoViews] = deque()  # videos whose rows aren't complete
    clips: list[Tensor] = []  # that haven't been run; one tensor for each video
    rows: list[Tensor] = []  # that no video has got yet, one for each clip

    def finished() -> Iterator[tuple[VideoViews, Tensor]]:
        while unfinished and len(unfinished[0].spans) <= len(rows):
            views = unfinished.popleft()
            count = len(views.spans)
            yield views, torch.stack(rows[:count]) if count else torch.empty(0)
            del rows[:count]

    for views in videos:
        unfinished.append(replace(views, clips=torch.empty(0)))
        if views.error is None:
            clips.append(views.clips)
        while sum(map(len, clips)) >= batch_size:
            waiting = torch.cat(clips) if len(clips) > 1 else clips[0]
            rows += run(waiting[:batch_size])
            clips = [waiting[batch_size:]] if len(waiting) > batch_size else []
        yield from finished()
    if clips:
        rows += run(torch.cat(clips))
    yield from finished()
