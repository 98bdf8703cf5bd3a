"""The README's first commands, on clips of a moving square: they learn, and print what the README shows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command
from videos import write_video

import mvit_video as mv
from mvit_video.weights import save_weights

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SMALL = ["model=mvitv2_nano_8x4", "model.crop_size=48", "augment=no_flip", "augment.area=[0.5,1]"]
FAST = ["batch_size=8", "optim.lr=4e-3", "optim.layer_decay=1", "trainer.max_epochs=6", "num_workers=1"]


@pytest.mark.slow
def test_fine_tuning_prints_what_the_readme_shows(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    _, commands, output, picture = re.findall(r"^```\w*\n(.+?)^```", README, re.M | re.S)[:4]
    make_files(tmp_path)
    printed = ""
    for line in [*commands.splitlines(), picture.splitlines()[0]]:
        run = next(iter(sorted((tmp_path / "outputs").glob("train/*/*"))), tmp_path)
        name, *arguments = shlex.split(line.replace("DATE/TIME", "/".join(run.parts[-2:])))
        arguments += [*SMALL, *FAST] if name == "mvit-train" else ["num_workers=0"]
        result = command(name.removeprefix("mvit-"), *arguments)
        assert result.code == 0, result.err
        printed += result.out
    (tmp_path / "printed.txt").write_text(printed)
    assert (tmp_path / "saved" / "long.timeline.png").is_file()
    lines = map(comparable, printed.splitlines())  # "in" takes them in order
    for line in output.splitlines():
        assert line in ("", "...") or comparable(line) in lines, line
    assert float(re.findall(r"video │ ([\d.]+)", printed)[0]) > 0.8
    assert re.search(r"new\.mp4 +│ all +│ moving_left +│", printed)


def comparable(line: str) -> str:
    """Without the prefix of the log and the values of numbers."""
    return re.sub(r"\d+", "0", re.sub(r"^\[.+?\]\[.+?\]\[[A-Z]+\] - ", "", line))


def make_files(folder: Path) -> None:
    """Labelled videos of two classes, an unlabelled one, a long one that turns round, and weights."""
    torch.manual_seed(0)
    save_weights(mv.create_model("mvitv2_nano_8x4", num_classes=400, crop_size=48), folder / "k400.pyth")
    rng = np.random.default_rng(0)
    for name, step in (("moving_left", -1), ("moving_right", 1)):
        (folder / "videos" / name).mkdir(parents=True)
        for number in range(24):
            path = folder / "videos" / name / f"{number:02}.mp4"
            write_video(path, moving_square([step] * 48, rng), fps=30, options={"crf": "18"})
    write_video(folder / "new.mp4", moving_square([-1] * 48, rng), fps=30, options={"crf": "18"})
    steps = [-1] * 100 + [1] * 120 + [-1] * 80
    write_video(folder / "long.mp4", moving_square(steps, rng), fps=30, options={"crf": "18"})


def moving_square(steps: list[int], rng: np.random.Generator, size: int = 64) -> Iterator[np.ndarray]:
    background = rng.integers(0, 100, (size, size, 3), dtype=np.uint8)
    square = rng.integers(130, 255, (20, 20, 3), dtype=np.uint8)
    top, left, speed = *rng.integers(size, size=2), rng.uniform(0.8, 1.6)
    for step in steps:
        left += step * speed
        frame = background.copy()
        frame[np.ix_(np.arange(top, top + 20) % size, np.arange(int(left), int(left) + 20) % size)] = square
        yield frame
