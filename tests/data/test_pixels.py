"""Pixels of test views against the official pipeline; training clips against a plain crop and resize."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_weights import frames_u8
from torchvision.transforms._presets import VideoClassification

from mvit_video.data import pixels
from mvit_video.data.pixels import (
    cut_and_resize,
    cut_views,
    denormalise,
    normalise,
    resize_for_test,
    view_crops,
)
from mvit_video.data.sampling import CropBox
from mvit_video.model import ClipSpec

GOLDEN = json.loads((Path(__file__).parents[1] / "reference" / "protocol.json").read_text())["spatial"]
MEAN, STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['protocol']} {c['frames_hw']} {c['spatial_idx']}")
def test_pixels_are_the_official_ones(case: dict) -> None:
    height, width = case["frames_hw"]
    frames = torch.from_numpy(np.array(frames_u8(2, height, width))).permute(0, 3, 1, 2)
    num_crops = 1 if "1 crop" in case["protocol"] else 3
    spec = ClipSpec(
        short_side=case["scale"], crop=case["crop"], num_crops=num_crops, mean=case["mean"], std=case["std"]
    )
    clips = cut_views(resize_for_test(frames, spec), [[0, 1]], view_crops(height, width, spec))
    assert clips.shape == (num_crops, *case["out_shape_cthw"])
    clip = clips[case["spatial_idx"] if num_crops == 3 else 0]
    values = clip.flatten()[case["positions"]]
    torch.testing.assert_close(values, torch.tensor(case["values"]), atol=2e-5, rtol=0)
    assert clip.mean().item() == pytest.approx(case["mean_of_all"], abs=1e-5)


@pytest.mark.parametrize("size", [(240, 320), (161, 90), (64, 64)])
def test_torchvision_pixels_are_those_of_its_preset(size: tuple[int, int]) -> None:
    frames = torch.from_numpy(np.array(frames_u8(3, *size))).permute(0, 3, 1, 2)
    spec = ClipSpec(short_side=64, crop=56, pixels="torchvision", mean=MEAN, std=STD)
    (clip,) = cut_views(resize_for_test(frames, spec), [[0, 1, 2]], view_crops(*size, spec))
    preset = VideoClassification(crop_size=(56, 56), resize_size=(64,), mean=MEAN, std=STD)
    torch.testing.assert_close(clip, preset(frames), atol=1e-5, rtol=0)


def test_clips_pick_frames_and_crops_vary_fastest() -> None:
    frames = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 40, 60) * 10
    spec = ClipSpec(short_side=40, crop=40, num_crops=3, mean=(0, 0, 0), std=(1, 1, 1))
    clips = cut_views(resize_for_test(frames, spec), [[0, 2], [4, 4]], view_crops(40, 60, spec))
    assert clips.shape == (6, 3, 2, 40, 40)
    shown = (clips[:, 0, :, 0, 0] * 255).round().tolist()
    assert shown == [[0, 20]] * 3 + [[40, 40]] * 3


@pytest.mark.parametrize("flip", [False, True])
def test_a_training_clip_is_its_box_resized_and_mirrored(flip: bool) -> None:
    frames = torch.from_numpy(np.array(frames_u8(3, 50, 70))).permute(0, 3, 1, 2)
    clip = normalise(cut_and_resize(frames, CropBox(5, 9, 30, 41, flip), 24), MEAN, STD)
    plain = (frames[:, :, 5:35, 9:50].double() / 255 - 0.45) / 0.225
    plain = F.interpolate(plain, size=(24, 24), mode="bilinear")
    plain = plain.flip(-1) if flip else plain
    assert clip.shape == (3, 3, 24, 24)
    torch.testing.assert_close(clip.double(), plain, atol=1e-5, rtol=0)


def test_pixels_come_back_from_what_the_model_sees() -> None:
    frames = torch.randint(256, (2, 3, 9, 7), dtype=torch.uint8)
    assert torch.equal(denormalise(normalise(frames, MEAN, STD), MEAN, STD), frames)


def test_large_frames_are_resized_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = torch.randint(256, (5, 3, 60, 80), dtype=torch.uint8)
    spec = ClipSpec(short_side=40, crop=40)
    whole = resize_for_test(frames, spec)
    monkeypatch.setattr(pixels, "_PIXELS_AT_ONCE", 2 * 60 * 80)
    assert torch.equal(resize_for_test(frames, spec), whole)
