"""Mixup and CutMix of a batch of clips, in the official form.

torchvision's and timm's draw partners, boxes or random numbers in another way, or know no time axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Mixing:
    """Mixes a batch with itself in reverse order, one lam for the whole batch.

    Attributes:
        mixup, cutmix: alpha of the Beta distribution that lam comes from; 0: off.
        probability: that a batch is mixed.
        switch_probability: that it is CutMix, where both are on.

    Raises:
        ValueError: neither is on.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    probability: float = 1.0
    switch_probability: float = 0.5

    def __post_init__(self) -> None:
        if self.probability and not (self.mixup or self.cutmix):
            raise ValueError("mixup and cutmix are both 0; probability=0 is how mixing is turned off")

    def __call__(self, clips: Tensor, rng: np.random.RandomState) -> tuple[Tensor, float]:
        """Mix clips (B, 3, T, H, W) with their reverse; also lam, the share of a clip's own class, in [0, 1].

        The random numbers are drawn as in the official code. A batch of one stays as it is.
        """
        if len(clips) < 2 or not self.probability or rng.rand() >= self.probability:
            return clips, 1.0
        cuts = bool(self.cutmix)
        if self.mixup and self.cutmix:
            cuts = bool(rng.rand() < self.switch_probability)
        alpha = self.cutmix if cuts else self.mixup
        lam = float(rng.beta(alpha, alpha))
        if not cuts:
            return torch.lerp(clips.flip(0), clips, lam), lam
        height, width = clips.shape[-2:]
        top, bottom, left, right = _random_box(height, width, 1 - lam, rng)
        mixed = clips.clone()
        mixed[..., top:bottom, left:right] = clips.flip(0)[..., top:bottom, left:right]
        return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _random_box(
    height: int, width: int, share: float, rng: np.random.RandomState
) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of a box of about that share of the area, clipped at the border."""
    scale = math.sqrt(share)
    box_height, box_width = int(height * scale), int(width * scale)
    y, x = int(rng.randint(height)), int(rng.randint(width))
    return (
        max(y - box_height // 2, 0),
        min(y + box_height // 2, height),
        max(x - box_width // 2, 0),
        min(x + box_width // 2, width),
    )


def hard_targets(labels: Tensor, num_classes: int) -> Tensor:
    """Labels (B,), or of several classes (B, K) filled up with -1, as float (B, num_classes) of 0 and 1."""
    if labels.ndim == 1:
        return F.one_hot(labels, num_classes).float()
    hot = torch.zeros(len(labels), num_classes + 1, device=labels.device)  # the last column takes the -1
    return hot.scatter_(1, labels.where(labels >= 0, num_classes), 1.0)[:, :-1]


def soft_targets(labels: Tensor, num_classes: int, *, lam: float, smoothing: float) -> Tensor:
    """Smoothed targets of a batch that was mixed with its reverse.

    Args:
        labels: int64, as of ``hard_targets``.
        lam: share of a clip's own class; 1 for a batch that wasn't mixed.
        smoothing: share of the target that is spread over all classes.

    Returns:
        float (B, num_classes); each row sums to 1 where a clip has one class.
    """
    hard = hard_targets(labels, num_classes)
    mixed = lam * hard + (1 - lam) * hard.flip(0)
    return (1 - smoothing) * mixed + smoothing / num_classes
