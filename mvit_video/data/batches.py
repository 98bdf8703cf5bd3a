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

    Yields each video, in order and as soon as it is done, without its clips but with its rows (V, ...).
    """
    waiting: deque[VideoViews] = deque()  # videos whose rows aren't complete
    parts: list[Tensor] = []  # clips that have not been run, and how many
    count = 0
    rows = torch.empty(0)  # that no video has got yet

    def append(found: Tensor) -> Tensor:
        return torch.cat([rows, found]) if len(rows) else found

    def take_finished() -> Iterator[tuple[VideoViews, Tensor]]:
        nonlocal rows
        while waiting and len(waiting[0].spans) <= len(rows):
            views = waiting.popleft()
            own, rows = rows[: len(views.spans)], rows[len(views.spans) :]
            yield views, own if views.spans else torch.empty(0)

    for views in videos:
        waiting.append(replace(views, clips=torch.empty(0)))
        if views.error is None:
            parts.append(views.clips)
            count += len(views.clips)
        while count >= batch_size:
            clips = torch.cat(parts) if len(parts) > 1 else parts[0]
            rows = append(run(clips[:batch_size]))
            count -= batch_size
            parts = [clips[batch_size:]] if count else []
        yield from take_finished()
    if parts:
        rows = append(run(torch.cat(parts)))
    yield from take_finished()
