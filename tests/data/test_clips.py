"""From files to clips: the frames that the plan names, the same whoever makes them, bad files replaced."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from videos import read_number, write_numbered_video

from mvit_video.data.clips import centre_views, read_test_views, view_frame_indices
from mvit_video.data.datasets import Augment, ClipDataset, ViewDataset, training_loader
from mvit_video.data.decode import open_video
from mvit_video.data.index import LabelledVideo
from mvit_video.data.samplers import EpochBatches
from mvit_video.data.sampling import kinetics_frame_indices, segment_frame_indices
from mvit_video.errors import DataError
from mvit_video.model import ClipSpec

PROTOCOL = ClipSpec(clip_frames=4, stride=2, target_fps=25, num_clips=3, short_side=96, crop=96)
WHOLE_PICTURE = Augment(area=(1, 1), aspect=(1, 1), flip_probability=0)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[LabelledVideo]:
    root = tmp_path_factory.mktemp("numbered")
    files = [write_numbered_video(root / f"{i}.mp4", 20 + i, height=96, width=96) for i in range(6)]
    return [LabelledVideo(str(file), i % 2, file.stem) for i, file in enumerate(files)]


def numbers(clip: torch.Tensor) -> list[int | None]:
    """What the frames of a normalised (3, T, H, W) clip show."""
    pixels = ((clip * 0.225 + 0.45) * 255).clamp(0, 255).to(torch.uint8)
    return [read_number(frame) for frame in pixels.transpose(0, 1)]


def test_test_views_show_the_planned_frames(videos: list[LabelledVideo]) -> None:
    for index, views in enumerate(ViewDataset(videos, PROTOCOL)):
        plan = kinetics_frame_indices(20 + index, 25, clip_frames=4, stride=2, num_clips=3, target_fps=25)
        assert [numbers(clip) for clip in views.clips] == plan
        assert views.spans == [pytest.approx((clip[0] / 25, clip[-1] / 25)) for clip in plan]


def test_segment_sampling_shows_a_frame_of_each_segment(videos: list[LabelledVideo]) -> None:
    views = ViewDataset(videos, replace(PROTOCOL, sampling="segment", num_crops=3))[1]
    assert [numbers(clip) for clip in views.clips] == [segment_frame_indices(21, clip_frames=4)] * 3


def test_torchvision_sampling_shows_runs_of_thinned_frames(videos: list[LabelledVideo]) -> None:
    protocol = replace(PROTOCOL, sampling="torchvision", pixels="torchvision", num_clips=2, target_fps=20)
    views = ViewDataset(videos, protocol)[3]  # 23 frames at 25 fps, thinned to 10: every 2.5th, 9 of them
    assert [numbers(clip) for clip in views.clips] == [[0, 2, 5, 7], [12, 15, 17, 20]]


def test_one_decode_serves_all_views(videos: list[LabelledVideo]) -> None:
    asked: list[list[int]] = []

    def spy(path: str):
        video = open_video(path)
        get_frames = video.get_frames

        def noted(indices, *, transform):
            asked.append(list(indices))
            return get_frames(indices, transform=transform)

        video.get_frames = noted
        return video

    views = ViewDataset(videos[:1], replace(PROTOCOL, num_crops=3), open_file=spy)[0]
    assert len(views.clips) == 9
    assert len(asked) == 1
    assert asked[0] == sorted(set(asked[0]))


def test_training_clips_depend_on_seed_epoch_and_video_alone(videos: list[LabelledVideo]) -> None:
    dataset, again, other = (ClipDataset(videos, PROTOCOL, Augment(), seed=seed) for seed in (3, 3, 4))
    random.seed(1)
    torch.manual_seed(1)
    for key in [(0, 4), (1, 4), (0, 0)]:
        assert torch.equal(dataset[key].clips[0], again[key].clips[0])
    assert not torch.equal(dataset[0, 4].clips[0], dataset[1, 4].clips[0])
    assert not torch.equal(dataset[0, 4].clips[0], other[0, 4].clips[0])


def test_the_sampler_shows_every_video_once_in_another_order_each_epoch() -> None:
    sampler = EpochBatches(50, 5, seed=1)
    first = list(chain.from_iterable(sampler))
    assert first == list(chain.from_iterable(EpochBatches(50, 5, seed=1)))
    sampler.set_epoch(1)
    second = list(chain.from_iterable(sampler))
    assert sorted(index for _, index in first) == sorted(index for _, index in second) == list(range(50))
    assert {epoch for epoch, _ in second} == {1}
    assert [index for _, index in first] != [index for _, index in second]


def test_training_frames_rise_and_stay_inside(videos: list[LabelledVideo]) -> None:
    dataset = ClipDataset(videos, PROTOCOL, WHOLE_PICTURE, seed=0)
    starts = set()
    for epoch in range(8):
        shown = numbers(dataset[epoch, 2].clips[0])
        assert all(number is not None and 0 <= number < 22 for number in shown)
        assert shown == sorted(shown)
        starts.add(shown[0])
    assert len(starts) > 3


def test_a_bad_video_is_replaced_and_reported(videos: list[LabelledVideo], tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    mixed = [LabelledVideo(str(broken), 0, "broken"), *videos]
    dataset = ClipDataset(mixed, PROTOCOL, WHOLE_PICTURE, seed=0)
    sample = dataset[0, 0]
    assert [bad.path for bad in sample.bad] == [str(broken)] * len(sample.bad)
    assert sample.bad
    assert sample.clips[0].shape == (3, 4, 96, 96)
    assert torch.equal(sample.clips, dataset[0, 0].clips)

    views = ViewDataset(mixed, PROTOCOL)[0]
    assert views.error
    assert len(views.clips) == len(views.spans) == 0

    with pytest.raises(DataError, match="in a row can't be read"):
        ClipDataset(mixed[:1], PROTOCOL, WHOLE_PICTURE, seed=0)[0, 0]


@pytest.mark.parametrize(("batch_size", "sizes"), [(2, [2, 2, 2]), (4, [4]), (6, [6]), (9, [6])])
def test_an_incomplete_batch_is_dropped_unless_it_is_the_only_one(
    videos: list[LabelledVideo], batch_size: int, sizes: list[int]
) -> None:
    dataset = ClipDataset(videos, PROTOCOL, WHOLE_PICTURE, seed=0)
    loader = training_loader(dataset, batch_size=batch_size, num_workers=0)
    assert [len(batch.labels) for batch in loader] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize("pixels", ["slowfast", "torchvision", "image"])
def test_tensors_are_prepared_as_files_are(
    videos: list[LabelledVideo], pixels: Literal["slowfast", "torchvision", "image"]
) -> None:
    sampling: Any = "torchvision" if pixels == "torchvision" else "uniform"
    spec = replace(
        PROTOCOL, pixels=pixels, sampling=sampling, num_clips=1, short_side=81, crop=64, mean=(0.4, 0.5, 0.6)
    )
    with open_video(videos[3].path) as video:
        views, _ = read_test_views(video, spec)
        (indices,) = view_frame_indices(video.num_frames, video.fps, spec)
        frames = video.get_frames(indices)
    assert torch.equal(centre_views(frames.transpose(0, 1)[None], spec), views)


def test_tensors_show_the_centre_of_three_crops(videos: list[LabelledVideo]) -> None:
    frames = torch.randint(256, (2, 3, 4, 60, 90), dtype=torch.uint8)
    spec = replace(PROTOCOL, short_side=40, crop=32)
    assert torch.equal(centre_views(frames, replace(spec, num_crops=3)), centre_views(frames, spec))
