"""Runs that are killed, in mid-epoch or while they write, go on exactly; damaged checkpoints are noticed."""

from __future__ import annotations

import csv
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import Command, error_line
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop

from mvit_video.cli import main
from mvit_video.data.decode import Decoder
from mvit_video.data.index import LabelledVideo, folder_splits
from mvit_video.errors import ConfigError
from mvit_video.io.writing import sole_writer
from mvit_video.model import MViT
from mvit_video.training import processes
from mvit_video.training.callbacks import Interrupts
from mvit_video.training.classification import Classifier
from mvit_video.training.metrics import MEANS_KEY, EpochLogger
from mvit_video.training.resume import FINGERPRINT_KEY, files_identity, find_checkpoint, resume

SLOW = pytest.mark.slow
SMALL = [
    "data=folder",
    "batch_size=2",  # of ten training videos: five steps an epoch
    "model.embed_dim=16",
    "model.stages=[1,1]",
    "model.crop_size=32",
    "model.num_frames=4",
    "model.drop_path=0.5",  # random numbers of the model count
    "optim.lr=1e-2",
    "optim.warmup=0",
    "trainer.max_epochs=3",
    "trainer.log_every_n_steps=1",
    "logger=csv",
]


# Not forked from this process: where autograd has threads, it can't be used in a fork.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["mvit_video.cli.main", "mvit_video.cli.train", "mvit_video.cli.eval"])


def nothing() -> None: ...


