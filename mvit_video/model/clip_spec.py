"""How clips are cut out of videos for a model: the part of a result that weights alone don't tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mvit_video.model.fields import check_types

KINETICS_MEAN, KINETICS_STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_SIZE = 4096  # of any number of frames, clips or pixels: far above any model's


@dataclass(frozen=True)
class ClipSpec:
    """Clip, crop and normalisation that a model was trained for, and the views that it is tested with.

    Attributes:
        clip_frames: frames of a clip.
        stride: frames from one frame of a clip to the next, counted at ``target_fps``.
        target_fps: frames per second that strides refer to; videos of another rate are spanned in seconds.
        sampling: "uniform": ``num_clips`` clips spread over the video (Kinetics); "segment": one clip with
            a frame from each of ``clip_frames`` equal segments (Something-Something); "torchvision":
            ``num_clips`` clips as torchvision's reference spreads them, see ``torchvision_frame_indices``.
        pixels: "slowfast": pictures stay unrounded when they are resized, an odd centre is rounded up;
            "torchvision": they are rounded to whole levels, an odd centre goes to the even neighbour;
            "image": as that, and resized by Pillow's antialiased bicubic filter (ImageNet).
        num_clips, num_crops: temporal and spatial views of a video in tests.
        short_side, crop: pixels of the resized short side and of the square crop in tests.
        mean, std: of RGB in [0, 1].
    """

    clip_frames: int = 16
    stride: int = 4
    target_fps: float = 30.0
    sampling: Literal["uniform", "segment", "torchvision"] = "uniform"
    pixels: Literal["slowfast", "torchvision", "image"] = "slowfast"
    num_clips: int = 5
    num_crops: int = 1
    short_side: int = 256
    crop: int = 224
    mean: tuple[float, float, float] = KINETICS_MEAN
    std: tuple[float, float, float] = KINETICS_STD

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("clip_frames", "stride", "target_fps", "num_clips", "short_side", "crop"):
            if not 0 < getattr(self, name) <= MAX_SIZE:
                raise ValueError(f"{name} must be positive and at most {MAX_SIZE}, got {getattr(self, name)}")
        if self.target_fps < 1 / MAX_SIZE:  # a clip's frames would be beyond the range of float32
            raise ValueError(f"target_fps must be at least 1/{MAX_SIZE}, got {self.target_fps}")
        if self.num_crops not in (1, 3):
            raise ValueError(
                f"num_crops must be 1 (centre) or 3 (along the longer side), got {self.num_crops}"
            )
        if self.pixels != "slowfast" and self.num_crops != 1:
            raise ValueError(f"num_crops must be 1 where pixels is {self.pixels!r}, got {self.num_crops}")
        if self.crop > self.short_side:
            raise ValueError(f"crop {self.crop} must not exceed short_side {self.short_side} (pixels)")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    def __str__(self) -> str:
        clips = f"{self.num_clips} clip{'s' * (self.num_clips > 1)}"
        stride = f" x stride {self.stride} at {self.target_fps:g} fps"
        if self.sampling == "segment":
            clips, stride = "1 clip over segments", ""
        stride += " spread as by torchvision" * (self.sampling == "torchvision")
        pixels = ", pixels as of torchvision" * (self.pixels == "torchvision")
        return (
            f"{clips} x {self.num_crops} crop{'s' * (self.num_crops > 1)}, "
            f"{self.clip_frames} frames{stride}, short side {self.short_side}, crop {self.crop}{pixels}"
        )
