"""Clips with masks, in batches; labels aren't read."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvit_video.data.datasets import BadVideo, ClipDataset, ViewDataset, cat_clips

DrawMask = Callable[[random.Random], Tensor]


class MaskedClips(NamedTuple):
    """Clips of one video or of a batch of them, and the videos that gave none."""

    clips: Any  # float (B, 3, T, H, W); ``Clips`` until they are where the model is
    masks: Tensor  # bool (B, T', h, w), True where masked
    bad: list[BadVideo]
    paths: Sequence[str]  # of each clip


class MaskedTrainingClips(ClipDataset):
    """Random clips, each with a mask that follows from seed, epoch and index alone.

    Args:
        draw_mask: gives bool (T', h, w).
        options: as of ``ClipDataset``.
    """

    def __init__(self, *arguments: Any, draw_mask: DrawMask, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.draw_mask = draw_mask

    def __getitem__(self, key: Any) -> MaskedClips:  # type: ignore[override]
        sample = super().__getitem__(key)
        epoch, index = key
        rng = random.Random(f"mask {self.seed} {epoch} {index}")
        masks = torch.stack([self.draw_mask(rng) for _ in sample.clips])
        return MaskedClips(sample.clips, masks, sample.bad, [sample.path] * len(masks))


class MaskedTestViews(ViewDataset):
    """The test views of each video, with masks that follow from seed and index alone.

    Args:
        draw_mask: gives bool (T', h, w).
        options: as of ``ViewDataset``.
    """

    def __init__(self, *arguments: Any, draw_mask: DrawMask, seed: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.draw_mask, self.seed = draw_mask, seed

    def __getitem__(self, index: int) -> MaskedClips:  # type: ignore[override]
        views = super().__getitem__(index)
        path = views.video.path
        if views.error is not None:
            return MaskedClips(torch.empty(0), torch.empty(0), [BadVideo(path, views.error)], [])
        rng = random.Random(f"mask {self.seed} {index}")
        masks = torch.stack([self.draw_mask(rng) for _ in views.spans])
        return MaskedClips(views.clips, masks, [], [path] * len(masks))


def collate_masked(samples: list[MaskedClips]) -> MaskedClips:
    """A batch of the clips of several videos; of bad ones alone, one without clips."""
    good = [sample for sample in samples if len(sample.clips)]
    return MaskedClips(
        cat_clips([sample.clips for sample in good]),
        torch.cat([sample.masks for sample in good]) if good else torch.empty(0),
        [bad for sample in samples for bad in sample.bad],
        [path for sample in samples for path in sample.paths],
    )
