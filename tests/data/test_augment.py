"""Augmentations against timm, from which the official ones come, and against the official formulae."""

from __future__ import annotations

import random
from contextlib import closing
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from videos import write_numbered_video

from mvit_video.data.augment import (
    OPERATIONS,
    Augment,
    ClipAugmentation,
    RandAugment,
    apply_operations,
    draw_operations,
    parse_rand_augment,
    random_erase_boxes,
)
from mvit_video.data.datasets import ClipDataset, training_loader
from mvit_video.data.index import LabelledVideo
from mvit_video.data.loader import WorkerType
from mvit_video.data.pixels import RGB, PendingClips, finish_clips
from mvit_video.data.samplers import EpochBatches
from mvit_video.model import ClipSpec

RECIPE = "rand-m7-n4-mstd0.5-inc1"
MEAN, STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)


def picture(seed: int, height: int = 41, width: int = 57) -> np.ndarray:
    """uint8 (H, W, 3): smooth colours with noise, dark at one side."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, width)[None, :, None] * np.linspace(0.3, 1, height)[:, None, None]
    return (ramp * rng.integers(60, 256, (height, width, 3))).astype(np.uint8)


def as_frames(*pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def augmented_clips(
    frames: torch.Tensor, augment: Augment, size: int, *, rng: random.Random, mean: RGB = MEAN, std: RGB = STD
) -> torch.Tensor:
    augmentation = ClipAugmentation(augment, size, mean=mean, std=std, rng=rng)
    return finish_clips(augmentation.to_clips(augmentation(frames)))


def rand_augment(frames: torch.Tensor, rng: random.Random) -> torch.Tensor:
    return apply_operations(frames, draw_operations(RECIPE, rng))


@pytest.mark.parametrize("magnitude", [0.0, 0.3, 4.4, 7.0, 9.99, 10.0])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_timms(name: str, magnitude: float) -> None:
    image = Image.fromarray(picture(1))
    settings = {"interpolation": Image.Resampling.BICUBIC, "img_mean": (124, 116, 104)}
    operation = AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=settings)
    random.seed(0)
    theirs = {operation(image).tobytes() for _ in range(12)}  # of both signs
    ours = {OPERATIONS[name](image, magnitude / 10, sign, (124, 116, 104)).tobytes() for sign in (-1.0, 1.0)}
    assert ours == theirs


def test_the_notation_means_what_it_means_to_timm() -> None:
    ours = parse_rand_augment(RECIPE)
    theirs = rand_augment_transform(RECIPE, {})
    assert ours == RandAugment(7, 4, 0.5, 0.5)
    assert ours.operations == theirs.num_layers
    assert theirs.choice_weights is None  # drawn with replacement
    assert [op.name for op in theirs.ops] == list(OPERATIONS)
    assert {(op.magnitude, op.magnitude_std, op.prob) for op in theirs.ops} == {(7, 0.5, 0.5)}


@pytest.mark.parametrize(
    "notation", ["rand-m7-n4", "rand-m7-n4-inc0", "augmix-m3-inc1", "rand-m7-k4-inc1", "rand-m11-inc1", "7"]
)
def test_a_notation_that_is_not_understood_is_named(notation: str) -> None:
    with pytest.raises(ValueError, match=f"rand_augment is '{notation}'"):
        Augment(rand_augment=notation)


def test_rand_augment_does_the_same_to_all_frames() -> None:
    frames = as_frames(picture(1), picture(2), picture(1))
    changed = 0
    for seed in range(30):
        out = rand_augment(frames, random.Random(seed))
        assert out.dtype == torch.uint8
        assert out.shape == frames.shape
        assert torch.equal(out[0], out[2])
        alone = rand_augment(frames[1:2], random.Random(seed))
        assert torch.equal(out[1], alone[0])
        changed += not torch.equal(out, frames)
    assert 20 < changed <= 30


def test_operations_are_applied_half_of_the_time_at_the_right_strength(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    applied: list[tuple[str, float, float]] = []
    for name in OPERATIONS:

        def noted(image: Image.Image, level: float, sign: float, _: object, name: str = name) -> Image.Image:
            applied.append((name, level, sign))
            return image

        monkeypatch.setitem(OPERATIONS, name, noted)
    rng = random.Random(0)
    frame = as_frames(picture(0, 4, 4))
    for _ in range(3000):
        rand_augment(frame, rng)
    names, levels, signs = zip(*applied, strict=True)
    assert len(applied) == pytest.approx(3000 * 4 * 0.5, rel=0.03)
    counts = [names.count(name) for name in OPERATIONS]
    assert min(counts) > 0.8 * 400
    assert max(counts) < 1.2 * 400
    assert np.mean(levels) == pytest.approx(0.7, abs=0.003)
    assert np.std(levels) == pytest.approx(0.05, abs=0.002)
    assert max(levels) <= 1
    assert np.mean(signs) == pytest.approx(0, abs=0.05)


def test_erase_boxes_follow_the_official_draws() -> None:
    """timm's RandomErasing, from the same random numbers, erases the same boxes."""
    height, width = 96, 128
    for seed in range(60):
        random.seed(seed)
        theirs = torch.zeros(1, 3, height, width)
        RandomErasing(probability=0.25, mode="const", max_count=1, device="cpu")._erase(
            theirs[0].sub_(1), 3, height, width, theirs.dtype
        )
        boxes = random_erase_boxes(height, width, probability=0.25, max_count=1, rng=random.Random(seed))
        ours = torch.full((height, width), -1.0)
        for box in boxes:
            ours[box.top : box.top + box.height, box.left : box.left + box.width] = 0
        assert torch.equal(ours, theirs[0, 0])


