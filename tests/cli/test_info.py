"""mvit-info: the published counts of the models, an honest account of the machine, and how fast it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import Command, error_line
from videos import write_numbered_video

from mvit_video.cli import speed
from mvit_video.cli.speed import Speed, advise

SMALL = ["model=mvitv2_nano_8x4", "model.stages=[1,1]", "model.embed_dim=8", "model.crop_size=32"]


@pytest.mark.parametrize(
    ("model", "parameters", "gmacs"),
    [
        ("mvitv2_s_16x4", "34,537,744", "64.46"),
        ("mvitv2_b_32x3", "51,230,128", "225.17"),
        ("mvitv2_l_40x3", "213,390,112", "2828.10"),
        ("mvitv2_t_224", "24,", "4.70"),
    ],
)
def test_models_are_described(command: Command, model: str, parameters: str, gmacs: str) -> None:
    shown = command("info", f"model={model}")
    assert shown.code == 0, shown.err
    assert model in shown.out
    assert parameters in shown.out
    assert f"{gmacs} GMACs a view" in shown.out


def test_a_detector_is_counted(command: Command) -> None:
    shown = command("info", "model=mask_rcnn_mvitv2_t")
    assert shown.code == 0, shown.err
    assert re.search(r"^mask_rcnn_mvitv2_t: 4\d,\d{3},\d{3} parameters$", shown.out, re.MULTILINE)


def test_overrides_count(command: Command) -> None:
    shown = command("info", "model=mvitv2_s_16x4", "model.num_frames=8", "model.crop_size=112")
    assert "4x28x28" in shown.out


def test_the_system_is_described(command: Command) -> None:
    shown = command("info", "system")
    assert shown.code == 0, shown.err
    for word in ("PyTorch", "PyAV", "torchcodec", "decord", "h264", "GPU"):
        assert word in shown.out


def test_a_small_model_is_measured_on_a_video(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "MATRIX", 64)
    write_numbered_video(tmp_path / "video.mp4", 40, height=64, width=80)
    done = command("info", "speed", *SMALL, "device=cpu", "video=video.mp4", "seconds=0", "output=speed.json")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["inference"].keys() == {"fp32", "fp32, plain", "bf16", "bf16, plain"}
    assert found["training"].keys() == {"fp32", "bf16"}
    assert found["decoding"]["1"] > 0
    assert found["loading"]["1"] > 0
    assert found["matrix"]["fp32"] > 0
    assert found["settings"].keys() == {"num_workers", "trainer.precision", "batch_size"}
    for key, value in found["settings"].items():
        assert f"{key}={value}" in done.out
    assert found["limit"] in done.out


def test_time_that_is_out_is_said(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "LIMIT", 0)
    write_numbered_video(tmp_path / "video.mp4", 40, height=64, width=80)
    done = command("info", "speed", *SMALL, "device=cpu", "video=video.mp4")
    assert done.code == 0, done.err
    assert "out of time" in done.out
    assert "settings: num_workers=1\n" in done.out  # nothing was compared


def test_a_video_that_is_none_is_one_line(command: Command, tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_text("no video")
    assert "video.mp4" in error_line(
        command("info", "speed", *SMALL, "device=cpu", "video=video.mp4"), "info"
    )


@pytest.mark.parametrize(
    ("device", "training", "loading", "limit", "workers"),
    [
        ("cpu", 1.0, {1: 20.0, 2: 40.0}, "the model", 1),
        ("cuda", 100.0, {1: 20.0, 2: 40.0}, "loading", 2),
        ("cuda", 35.0, {1: 20.0, 16: 300.0}, "the model", 2),
        ("cuda", 90.0, {1: 20.0, 16: 300.0}, "the model", 5),
    ],
)
def test_the_limit_and_the_workers_that_it_takes(
    device: str, training: float, loading: dict[int, float | None], limit: str, workers: int
) -> None:
    measured = Speed(
        cores=max(loading),
        device=device,
        matrix={},
        inference={"fp32": 1.0, "bf16": 2.0, "bf16, compiled": 3.0},
        training={"fp32": training / 2, "bf16": training},
        batches={1: 1.0, 2: 1.93, 4: 2.0, 8: None},
        decoding={},
        loading=loading,
    )
    advice = advise(measured)
    assert advice.limit == limit
    assert advice.settings == {
        "num_workers": workers,
        "trainer.precision": "bf16-mixed",
        "batch_size": 2,
        "compile": True,
    }
