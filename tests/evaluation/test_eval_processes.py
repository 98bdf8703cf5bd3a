"""Evaluation in several processes, and processes that are killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mvit_video.evaluation.score_files import read_scores

EVAL = [sys.executable, "-m", "mvit_video.eval"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(command: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**ONE_THREAD, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, out + err


def as_ranks(commands: list[list[str]], folder: Path) -> list[subprocess.Popen[str]]:
    """Start processes as torchrun would, but without anything that ends the others when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(commands))}
    return [start(command, folder, RANK=str(rank), **shared) for rank, command in enumerate(commands)]


@pytest.fixture(scope="module")
def alone(two_classes: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation in one process."""
    folder = tmp_path_factory.mktemp("alone")
    arguments = [f"data.root={two_classes}", f"weights={checkpoint}", "split=train", "hydra.run.dir=run"]
    code, said = finish(start([*EVAL, *arguments, "num_workers=0"], folder))
    assert code == 0, said
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "split", "batch_size"), [(3, "train", 7), (4, "val", 2)])
def test_processes_give_what_one_gives(
    two_classes: Path,
    checkpoint: Path,
    alone: Path,
    tmp_path: Path,
    processes: int,
    split: str,
    batch_size: int,
) -> None:
    """Ten videos for three processes; two videos for four."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    arguments = [f"data.root={two_classes}", f"weights={checkpoint}", f"split={split}", "num_workers=0"]
    code, said = finish(
        start(
            [
                *torchrun,
                f"--nproc-per-node={processes}",
                "-m",
                "mvit_video.eval",
                *arguments,
                f"batch_size={batch_size}",
                "hydra.run.dir=run",
            ],
            tmp_path,
        )
    )
    assert code == 0, said
    table = read_scores(tmp_path / "run" / "scores.parquet")
    if split == "val":
        assert len(table) == 2
        return
    whole = read_scores(alone / "scores.parquet")
    assert table.videos == whole.videos
    torch.testing.assert_close(table.views, whole.views, atol=1e-5, rtol=0)
    one, many = (json.loads((f / "results.json").read_text()) for f in (alone, tmp_path / "run"))
    assert many["video_top1"] == one["video_top1"]


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_with_a_word(
    two_classes: Path, checkpoint: Path, tmp_path: Path
) -> None:
    arguments = [f"data.root={two_classes}", "num_workers=0", "hydra.run.dir=run"]
    weights = (f"weights={checkpoint}", "weights=gone.ckpt")
    processes = as_ranks([[*EVAL, *arguments, file] for file in weights], tmp_path)
    (code, said), (bad_code, bad_said) = (finish(process) for process in processes)
    assert (code, bad_code) == (1, 1)
    assert "gone.ckpt: no such file" in bad_said
    assert "rank 0 of 2: another rank failed; see its error above" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["alone", "one of two"])
def test_a_killed_evaluation_goes_on_with_the_same_command(
    two_classes: Path, checkpoint: Path, alone: Path, tmp_path: Path, victim: str
) -> None:
    command = [*EVAL, f"data.root={two_classes}", f"weights={checkpoint}", "split=train"]
    command += ["num_workers=0", "batch_size=1", "hydra.run.dir=run"]
    count = 1 if victim == "alone" else 2
    processes = as_ranks([command] * count, tmp_path) if count == 2 else [start(command, tmp_path)]
    log = tmp_path / "run" / "unfinished" / f"{count - 1:04d}.jsonl"
    deadline = time.monotonic() + 200
    while not (log.exists() and log.stat().st_size > 500) and time.monotonic() < deadline:
        time.sleep(0.01)
    processes[-1].send_signal(signal.SIGKILL)
    ends = [finish(process) for process in processes]
    assert ends[-1][0] == -signal.SIGKILL
    if count == 2:
        assert ends[0][0] == 1
        assert "rank 0 of 2: another rank failed" in ends[0][1]
    code, said = finish(start(command, tmp_path))
    assert code == 0, said
    assert "have been scored before" in said
    table, whole = (read_scores(folder / "scores.parquet") for folder in (tmp_path / "run", alone))
    assert table.videos == whole.videos
    torch.testing.assert_close(table.views, whole.views, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_slurm_s_tasks_need_no_number_per_node(two_classes: Path, checkpoint: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"NTASKS": "2", "NNODES": "2", "JOB_ID": "123", "JOB_NAME": "eval", "NODELIST": "127.0.0.1"}
    command = [
        *EVAL,
        f"data.root={two_classes}",
        f"weights={checkpoint}",
        "num_workers=0",
        "hydra.run.dir=run",
    ]
    processes = [
        start(
            command,
            tmp_path,
            MASTER_PORT=str(port),
            **{f"SLURM_{name}": value for name, value in {**job, "PROCID": rank, "LOCALID": "0"}.items()},
        )
        for rank in "01"
    ]
    for code, said in [finish(process) for process in processes]:
        assert code == 0, said
    assert len(read_scores(tmp_path / "run" / "scores.parquet")) == 2
