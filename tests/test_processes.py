"""Several processes: started by torchrun, one folder, the losses of a single process with the same batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Command
from test_errors import error_line
from test_resume import SMALL, losses

from mvit_video import processes


def test_more_devices_than_processes_are_refused_with_the_command_to_use(
    command: Command, two_classes: Path
) -> None:
    arguments = [f"data.root={two_classes}", "trainer.accelerator=cpu", "trainer.devices=2"]
    line = error_line(command("train", *arguments), "train")
    assert "torchrun --nproc_per_node=2 -m mvit_video.train data.root=" in line
    assert "trainer.devices=2" in line
    line = error_line(command("train", *arguments, "trainer.num_nodes=3"), "train")
    assert "6 processes" in line
    assert "torchrun --nnodes=3 --nproc_per_node=2 -m" in line


def test_more_processes_than_devices_are_refused(
    command: Command, two_classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    result = command(
        "train",
        f"data.root={two_classes}",
        "hydra.run.dir=run",
        "trainer.accelerator=cpu",
        "trainer.devices=1",
    )
    assert "3 processes were started, but trainer.devices x trainer.num_nodes is 1" in result.err


@pytest.mark.parametrize(("rank", "extra"), [("0", 0), ("2", 3)])
def test_slurm_s_tasks_share_the_folder_of_the_job(
    monkeypatch: pytest.MonkeyPatch, rank: str, extra: int
) -> None:
    for name, value in {"NTASKS": "4", "PROCID": rank, "JOB_ID": "123", "JOB_NAME": "train"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    added = processes.overrides(["data.root=x"])
    assert added[0] == "hydra.run.dir=outputs/train/slurm/123"
    assert len(added) == 1 + extra
    assert len(processes.overrides(["hydra.run.dir=mine"])) == extra


def test_one_process_is_left_alone() -> None:
    assert processes.rank_and_size() == (0, 1)
    assert processes.overrides([]) == []
    assert processes.choose_devices("auto", 1) == (1, 1)
    assert processes.choose_devices(2, 1) == (2, 1)


def torchrun(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "mvit_video.train", *arguments]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_batch(
    command: Command, two_classes: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").symlink_to(two_classes)
    arguments = [
        *SMALL,
        "data.root=data",
        "model.drop_path=0",  # whose random numbers differ between processes
        "model.head_dropout=0",
        "trainer.accelerator=cpu",
        "num_workers=1",
        "save_every_n_steps=1",
    ]
    assert command("train", *arguments, "batch_size=4", "hydra.run.dir=one").code == 0
    done = torchrun(*arguments, "batch_size=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "outputs" / "train").glob("*/*")
    assert (run / "train.log").read_text().count("epoch 1/3") == 1
    assert {path.name for path in run.iterdir()} == {
        ".hydra",
        "batch.png",
        "checkpoints",
        "csv",
        "learning_curve.png",
        "train.log",
    }
    one, two = losses(tmp_path / "one"), losses(run)
    assert sorted(two) == [0, 1, 2, 3, 4, 5]
    for step, loss in two.items():
        assert float(loss) == pytest.approx(float(one[step]), abs=1e-5)

    (run / "checkpoints" / "last.ckpt").unlink()  # the one before is from the middle of the last epoch
    done = torchrun(*arguments, "batch_size=2", "ckpt_path=last", f"hydra.run.dir={run}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    resumed = losses(run)
    assert sorted(resumed) == [5]
    assert float(resumed[5]) == pytest.approx(float(one[5]), abs=1e-5)