def test_several_boxes_share_the_area() -> None:
    rng = random.Random(0)
    draws = [random_erase_boxes(100, 100, probability=1, max_count=3, rng=rng) for _ in range(500)]
    assert {len(boxes) for boxes in draws} == {1, 2, 3}
    for boxes in draws:
        assert sum(box.height * box.width for box in boxes) <= 100 * 100 / 3 * 1.05


def test_erasing_is_one_box_of_fresh_noise_in_every_frame() -> None:
    frames = torch.full((6, 3, 64, 64), 115, dtype=torch.uint8)
    augment = Augment(area=(1, 1), aspect=(1, 1), flip_probability=0, erase_probability=1)
    (clip,) = augmented_clips(frames, augment, 64, rng=random.Random(3))
    changed = (clip - clip[0, 0, 0, 0]).abs() > 1e-6
    if changed[0, 0].float().mean() > 0.5:  # the corner was erased
        changed = (clip - (115 / 255 - 0.45) / 0.225).abs() > 1e-4
    assert 0.02 * 0.9 < changed[0, 0].float().mean() < 1 / 3 * 1.1
    assert (changed == changed[:1, :1]).all()
    noise = clip[changed].reshape(3, 6, -1)
    assert noise.mean().item() == pytest.approx(0, abs=0.05)
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    assert not torch.equal(noise[:, 0], noise[:, 1])


def test_colours_change_alike_in_all_frames() -> None:
    frames = as_frames(picture(1, 41, 41), picture(1, 41, 41))
    whole = {"area": (1, 1), "aspect": (1, 1), "flip_probability": 0}
    plain, changed = (
        augmented_clips(frames, Augment(**whole, colour_jitter=strength), 41, rng=random.Random(0))[0]
        for strength in (0.0, 0.4)
    )
    assert torch.equal(changed[:, 0], changed[:, 1])
    assert not torch.equal(changed, plain)


def test_clips_are_the_same_however_many_frames_come_at_a_time() -> None:
    augment = Augment(
        short_side=50, rand_augment=RECIPE, colour_jitter=0.3, erase_probability=1, repeats=2, bgr=True
    )
    frames = as_frames(*(picture(seed) for seed in range(5)))
    for seed in range(5):
        whole = augmented_clips(frames, augment, 32, rng=random.Random(seed))
        augmentation = ClipAugmentation(augment, 32, mean=MEAN, std=STD, rng=random.Random(seed))
        parts = torch.cat([augmentation(part) for part in frames.split(2)])
        assert torch.equal(finish_clips(augmentation.to_clips(parts)), whole)


def test_scale_jitter_cuts_squares_and_does_not_mirror() -> None:
    """Something-Something: left stays left."""
    ramp = np.broadcast_to(np.linspace(0, 255, 120)[None, :, None], (80, 120, 3)).astype(np.uint8)
    augment = Augment(short_side_range=(80, 100), flip_probability=0)
    for seed in range(20):
        (clip,) = augmented_clips(as_frames(ramp, ramp), augment, 64, rng=random.Random(seed))
        assert clip.shape == (3, 2, 64, 64)
        assert (clip[0, 0, 0].diff() >= 0).all()
        # 64 pixels of a picture that became 120 to 150 wide show 43 to 53 % of the ramp
        shown = (clip[0, 0, 0, -1] - clip[0, 0, 0, 0]) * 0.225
        assert 0.40 < shown < 0.56


def test_bgr_lets_rand_augment_see_swapped_channels() -> None:
    frames = as_frames(picture(1), picture(2))
    kept = {"area": (1, 1), "aspect": (57 / 41, 57 / 41), "flip_probability": 0, "rand_augment": RECIPE}
    different = 0
    for seed in range(20):
        plain, swapped, official = (
            augmented_clips(given, Augment(**kept, bgr=bgr), 41, rng=random.Random(seed))
            for given, bgr in ((frames, False), (frames, True), (frames.flip(1), False))
        )
        assert torch.equal(swapped, official.flip(1))
        different += not torch.equal(plain, swapped)
    assert different  # colour and contrast weigh the channels


def test_frames_are_resized_first() -> None:
    frames = as_frames(picture(1, 120, 200))
    whole = Augment(short_side=60, area=(1, 1), aspect=(1, 1), flip_probability=0)
    (clip,) = augmented_clips(frames, whole, 60, mean=(0, 0, 0), std=(1, 1, 1), rng=random.Random(0))
    from torchvision.transforms.v2.functional import resize

    small = resize(frames, [60], antialias=True)
    assert small.shape[-2:] == (60, 100)
    assert torch.equal((clip[:, 0] * 255).round().byte(), small[0, :, :, 20:80])


