"""From an open video to clips for the model: plan the views, decode once, transform."""

from __future__ import annotations

import random

from torch import Tensor

from mvit_video.data.augment import Augment, augmented_clips
from mvit_video.data.decode import Video
from mvit_video.data.pixels import test_clips
from mvit_video.data.sampling import (
    kinetics_frame_indices,
    random_frame_indices,
    random_segment_frame_indices,
    segment_frame_indices,
    spatial_views,
    torchvision_frame_indices,
    torchvision_spatial_view,
)
from mvit_video.model.clip_spec import ClipSpec


def read_training_clips(video: Video, protocol: ClipSpec, augment: Augment, rng: random.Random) -> Tensor:
    """One random clip of a video, augmented ``augment.repeats`` times, float (repeats, 3, T, H, W).

    Raises VideoError for a bad file.
    """
    if protocol.sampling == "segment":
        indices = random_segment_frame_indices(video.num_frames, clip_frames=protocol.clip_frames, rng=rng)
    else:
        indices = random_frame_indices(
            video.num_frames,
            video.fps,
            clip_frames=protocol.clip_frames,
            stride=protocol.stride,
            target_fps=protocol.target_fps,
            rng=rng,
        )
    frames = video.get_frames(indices)
    return augmented_clips(frames, augment, protocol.crop, mean=protocol.mean, std=protocol.std, rng=rng)


def read_test_views(video: Video, protocol: ClipSpec) -> tuple[Tensor, list[tuple[float, float]]]:
    """All views of a video and their spans, as in ``VideoViews``. Raises VideoError for a bad file."""
    if protocol.sampling == "segment":
        clips = [segment_frame_indices(video.num_frames, clip_frames=protocol.clip_frames)]
    elif protocol.sampling == "torchvision":
        clips = torchvision_frame_indices(
            video.num_frames,
            video.fps,
            clip_frames=protocol.clip_frames,
            frame_rate=protocol.target_fps / protocol.stride,
            num_clips=protocol.num_clips,
        )
    else:
        clips = kinetics_frame_indices(
            video.num_frames,
            video.fps,
            clip_frames=protocol.clip_frames,
            stride=protocol.stride,
            num_clips=protocol.num_clips,
            target_fps=protocol.target_fps,
        )
    needed = sorted({index for clip in clips for index in clip})
    position = {index: i for i, index in enumerate(needed)}
    positions = [[position[index] for index in clip] for clip in clips]
    frames = video.get_frames(needed)  # one decode, however many views
    height, width = frames.shape[-2:]
    sizes = {"short_side": protocol.short_side, "crop": protocol.crop}
    round_pixels = protocol.pixels != "slowfast"
    if round_pixels:
        crops = [torchvision_spatial_view(height, width, **sizes)]
    else:
        crops = spatial_views(height, width, num_crops=protocol.num_crops, **sizes)
    spans = [(video.frame_time(clip[0]), video.frame_time(clip[-1])) for clip in clips for _ in crops]
    clip_pixels = test_clips(
        frames,
        positions,
        crops,
        mean=protocol.mean,
        std=protocol.std,
        round_pixels=round_pixels,
        bicubic=protocol.pixels == "image",
    )
    return clip_pixels, spans
