"""The package as it is installed: light to import, complete as a wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

from conftest import Command

import mvit_video as mv

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml"))


def run(*command: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def test_type_checkers_know_each_name() -> None:
    stub = (ROOT / "mvit_video" / "__init__.pyi").read_text()
    found = re.findall(r"^from (\S+) import (\w+) as (\w+)", stub, re.MULTILINE)
    told = {name: getattr(import_module(home), there) for home, there, name in found}
    assert told == {name: getattr(mv, name) for name in mv.__all__}


def test_predict_stays_a_function_beside_its_command() -> None:
    assert callable(mv.predict)
    done = run(sys.executable, "-W", "error::RuntimeWarning", "-m", "mvit_video.predict", "--help")
    assert done.returncode == 0, done.stderr
    assert "mvit-predict says what happens in video files" in done.stdout


def test_an_experiment_overrides_the_defaults(command: Command) -> None:
    default = command("train", "--cfg", "job").out
    recipe = command("train", "--cfg", "job", "experiment=motion").out
    assert "batch_size: 4\nnum_workers: 2\n" in default
    assert "batch_size: 8\n" in recipe
    assert "max_epochs: 12\n" in recipe
    assert "batch_size: 2\n" in command("train", "--cfg", "job", "experiment=motion", "batch_size=2").out


def test_the_wheel_carries_the_configuration(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    done = run(*build)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"mvit_video/conf/{config}" for config in CONFIGS} <= set(names)
    assert "mvit_video/evaluation/report.html" in names
    assert {f"mvit_video/data/classes/{name}.txt" for name in ("kinetics400", "ssv2")} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "datasets", "conf"))]

    site = tmp_path / "site"
    done = run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)
    )
    assert done.returncode == 0, done.stderr
    script = (
        "import sys, mvit_video, mvit_video.train as train;"
        f"assert mvit_video.__file__.startswith({str(site)!r}), mvit_video.__file__;"
        "sys.argv = ['mvit-train', '--cfg', 'job', 'experiment=motion']; train.main()"
    )
    done = run(sys.executable, "-c", script, cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": ""})
    assert done.returncode == 0, done.stderr
    assert "name: mvitv2_nano_8x4" in done.stdout
