"""The benchmark of backbones, on a small image."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "detection.py"
CASES = ["pooling + Hwin", "plain", "pooling + shifted windows", "full", "joint positions"]


@pytest.mark.slow
def test_the_benchmark_measures_each_attention() -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--cases", *CASES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == CASES
    assert all(float(row[1]) > 0 for row in rows)