def losses(run: Path) -> dict[int, str]:
    """The loss of each step in the newest csv log, as written: equal only if bitwise equal."""
    logs = sorted(run.glob("csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    with logs[-1].open() as file:
        rows = list(csv.DictReader(file))
    return {int(row["step"]): row["train/loss_step"] for row in rows if row.get("train/loss_step")}


def averages(run: Path) -> list[tuple[str, str]]:
    """Loss and accuracy of each epoch in the newest csv log, as written."""
    logs = sorted(run.glob("csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    with logs[-1].open() as file:
        rows = list(csv.DictReader(file))
    return [(row["train/loss_epoch"], row["train/top1_epoch"]) for row in rows if row["train/loss_epoch"]]


def validations(run: Path) -> list[tuple[str, str]]:
    """Step and loss of each validation in the newest csv log, as written."""
    logs = sorted(run.glob("csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    with logs[-1].open() as file:
        return [(row["step"], row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_equal_weights(run: Path, other: Path) -> None:
    first, second = weights(run), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def in_child(command: Callable[[], Any], arguments: list[str], prepare: Callable[[], Any] = nothing) -> Any:
    """Start a command in a process of its own, after ``prepare``."""
    child = CHILDREN.Process(target=_child, args=(command, arguments, prepare, dict(os.environ)))
    child.start()
    return child


def _child(
    command: Callable[[], Any], arguments: list[str], prepare: Callable[[], Any], environment: dict[str, str]
) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as in a process of a user
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
    prepare()
    sys.argv = ["mvit", *arguments]
    command()


def train_in_child(arguments: list[str], prepare: Callable[[], Any] = nothing) -> int:
    """The exit code of mvit-train in a process of its own (-9: killed by SIGKILL)."""
    child = in_child(main.train, arguments, prepare)
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def signal_in_batch(
    number: int, which: signal.Signals, step_name: str = "training_step"
) -> Callable[[], None]:
    """Makes a process send itself a signal in its so-manieth batch of training or validation, from 0."""
    return partial(_signal_in_batch, number, which, step_name)


def _signal_in_batch(number: int, which: signal.Signals, step_name: str) -> None:
    step, batches = getattr(Classifier, step_name), iter(range(1000))

    def signalling_step(self: Classifier, *args: Any) -> Any:
        if next(batches) == number:
            os.kill(os.getpid(), which)
        return step(self, *args)

    setattr(Classifier, step_name, signalling_step)


@pytest.fixture(scope="module")
def arguments(two_classes: Path) -> list[str]:
    return [*SMALL, f"data.root={two_classes}", "save_every_n_steps=3", "ckpt_path=last"]


@pytest.fixture(scope="module")
def whole(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    run = tmp_path_factory.mktemp("whole")
    assert train_in_child([*arguments, "num_workers=0", f"hydra.run.dir={run}"]) == 0
    assert "nothing to resume" in (run / "train.log").read_text()
    assert sorted(losses(run)) == list(range(15))
    return run


@pytest.mark.parametrize(
    ("loading", "killed_in", "resumed_at"),
    [
        (["num_workers=0"], 8, 6),
        (["num_workers=2", "loader=workers"], 4, 3),
        (["num_workers=2", "loader=threads"], 7, 6),
        (["num_workers=2"], 11, 10),  # after the end of an epoch
        (["num_workers=0", "trainer.max_steps=15"], 8, 6),
    ],
    ids=["alone", "workers", "threads", "epoch end", "max_steps"],
)
def test_a_killed_run_goes_on_with_the_batch_that_was_due(
    command: Command,
    arguments: list[str],
    whole: Path,
    tmp_path: Path,
    loading: list[str],
    killed_in: int,
    resumed_at: int,
) -> None:
    arguments = [*arguments, *loading, "hydra.run.dir=run"]
    assert train_in_child(arguments, signal_in_batch(killed_in, signal.SIGKILL)) == -signal.SIGKILL
    result = command("train", *arguments)
    assert result.code == 0, result.err
    assert "resuming from" in result.out
    expected = {step: loss for step, loss in losses(whole).items() if step >= resumed_at}
    assert losses(tmp_path / "run") == expected
    assert averages(tmp_path / "run") == averages(whole)[resumed_at // 5 :]
    assert_equal_weights(tmp_path / "run", whole)


def test_a_shortened_epoch_is_an_epoch(command: Command, arguments: list[str], tmp_path: Path) -> None:
    arguments = [*arguments, "num_workers=0", "trainer.limit_train_batches=3", "trainer.max_epochs=2"]
    assert command("train", *arguments, "hydra.run.dir=whole").code == 0
    code = train_in_child([*arguments, "hydra.run.dir=run"], signal_in_batch(3, signal.SIGKILL))
    assert code == -signal.SIGKILL
    assert command("train", *arguments, "hydra.run.dir=run").code == 0
    assert sorted(losses(tmp_path / "run")) == [3, 4, 5]
    assert_equal_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    "ended",
    [
        ["trainer.max_steps=8"],
        pytest.param(["trainer.max_steps=10"], marks=SLOW),  # after a whole epoch
        pytest.param(["trainer.max_steps=7", "trainer.val_check_interval=2"], marks=SLOW),
        pytest.param(["early_stopping=1", "trainer.val_check_interval=2"], marks=SLOW),
    ],
    ids=str,
)
def test_a_run_that_ended_in_an_epoch_goes_on_with_the_rest_of_it(
    command: Command, arguments: list[str], tmp_path: Path, ended: list[str]
) -> None:
    constant = ["optim.end_lr=1e-2", "optim.warmup_start_lr=1e-2"]  # whatever the last step is
    arguments = [*arguments, *constant, "num_workers=0", *ended[1:]]
    assert command("train", *arguments, "hydra.run.dir=whole").code == 0
    assert command("train", *arguments, "hydra.run.dir=run", ended[0]).code == 0
    first = sorted(losses(tmp_path / "run"))
    assert len(first) < 15
    result = command("train", *arguments, "hydra.run.dir=run")
    assert result.code == 0, result.err
    rest = {step: loss for step, loss in losses(tmp_path / "whole").items() if step > first[-1]}
    assert losses(tmp_path / "run") == rest
    assert averages(tmp_path / "run") == averages(tmp_path / "whole")[len(first) // 5 :]
    assert_equal_weights(tmp_path / "run", tmp_path / "whole")
    assert epochs(tmp_path / "run") == epochs(tmp_path / "whole") == [1, 2, 3]


def epochs(run: Path) -> list[float]:
    """Those of the learning curve."""
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return [row["epoch"] for row in state["callbacks"][EpochLogger.state_key]["epochs"]]


@pytest.mark.slow
def test_the_published_recipe_goes_on_exactly(command: Command, arguments: list[str], tmp_path: Path) -> None:
    """Averaged weights, mixing, random augmentations and several clips of a video are part of it."""
    recipe = ["ema=0.9", "mixing=mixup_cutmix", "augment=kinetics", "augment.short_side=48", "num_workers=2"]
    arguments = [*arguments, *recipe]
    assert command("train", *arguments, "hydra.run.dir=whole").code == 0
    code = train_in_child([*arguments, "hydra.run.dir=run"], signal_in_batch(8, signal.SIGKILL))
    assert code == -signal.SIGKILL
    assert command("train", *arguments, "hydra.run.dir=run").code == 0
    expected = {step: loss for step, loss in losses(tmp_path / "whole").items() if step >= 6}
    assert losses(tmp_path / "run") == expected
    assert_equal_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_run_is_killed_again_and_again(
    command: Command, arguments: list[str], whole: Path, tmp_path: Path
) -> None:
    arguments = [*arguments, "num_workers=0", "hydra.run.dir=run"]
    for batches in (1, 4, 4, 2):  # of the first run and of each resumed one
        assert train_in_child(arguments, signal_in_batch(batches, signal.SIGKILL)) == -signal.SIGKILL
    assert command("train", *arguments).code == 0
    assert_equal_weights(tmp_path / "run", whole)


@pytest.mark.slow
def test_gradients_that_are_being_gathered_are_gathered_again(
    command: Command, arguments: list[str], tmp_path: Path
) -> None:
    arguments = [*arguments, "num_workers=0", "trainer.accumulate_grad_batches=2"]
    assert command("train", *arguments, "hydra.run.dir=whole").code == 0
    for batch in (1, 2, 7, 8):  # the first and the second of two
        run = f"hydra.run.dir=run{batch}"
        code = train_in_child([*arguments, run], signal_in_batch(batch, signal.SIGTERM))
        assert code == 128 + signal.SIGTERM
        assert command("train", *arguments, run).code == 0
        assert_equal_weights(tmp_path / f"run{batch}", tmp_path / "whole")


@pytest.mark.parametrize(("batch", "saved"), [(3, 4), (4, 5)])  # in an epoch, and before its validation
def test_sigterm_saves_and_ends(
    command: Command, arguments: list[str], whole: Path, tmp_path: Path, batch: int, saved: int
) -> None:
    arguments = [*arguments, "num_workers=2", "hydra.run.dir=run"]
    assert train_in_child(arguments, signal_in_batch(batch, signal.SIGTERM)) == 128 + signal.SIGTERM
    assert "ckpt_path=last resumes" in (tmp_path / "run" / "train.log").read_text()
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == saved
    assert command("train", *arguments).code == 0
    assert losses(tmp_path / "run") == {s: loss for s, loss in losses(whole).items() if s >= saved}
    assert_equal_weights(tmp_path / "run", whole)


def scontrol(folder: Path, ending: str) -> Path:
    """A folder with a program that stands for Slurm's."""
    program = folder / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $* > {folder}/called\n{ending}")
    program.chmod(0o755)
    return program.parent


@pytest.mark.parametrize("there", [True, False], ids=["refuses", "missing"])
def test_a_job_that_can_not_be_queued_again_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, there: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("PATH", str(scontrol(tmp_path, "echo nope >&2; exit 1") if there else tmp_path))
    processes.requeue()
    reason = "nope" if there else "scontrol can't be run (No such file or directory)"
    assert f"the job isn't queued again: {reason}" in caplog.text


def test_sigusr1_in_a_slurm_job_saves_and_queues_it_again(
    command: Command, arguments: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_ID": "123"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    monkeypatch.setenv("PATH", str(scontrol(tmp_path, "")), prepend=os.pathsep)
    arguments = [*arguments, "num_workers=0", "hydra.run.dir=run"]
    assert train_in_child(arguments, signal_in_batch(3, signal.SIGUSR1)) == 128 + signal.SIGTERM
    assert "job 123 is queued again" in (tmp_path / "run" / "train.log").read_text()
    assert (tmp_path / "called").read_text() == "requeue 123\n"
    assert {path.name for path in (tmp_path / "run").iterdir() if "ckpt" in path.name} == set()
    assert command("train", *arguments).code == 0
    assert losses(tmp_path / "run") == {s: loss for s, loss in losses(whole).items() if s >= 4}
    assert_equal_weights(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("added", "batch", "saved", "which"),
    [
        pytest.param([], 1, 4, signal.SIGTERM, marks=SLOW),
        pytest.param([], (1, 2), 8, signal.SIGTERM, marks=SLOW),  # again, after the resume
        ([], (1, 1), 4, signal.SIGTERM),  # again, in the same validation
        pytest.param(["trainer.num_sanity_val_steps=2"], 0, None, signal.SIGTERM, marks=SLOW),
        pytest.param(["ema=0.9"], 2, 8, signal.SIGTERM, marks=SLOW),
        pytest.param(["trainer.val_check_interval=2"], 1, 2, signal.SIGTERM, marks=SLOW),
        (["trainer.val_check_interval=2", "ema=0.9"], 4, 6, signal.SIGTERM),
        (["trainer.val_check_interval=3"], 1, 3, signal.SIGKILL),  # written as the validation began
        pytest.param(["trainer.max_steps=8"], 2, 6, signal.SIGTERM, marks=SLOW),
        (["trainer.val_check_interval=3", "trainer.accumulate_grad_batches=2"], 0, None, signal.SIGTERM),
    ],
    ids=[
        "epoch's",
        "twice",
        "the same twice",
        "sanity check",
        "averages",
        "mid-epoch",
        "mid-epoch averages",
        "killed",
        "the last",
        "gathering",
    ],
)
def test_a_validation_that_is_stopped_is_made_again(
    command: Command,
    arguments: list[str],
    tmp_path: Path,
    added: list[str],
    batch: int | tuple[int, ...],
    saved: int | None,
    which: signal.Signals,
) -> None:
    four_and_two = "data.val_fraction=0.4"  # batches an epoch, of training and of validation
    arguments = [*arguments, "num_workers=0", four_and_two, *added]
    assert train_in_child([*arguments, "hydra.run.dir=whole"]) == 0
    for number in batch if isinstance(batch, tuple) else (batch,):
        stop = signal_in_batch(number, which, "validation_step")
        code = train_in_child([*arguments, "hydra.run.dir=run"], stop)
        assert code == (128 + which if which == signal.SIGTERM else -which)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    if saved is None:
        assert not last.exists()
    else:
        assert torch.load(last, weights_only=True)["global_step"] == saved
    assert command("train", *arguments, "hydra.run.dir=run").code == 0
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert losses(run) == {step: loss for step, loss in losses(whole).items() if step >= (saved or 0)}
    done = validations(run)
    assert done
    assert done == validations(whole)[-len(done) :]
    assert averages(run) == averages(whole)[max((saved or 0) - 1, 0) // 4 :]
    assert_equal_weights(run, whole)


def die_while_writing(count: int) -> None:
    """Makes the process die in the middle of its so-manieth checkpoint, from 0."""
    save, saved = torch.save, iter(range(1000))

    def dying(checkpoint: Any, file: Any) -> None:
        if next(saved) == count:
            file.write(b"half a checkpoint" * 1000)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(checkpoint, file)

    torch.save = dying


def test_a_crash_while_writing_leaves_the_checkpoint_before(
    command: Command, arguments: list[str], whole: Path, tmp_path: Path
) -> None:
    arguments = [*arguments, "num_workers=0", "hydra.run.dir=run"]
    assert train_in_child(arguments, partial(die_while_writing, 2)) == -signal.SIGKILL
    result = command("train", *arguments)
    assert result.code == 0, result.err
    assert "damaged" not in result.out
    assert min(losses(tmp_path / "run")) == 3
    assert_equal_weights(tmp_path / "run", whole)
    names = {file.name for file in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"best.ckpt", "last.ckpt", "previous.ckpt"}


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "gone"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_taken(
    command: Command, arguments: list[str], whole: Path, tmp_path: Path, damage: str
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    folder = run / "checkpoints"
    content = bytearray((folder / "last.ckpt").read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 255
    elif damage == "empty":
        content.clear()
    (folder / "last.ckpt").write_bytes(content)
    if damage == "gone":
        (folder / "last.ckpt").unlink()
    if damage in ("flipped", "empty"):
        assert find_checkpoint("last", run, own_only=True) == folder / "previous.ckpt"
        return
    arguments = [*arguments, "num_workers=0", "hydra.run.dir=run"]
    result = command("train", *arguments)
    assert result.code == 0, result.err
    assert ("last.ckpt: the checkpoint is" in result.out) == (damage != "gone")
    assert f"resuming from {folder / 'previous.ckpt'}" in result.out
    assert losses(run) == {step: loss for step, loss in losses(whole).items() if step >= 12}

    for name in ("last.ckpt", "previous.ckpt"):
        (folder / name).write_bytes(bytes(content[:100]))
    line = error_line(command("train", *arguments), "train")
    assert "last.ckpt: the checkpoint is cut off or damaged" in line
    assert "previous.ckpt: the checkpoint is cut off or damaged" in line


def test_weights_alone_and_folders_are_nothing_to_resume(
    command: Command, checkpoint: Path, two_classes: Path
) -> None:
    result = command("train", f"data.root={two_classes}", f"ckpt_path={checkpoint}")
    line = error_line(result, "train")
    assert "model.ckpt: no checkpoint of a run but weights alone; weights=FILE" in line
    assert "weights alone" not in result.out  # said once
    line = error_line(command("train", f"data.root={two_classes}", f"ckpt_path={two_classes}"), "train")
    assert "a folder; ckpt_path takes a file" in line


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")
def test_the_loader_s_processes_end_with_a_killed_run(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    loading = ["num_workers=2", "loader=workers", "hydra.run.dir=run"]
    child = in_child(main.train, [*arguments, *loading], signal_in_batch(8, signal.SIGSTOP))
    while "T (stopped)" not in Path(f"/proc/{child.pid}/status").read_text():
        assert child.is_alive()
        time.sleep(0.1)
    workers = children(child.pid)
    assert len(workers) == 4  # two for training, two for validation
    child.kill()
    child.join()
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # or the test never ends
        time.sleep(0.1)


def interrupt_group(group: Path, *, swallowed: bool) -> None:
    """Ctrl-C in the fourth step, for all processes, as from a terminal."""
    os.setsid()
    group.write_text(str(os.getpgrp()))
    step, batches = Classifier.training_step, iter(range(1000))

    class Destructor:
        def __del__(self) -> None:
            os.killpg(os.getpgrp(), signal.SIGINT)

    def training_step(self: Classifier, *args: Any) -> Any:
        if next(batches) == 3:
            if swallowed:  # Python drops exceptions in a destructor
                Destructor()
            else:
                os.killpg(os.getpgrp(), signal.SIGINT)
        return step(self, *args)

    Classifier.training_step = training_step


def assert_group_has_ended(group: int) -> None:
    """Else the test never ends; multiprocessing's own helper ends a little later than the others."""
    with suppress(ProcessLookupError):
        while True:
            os.killpg(group, 0)
            time.sleep(0.05)


@pytest.mark.parametrize("loader", ["threads", "workers"])
@pytest.mark.parametrize("swallowed", [False, True])
def test_ctrl_c_ends_a_run(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: str, swallowed: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    group = tmp_path / "group"
    prepare = partial(interrupt_group, group, swallowed=swallowed)
    code = train_in_child([*arguments, "num_workers=2", f"loader={loader}", "hydra.run.dir=run"], prepare)
    assert code == 128 + signal.SIGINT
    assert "epoch 2/3" not in (tmp_path / "run" / "train.log").read_text()
    assert_group_has_ended(int(group.read_text()))


def interrupt_and_hang(group: Path) -> None:
    interrupt_group(group, swallowed=False)
    Interrupts.END_AFTER_S = 0.5
    EpochLogger.on_exception = lambda *_: threading.Event().wait()


def test_ctrl_c_ends_a_run_that_hangs_while_it_closes_down(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loading = ["num_workers=2", "loader=workers", "hydra.run.dir=run"]
    code = train_in_child([*arguments, *loading], partial(interrupt_and_hang, tmp_path / "group"))
    assert code == 128 + signal.SIGINT
    assert_group_has_ended(int((tmp_path / "group").read_text()))


def interrupt_evaluation() -> None:
    os.setsid()
    MViT.forward = lambda *_: os.killpg(os.getpgrp(), signal.SIGINT)


def test_ctrl_c_ends_an_evaluation(
    two_classes: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [f"data.root={two_classes}", f"weights={checkpoint}", "hydra.run.dir=run"]
    child = in_child(main.evaluate, arguments, interrupt_evaluation)
    child.join()
    assert child.exitcode == 128 + signal.SIGINT
    assert_group_has_ended(child.pid)


def test_a_killed_process_of_the_loader_ends_a_run_with_the_name_of_its_video(
    command: Command, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opens = Decoder.__call__

    def deadly(self: Decoder, path: str) -> Any:
        if path.endswith("cats/3.mp4") and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return opens(self, path)

    monkeypatch.setattr(Decoder, "__call__", deadly)
    options = ["num_workers=2", "loader=workers", "hydra.run.dir=run"]
    line = error_line(command("train", *arguments, *options), "train")
    assert "was killed by SIGKILL while it read" in line
    assert "cats/3.mp4 (out of memory?" in line


CHANGES: list[dict[str, str]] = [
    {
        "batch_size=5": "batch: size 2 -> 5",
        "trainer.accumulate_grad_batches=2": "batch: accumulate_grad_batches",
        "seed=1": "seed 0 -> 1",
        "optim.lr=1e-3": "optim: lr 0.01 -> 0.001",
        "augment=no_flip": "augment: flip_probability",
        "mixing=mixup_cutmix": "mixing: probability",
        "ema=0.9": "ema null -> 0.9",
        "freeze=backbone": "freeze null -> ",
        "views.stride=2": "clips: stride",
        "data.val_fraction=0.5": "data: train",
        "monitor=val/loss": "monitor val/top1 -> val/loss",
    },
    {"optim=sgd": "optimizer", "model.stages=[1,2]": "model: stages"},
    {"trainer.max_epochs=1": "trainer.max_epochs=1"},
    {"trainer.max_steps=9": "trainer.max_steps=9"},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: " ".join(changes))
def test_a_run_goes_on_as_the_same_run_or_not_at_all(
    command: Command, arguments: list[str], whole: Path, tmp_path: Path, changes: dict[str, str]
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    line = error_line(command("train", *arguments, "hydra.run.dir=run", *changes), "train")
    assert [said for said in changes.values() if said not in line] == []
    assert str(run / "checkpoints" / "last.ckpt") in line
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before


def test_other_data_are_another_run(
    command: Command, arguments: list[str], two_classes: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(two_classes, tmp_path / "data")
    (tmp_path / "data" / "cats" / "1.mp4").rename(tmp_path / "data" / "cats" / "one.mp4")
    line = error_line(command("train", *arguments, "hydra.run.dir=run", "data.root=data"), "train")
    assert "data: train" in line
    (tmp_path / "data" / "cats" / "one.mp4").rename(tmp_path / "data" / "cats" / "1.mp4")
    for split, names in drawn(two_classes).items():
        replaced = tmp_path / "data" / names[0]
        content = replaced.read_bytes()
        replaced.write_bytes(content + b"\0\0\0\x08free")
        line = error_line(command("train", *arguments, "hydra.run.dir=run", "data.root=data"), "train")
        assert f"files: {split}_sizes" in line
        replaced.write_bytes(content)
    (tmp_path / "data" / "cats").rename(tmp_path / "data" / "tigers")
    line = error_line(command("train", *arguments, "hydra.run.dir=run", "data.root=data"), "train")
    assert "data: classes" in line


def drawn(root: Path) -> dict[str, list[str]]:
    """The videos of each split, below ``root``."""
    splits = folder_splits(root)
    return {name: [video.id for video in getattr(splits, name).videos] for name in ("train", "val")}


def test_files_are_known_by_size_wherever_they_are(tmp_path: Path) -> None:
    videos = [LabelledVideo(str(tmp_path / name), 0, name) for name in ("a.mp4", "b_[1-3].jpg", "c", "d.mp4")]
    (tmp_path / "c").mkdir()
    for name in ("a.mp4", "b_1.jpg", "b_2.jpg", "b_3.jpg", "c/1.png", "c/2.png"):  # and there is no d.mp4
        (tmp_path / name).write_text(name)
    whole = files_identity(train=videos)
    for name in ("a.mp4", "b_3.jpg", "c/1.png"):
        os.utime(tmp_path / name, (0, 0))
        moved = files_identity(train=videos)
        assert moved["files"] == whole["files"]
        assert moved["file_times"] != whole["file_times"]
        (tmp_path / name).write_text("something else")
        assert files_identity(train=videos)["files"] != whole["files"]
        (tmp_path / name).write_text(name)
    assert files_identity(train=videos)["files"] == whole["files"]


def test_what_an_older_version_has_not_noted_is_not_compared(whole: Path, tmp_path: Path) -> None:
    state = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    now = state[FINGERPRINT_KEY]
    state[FINGERPRINT_KEY] = {part: now[part] for part in now if part not in ("files", "file_times")}
    torch.save(state, tmp_path / "last.ckpt")
    loader: Any = None  # as the next epoch is due
    resume(tmp_path / "last.ckpt", now, loader, max_epochs=3)
    with pytest.raises(ConfigError, match="seed 0 -> 1"):
        resume(tmp_path / "last.ckpt", now | {"seed": 1}, loader, max_epochs=3)


def test_what_may_change_is_taken_over_and_said(
    command: Command, arguments: list[str], two_classes: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(two_classes, tmp_path / "moved", copy_function=shutil.copyfile)  # times are new
    free = ["trainer.max_epochs=4", "num_workers=1", "save_every_n_steps=2", "trainer.limit_val_batches=1"]
    free += ["data.root=moved", "decoder.frame_rate=12"]
    result = command("train", *arguments, "hydra.run.dir=run", *free)
    assert result.code == 0, result.err
    for said in (
        *("max_epochs 3 -> 4", "num_workers 0 -> 1", "save_every_n_steps 3 -> 2", "limit_val_batches"),
        *("-> moved", "decoder.frame_rate 30 -> 12", "train_file_times"),
    ):
        assert said in result.out
    assert sorted(losses(tmp_path / "run")) == [15, 16, 17, 18, 19]


OLD = {
    None: None,
    "optim=sgd": "can't be resumed",
    "model.embed_dim=8": "model: embed_dim 16 -> 8",
    "optim.layer_decay=0.5": "can't be resumed",
}


@pytest.mark.parametrize("change", OLD)
def test_a_checkpoint_without_a_fingerprint_goes_on_with_a_warning(
    command: Command, arguments: list[str], whole: Path, tmp_path: Path, change: str | None
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    last = run / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    for key in (FINGERPRINT_KEY, MEANS_KEY):
        del state[key]
    torch.save(state, last)
    arguments = [*arguments, "hydra.run.dir=run", "trainer.max_epochs=4", *([change] if change else [])]
    result = command("train", *arguments)
    if change is None:
        assert result.code == 0, result.err
        assert "doesn't say which settings it comes from" in result.out
        assert "epoch 4/4" in result.out
    else:
        assert OLD[change] in error_line(result, "train")


def test_two_runs_in_one_folder_and_what_a_former_run_has_left(
    command: Command, arguments: list[str], whole: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    former = (run / "checkpoints" / "best.ckpt").read_bytes()
    anew = [*arguments, "hydra.run.dir=run", "ckpt_path=null", "trainer.max_epochs=1", "num_workers=0"]
    with sole_writer(run / "checkpoints"):
        assert "another run is writing there" in error_line(command("train", *anew), "train")
    assert (run / "checkpoints" / "best.ckpt").read_bytes() == former
    result = command("train", *anew)
    assert result.code == 0, result.err
    assert (run / "checkpoints.former" / "best.ckpt").read_bytes() == former
    names = {file.name for file in (run / "checkpoints").iterdir()}
    assert names == {"best.ckpt", "last.ckpt", "previous.ckpt"}


def test_a_full_disk_leaves_the_checkpoint_before_and_says_which_file(
    arguments: list[str], whole: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    last = run / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    assert len(before) > 60_000
    said = tmp_path / "said"
    more = [f"hydra.run.dir={run}", "trainer.max_epochs=4", "num_workers=0"]
    assert train_in_child([*arguments, *more], partial(fill_disk_and_keep, said)) == 1
    assert said.read_text().splitlines()[-1].startswith(f"mvit-train: error: {run}/checkpoints/")
    assert "Traceback" not in said.read_text()
    assert last.read_bytes() == before
    assert not list((run / "checkpoints").glob(".unfinished*"))


def fill_disk_and_keep(said: Path) -> None:
    """As with a full disk, the system refuses to write more than some bytes to a file."""
    sys.stderr = said.open("w", buffering=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def test_lightning_s_internals_are_those_of_its_version() -> None:
    """What is used of them though it isn't public; look at each again with another version."""
    assert pl.__version__.startswith("2.6.")
    assert callable(_TrainingEpochLoop._should_check_val_fx)
    assert callable(_TrainingEpochLoop._should_accumulate)
    assert "_data_fetcher" in vars(pl.Trainer(logger=False, enable_checkpointing=False).fit_loop)
    average = EMAWeightAveraging(decay=0.9)
    assert {"_average_model", "_use_buffers", "_kwargs"} <= vars(average).keys()
    assert callable(average._swap_models)
