"""Exported models: the same answers, from a file that needs nothing of this package."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from conftest import Command, error_line
from torch._inductor.exc import InvalidCxxCompiler

import mvit_video as mv
from mvit_video.weights import METADATA_KEY, model_metadata
from mvit_video.weights.export import ExportedModel, load_exported


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model that is exported in seconds."""
    torch.manual_seed(1)
    model = mv.create_model(
        "mvitv2_nano_8x4", num_classes=2, num_frames=4, crop_size=32, stages=(1, 1), kv_stride=(1, 4, 4)
    )
    model.class_names = ("cats", "dogs and birds")
    path = tmp_path_factory.mktemp("small") / "model.ckpt"
    weights = {f"model.{name}": torch.randn_like(value) / 3 for name, value in model.state_dict().items()}
    torch.save({"state_dict": weights, METADATA_KEY: model_metadata(model)}, path)
    return path


def test_a_compiler_that_is_missing_is_one_line(
    command: Command, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch.export.export", lambda *args, **options: None)  # which takes seconds
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", refuse)
    result = command("export", f"weights={small}", "output=model.pt2", "runs=1", "compiled=true")
    assert "C++ compiler" in error_line(result, "export")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(
    command: Command, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.export.export", lambda *args, **options: None)  # which takes seconds
    monkeypatch.setattr("torch.export.save", lambda _, file, **options: file.write(bytes(1 << 20)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, limits[1]))
    try:
        result = command("export", f"weights={small}", "output=model.pt2", "runs=1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "model.pt2" in error_line(result, "export")
    assert not list(tmp_path.iterdir())


def check(command: Command, small: Path, two_classes: Path, tmp_path: Path, name: str, *options: str) -> None:
    """Export by the command; predict with the file as with the checkpoint."""
    result = command("export", f"weights={small}", f"output={name}", "runs=1", "batch_size=3", *options)
    assert result.code == 0, result.err
    assert "largest difference" in result.out
    assert not re.search(r"The value|No unused|Skipping", result.out + result.err)  # of the exporters
    assert [path.name for path in tmp_path.iterdir()] == [name]
    exported, model = load_exported(name, trust=True), mv.load_model(small)
    assert exported.class_names == ("cats", "dogs and birds")
    assert exported.protocol == model.protocol
    for batch in (1, 2, 7):
        clips = torch.randn(batch, 3, 4, 32, 32)
        with torch.inference_mode():
            torch.testing.assert_close(exported(clips), model(clips), atol=1e-4, rtol=0)
    with pytest.raises(mv.ConfigError, match=r"clips of \(3, 4, 32, 32\)"):
        exported(torch.zeros(1, 3, 8, 32, 32))
    arguments = [two_classes, f"weights={name}", "output=a.json", "num_workers=0"]
    if name.endswith(".pt2"):
        refused = command("predict", *arguments)
        assert refused.code == 1
        assert "trust=true" in refused.err
        arguments.append("trust=true")
    result = command("predict", *arguments)
    assert result.code == 0, result.err
    told = json.loads((tmp_path / "a.json").read_text())["videos"]
    for video, expected in zip(told, mv.predict(two_classes, small), strict=True):
        assert video["path"] == expected.path
        scores = dict(zip(expected.classes, expected.scores, strict=True))
        assert dict(zip(video["classes"], video["scores"], strict=True)) == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("name", ["model.onnx", pytest.param("model.pt2", marks=pytest.mark.slow)])
def test_an_exported_model_gives_the_same_answers(
    command: Command, small: Path, two_classes: Path, tmp_path: Path, name: str
) -> None:
    check(command, small, two_classes, tmp_path, name)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(name, alone)
    code = {
        "model.onnx": (
            "import onnxruntime as ort, numpy as np; s = ort.InferenceSession('model.onnx');"
            "out = s.run(None, {'clips': np.zeros((5, 3, 4, 32, 32), np.float32)})[0];"
            "told = s.get_modelmeta().custom_metadata_map['mvit_video'];"
        ),
        "model.pt2": (
            "import torch; extra = {'mvit_video': ''}; p = torch.export.load('model.pt2', extra_files=extra);"
            "out = p.module()(torch.zeros(5, 3, 4, 32, 32)); told = extra['mvit_video'];"
        ),
    }[name]
    code += "import json, sys; told = json.loads(told); assert 'mvit_video' not in sys.modules;"
    code += "print(json.dumps([list(out.shape), told['class_names'], told['protocol']['mean']]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=alone, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    shape, names, mean = json.loads(done.stdout)
    assert (shape, names) == ([5, 2], ["cats", "dogs and birds"])
    assert mean == list(mv.load_model(small).protocol.mean)
    if name == "model.onnx":
        parts: dict[str, Any] = {"save_as_external_data": True, "location": "other.bin", "size_threshold": 0}
        onnx.save(onnx.load(name), str(alone / "two.onnx"), **parts)
        with pytest.raises(mv.CheckpointError, match=r"two\.onnx"):
            mv.Recognizer(alone / "two.onnx")


def test_a_wrong_file_is_not_left(
    command: Command, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mv.load_model(small)

    def wrong(path: str, trust: bool) -> ExportedModel:
        return ExportedModel(lambda clips: model(clips) + 2e-4, json.dumps(model_metadata(model)), path)

    monkeypatch.setattr("mvit_video.cli.export.export_model", lambda model, path, compiled: None)
    monkeypatch.setattr("mvit_video.cli.export.load_exported", wrong)
    result = command("export", f"weights={small}", "output=model.pt2", "runs=1")
    assert result.code == 1
    assert "differ by 0.0002, more than tolerance=0.0001" in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_answers(
    command: Command, small: Path, two_classes: Path, tmp_path: Path
) -> None:
    check(command, small, two_classes, tmp_path, "model.pt2", "compiled=true")


def test_what_can_not_be_exported_or_read_is_said(
    command: Command, small: Path, two_classes: Path, tmp_path: Path
) -> None:
    for options, reason in (
        (["output=model.bin"], ".onnx or .pt2"),
        (["output=model.onnx", "compiled=true"], "only a .pt2"),
        (["runs=0"], "runs is 0"),
    ):
        result = command("export", f"weights={small}", "runs=1", *options)
        assert result.code == 1
        assert reason in result.err
    assert not list(tmp_path.iterdir())
    for name in ("damaged.onnx", "damaged.pt2"):
        (tmp_path / name).write_bytes(b"not a model")
        result = command("predict", two_classes, f"weights={name}", "trust=true")
        assert result.code == 1
        assert name in result.err
        assert "damaged" in result.err
    with pytest.raises(mv.CheckpointError, match="no such file"):
        mv.Recognizer(tmp_path / "gone.onnx")
