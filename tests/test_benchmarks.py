"""The benchmark for GPUs, where there is none: all lines but the device's own, and how it takes trouble."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
PARTS = ["machine", "checks", "decoding", "beside", "difficult", "models", "profile", "compiled", "tests"]
NOT_NEEDED = ["lightning", "pytorch_lightning", "torchvision", "torchmetrics", "torchcodec", "decord", "timm"]
NOT_NEEDED += ["pytorchvideo", "rich", "PIL", "scipy", "pyarrow", "safetensors", "matplotlib", "pytest"]
WITHOUT = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOT_NEEDED}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
sys.path.insert(0, {str(SCRIPT.parent)!r})
"""


def numbers_in(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers_in(item)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.slow
def test_all_parts_run_without_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--seconds", "6000"]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    parts = record["parts"]
    assert list(parts) == PARTS
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(parts, "done"), done.stdout
    for name, part in parts.items():
        assert part["results"], name
        assert part["problems"].keys() <= {"frames of torchcodec cpu"}, part["problems"]
        assert all(math.isfinite(number) for number in numbers_in(part["results"]))
    checks = parts["checks"]["results"]
    assert all(row["ok"] for name, row in checks.items() if name.startswith("nano"))
    assert all(row["ok"] for row in checks["layouts of poolings"].values())
    for name in ("h264", "h264 interlaced", "hevc", "hevc 10 bit", "vp9", "av1"):
        assert checks[f"planes {name}"] == {"frames": 24, "luma differs": 0, "chroma differs": 0}
    assert parts["decoding"]["results"]["frames of cpu"]["wrong frames"] == 0
    assert "damaged" in parts["difficult"]["results"]["damaged file"]
    for kind in ("inference", "training"):
        row = parts["models"]["results"][f"nano {kind} bf16"]
        for label in ("ours", "contiguous", "torchvision"):
            assert row[label]["clips/s"] > 0
            assert 0 < row[label]["share"] < 2
            assert row[label]["peak GB"] is None  # of a GPU
        assert parts["profile"]["results"][f"nano {kind} bf16"]["kernels"] is None
    assert parts["compiled"]["results"]["nano inference bf16"]["ours"]["clips/s"] > 0
    assert list(parts["tests"]["results"].values()) == ["PASSED"]
    table = output.with_suffix(".md").read_text()
    assert table in done.stdout
    assert "| nano training bf16 |" in table


def test_no_more_than_the_named_packages_is_needed() -> None:
    code = """
import gpu, torch
from gpu_models import fresh
model, clips = fresh("mvitv2_nano_8x4", torch.device("cpu"))
from gpu_decoding import choice, clip_at, decode_on
print(tuple(model(clips).shape), tuple(decode_on("cpu")(choice.SAMPLE, [0, 3]).shape))
"""
    done = subprocess.run([sys.executable, "-c", WITHOUT + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "(2, 400) (2, 3, 256, 256)"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script adds to it
    import gpu

    return gpu


def fail(run: Any) -> None:
    run.case("before", lambda: 1.5)
    raise ValueError("the part itself")


def crash(run: Any) -> None:
    run.case("before", lambda: 1.5)
    os.kill(os.getpid(), signal.SIGKILL)


def hang(run: Any) -> None:
    run.case("before", lambda: 1.5)
    time.sleep(1000)


@pytest.mark.parametrize(
    ("part", "seconds", "status"),
    [
        (fail, 100, "failed (ValueError: the part itself)"),
        (crash, 100, f"crashed (exit code {-signal.SIGKILL})"),
        (hang, 3, "out of time"),
    ],
)
def test_trouble_ends_one_part_only(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, part: Callable[[Any], None], seconds: float, status: str
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0)
    monkeypatch.setitem(gpu.PARTS, "checks", (part, 1))
    found = gpu.run_part("checks", "cpu", True, time.monotonic() + seconds)
    assert found["status"] == status
    assert found["results"] == {"before": 1.5}
    assert "Not measured" in gpu.tables({"device": "cpu", "parts": {"checks": found}})


def test_what_can_not_be_measured_is_null_with_its_reason(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def cases(run: Any) -> None:
        run.case("broken", lambda: 1 / 0)
        run.case("not a number", lambda: {"clips/s": math.nan})
        run.case("fine", lambda: 2.0)
        run._deadline = 0
        run.case("late", lambda: 3.0)

    monkeypatch.setitem(gpu.PARTS, "checks", (cases, 1))
    found = gpu.run_part("checks", "cpu", True, time.monotonic() + 100)
    assert found["status"] == "done"
    assert found["results"] == {"broken": None, "not a number": None, "fine": 2.0, "late": None}
    assert found["problems"].keys() == {"broken", "not a number", "late"}
    assert found["problems"]["late"] == "out of time"
    assert "ZeroDivisionError" in found["problems"]["broken"]
