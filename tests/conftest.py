from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from videos import write_numbered_video

import mvit_video as mv
from mvit_video.cli.main import main
from mvit_video.weights import METADATA_KEY, model_metadata

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # small models gain nothing from more
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # Lightning sets their number for several processes, else


class Result(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Command]:
    """Runs a console script in this process, from an empty folder: ``command("train", "data.root=...")``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    handlers = logging.getLogger().handlers[:]

    def run(name: str, *arguments: str) -> Result:
        if name in ("eval", "predict") and not any(str(a).startswith(("precision=", "-")) for a in arguments):
            arguments = (*arguments, "precision=fp32")  # scores are compared to the last digits
        monkeypatch.setattr(sys, "argv", [f"mvit-{name}", *map(str, arguments)])
        capfd.readouterr()
        try:
            main(name)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        out, err = capfd.readouterr()
        return Result(code, out, err)

    yield run
    logging.getLogger().handlers[:] = handlers  # Hydra's write to this test's standard output


def error_line(result: Result, name: str) -> str:
    """The one line that the command said on standard error; logs and progress go elsewhere or before it."""
    assert result.code == 1
    lines = [line for line in result.err.splitlines() if line.startswith(f"mvit-{name}: error: ")]
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err + result.out
    return lines[0].removeprefix(f"mvit-{name}: error: ")


@pytest.fixture(scope="session")
def two_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of own videos, ``root/<class>/``: two classes of six short videos, each of another kind."""
    root = tmp_path_factory.mktemp("two_classes")
    for name, suffix, codec in (("cats", ".mp4", "libx264"), ("dogs and birds", ".webm", "libvpx-vp9")):
        (root / name).mkdir()
        for number in range(6):
            write_numbered_video(
                root / name / f"{number}{suffix}", 12 + number, codec=codec, height=48, width=64, fps=12
            )
    return root


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as ``mvit-train`` leaves it, of an untrained nano model that knows the two classes."""
    torch.manual_seed(0)
    model = mv.create_model("mvitv2_nano_8x4", num_classes=2)
    model.class_names = ("cats", "dogs and birds")
    path = tmp_path_factory.mktemp("checkpoint") / "model.ckpt"
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": weights, METADATA_KEY: model_metadata(model)}, path)
    return path


@pytest.fixture
def predict(command: Command, checkpoint: Path) -> Command:
    """``mvit-predict`` with these weights."""
    return partial(command, "predict", f"weights={checkpoint}")


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    found = next((path for path in map(shutil.which, BROWSERS) if path), None)  # else playwright's own
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()
