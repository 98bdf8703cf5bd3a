"""Planes to RGB: against swscale on the same planes of real decoded frames."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from videos import write_video

from mvit_video.data.decode.frames import (
    BT601,
    BT709,
    BT2020,
    FrameFormat,
    _from_planes,
    convert,
    matrix_of,
    to_rgb,
)

CPU = torch.device("cpu")
PIX_FMTS = [
    *("yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p", "nv12", "gray"),
    *("yuv420p10le", "yuv422p10le", "yuv444p10le", "p010le", "gray10le"),
]


@pytest.fixture(scope="module")
def decoded(tmp_path_factory: pytest.TempPathFactory) -> list[VideoFrame]:
    """Frames with all colours, sharp edges and noise."""
    height, width = 96, 128
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    pictures = []
    for i in range(3):
        waves = [np.sin(x / 9 + i), np.cos(y / 7 - i), np.sin((x + y) / 15)]
        picture = 128 + 127 * np.stack(waves, axis=-1)
        picture[height // 3 : height // 2, i * 20 : i * 20 + 30] = rng.integers(0, 256, (1, 30, 3))
        pictures.append(np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8))
    options = {"deadline": "realtime", "crf": "10", "b": "0"}
    path = tmp_path_factory.mktemp("colour") / "colour.webm"
    write_video(path, pictures, codec="libvpx-vp9", options=options)
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def from_planes(frames: list[VideoFrame]) -> torch.Tensor:
    fmt = FrameFormat.of(frames[0])
    return fmt.upright(_from_planes(frames, fmt, VideoReformatter(), CPU))


@pytest.mark.parametrize("full_range", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("colorspace", [1, 2, 5, 9])
@pytest.mark.parametrize("pix_fmt", PIX_FMTS)
def test_close_to_swscale(decoded: list[VideoFrame], pix_fmt: str, colorspace: int, full_range: bool) -> None:
    frames = [frame.reformat(format=pix_fmt) for frame in decoded]
    for frame in frames:
        frame.colorspace, frame.color_range = colorspace, 2 if full_range else 1
    high_bit_depth = "10" in pix_fmt
    # By itself swscale repeats the chroma of 8-bit planes, and interpolates that of all others.
    same_planes = [frame.reformat(format="yuv420p") if pix_fmt == "nv12" else frame for frame in frames]
    expected = np.stack(
        [
            frame.reformat(
                format="rgb24", interpolation="POINT" if high_bit_depth else None, threads=1
            ).to_ndarray()
            for frame in same_planes
        ]
    )
    difference = np.abs(from_planes(frames).permute(0, 2, 3, 1).numpy().astype(int) - expected)
    assert difference.max() <= 3
    assert difference.mean() < (1.5 if high_bit_depth else 1.2)


@pytest.mark.parametrize("size", [(96, 131), (97, 128), (97, 131), (256, 427), (2, 3)], ids=str)
@pytest.mark.parametrize("pix_fmt", sorted({*PIX_FMTS} - {"nv12", "p010le"}))
def test_rgb_of_the_cpu_at_any_size(pix_fmt: str, size: tuple[int, int]) -> None:
    """To its last row and column: swscale alone shifts the chroma of odd sizes, or loses a column."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 15)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 6, waves.shape)
    picture = np.clip(128 + 120 * waves + noise, 0, 255).astype(np.uint8)
    frames = [
        VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pix_fmt)
        for pixels in (picture, picture[::-1].copy())
    ]
    found = convert(frames, FrameFormat.of(frames[0]), VideoReformatter(), CPU)
    difference = (found.int() - from_planes(frames).int()).abs().float()
    assert difference.max() <= 3
    assert difference.mean() < 1.2


@pytest.mark.parametrize("unit", [1, 4, 256])
def test_odd_sizes_are_even_ones_cut_off(unit: int) -> None:
    """swscale stretches the chroma of some of them by half a sample; here it stays where it was sampled."""
    rng = torch.Generator().manual_seed(0)
    luma = torch.randint(0, 256, (2, 98, 132), generator=rng) * unit
    chroma = torch.randint(0, 256, (2, 2, 49, 66), generator=rng) * unit
    whole = to_rgb(luma, (chroma[0], chroma[1]), matrix=BT709, unit=unit)
    cut = to_rgb(luma[:, :97, :131], (chroma[0], chroma[1]), matrix=BT709, unit=unit)
    torch.testing.assert_close(cut, whole[:, :, :97, :131])


def test_matrix_follows_the_stream_and_is_bt601_when_unspecified() -> None:
    assert [matrix_of(code) for code in (1, 9, 10)] == [BT709, BT2020, BT2020]
    assert [matrix_of(code) for code in (0, 2, 5, 6, 99)] == [BT601] * 5


@pytest.mark.parametrize(
    ("sample", "rgb"),
    [((16, 128, 128), (0, 0, 0)), ((235, 128, 128), (255, 255, 255)), ((81, 90, 240), (254, 0, 0))],
)
def test_known_colours(sample: tuple[int, int, int], rgb: tuple[int, int, int]) -> None:
    for unit in (1, 4, 256):
        y, u, v = (torch.tensor([[[value * unit]]], dtype=torch.int32) for value in sample)
        assert to_rgb(y, (u, v), unit=unit).flatten().tolist() == list(rgb)


def test_a_chroma_plane_that_lacks_its_last_row_and_column_repeats_them() -> None:
    """As PyAV hands over NV12 of odd size."""
    luma = torch.full((1, 5, 7), 100, dtype=torch.uint8)
    whole = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 4) * 10 + 60
    whole[:, 2], whole[:, :, 3] = whole[:, 1], whole[:, :, 2]
    cut = whole[:, :2, :3]
    expected = to_rgb(luma, (whole, whole))
    torch.testing.assert_close(to_rgb(luma, (cut, cut)), expected)


def test_planes_are_turned_like_rgb(tmp_path: Path, decoded: list[VideoFrame]) -> None:
    pictures = [frame.to_ndarray(format="rgb24") for frame in decoded]
    for degrees in (90, 180, 270):
        path = write_video(tmp_path / f"{degrees}.mp4", pictures, rotation=degrees)
        with av.open(str(path)) as container:
            frames = list(container.decode(video=0))
        fmt = FrameFormat.of(frames[0])
        expected = convert(frames, fmt, VideoReformatter(), CPU)
        assert expected.shape[2:] == fmt.upright_size
        assert (from_planes(frames).int() - expected.int()).abs().max() <= 3


def test_planes_of_another_size_are_resized(decoded: list[VideoFrame]) -> None:
    small = decoded[1].reformat(width=64, height=48)
    frames = from_planes([decoded[0], small])
    assert frames.shape[2:] == (decoded[0].height, decoded[0].width)
    assert (frames[1].float() - from_planes([decoded[1]])[0].float()).abs().mean() < 12
