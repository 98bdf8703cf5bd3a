"""The edge of the commands: what an entry imports, signals, several jobs, places that can't be written."""

from __future__ import annotations

import csv
import importlib
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from conftest import Command, error_line
from hydra.experimental.callback import Callback

from mvit_video.errors import ConfigError

HEAVY = (
    "torch", "torchvision", "pytorch_lightning", "torchmetrics", "matplotlib", "pyarrow", "scipy", "gradio",
    "tensorboard", "jinja2", "ray", "PIL", "av", "torch._dynamo", "sympy",
)  # fmt: skip


def run(code: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=cwd)


LINES = [
    "predict --help",
    "train --help",
    "train --cfg job",
    "train lr=1",
    "train data=kinetic",
    "train data.root=. optim.lr=fast",
    "train -sc query=bash",
    "eval weights=x split=dev",
    "demo port=-1",
    "data prepair",
    "info model=mvitv2_xs",
]


def test_what_needs_no_model_imports_none(tmp_path: Path) -> None:
    code = f"""
import contextlib, os, sys
from mvit_video.cli.main import main
for line in {LINES}:
    sys.argv = ["mvit", *line.split()[1:]]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(sys.stderr):
        main(line.split()[0])
    os.environ.pop("HYDRA_FULL_ERROR", None)
    print(line, *[name for name in {HEAVY} if name in sys.modules], sep=" | ")
"""
    done = run(code, tmp_path)
    assert done.stdout.splitlines() == LINES, done.stderr


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import mvit_video, mvit_video.train, mvit_video.predict, mvit_video.data", set()),
        (
            "import mvit_video as mv; mv.ClipSpec, mv.list_models(), mv.create_model('mvitv2_nano_8x4')",
            {"torch"},
        ),
        ("import mvit_video as mv; mv.open_video, mv.predict, mv.Recognizer", {"torch", "PIL", "av"}),
    ],
)
def test_the_package_imports_what_is_used(code: str, allowed: set[str]) -> None:
    done = run(f"import sys; {code}; print(*[name for name in {HEAVY} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= allowed


def test_predicting_imports_no_training(two_classes: Path, checkpoint: Path, tmp_path: Path) -> None:
    words = ["mvit-predict", str(two_classes / "cats" / "0.mp4"), f"weights={checkpoint}", "num_workers=0"]
    code = f"import sys; sys.argv = {words}; from mvit_video.cli.main import predict; predict()\n"
    done = run(f"{code}print('imported', *[name for name in {HEAVY} if name in sys.modules])", tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()[-1].split()[1:]) <= {"torch", "PIL", "av"}
    assert list(tmp_path.iterdir()) == []  # no log file beside the user's own


# Sends a signal to its own process when a module is looked for.
INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class At:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, At())
sys.argv[0] = "mvit-info"
from mvit_video.cli.main import info
info()
"""


@pytest.mark.parametrize("module", ["hydra", "torch.nn"])
def test_ctrl_c_during_imports_ends_with_one_line(module: str, tmp_path: Path) -> None:
    done = run(INTERRUPTED.format(module=module), cwd=tmp_path)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == "mvit-info: interrupted\n"


# Runs a job of our own as mvit-info, which imports no torch.
OWN_JOB = """
import os, signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored below nohup
def job(config):
    try:
        {body}
    finally:
        print("cleaned up", flush=True)
sys.modules["mvit_video.cli.info"] = types.SimpleNamespace(print_model=job)
sys.argv[0] = "mvit-info"
from mvit_video.cli.main import info
info()
"""


# A library may drop what a handler raises; then the job ends with the next item of its loop.
DROPPED = """
        from mvit_video.io.console import track
        class Dropping:
            def __del__(self):
                {stop}
        Dropping()
        for _ in track(range(9), 9, what=""):
            time.sleep(60)
