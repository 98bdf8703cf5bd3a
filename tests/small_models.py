"""Models that are built, saved and read in milliseconds."""

from __future__ import annotations

from typing import Any

import torch

import mvit_video as mv

SMALL = {"num_classes": 3, "embed_dim": 8, "stages": (1, 1), "crop_size": 16, "num_frames": 4}


def small_model(seed: int = 0, **overrides: Any) -> mv.MViT:
    torch.manual_seed(seed)
    return mv.create_model("mvitv2_nano_8x4", **(SMALL | overrides))
