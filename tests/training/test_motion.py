"""The motion data set: real files, the same for the same arguments, and classes only motion can tell."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import generate as motion
import numpy as np
import pytest
from numpy.typing import NDArray

TINY = {"train_per_class": 3, "val_per_class": 2, "size": 32}
OPPOSITES = [
    ("moving_left", "moving_right"),
    ("moving_up", "moving_down"),
    ("rotating_clockwise", "rotating_counterclockwise"),
    ("growing", "shrinking"),
]


def decode(path: Path) -> NDArray[np.uint8]:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def clips(root: Path) -> list[Path]:
    return sorted(root.glob("*/*/*.mp4"))


def stamps(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in [*clips(root), root / "motion.json"]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("motion")
    motion.generate(root, **TINY, seed=0, workers=2)
    return root


def test_layout(tiny: Path) -> None:
    expected = [
        f"{split}/{name}/{index:04d}.mp4"
        for split, count in (("train", 3), ("val", 2))
        for name in motion.CLASSES
        for index in range(count)
    ]
    assert sorted(expected) == [path.relative_to(tiny).as_posix() for path in clips(tiny)]
    assert {path.name for path in tiny.iterdir()} == {"train", "val", "motion.json"}
    assert json.loads((tiny / "motion.json").read_text())["classes"] == list(motion.CLASSES)
    assert not list(tiny.rglob("*.part"))


def test_files_are_h264_and_vary(tiny: Path) -> None:
    rates, sizes, seconds = set(), set(), []
    b_frames = 0
    for path in clips(tiny):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
            frames = list(container.decode(video=0))
            assert len(frames) == stream.frames
            assert min(stream.height, stream.width) == 32
            assert stream.average_rate in motion.FRAME_RATES
            rates.add(stream.average_rate)
            sizes.add((stream.height, stream.width))
            seconds.append(float(Fraction(stream.frames) / stream.average_rate))
            b_frames += stream.codec_context.has_b_frames
    assert len(rates) >= 5
    assert len(sizes) >= 3
    assert b_frames > 0
    assert min(seconds) < 2 < 3.5 < max(seconds)
    assert min(seconds) > 1.4
    assert max(seconds) < 4.1


def test_decoded_pixels_are_the_rendered_ones(tiny: Path) -> None:
    for name in motion.CLASSES:
        clip = motion.plan_clip("train", name, 1, seed=0, size=32)
        drawn, decoded = motion.render(clip), decode(tiny / "train" / name / "0001.mp4")
        assert drawn.shape == decoded.shape
        assert abs(drawn.astype(float) - decoded).mean() < 12  # chroma is halved, and 32 pixels are few


def test_same_seed_same_pixels_whatever_the_workers(tiny: Path, tmp_path: Path) -> None:
    motion.generate(tmp_path / "same", **TINY, seed=0, workers=1)
    motion.generate(tmp_path / "other", **TINY, seed=1, workers=2)
    for path in clips(tiny):
        here = path.relative_to(tiny)
        np.testing.assert_array_equal(decode(path), decode(tmp_path / "same" / here))
        assert path.read_bytes() != (tmp_path / "other" / here).read_bytes()


def test_no_clip_twice(tiny: Path) -> None:
    assert len({path.read_bytes() for path in clips(tiny)}) == len(clips(tiny))


def test_val_shows_looks_that_train_never_does(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: dict[str, set[tuple[str, str]]] = {"train": set(), "val": set()}
    draw = motion._draw_sprite
    for split, seen in looks.items():

        def spy(rng, shape, texture, size, seen=seen):  # type: ignore[no-untyped-def]
            seen.add((shape, texture))
            return draw(rng, shape, texture, size)

        monkeypatch.setattr(motion, "_draw_sprite", spy)
        for index in range(60):
            motion.plan_clip(split, "growing", index, seed=0, size=32)
    assert (len(looks["train"]), len(looks["val"])) == (20, 5)
    assert not looks["train"] & looks["val"]


def test_rerun_keeps_and_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"train_per_class": 1, "val_per_class": 1, "size": 32}
    motion.generate(tmp_path, **small)
    before = stamps(tmp_path)
    capsys.readouterr()
    motion.generate(tmp_path, **small)
    assert "nothing to do" in " ".join(capsys.readouterr().err.split())  # however wide the terminal
    assert stamps(tmp_path) == before

    lost = clips(tmp_path)[5]
    content = lost.read_bytes()
    lost.unlink()
    motion.generate(tmp_path, **small)
    assert lost.read_bytes() == content
    after = stamps(tmp_path)
    assert {path for path in before if before[path] != after[path]} == {lost}

    motion.generate(tmp_path, **small, seed=1)
    assert lost.read_bytes() != content
    assert len(clips(tmp_path)) == len(before) - 1


def test_somebody_elses_files_stay(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.mp4").touch()
    with pytest.raises(FileExistsError, match=r"train exists, but no .*motion\.json"):
        motion.generate(tmp_path, **TINY)
    assert (tmp_path / "train" / "mine.mp4").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"size": 33}, "size=33"), ({"size": 16}, "size=16"), ({"val_per_class": 0}, "val_per_class=0")],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        motion.generate(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


# --- what one frame tells, and what two frames tell -----------------------------------------------------

TRAIN_CLIPS, VAL_CLIPS = 60, 40


@pytest.fixture(scope="module")
def stills() -> dict[str, NDArray[np.float32]]:
    """By class, (clips, 3, 32, 32) grey pictures: the first frame, one 1/15 s later, and the last frame."""

    def three(name: str, index: int) -> NDArray[np.float32]:
        clip = motion.plan_clip("train", name, index, seed=5, size=32)
        soon = motion.render(replace(clip, num_frames=2, fps=Fraction(15)))
        end = motion.render(replace(clip, num_frames=2, fps=clip.fps / (clip.num_frames - 1)))
        frames = np.stack([*soon, end[1]]).astype(np.float32).mean(axis=-1) / 255
        top, left = (frames.shape[1] - 32) // 2, (frames.shape[2] - 32) // 2
        return frames[:, top : top + 32, left : left + 32]

    count = TRAIN_CLIPS + VAL_CLIPS
    return {name: np.stack([three(name, index) for index in range(count)]) for name in motion.CLASSES}


def _features(picture: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a still shows: (N, 32, 32) -> 8x8 brightness, 8x8 edge energy, their means and spreads."""
    dy, dx = np.gradient(picture, axis=(1, 2))
    maps = np.stack([picture, dx * dx, dy * dy, dx * dy], axis=1)
    coarse = maps.reshape(len(picture), 4, 8, 4, 8, 4).mean(axis=(3, 5))
    spread = np.concatenate([maps.mean(axis=(2, 3)), maps.std(axis=(2, 3))], axis=1)
    return np.concatenate([coarse[:, :2].reshape(len(picture), -1), spread], axis=1)