"""


@pytest.mark.parametrize(
    ("name", "body"),
    [("SIGINT", "{stop}; time.sleep(60)"), ("SIGTERM", "{stop}; time.sleep(60)"), ("SIGHUP", DROPPED)],
)
def test_a_job_that_is_stopped_cleans_up(name: str, body: str, tmp_path: Path) -> None:
    body = body.format(stop=f"os.kill(os.getpid(), signal.{name})")
    done = run(OWN_JOB.format(body=body), tmp_path)
    assert done.returncode == 128 + getattr(signal, name)
    assert "cleaned up" in done.stdout
    assert "Traceback" not in done.stderr


def test_signals_are_as_before_when_a_command_has_ended(command: Command) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    command("info", "model=mvitv2_xs")
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_failed_job_of_a_sweep_does_not_end_the_others(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    def job(config):
        done.append(config.optim.lr)
        if config.optim.lr == 2:
            raise ConfigError("two is too much")
        if config.optim.lr == 3:
            raise KeyError("a bug")
        return config.optim.lr / 10

    monkeypatch.setattr(importlib.import_module("mvit_video.cli.train"), "train", job)
    result = command(
        "train", "-m", "optim.lr=1,2,3,4", "data.root=a=b", "hydra.sweep.dir=sweep", "logger=csv"
    )
    assert result.code == 1
    assert done == [1, 2, 3, 4]
    assert "error in job 1: two is too much" in result.err
    assert "jobs.csv" in result.out
    with (tmp_path / "sweep" / "jobs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["overrides"] for row in rows] == [f"optim.lr={n}" for n in (4, 1, 2, 3)]  # the best first
    assert [row["metric"] for row in rows] == ["0.4", "0.1", "", ""]
    assert [bool(row["error"]) for row in rows] == [False, False, True, True]

    losses = ["train", "-m", "optim.lr=4,1", "data.root=x", "hydra.sweep.dir=losses", "monitor=val/loss"]
    assert command(*losses).code == 0
    with (tmp_path / "losses" / "jobs.csv").open(newline="") as file:
        assert [row["metric"] for row in csv.DictReader(file)] == ["0.1", "0.4"]

    again = command("train", "-m", "optim.lr=1", "data.root=x", "hydra.sweep.dir=sweep")
    assert again.code == 0
    with (tmp_path / "sweep" / "jobs.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 1  # the other sweep's results aren't these jobs'


class Recorder(Callback):
    """Keeps what jobs return, which is what a sweeper that optimises is given."""

    returned: ClassVar[list[float]] = []

    def on_job_end(self, config, job_return, **_):
        self.returned.append(job_return.return_value)


def test_a_sweeper_is_given_the_metric(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def job(config):
        if config.seed:
            raise ConfigError("no")
        return 0.25

    Recorder.returned.clear()
    monkeypatch.setattr(importlib.import_module("mvit_video.cli.train"), "train", job)
    recorder = f"+hydra.callbacks.recorder._target_={__name__}.Recorder"
    command("train", "-m", "seed=0,1", "data.root=x", recorder)
    assert Recorder.returned[0] == 0.25
    assert math.isnan(Recorder.returned[1])


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda folder: (folder / "outputs").touch(), "outputs"),  # a file where a folder is needed
        (lambda folder: (folder / "run" / "train.log").mkdir(parents=True), "run"),
    ],
)
def test_a_place_that_can_not_be_written_ends_with_one_line(
    command: Command, tmp_path: Path, make, place: str
) -> None:
    make(tmp_path)
    arguments = ["hydra.run.dir=run"] if place == "run" else []
    assert place in error_line(command("train", "data.root=x", *arguments), "train")


def test_a_read_only_folder_is_enough_to_predict(
    command: Command, two_classes: Path, checkpoint: Path, tmp_path: Path
) -> None:
    os.chmod(tmp_path, 0o555)  # noqa: PTH101
    try:
        result = command("predict", two_classes / "cats" / "0.mp4", f"weights={checkpoint}", "num_workers=0")
    finally:
        os.chmod(tmp_path, 0o755)  # noqa: PTH101
    assert result.code == 0, result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["-m", "mvit_video.info", "--help"], ["-c", OWN_JOB.format(body="print('x' * 100_000)")]]
)
def test_a_reader_who_has_enough_ends_a_command_quietly(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_full_disk_behind_the_output_is_said() -> None:
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        command = [sys.executable, "-m", "mvit_video.info", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.startswith("mvit-info: error: No space left on device")


def test_letters_that_the_locale_lacks_are_escaped(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mvit_video.train", "--cfg", "job", "data.root=Übung"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "root: \\xdcbung" in done.stdout
