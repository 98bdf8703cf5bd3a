"""Numbers of epochs: means over what every process has seen, the best checkpoint, what a terminal shows."""

from __future__ import annotations

import json
import multiprocessing
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import Command, error_line
from test_processes import torchrun
from test_resume import losses, validations

from mvit_video.training.metrics import BestCheckpoint, EpochLogger, Means

BASE = ("experiment=motion", "batch_size=2", "num_workers=0", "trainer.max_epochs=1", "hydra.run.dir=run")


COUNTS = [(5, 4), (3, 0), (0, 0)]  # samples of two processes, three times


def means_of(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    means, values = Means(["val/loss"]), []
    for counts in COUNTS:
        for sample in range(counts[rank]):
            means.add({"val/loss": torch.tensor(float(10 * rank + sample))}, 1)
        means.add({}, 0)
        values.append(means.take()["val/loss"])
    torch.save(values, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_means_count_each_sample_of_every_process_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=means_of, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    for index, counts in enumerate(COUNTS):
        seen = [10.0 * rank + sample for rank in range(2) for sample in range(counts[rank])]
        for rank in range(2):
            found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[index]
            torch.testing.assert_close(found, torch.tensor(seen).mean(), equal_nan=True)


class Scripted(pl.LightningModule):
    """Validates with given numbers, an (accuracy, loss) each epoch."""

    def __init__(self, script: list[tuple[float, float]]) -> None:
        super().__init__()
        self.script, self.layer = script, torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_index: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def validation_step(self, batch: torch.Tensor, batch_index: int) -> None:
        accuracy, loss = self.script[self.current_epoch]
        self.log_dict({"val/top1": accuracy, "val/loss": loss})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("script", "best"),
    [
        ([(0.5, 2.0), (0.5, 1.0), (0.5, 3.0)], 1),
        ([(0.5, 1.0), (0.5, 1.0), (0.4, 0.1)], 0),
        ([(0.5, 0.1), (0.6, 2.0), (0.6, 1.5)], 2),
    ],
)
def test_of_equal_accuracies_the_lower_loss_is_the_best(
    tmp_path: Path, script: list[tuple[float, float]], best: int
) -> None:
    history, data = EpochLogger(), torch.utils.data.DataLoader(torch.ones(2, 1))
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=len(script), logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[BestCheckpoint(tmp_path, "val/top1"), history],
    )  # fmt: skip
    trainer.fit(Scripted(script), data, data)
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == best
    score = trainer.checkpoint_callback.best_model_score.item()
    assert score == history.best("val/top1") == pytest.approx(max(accuracy for accuracy, _ in script))
    assert history.describe("val/top1", score).startswith(f"epoch {best + 1}, ")

    state = trainer.checkpoint_callback.state_dict()  # in another folder, it takes the file along
    for folder, known in (("moved", True), ("copied", True), ("lost", False)):
        if folder == "copied":
            shutil.copytree(tmp_path / "moved", tmp_path / "copied")
            (tmp_path / "best.ckpt").unlink()
        taken = BestCheckpoint(tmp_path / folder, "val/top1")
        taken.load_state_dict(state)
        assert (tmp_path / folder / "best.ckpt").is_file() == known
        assert taken.best_model_score == (score if known else None)
        assert taken.check_monitor_top_k(trainer, torch.tensor(0.1)) != known


def test_epochs_without_validation_have_no_validation_numbers(
    command: Command, two_classes: Path, tmp_path: Path
) -> None:
    options = ["trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2", f"data.root={two_classes}"]
    result = command("train", *BASE, *options)
    assert result.code == 0, result.err
    lines = [line for line in result.out.splitlines() if re.search(r"epoch \d/3: ", line)]
    assert ["val/" in line for line in lines] == [False, True, False]


def test_the_best_of_another_metric_can_be_kept(command: Command, two_classes: Path, tmp_path: Path) -> None:
    options = ["monitor=val/loss", "early_stopping=5", "trainer.max_epochs=2", f"data.root={two_classes}"]
    result = command("train", *BASE, *options)
    assert result.code == 0, result.err
    found = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    kept = next(state for key, state in found["callbacks"].items() if "ModelCheckpoint" in key)
    assert kept["monitor"] == "val/loss"
    assert re.search(r"best checkpoint: .*best.ckpt\s+\(epoch [12], val/loss", result.out)
    unknown = command("train", *BASE, f"data.root={two_classes}", "monitor=val/topp1")
    assert "val/topp1" in error_line(unknown, "train")