def _accuracy(features: dict[str, NDArray[np.float32]]) -> float:
    """Ridge regression to one-hot classes, fitted on the first TRAIN_CLIPS of each, scored on the others."""
    names = list(features)
    fit_x = np.concatenate([features[name][:TRAIN_CLIPS] for name in names])
    test_x = np.concatenate([features[name][TRAIN_CLIPS:] for name in names])
    fit_y = np.repeat(np.eye(len(names)), TRAIN_CLIPS, axis=0)
    mean, std = fit_x.mean(axis=0), fit_x.std(axis=0) + 1e-6
    fit_x, test_x = (np.c_[(x - mean) / std, np.ones(len(x))] for x in (fit_x, test_x))
    weights = np.linalg.solve(fit_x.T @ fit_x + 50 * np.eye(fit_x.shape[1]), fit_x.T @ fit_y)
    truth = np.repeat(np.arange(len(names)), VAL_CLIPS)
    return float(((test_x @ weights).argmax(axis=1) == truth).mean())


def _flow(before: NDArray[np.float32], after: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, 32, 32) twice -> (N, 4): how well the change fits a shift in x, in y, a turn and a growth.

    The last two are about the nearest bright blob's centre, as the things turn and grow about their own.
    """
    picture = (before + after) / 2
    dy, dx = np.gradient(picture, axis=(1, 2))
    change = before - after
    u, v = change * dx, change * dy
    weight = np.stack([_blur(part) for part in (picture, picture * _AXIS, picture * _AXIS[:, None])])
    to_x, to_y = _AXIS - weight[1] / weight[0], _AXIS[:, None] - weight[2] / weight[0]
    parts = (u, v, v * to_x - u * to_y, u * to_x + v * to_y)
    energy = (dx * dx + dy * dy).sum(axis=(1, 2))
    return np.stack([part.sum(axis=(1, 2)) / energy for part in parts], axis=1)


_AXIS = np.arange(32, dtype=np.float32)


def _blur(picture: NDArray[np.float32]) -> NDArray[np.float32]:
    kernel = np.exp(-((_AXIS[:, None] - _AXIS) ** 2) / (2 * 4.0**2))
    return kernel @ picture @ kernel


@pytest.mark.parametrize("which", [0, 2], ids=["first", "last"])
def test_a_still_does_not_tell_the_class(stills: dict[str, NDArray[np.float32]], which: int) -> None:
    features = {name: _features(frames[:, which]) for name, frames in stills.items()}
    assert _accuracy(features) < 0.20  # chance 0.125, standard deviation 0.018
    for pair in OPPOSITES:
        assert 0.3 < _accuracy({name: features[name] for name in pair}) < 0.7  # chance 0.5 +- 0.06


def test_two_frames_tell_the_class(stills: dict[str, NDArray[np.float32]]) -> None:
    flows = {name: _flow(frames[:, 0], frames[:, 1]) for name, frames in stills.items()}
    for pair in OPPOSITES:
        assert _accuracy({name: flows[name] for name in pair}) > 0.75, pair  # chance 0.5 +- 0.06
    assert _accuracy(flows) > 0.6


def test_the_test_on_stills_sees_a_leak(stills: dict[str, NDArray[np.float32]]) -> None:
    leaky = {name: _features(f[:, 0] + 0.03 * k) for k, (name, f) in enumerate(stills.items())}
    assert _accuracy(leaky) > 0.25


def test_stills_are_uniform_on_their_circles() -> None:
    """x, y, size phase and angle at the first and the last frame, all classes: flat histograms."""
    for name in motion.CLASSES:
        start, end = [], []
        for index in range(150):
            clip = motion.plan_clip("train", name, index, seed=3, size=32)
            thing = clip.things[0]
            height, width, _ = clip.background.shape
            vx, vy, turn, grow = clip.velocity
            first = np.array([thing.x, thing.y, thing.angle / (2 * np.pi), thing.phase])
            speed = np.array([vx / width, vy / height, turn / (2 * np.pi), grow])
            start.append(first % 1)
            end.append((first + speed * (clip.num_frames - 1) / float(clip.fps)) % 1)
        for values in (np.array(start), np.array(end)):
            for column in values.T:
                counts, _ = np.histogram(column, bins=5, range=(0, 1))
                chi_squared = ((counts - 30) ** 2 / 30).sum()
                assert chi_squared < 24, (name, counts)  # p = 1e-4 at 4 degrees of freedom
