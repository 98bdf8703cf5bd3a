"""From an open video to clips for the model: plan the views, decode once, transform."""

from __future__ import annotations

import random
from functools import partial

import torch
from torch import Tensor

from mvit_video.data import sampling
from mvit_video.data.augment import Augment, ClipAugmentation
from mvit_video.data.decode import Video
from mvit_video.data.pixels import PendingClips, cut_views, finish_clips, resize_for_test, view_crops
from mvit_video.model.clip_spec import ClipSpec


def read_training_clips(
    video: Video, spec: ClipSpec, augment: Augment, rng: random.Random
) -> list[PendingClips | Tensor]:
    """One random clip of a video, augmented ``augment.repeats`` times, each (1, 3, T, H, W).

    Raises VideoError for a bad file.
    """
    length, stride, fps = spec.clip_frames, spec.stride, spec.target_fps
    if spec.sampling == "segment":
        indices = sampling.random_segment_frame_indices(video.num_frames, clip_frames=length, rng=rng)
    else:
        indices = sampling.random_frame_indices(
            video.num_frames, video.fps, clip_frames=length, stride=stride, target_fps=fps, rng=rng
        )
    augmentation = ClipAugmentation(augment, spec.crop, mean=spec.mean, std=spec.std, rng=rng)
    return augmentation.to_clips(video.get_frames(indices, transform=augmentation))


def read_test_views(video: Video, spec: ClipSpec) -> tuple[Tensor, list[tuple[float, float]]]:
    """All views of a video, float (V, 3, T, H, W), and their spans, as in ``VideoViews``.

    Raises VideoError for a bad file.
    """
    clips, spans = read_pending_views(video, spec)
    return finish_clips(clips), spans


def read_pending_views(
    video: Video, spec: ClipSpec
) -> tuple[list[PendingClips | Tensor], list[tuple[float, float]]]:
    """The same, pending where the pictures' bytes aren't more than the floats of the views."""
    clips = view_frame_indices(video.num_frames, video.fps, spec)
    needed = sorted({index for clip in clips for index in clip})
    rows = {index: row for row, index in enumerate(needed)}
    shrink = partial(_resize_large, spec=spec, frames_a_clip=len(needed) / len(clips))
    frames = video.get_frames(needed, transform=shrink)  # one decode for all
    crops = view_crops(video.height, video.width, spec)
    finish = partial(_finish_views, rows=[[rows[i] for i in clip] for clip in clips], crops=crops, spec=spec)
    spans = [(video.frame_time(clip[0]), video.frame_time(clip[-1])) for clip in clips for _ in crops]
    return [PendingClips(frames, finish) if frames.dtype == torch.uint8 else finish(frames)], spans


def _resize_large(frames: Tensor, *, spec: ClipSpec, frames_a_clip: float) -> Tensor:
    height, width = frames.shape[-2:]
    floats = 4 * spec.clip_frames * spec.crop**2 * len(view_crops(height, width, spec))  # bytes a clip
    return resize_for_test(frames, spec) if frames_a_clip * height * width > floats else frames


def _finish_views(
    frames: Tensor, *, rows: list[list[int]], crops: list[sampling.SpatialView], spec: ClipSpec
) -> Tensor:
    resized = resize_for_test(frames, spec) if frames.dtype == torch.uint8 else frames
    return cut_views(resized, rows, crops)


def centre_views(clips: Tensor, spec: ClipSpec) -> Tensor:
    """The centre crop of clips that were cut already, as a model sees it.

    Args:
        clips: uint8 (B, 3, T, H, W).

    Returns:
        float (B, 3, T, crop, crop)
    """
    height, width = clips.shape[-2:]
    crops = view_crops(height, width, spec)
    centre = crops[len(crops) // 2]
    whole = range(clips.shape[2])
    frames = (resize_for_test(clip.transpose(0, 1), spec) for clip in clips)
    return torch.cat([cut_views(clip, [whole], [centre]) for clip in frames])


def view_frame_indices(num_frames: int, fps: float, spec: ClipSpec) -> list[list[int]]:
    """Frame numbers of the test clips."""
    length, clips, stride, target_fps = spec.clip_frames, spec.num_clips, spec.stride, spec.target_fps
    if spec.sampling == "segment":
        return [sampling.segment_frame_indices(num_frames, clip_frames=length)]
    if spec.sampling == "torchvision":
        return sampling.torchvision_frame_indices(
            num_frames, fps, clip_frames=length, frame_rate=target_fps / stride, num_clips=clips
        )
    return sampling.kinetics_frame_indices(
        num_frames, fps, clip_frames=length, stride=stride, num_clips=clips, target_fps=target_fps
    )
