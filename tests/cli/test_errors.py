"""What a user gets wrong, through the commands: one clear line, status 1, nothing half done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Command, error_line
from videos import write_numbered_video

import mvit_video as mv
from mvit_video.cli.messages import one_line


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        # misspelt keys, groups and options
        ("train", ["trainer.max_epoch=2"], ["'trainer.max_epoch'", "did you mean trainer.max_epochs?"]),
        ("train", ["optm.lr=1"], ["'optm'", "did you mean optim?"]),
        ("train", ["experimnt=motion"], ["'experimnt'", "did you mean experiment?"]),
        ("train", ["optim.lr.start=1"], ["'optim.lr.start'", "optim.lr is a value"]),
        (
            "train",
            ["model=mvitv2_nano_8x"],
            ["model has no 'mvitv2_nano_8x'", "did you mean mvitv2_nano_8x4?"],
        ),
        ("train", ["data=kinetic"], ["data has no 'kinetic'", "folder", "csv"]),
        ("eval", ["weights=x", "views=5by1"], ["views has no '5by1'", "5x1"]),
        ("predict", ["a.mp4", "top_k=3"], ["'top_k'", "did you mean topk?"]),
        ("train", ["data.root"], ["data.root"]),
        # values
        ("train", ["data.root=.", "optim.lr=fast"], ["optim.lr is 'fast'", "expected a number"]),
        ("train", ["data.root=.", "trainer.max_epochs=2.5"], ["trainer.max_epochs is 2.5", "whole number"]),
        ("train", ["data.root=.", "trainer.enable_progress_bar=perhaps"], ["'perhaps'", "true or false"]),
        ("train", ["data.root=.", "views.crop=400"], ["views", "crop 400", "short_side"]),
        ("train", ["data.root=.", "decoder.device=abacus"], ["'abacus'", "cpu"]),
        ("train", ["data.root=.", "decoder.backend=abacus"], ["'abacus'", "pyav"]),
        ("train", ["data.root=.", "loader=process"], ["loader is 'process'", "auto or threads or workers"]),
        ("train", ["data.root=.", "max_bad_videos=1.5"], ["max_bad_videos is 1.5", "from 0 to below 1"]),
        ("eval", ["weights=x", "device=abacus", "data.root=."], ["'abacus'"]),
        ("eval", ["weights=x", "split=dev", "data.root=."], ["split is 'dev'", "train or val"]),
        ("info", ["model=mvitv2_xs"], ["model has no 'mvitv2_xs'", "mvitv2_s_16x4"]),
        ("info", ["model.stages=[0]"], ["model", "stages"]),
        ("predict", ["a.mp4", "topk=0", "model=mvitv2_nano_8x4"], ["topk is 0", "from 1"]),
        # what isn't there
        ("train", [], ["data.root isn't set", "data.root=..."]),
        ("train", ["data.root=missing"], ["missing", "does not exist"]),
        ("train", ["data=csv", "data.train=a.csv", "data.val=b.csv"], ["a.csv"]),
        ("train", ["data.root=.", "ckpt_path=gone.ckpt"], ["gone.ckpt", "no such file", "'last'"]),
        ("train", ["data.root=.", "ckpt_path=last"], ["no run below", "checkpoint"]),
        ("eval", ["data.root=."], ["weights isn't set"]),
        ("eval", ["data.root=.", "weights=gone.ckpt"], ["gone.ckpt", "no such file"]),
        ("predict", ["weights=gone.ckpt"], ["no files given"]),
        ("predict", ["a.mp4"], ["weights=FILE", "model=NAME"]),
        ("predict", ["a.mp4", "model=mvitv2_nano_8x4"], ["a.mp4", "does not exist"]),
        # the grammar of the command line, and text, numbers and lists that aren't meant as they read
        ("train", ["lr=1"], ["'lr'", "optim.lr"]),
        ("train", ["epochs=3"], ["'epochs'", "trainer.max_epochs"]),
        ("train", ["gpus=2"], ["'gpus'", "trainer.devices"]),
        ("predict", ["a.mp4", "augment=light"], ["mvit-predict has no group 'augment'", "views"]),
        ("eval", ["model.weights=kinetics400"], ["'model.weights' without model=", "mvitv2_s_16x4"]),
        ("train", ["trainer=null"], ["trainer=null", "default"]),
        ("train", ["~trainer", "data.root=x"], ["trainer"]),
        ("train", ["batch_size=1,2"], ["batch_size=1,2", "--multirun"]),
        ("predict", ["a.mp4", "weights=epoch=3-step=99.ckpt"], ["epoch=3-step=99.ckpt"]),
        ("predict", ["a.mp4", "weights=12"], ["12: no such file"]),
        ("predict", ["videos=/a/b.mp4", "model=mvitv2_nano_8x4"], ["/a/b.mp4"]),
        ("predict", ["~x.mp4", "model=mvitv2_nano_8x4"], ["~x.mp4"]),
        ("train", ["data.root=~/x"], ["does not exist"]),
        ("train", ["data.root=Übung"], ["Übung"]),
        ("train", ["data.root="], ["data.root is ''"]),
        ("predict", ["a.mp4", "save=s"], ["save is 's'", "srt"]),
        ("predict", ["a.mp4", "smoothing=nan"], ["smoothing is nan"]),
        ("predict", ["a.mp4", "decoder.device=null"], ["decoder.device is null"]),
        ("eval", ["weights=x", "data.root=x", "num_workers=99999"], ["num_workers is 99999", "1024"]),
        ("train", ["data.root=x", "trainer.accumulate_grad_batches=0"], ["accumulate_grad_batches is 0"]),
        ("demo", ["weights=x", "port=70000"], ["port is 70000"]),
        ("data", ["prepare", "data.root=x", "frame_rate=0"], ["frame_rate is 0"]),
        ("info", ["model.window=3"], ["model.window is 3"]),
        ("train", ["batch_size=[1", "-m"], ["batch_size=[1", "quotes"]),
        ("train", ["batch_size=${nothing}"], ["batch_size: ", "'nothing'"]),
        ("train", ["hydra.nonsense=3"], ["'hydra.nonsense'", "sweeper"]),
        ("train", ["~data", "data.root=x"], ["'data.root'", "~data"]),
        ("train", ["~seed", "data.root=x"], ["seed", "~seed"]),
        ("train", ["~augment", "data.root=x"], ["augment", "~augment"]),
    ],
)
def test_mistakes_get_one_clear_line(
    command: Command, name: str, arguments: list[str], expected: list[str]
) -> None:
    line = error_line(command(name, *arguments), name)
    for words in expected:
        assert words in line


def test_defaults_of_the_trainer_can_be_left_to_lightning(
    command: Command, two_classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvit_video.training.run.fit", lambda *_: None)
    arguments = [f"data.root={two_classes}", "model=mvitv2_nano_8x4", "num_workers=0"]
    result = command("train", *arguments, "~trainer.max_epochs", "~trainer.accumulate_grad_batches")
    assert result.code == 0, result.err


def test_a_folder_that_is_gone_is_said(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "gone" in error_line(command("info", "model.num_framse=3"), "info")


def test_an_error_without_text_is_named() -> None:
    assert one_line(MemoryError()) == "MemoryError"


def test_an_empty_index_says_what_was_expected(command: Command, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    line = error_line(command("train", "data.root=videos"), "train")
    assert "videos" in line
    assert "<class>" in line


@pytest.mark.parametrize("label", ["2", "-1", "7"])
def test_a_label_out_of_range_names_list_and_label(command: Command, tmp_path: Path, label: str) -> None:
    write_numbered_video(tmp_path / "v.mp4", 4)
    (tmp_path / "names.txt").write_text("cats\ndogs\n")
    (tmp_path / "list.csv").write_text(f"v.mp4 0\nw.mp4 {label}\n")
    result = command(
        "train", "data=csv", "data.train=list.csv", "data.val=list.csv", "data.class_names=names.txt"
    )
    line = error_line(result, "train")
    assert "list.csv" in line
    assert f"label {label}" in line
    assert "0 to 1" in line


@pytest.fixture
def damaged(two_classes: Path, tmp_path: Path) -> Path:
    """The two classes with two broken videos in training and one in validation."""
    for split, numbers in (("train", range(4)), ("val", range(4, 6))):
        for folder in two_classes.iterdir():
            target = tmp_path / "data" / split / folder.name
            target.mkdir(parents=True)
            for file in folder.iterdir():
                if int(file.stem) in numbers:
                    (target / file.name).write_bytes(file.read_bytes())
    for broken in ("train/cats/broken1.mp4", "train/cats/broken2.mp4", "val/cats/broken.mp4"):
        (tmp_path / "data" / broken).write_text("no video")
    return tmp_path / "data"


def test_training_replaces_and_counts_bad_videos(command: Command, damaged: Path, tmp_path: Path) -> None:
    result = command(
        "train",
        "experiment=motion",
        f"data.root={damaged}",
        "trainer.max_epochs=2",
        "batch_size=5",
        "num_workers=1",
        "hydra.run.dir=run",
    )
    assert result.code == 0, result.err
    rows = (tmp_path / "run" / "bad_videos.csv").read_text().splitlines()
    assert rows[0] == "path,reason"
    assert sorted(Path(row.split(",")[0]).name for row in rows[1:]) == [
        "broken.mp4",
        "broken1.mp4",
        "broken2.mp4",
    ]
    assert "3 unreadable videos" in (tmp_path / "run" / "train.log").read_text()
    assert (
        "0.3 M parameters, 2 classes, 10 training and 5 validation videos"
        in (tmp_path / "run" / "train.log").read_text()
    )


def test_a_run_with_some_bad_files_ends_and_lists_them(
    command: Command, two_classes: Path, tmp_path: Path
) -> None:
    """20 training videos; two are damaged, each in another way."""
    for copy in range(2):
        for folder in two_classes.iterdir():
            (tmp_path / "data" / "train" / folder.name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / "val" / folder.name).mkdir(parents=True, exist_ok=True)
            for file in folder.iterdir():
                split = "train" if file.stem != "5" else "val"
                target = tmp_path / "data" / split / folder.name / f"{copy}{file.name}"
                target.write_bytes(file.read_bytes())
    bad = sorted((tmp_path / "data" / "train").glob("*/*3.*"))[:2]
    bad[0].write_bytes(bad[0].read_bytes()[:200])
    for file in bad[1:]:
        file.write_bytes(b"")
    arguments = [
        "experiment=motion",
        "data.root=data",
        "trainer.max_epochs=2",
        "batch_size=4",
        "num_workers=2",
        "hydra.run.dir=run",
    ]
    result = command("train", *arguments)
    assert result.code == 0, result.err
    assert "epoch 2/2" in result.out
    rows = (tmp_path / "run" / "bad_videos.csv").read_text().splitlines()
    assert rows[0] == "path,reason"
    assert sorted(row.split(",")[0] for row in rows[1:]) == [str(p.relative_to(tmp_path)) for p in bad]
    for limit in (1, 0.055):
        line = error_line(command("train", *arguments, f"max_bad_videos={limit}"), "train")
        assert f"{len(bad)} of 24 videos can't be read, and max_bad_videos allows {len(bad) - 1}" in line
        assert "run/bad_videos.csv lists them" in line
        assert bad[0].name in (tmp_path / "run" / "bad_videos.csv").read_text()


@pytest.mark.parametrize("workers", [0, 1])
def test_training_gives_up_where_nothing_can_be_read(command: Command, tmp_path: Path, workers: int) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "data" / name / f"{number}.mp4").write_text("no video")
    result = command(
        "train",
        "experiment=motion",
        "data.root=data",
        "batch_size=2",
        f"num_workers={workers}",
        "hydra.run.dir=run",
    )
    line = error_line(result, "train")
    assert line.startswith("20 videos in a row can't be read, the last: data/")


def test_evaluation_fails_on_a_bad_video_unless_allowed(
    command: Command, damaged: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "-damaged").symlink_to(damaged)  # csv files have another text for such a name
    arguments = ["data.root=-damaged", f"weights={checkpoint}", "num_workers=0", "hydra.run.dir=run"]
    line = error_line(command("eval", *arguments), "eval")
    assert "broken.mp4" in line
    assert "max_bad_videos allows 0" in line
    assert "broken.mp4" in (tmp_path / "run" / "bad_videos.csv").read_text()
    assert not (tmp_path / "run" / "results.json").exists()

    assert command("eval", *arguments, "max_bad_videos=1").code == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["videos"] == 4
    assert [Path(video["path"]).name for video in results["bad_videos"]] == ["broken.mp4"]
    assert results["bad_videos"][0]["reason"]


def test_evaluation_refuses_other_classes(
    command: Command, two_classes: Path, checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("ant", "bee", "cow"):
        (tmp_path / "three" / name).mkdir(parents=True)
        for number in range(2):
            write_numbered_video(tmp_path / "three" / name / f"{number}.mp4", 4, height=48, width=64)
    line = error_line(command("eval", "data.root=three", f"weights={checkpoint}"), "eval")
    assert "2 classes" in line
    assert "3" in line

    (tmp_path / "two").symlink_to(two_classes)
    model = mv.load_model(checkpoint)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    result = command("eval", "data.root=three", "weights=bare.pth", "model=mvitv2_nano_8x4")
    assert "its head has 2 classes, the model has 3" in error_line(result, "eval")

    for name in ("three/ant", "three/bee", "three/cow"):
        (tmp_path / name).rename(tmp_path / name.replace("three", "gone").replace("/", "_"))
    for name in ("dogs", "cats"):
        (tmp_path / "three" / name).mkdir()
        for number in range(2):
            write_numbered_video(tmp_path / "three" / name / f"{number}.mp4", 4, height=48, width=64)
    line = error_line(command("eval", "data.root=three", f"weights={checkpoint}"), "eval")
    assert "'dogs and birds'" in line
    assert "'dogs'" in line


def test_bare_weights_need_a_model(
    command: Command, two_classes: Path, checkpoint: Path, tmp_path: Path
) -> None:
    torch.save(mv.load_model(checkpoint).state_dict(), tmp_path / "bare.pth")
    arguments = [f"data.root={two_classes}", "weights=bare.pth", "num_workers=0"]
    assert "model=" in error_line(command("eval", *arguments), "eval")
    assert command("eval", *arguments, "model=mvitv2_nano_8x4").code == 0


def test_fine_tuning_names_what_does_not_fit(command: Command, two_classes: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"\x80\x02garbage")
    result = command(
        "train", "experiment=motion", f"data.root={two_classes}", "weights=weights.pth", "batch_size=2"
    )
    assert "weights.pth" in error_line(result, "train")


def test_prediction_gives_a_bad_file_a_row(
    command: Command, two_classes: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.mp4").write_text("no video")
    good = two_classes / "cats" / "0.mp4"
    result = command("predict", "broken.mp4", str(good), f"weights={checkpoint}", "output=answer.json")
    assert result.code == 0, result.err
    assert "error" in result.out
    broken, fine = json.loads((tmp_path / "answer.json").read_text())["videos"]
    assert broken["error"]
    assert broken["classes"] == []
    assert fine["error"] is None
    assert len(fine["classes"]) == 2

    result = command("predict", "broken.mp4", f"weights={checkpoint}")
    assert "broken.mp4" in error_line(result, "predict")


def test_a_run_that_goes_on_with_another_optimizer_is_refused(command: Command, two_classes: Path) -> None:
    arguments = [f"data.root={two_classes}", "model=mvitv2_nano_8x4", "model.crop_size=32", "num_workers=0"]
    arguments += ["hydra.run.dir=run", "trainer.limit_train_batches=1", "trainer.limit_val_batches=1"]
    done = command("train", *arguments, "trainer.max_epochs=1")
    assert done.code == 0, done.err
    again = command("train", *arguments, "trainer.max_epochs=2", "ckpt_path=last", "optim.layer_decay=0.5")
    line = error_line(again, "train")
    assert "last.ckpt" in line
    assert "layer_decay" in line