def test_a_box_can_be_cut_out_before_rand_augment() -> None:
    """As image recipes do: what geometric operations move in is grey, never the rest of the picture."""
    frames = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    frames[..., 16:48, 16:48] = 255
    augment = Augment(crop_first=True, rand_augment=RECIPE, area=(0.25, 0.25), aspect=(1, 1))
    for seed in range(10):
        clips = augmented_clips(frames, augment, 32, rng=random.Random(seed))
        assert clips.shape == (1, 3, 1, 32, 32)
    with pytest.raises(ValueError, match="crop_first"):
        Augment(crop_first=True, short_side_range=(64, 80))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("short_side", 0),
        ("colour_jitter", 1.5),
        ("erase_probability", -0.1),
        ("erase_count", 0),
        ("repeats", 0),
        ("area", (0.5, 2.0)),
        ("short_side_range", (320, 256)),
        ("flip_probability", 2),
    ],
)
def test_values_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        Augment(**{name: value})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ClipDataset:
    root = tmp_path_factory.mktemp("numbered")
    files = [write_numbered_video(root / f"{i}.mp4", 20 + i, height=64, width=80) for i in range(4)]
    augment = Augment(rand_augment=RECIPE, erase_probability=0.5, colour_jitter=0.2, repeats=2)
    videos = [LabelledVideo(str(file), i, file.stem) for i, file in enumerate(files)]
    protocol = ClipSpec(clip_frames=4, stride=2, target_fps=25, short_side=32, crop=32)
    return ClipDataset(videos, protocol, augment, seed=3)


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_pending_clips_end_as_the_others(dataset: ClipDataset, kind: WorkerType) -> None:
    """To the bit, wherever they are finished; those whose bytes would be more are floats at once."""
    augment = replace(dataset.augment, area=(0.5, 1.0))
    at_once, pending = (
        ClipDataset(dataset.videos, dataset.protocol, augment, seed=3, pending=way) for way in (False, True)
    )
    plain = training_loader(at_once, batch_size=2, num_workers=0)
    with closing(training_loader(pending, batch_size=2, num_workers=1, worker_type=kind)) as loader:
        kinds = set()
        for epoch in range(4):
            plain.batches.set_epoch(epoch)
            loader.batches.set_epoch(epoch)
            for batch, expected in zip(loader, plain, strict=True):
                parts = batch.clips if isinstance(batch.clips, list) else []
                kinds |= {part.frames.dtype for part in parts if isinstance(part, PendingClips)}
                kinds |= {part.dtype for part in parts if isinstance(part, torch.Tensor)}
                assert torch.equal(finish_clips(batch.clips), expected.clips)
                assert torch.equal(batch.labels, expected.labels)
    assert kinds == {torch.uint8, torch.float32}


@pytest.mark.gpu
def test_clips_are_finished_on_the_gpu(dataset: ClipDataset) -> None:
    """As on the CPU, but for the order of sums; what is erased is other noise, the same each time."""
    for erased in (0.0, 1.0):
        augment = replace(dataset.augment, erase_probability=erased, area=(0.1, 0.3))
        pending = ClipDataset(dataset.videos, dataset.protocol, augment, seed=3, pending=True)
        loader = training_loader(pending, batch_size=4, num_workers=3, pin_memory=True)
        with closing(loader):
            (batch,) = loader
        assert all(part.frames.is_pinned() for part in batch.clips)
        found = finish_clips(batch.clips, "cuda")
        assert found.is_cuda
        assert torch.equal(found, finish_clips(batch.clips, "cuda"))
        if not erased:
            torch.testing.assert_close(found.cpu(), finish_clips(batch.clips), atol=1e-4, rtol=1e-4)


def test_everything_follows_from_the_key(dataset: ClipDataset) -> None:
    for key in [(0, 1), (0, 2), (5, 1)]:
        first = dataset[key].clips
        random.seed(9)
        torch.manual_seed(9)
        assert torch.equal(first, dataset[key].clips)
    assert not torch.equal(dataset[0, 1].clips, dataset[1, 1].clips)


def test_repeats_come_from_one_decode_and_lie_side_by_side(dataset: ClipDataset) -> None:
    batch = next(iter(training_loader(dataset, batch_size=2, num_workers=0)))
    order = next(iter(EpochBatches(4, 2, seed=3)))
    assert batch.clips.shape == (4, 3, 4, 32, 32)  # two videos, two clips each
    assert batch.labels.tolist() == [index for _, index in order for _ in range(2)]
    assert [Path(path).stem for path in batch.paths] == [str(label) for label in batch.labels.tolist()]
    assert not torch.equal(batch.clips[0], batch.clips[1])

    opened: list[str] = []
    spied = copy(dataset)
    spied.open_file = lambda path: opened.append(path) or dataset.open_file(path)
    assert torch.equal(spied[order[0]].clips, batch.clips[:2])
    assert len(opened) == 1