def test_a_sweep_gets_the_best_accuracy(command: Command, two_classes: Path, tmp_path: Path) -> None:
    options = [f"data.root={two_classes}", "hydra.sweep.dir=sweep", "trainer.limit_train_batches=1"]
    result = command("train", "--multirun", *BASE[:-1], *options)
    assert result.code == 0, result.err
    value = json.loads((tmp_path / "sweep" / "0" / "job.json").read_text())["metric"]
    last = torch.load(tmp_path / "sweep" / "0" / "checkpoints" / "last.ckpt", weights_only=True)
    history = next(state for key, state in last["callbacks"].items() if key == "History")
    assert value == history["epochs"][0]["val/top1"]


SMALL_PRETRAINING = (
    "experiment=maskfeat_motion",
    "masking.cell=8",
    "model.embed_dim=8",
    "model.stages=[1,1]",
)
SMALL_PRETRAINING += ("model.crop_size=32", "model.num_frames=4", "trainer.max_epochs=1")


@pytest.mark.parametrize("recipe", [BASE, SMALL_PRETRAINING], ids=["classification", "pretraining"])
def test_a_validation_that_is_not_finite_stops_the_run(
    command: Command, two_classes: Path, recipe: tuple[str, ...]
) -> None:
    one_step = ("optim.lr=1e30", "optim.warmup=0", "trainer.gradient_clip_val=null", "num_workers=0")
    one_step += ("trainer.limit_train_batches=1", f"data.root={two_classes}", "hydra.run.dir=run")
    line = error_line(command("train", *recipe, *one_step), "train")
    assert "isn't finite in the validation of epoch 1" in line


@pytest.mark.parametrize(
    "override",
    [
        "trainer.val_check_interval=1000",
        "trainer.limit_train_batches=0.01",
        "trainer.limit_val_batches=0.01",
        "trainer.overfit_batches=0.01",
        "trainer.min_epochs=5",
    ],
)
def test_what_lightning_refuses_is_one_line(command: Command, two_classes: Path, override: str) -> None:
    result = command("train", *BASE, f"data.root={two_classes}", override)
    if result.code:  # Lightning takes min_epochs above max_epochs
        error_line(result, "train")
    assert "Traceback" not in result.err + result.out
    assert result.code == (override != "trainer.min_epochs=5")


@pytest.mark.slow
def test_a_process_whose_validation_videos_are_all_unreadable(
    command: Command, two_classes: Path, tmp_path: Path
) -> None:
    for split, numbers in (("train", range(4)), ("val", range(4, 6))):
        for folder in two_classes.iterdir():
            (tmp_path / "data" / split / folder.name).mkdir(parents=True)
            for number in numbers:
                (source,) = folder.glob(f"{number}.*")
                (tmp_path / "data" / split / folder.name / source.name).symlink_to(source)
    for broken in (tmp_path / "data" / "val").glob("*/5.*"):  # every second one: those of the second process
        broken.unlink()
        broken.write_text("no video")
    options = ["data.root=data", "max_bad_videos=2", "logger=csv", "trainer.accelerator=cpu"]
    one = command("train", *BASE, *options)
    assert one.code == 0, one.err
    done = torchrun(*BASE, *options, "batch_size=1", "hydra.run.dir=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "two")) == len(losses(tmp_path / "run"))
    (two,), (alone,) = validations(tmp_path / "two"), validations(tmp_path / "run")
    assert float(two[1]) == pytest.approx(float(alone[1]), abs=0.05)  # their dropout differs


def screen(written: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", written):
        if part == "\n":
            row += 1
        elif part.startswith("\x1b[") and part.endswith("A"):
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part[0] not in "\x1b\r":
            lines[row] += part
        lines += [""] * (row + 1 - len(lines))
    return lines


def test_the_bar_leaves_the_log_on_a_terminal(two_classes: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "80", "TERM": "xterm"}
    arguments = [*BASE, f"data.root={two_classes}", "trainer.max_epochs=2", "logger=csv"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mvit_video.train", *arguments], cwd=tmp_path, env=environment,
        stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    written = b""
    try:
        while block := os.read(ours, 1 << 16):
            written += block
    except OSError:  # the other side is closed
        pass
    assert process.wait() == 0, written.decode()
    shown = " ".join(" ".join(screen(written.decode())).split())  # without the breaks of long lines
    assert "epoch 1/2" in written.decode()
    assert "v_num" not in written.decode()
    for line in ("epoch 1/2: train/loss", "epoch 2/2: train/loss", "one epoch will take about"):
        assert shown.count(line) == 1, shown
