"""Several processes: started by torchrun, one folder, the losses of a single process with the same batch."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Command, error_line
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from test_resume import SMALL, losses, validations

from mvit_video.data.ranks import rank_and_size
from mvit_video.errors import ConfigError
from mvit_video.training import processes


def test_more_devices_than_processes_are_refused_with_the_command_to_use(
    command: Command, two_classes: Path
) -> None:
    arguments = [f"data.root={two_classes}", "trainer.accelerator=cpu", "trainer.devices=2"]
    line = error_line(command("train", *arguments), "train")
    assert "torchrun --nproc_per_node=2 -m mvit_video.train data.root=" in line
    assert "trainer.devices=" in line
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


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"NTASKS": "8", "NNODES": "2", "TASKS_PER_NODE": "4(x2)"}, (4, 2)),
        ({"NTASKS": "8", "NNODES": "2"}, (4, 2)),
        ({"NTASKS": "8", "NNODES": "2", "NTASKS_PER_NODE": "4"}, (4, 2)),
        ({"NTASKS": "2", "NNODES": "1", "TASKS_PER_NODE": "4(x2)", "STEP_TASKS_PER_NODE": "2"}, (2, 1)),
        ({"NTASKS": "4"}, (4, 1)),
    ],
)
def test_devices_follow_from_slurm_s_tasks_and_nodes(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[int, int]
) -> None:
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "")
    for name, value in {"PROCID": "5", "JOB_NAME": "train", "JOB_ID": "123", **variables}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    if expected[0] * expected[1] < 6:
        monkeypatch.setenv("SLURM_PROCID", "1")
    assert processes.choose_devices("auto", 1) == expected
    slurm = SLURMEnvironment()  # which refuses jobs without --ntasks-per-node
    slurm.validate_settings(*expected)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"TASKS_PER_NODE": "3,2"}, "--ntasks-per-node"),
        ({"NNODES": "0"}, "SLURM_NNODES"),
        ({"NTASKS_PER_NODE": "0"}, "SLURM_NTASKS_PER_NODE"),
        ({"JOB_ID": ""}, "hydra.run.dir"),
    ],
    ids=str,
)
def test_tasks_that_cannot_be_shared_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "")
    usual = {"PROCID": "0", "JOB_NAME": "train", "NTASKS": "5", "JOB_ID": "1"}
    for name, value in (usual | variables).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(ConfigError, match=said):
        processes.choose_devices("auto", 1) and processes.overrides([])


@pytest.mark.parametrize(
    "variables",
    [{"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"SLURM_NTASKS": "2"}],
    ids=str,
)
def test_ranks_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"RANK|rank|SLURM_PROCID"):
        rank_and_size()


def test_one_process_is_left_alone() -> None:
    assert rank_and_size() == (0, 1)
    assert processes.overrides([]) == []
    assert processes.choose_devices("auto", 1) == (1, 1)
    assert processes.choose_devices(2, 1) == (2, 1)


def torchrun(
    *arguments: str, cwd: Path, program: Sequence[str] = ("-m", "mvit_video.train")
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [*program, *arguments]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


ALIKE = [
    *SMALL,
    "data.root=data",
    "model.drop_path=0",  # whose random numbers differ between processes
    "model.head_dropout=0",
    "trainer.accelerator=cpu",
    "num_workers=1",
    "save_every_n_steps=1",
]


def state_of(run: Path, name: str = "last.ckpt") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / name, weights_only=True)


def assert_close(one: Any, two: Any, tolerance: float) -> None:
    """Nested states with the same keys and, but for the tolerance, the same numbers."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_close(one[key], two[key], tolerance)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, two, atol=tolerance, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one_with_the_same_batch(
    command: Command, two_classes: Path, tmp_path: Path, strategy: str
) -> None:
    (tmp_path / "data").symlink_to(two_classes)
    assert command("train", *ALIKE, "batch_size=4", "hydra.run.dir=one").code == 0
    arguments = [*ALIKE, "batch_size=2", f"trainer.strategy={strategy}"]
    done = torchrun(*arguments, cwd=tmp_path)
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
    (of_one,), (of_two,) = (state_of(r)["optimizer_states"] for r in (tmp_path / "one", run))
    assert_close(of_one["state"], of_two["state"], 1e-5)

    (run / "checkpoints" / "last.ckpt").unlink()  # the one before is from the middle of the last epoch
    alone = Path(shutil.copytree(run, tmp_path / "alone"))
    done = torchrun(*arguments, "ckpt_path=last", f"hydra.run.dir={run}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = command("train", *ALIKE, "batch_size=4", "ckpt_path=last", "hydra.run.dir=alone")
    assert result.code == 0, result.err
    for resumed in map(losses, (run, alone)):
        assert sorted(resumed) == [5]
        assert float(resumed[5]) == pytest.approx(float(one[5]), abs=1e-5)
    assert command("eval", "data.root=data", f"weights={run / 'checkpoints' / 'best.ckpt'}").code == 0


@pytest.mark.slow
def test_a_run_in_shards_averages_its_weights_and_goes_on_exactly(
    command: Command, two_classes: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").symlink_to(two_classes)
    recipe = ["ema=0.9", "optim.layer_decay=0.75", "model.checkpoint_blocks=true", "ckpt_path=last"]
    one = [*ALIKE, *recipe, "batch_size=4"]
    assert command("train", *one, "hydra.run.dir=one").code == 0
    two = [*ALIKE, *recipe, "batch_size=2", "trainer.strategy=fsdp"]
    assert torchrun(*two, "hydra.run.dir=two", cwd=tmp_path).returncode == 0
    whole, other = (state_of(tmp_path / run) for run in ("two", "one"))
    for name in ("state_dict", "current_model_state"):  # averages, and what they are of
        assert_close(whole[name], other[name], 5e-3)  # after steps of up to 1e-2
    for run in ("one", "two"):
        (tmp_path / run / "checkpoints" / "last.ckpt").unlink()
        assert torchrun(*two, f"hydra.run.dir={run}", cwd=tmp_path).returncode == 0
    assert_close(whole["state_dict"], state_of(tmp_path / "two")["state_dict"], 0)
    assert_close(whole["current_model_state"], state_of(tmp_path / "two")["current_model_state"], 0)
    expected = float(losses(tmp_path / "two")[5])
    assert float(losses(tmp_path / "one")[5]) == pytest.approx(expected, abs=1e-5)


STOPPED = """
import os, signal
from mvit_video.cli import main
from mvit_video.training.classification import Classifier

step, batches = Classifier.validation_step, iter(range(100))

def stopping_step(self, *args):
    if next(batches) == 1 and self.global_rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, *args)

Classifier.validation_step = stopping_step
main.train()
"""


@pytest.mark.slow
def test_processes_that_are_stopped_while_they_validate_save_and_validate_again(
    two_classes: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").symlink_to(two_classes)
    (tmp_path / "stopped.py").write_text(STOPPED)
    arguments = [*ALIKE[:-1], "batch_size=2", "trainer.strategy=fsdp", "ema=0.9", "ckpt_path=last"]
    arguments += ["data.val_fraction=0.4", "trainer.val_check_interval=1"]
    assert torchrun(*arguments, "hydra.run.dir=whole", cwd=tmp_path).returncode == 0
    stopped = torchrun(*arguments, "hydra.run.dir=run", cwd=tmp_path, program=("stopped.py",))
    assert f"exitcode  : {128 + signal.SIGTERM}" in stopped.stderr
    assert state_of(tmp_path / "run")["global_step"] == 2  # after one validation of one batch a step
    done = torchrun(*arguments, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert losses(run) == {step: loss for step, loss in losses(whole).items() if step >= 2}
    assert validations(run) == validations(whole)[1:]
    assert_close(state_of(run)["state_dict"], state_of(whole)["state_dict"], 0)


@pytest.mark.slow
def test_bad_videos_of_all_processes_count_together(two_classes: Path, tmp_path: Path) -> None:
    for folder, name in (("cats", "cats"), ("dogs", "dogs and birds")):
        for number, video in enumerate(sorted((two_classes / name).iterdir()) * 2):
            copy = tmp_path / "data" / "train" / folder / f"{number}.mp4"
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(b"broken" if number in (1, 4) else video.read_bytes())
        shutil.copytree(two_classes / name, tmp_path / "data" / "val" / folder)
    arguments = [*ALIKE, "hydra.run.dir=run", "trainer.max_epochs=2", "ckpt_path=last"]
    stopped = torchrun(*arguments, "max_bad_videos=3", cwd=tmp_path)
    assert stopped.returncode == 1
    assert "videos can't be read, and max_bad_videos allows 3" in stopped.stderr
    assert "[rank" not in stopped.stderr  # stack traces
    assert "epoch 1" not in (tmp_path / "run" / "train.log").read_text()  # every video comes once in an epoch
    done = torchrun(*arguments, "max_bad_videos=4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "run" / "train.log").read_text()
    assert "4 unreadable videos" in log
    assert log.count("epoch 2/2") == 1


def test_one_process_may_shard_too(command: Command, two_classes: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(two_classes)
    for run, added in (("plain", []), ("fsdp", ["trainer.strategy=fsdp", "ema=0.9"])):
        result = command("train", *ALIKE, "batch_size=4", f"hydra.run.dir={run}", *added)
        assert result.code == 0, result.err
    torch.distributed.destroy_process_group()
    assert losses(tmp_path / "plain") == losses(tmp_path / "fsdp")


def test_shards_and_scaled_gradients_are_refused(command: Command, two_classes: Path) -> None:
    arguments = (f"data.root={two_classes}", "trainer.strategy=fsdp", "trainer.precision=16-mixed")
    line = error_line(command("train", *arguments), "train")
    assert "trainer.precision=16-mixed isn't possible with fsdp; bf16-mixed is" in line


@pytest.mark.slow
def test_a_sweep_runs_as_jobs_that_go_on_by_themselves(two_classes: Path, tmp_path: Path) -> None:
    """By Hydra's submitit launcher; its local jobs stand for those of Slurm."""
    (tmp_path / "data").symlink_to(two_classes)
    arguments = [argument for argument in ALIKE if not argument.startswith(("data.root", "optim.lr="))]
    arguments += [f"data.root={tmp_path / 'data'}", "hydra/launcher=submitit_local", "hydra.sweep.dir=sweep"]
    arguments += ["ckpt_path=last", "optim.lr=1e-2,1e-3"]
    command = [sys.executable, "-m", "mvit_video.train", "--multirun", *arguments]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}

    def sweep() -> tuple[dict[int, str], dict[int, str]]:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return losses(tmp_path / "sweep" / "0"), losses(tmp_path / "sweep" / "1")

    first, second = sweep()
    assert sorted(first) == sorted(second) == list(range(15))
    assert first[0] == second[0]
    assert first[14] != second[14]
    (tmp_path / "sweep" / "1" / "checkpoints" / "last.ckpt").unlink()
    shutil.rmtree(tmp_path / "sweep" / "0" / "checkpoints")  # which then starts at the front
    assert sweep() == (first, {14: second[14]})


@pytest.mark.slow
def test_optuna_gets_the_metric_of_each_trial(two_classes: Path, tmp_path: Path, command: Command) -> None:
    pytest.importorskip("optuna", reason="Optuna isn't installed: pip install 'mvit-video[sweep]'")
    (tmp_path / "data").symlink_to(two_classes)
    arguments = [argument for argument in ALIKE if not argument.startswith(("optim.lr=", "hydra.run.dir"))]
    sweep = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.n_jobs=1",
        "hydra.sweep.dir=sweep",
    ]
    space = ["optim.lr=interval(1e-4,1e-2)", "optim.weight_decay=choice(0.0,0.05)"]
    result = command(
        "train", "--multirun", *arguments, *sweep, *space, "monitor=val/loss", "trainer.max_epochs=1"
    )
    assert result.code == 0, result.err
    with (tmp_path / "sweep" / "jobs.csv").open() as file:
        found = sorted(float(row["metric"]) for row in csv.DictReader(file))
    best = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert len(found) == 3
    assert best["best_value"] == found[0]
    assert 1e-4 <= best["best_params"]["optim.lr"] <= 1e-2


def test_a_slurm_job_of_one_task_has_its_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a requeued job never takes up another one's run."""
    for name, value in {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_NAME", "training")
    monkeypatch.delenv("RANK", raising=False)
    assert processes.overrides([]) == ["hydra.run.dir=outputs/train/slurm/7"]
    assert processes.overrides(["hydra.run.dir=run"]) == []
    assert processes.overrides(["--multirun"]) == []
