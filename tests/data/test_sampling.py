"""View plans: equal to figures computed with PySlowFast (tests/reference/protocol.json), and always valid."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.datasets.video_utils import VideoClips
from torchvision.transforms.functional import center_crop, resize

from mvit_video.data.sampling import (
    SpatialView,
    kinetics_frame_indices,
    random_frame_indices,
    random_resized_crop,
    random_segment_frame_indices,
    random_short_side_crop,
    segment_frame_indices,
    spatial_views,
    torchvision_frame_indices,
    torchvision_spatial_view,
)

PROTOCOL = json.loads((Path(__file__).parents[1] / "reference" / "protocol.json").read_text())
SIZES = [(256, 340), (340, 256), (224, 224), (100, 113), (1, 1000), (480, 2)]


@pytest.mark.parametrize(
    "case",
    PROTOCOL["frame_indices"],
    ids=lambda case: f"{case['video_frames']}x{case['fps']:.5g}x{case['num_clips']}",
)
def test_kinetics_clips_equal_slowfast(case: dict[str, Any]) -> None:
    settings = {name: case[name] for name in ("num_clips", "target_fps", "use_offset")}
    settings |= {"clip_frames": case["num_frames"], "stride": case["sampling_rate"]}
    assert kinetics_frame_indices(case["video_frames"], case["fps"], **settings) == case["indices"]


@pytest.mark.parametrize("case", PROTOCOL["ssv2_indices"], ids=lambda case: str(case["video_frames"]))
def test_segments_equal_slowfast(case: dict[str, Any]) -> None:
    num_frames, clip_frames = case["video_frames"], case["num_frames"]
    assert segment_frame_indices(num_frames, clip_frames=clip_frames) == case["test"]
    drawn = random_segment_frame_indices(num_frames, clip_frames=clip_frames, rng=random.Random(1234))
    assert drawn == case["train_seed1234_python_random"]


@pytest.mark.parametrize(
    "case", PROTOCOL["spatial"], ids=lambda case: f"{case['frames_hw']}-{case['scale']}-{case['spatial_idx']}"
)
def test_spatial_views_equal_slowfast(case: dict[str, Any]) -> None:
    num_crops = 1 if case["protocol"].endswith("1 crop") else 3
    views = spatial_views(
        *case["frames_hw"], short_side=case["scale"], crop=case["crop"], num_crops=num_crops
    )
    view = views[case["spatial_idx"] if num_crops == 3 else 0]
    assert view == SpatialView(*case["resized_hw"], *case["offset_yx"], case["crop"])


@pytest.mark.parametrize("num_frames", [64, 100, 299, 300, 751])
@pytest.mark.parametrize("fps", [7.5, 15.0, 30.0, 25.0, 30000 / 1001, 59.94])
@pytest.mark.parametrize("num_clips", [1, 5, 10])
def test_torchvision_clips_equal_its_own_code(num_frames: int, fps: float, num_clips: int) -> None:
    clips, _ = VideoClips.compute_clips_for_video(torch.arange(num_frames), 8, 1, fps, 7.5)
    chosen = torch.linspace(0, len(clips) - 1, num_clips).floor().long()
    plan = torchvision_frame_indices(num_frames, fps, clip_frames=8, num_clips=num_clips)
    assert plan == clips[chosen].tolist()


@pytest.mark.parametrize("num_frames", [1, 5, 20])
@pytest.mark.parametrize("fps", [5.0, 24.0, 30.0])
def test_torchvision_clips_of_short_videos_repeat_the_last_frame(num_frames: int, fps: float) -> None:
    first, *others = torchvision_frame_indices(num_frames, fps, clip_frames=40)
    assert len(first) == 40
    assert first == sorted(first)
    assert first[0] == 0
    assert first[-1] < num_frames
    assert others == [first] * 4


def test_a_clock_of_ages_between_frames_takes_no_memory() -> None:
    for clip in torchvision_frame_indices(10, 1e-9, num_clips=5):
        assert len(clip) == 16
        assert 0 <= min(clip) <= max(clip) < 10


@pytest.mark.parametrize(("height", "width"), [(240, 320), (321, 240), (256, 341), (480, 481), (1080, 607)])
def test_torchvision_crops_equal_its_own_code(height: int, width: int) -> None:
    where = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"))
    view = torchvision_spatial_view(height, width, short_side=min(height, width), crop=224)
    cropped = center_crop(where, [224, 224])
    assert [view.left, view.top] == cropped[:, 0, 0].tolist()
    view = torchvision_spatial_view(height, width, short_side=256, crop=224)
    assert (view.resized_height, view.resized_width) == resize(where[None].float(), [256]).shape[-2:]


@pytest.mark.parametrize("num_frames", [1, 2, 15, 63, 64, 65, 127, 128, 129, 1000])
@pytest.mark.parametrize("fps", [1.0, 7.5, 23.976, 30.0, 59.94, 240.0])
@pytest.mark.parametrize("use_offset", [True, False])
def test_clips_stay_inside_the_video(num_frames: int, fps: float, use_offset: bool) -> None:
    clips = kinetics_frame_indices(num_frames, fps, use_offset=use_offset)
    drawn = random_frame_indices(num_frames, fps, clip_frames=16, stride=4, rng=random.Random(0))
    assert len(clips) == 5
    assert clips == sorted(clips)
    for clip in [*clips, drawn]:
        assert len(clip) == 16
        assert clip == sorted(clip)
        assert clip[0] >= 0
        assert clip[-1] < num_frames


def test_random_clips_reach_both_ends_of_the_video() -> None:
    rng = random.Random(0)
    clips = [random_frame_indices(70, 30.0, clip_frames=16, stride=4, rng=rng) for _ in range(200)]
    assert min(clip[0] for clip in clips) <= 1
    assert max(clip[-1] for clip in clips) >= 68
    assert {clip[-1] - clip[0] for clip in clips} <= {62, 63}


def test_random_segments_stay_inside_their_segments() -> None:
    rng = random.Random(0)
    for _ in range(50):
        clip = random_segment_frame_indices(33, clip_frames=16, rng=rng)
        assert all(2 * segment <= frame <= 2 * segment + 2 for segment, frame in enumerate(clip))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_frame_of_the_right_size_is_not_resized(height: int, width: int) -> None:
    short_side = min(height, width)
    (view,) = spatial_views(height, width, short_side=short_side, crop=1)
    assert (view.resized_height, view.resized_width) == (height, width)


def test_three_crops_of_a_square_frame_move_along_its_width() -> None:
    views = spatial_views(300, 300, short_side=256, crop=224, num_crops=3)
    assert [(view.top, view.left) for view in views] == [(16, 0), (16, 16), (16, 32)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_random_crops_stay_inside_the_frame(height: int, width: int) -> None:
    rng = random.Random(0)
    for _ in range(100):
        box = random_resized_crop(height, width, rng=rng)
        assert 0 <= box.top < box.top + box.height <= height
        assert 0 <= box.left < box.left + box.width <= width
        view = random_short_side_crop(height, width, rng=rng)
        assert 256 <= min(view.resized_height, view.resized_width) <= 320
        assert 0 <= view.top <= view.resized_height - 224
        assert 0 <= view.left <= view.resized_width - 224


def test_random_resized_crop_covers_the_asked_area_and_aspect() -> None:
    rng = random.Random(0)
    boxes = [random_resized_crop(1000, 1000, rng=rng) for _ in range(500)]
    assert all(0.079 < box.height * box.width / 1e6 <= 1 for box in boxes)
    assert all(0.74 < box.width / box.height < 1.35 for box in boxes)
    assert 0.4 < sum(box.flip for box in boxes) / 500 < 0.6
    assert 0.4 < sum(box.width > box.height for box in boxes) / 500 < 0.6


@pytest.mark.parametrize(
    ("size", "expected"), [((100, 1000), (100, 133, 0, 433)), ((1000, 90), (120, 90, 440, 0))]
)
def test_random_resized_crop_falls_back_to_the_centre(
    size: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    box = random_resized_crop(*size, area=(1.0, 1.0), rng=random.Random(0))
    assert (box.height, box.width, box.top, box.left) == expected


def test_short_side_jitter_prefers_small_sizes() -> None:
    rng = random.Random(0)
    views = [random_short_side_crop(300, 300, short_sides=(200, 400), crop=200, rng=rng) for _ in range(600)]
    assert 0.6 < sum(view.resized_height < 300 for view in views) / 600 < 0.73  # 2/3: 1/size is uniform
    assert not any(view.flip for view in views)


@pytest.mark.parametrize(
    "plan",
    [
        lambda rng: random_frame_indices(300, 25.0, clip_frames=16, stride=4, rng=rng),
        lambda rng: random_segment_frame_indices(300, clip_frames=16, rng=rng),
        lambda rng: random_resized_crop(240, 320, rng=rng),
        lambda rng: random_short_side_crop(240, 320, flip_probability=0.5, rng=rng),
    ],
    ids=["clip", "segments", "box", "jitter"],
)
def test_a_seed_gives_one_plan(plan: Callable[[random.Random], object]) -> None:
    assert plan(random.Random(7)) == plan(random.Random(7))
    assert plan(random.Random(7)) != plan(random.Random(8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kinetics_frame_indices(0, 30.0), "num_frames is 0"),
        (lambda: kinetics_frame_indices(10, 0.0), "fps is 0.0"),
        (lambda: kinetics_frame_indices(10, float("nan")), "fps is nan"),
        (lambda: kinetics_frame_indices(10, 30.0, num_clips=0), "num_clips is 0"),
        (lambda: kinetics_frame_indices(10, 30.0, stride=-1), "stride is -1"),
        (lambda: segment_frame_indices(10, clip_frames=0), "clip_frames is 0"),
        (lambda: spatial_views(240, 0), "width is 0"),
        (lambda: spatial_views(240, 320, num_crops=2), "num_crops is 2; allowed are 1"),
        (lambda: spatial_views(240, 320, short_side=200), "crop is 224; it must not exceed .* 200"),
        (lambda: random_short_side_crop(9, 9, short_sides=(320, 256), rng=random.Random()), "short_sides is"),
        (lambda: random_resized_crop(9, 9, area=(0.1, 2.0), rng=random.Random()), "area is"),
        (lambda: random_resized_crop(9, 9, aspect=(0.0, 1.0), rng=random.Random()), "aspect is"),
        (
            lambda: random_resized_crop(9, 9, flip_probability=2.0, rng=random.Random()),
            "flip_probability is 2",
        ),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
