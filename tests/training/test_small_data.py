"""Few videos: splits by group, rare classes, several classes a video, by the commands."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, error_line
from torchmetrics.functional.classification import multilabel_average_precision
from videos import write_numbered_video

import mvit_video as mv
from mvit_video.data.index import LabelledVideo, VideoIndex, draw_split
from mvit_video.data.samplers import EpochBatches, inverse_frequencies

BASE = ("experiment=motion", "batch_size=4", "num_workers=0", "trainer.max_epochs=1", "hydra.run.dir=run")


def index_of(*names: str) -> VideoIndex:
    """Videos by ids such as "walk/person1/a.mp4", whose classes are the first folders."""
    classes = sorted({name.split("/")[0] for name in names})
    videos = (LabelledVideo(f"/v/{name}", classes.index(name.split("/")[0]), name) for name in names)
    return VideoIndex(tuple(videos), tuple(classes))


RECORDINGS = index_of(
    *(f"{name}/p{person}/{take}.mp4" for name in ("run", "walk") for person in range(10) for take in range(3))
)


@pytest.mark.parametrize("group", ["folder", r"/(p\d+)/", r"p\d+"])
@pytest.mark.parametrize("seed", range(3))
def test_groups_stay_together_and_classes_keep_their_shares(group: str, seed: int) -> None:
    splits = draw_split(RECORDINGS, 0.2, seed, group=group, class_folders=True)
    train, val = ({video.id.split("/")[1] for video in part.videos} for part in (splits.train, splits.val))
    assert not train & val
    assert Counter(video.label for video in splits.val.videos) == {0: 6, 1: 6}
    assert len(splits.train) == 48
    assert splits == draw_split(RECORDINGS, 0.2, seed, group=group, class_folders=True)


def test_a_class_of_large_recordings_gives_its_smallest() -> None:
    index = index_of(*(f"a/long/{i}.mp4" for i in range(9)), "a/brief/0.mp4", "a/brief/1.mp4",
                     *(f"a/longer/{i}.mp4" for i in range(12)), "b/only/0.mp4", "b/only/1.mp4",
                     *(f"c/{i}.mp4" for i in range(5)))  # fmt: skip
    val = draw_split(index, 0.1, 0, group="folder", class_folders=True).val
    found = Counter(video.id.rpartition("/")[0] for video in val.videos)
    assert found == {"a/brief": 2, "c": 1}  # b keeps its only recording


@pytest.mark.parametrize(
    ("group", "told"),
    [
        ("folder", "data.group='"),
        (r"(g\d+)", "finds nothing in"),
        ("(", "regular expression"),
        ("mp4", "one group"),
    ],
)
def test_groups_that_are_not_there(command: Command, two_classes: Path, group: str, told: str) -> None:
    data = [f"data.root={two_classes}", f"data.group={group}"]
    if group == "mp4":
        data = [f"data.root={two_classes}", "data.group=s"]
    assert told in error_line(command("train", *BASE, *data), "train")


@pytest.fixture
def recordings(two_classes: Path, tmp_path: Path) -> Path:
    """Cats of four recordings, and two dogs: a class is rare."""
    root = tmp_path / "recordings"
    for name, count in (("cats", 6), ("dogs and birds", 2)):
        for number, file in enumerate(sorted((two_classes / name).iterdir())[:count]):
            (root / name / f"rec{number // 2 if name == 'cats' else number}").mkdir(
                parents=True, exist_ok=True
            )
            folder = f"rec{number // 2 if name == 'cats' else number}"
            shutil.copy(file, root / name / folder / f"clip_{number}{file.suffix}")
    return root


@pytest.mark.parametrize(("group", "balance"), [("folder", "loss"), (r"(rec\d+)/", "sampler")])
def test_rare_classes_and_recordings_by_the_command(
    command: Command, recordings: Path, group: str, balance: str, tmp_path: Path
) -> None:
    data = [f"data.root={recordings}", f"data.group={group}", f"data.balance={balance}"]
    result = command("train", *BASE, *data, "monitor=val/balanced_accuracy")
    assert result.code == 0, result.err
    assert "3 groups, 1 of them for validation" in result.out
    state = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    assert state["run_fingerprint"]["data"]["balance"] == balance
    kept = next(value for key, value in state["callbacks"].items() if "ModelCheckpoint" in key)
    assert kept["monitor"] == "val/balanced_accuracy"
    assert "experiment=finetune" not in result.out + result.err  # the model is small
    if balance == "loss":
        other = command("train", *BASE, *data[:2], "ckpt_path=last", "trainer.max_epochs=2")
        assert "balance" in error_line(other, "train")


def test_draws_depend_on_seed_and_epoch_alone() -> None:
    labels = [0] * 90 + [1] * 10
    weights = [inverse_frequencies(labels, 3)[label] for label in labels]
    assert inverse_frequencies(labels, 3) == pytest.approx([100 / 180, 5, 1])

    def epoch(number: int, ranks: int) -> list[Any]:
        parts = []
        for rank in range(ranks):
            batches = EpochBatches(100, 4 // ranks, seed=1, rank=rank, num_replicas=ranks, weights=weights)
            batches.set_epoch(number)
            parts.append(list(batches))
        return [sorted(key for part in step for key in part) for step in zip(*parts, strict=True)]

    assert epoch(3, 1) == epoch(3, 2)
    assert epoch(3, 1) != epoch(4, 1)
    keys = [key for number in range(5) for step in epoch(number, 1) for key in step]
    assert len(set(keys)) == len(keys) == 500  # whoever comes again gives another clip
    assert 200 < sum(labels[key[1]] for key in keys) < 300


def test_large_models_from_scratch_on_few_videos_warn(
    command: Command, two_classes: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvit_video.cli.tasks.classification.MANY_PARAMETERS", 1e5)
    options = [*BASE, f"data.root={two_classes}", "trainer.fast_dev_run=true"]
    for weights, warns in (([], True), ([f"weights={checkpoint}"], False)):
        result = command("train", *options, *weights)
        assert result.code == 0, result.err
        told = " ".join((result.out + result.err).split())
        assert ("experiment=finetune weights=FILE" in told) == warns


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Eight videos of none to three classes, in a csv file and the same in json."""
    labels = ["sit;eat", "sit", "eat; stand", "", "sit;eat;stand", "stand", "eat", "sit"]
    for number in range(len(labels)):
        write_numbered_video(tmp_path / f"{number}.mp4", 12 + number, height=48, width=64, fps=12)
    lines = [f"{number}.mp4,{label}" for number, label in enumerate(labels)]
    (tmp_path / "all.csv").write_text("\n".join(["video,actions", *lines]))
    entries = [
        {"path": f"{number}.mp4", "label": [part.strip() for part in label.split(";") if part]}
        for number, label in enumerate(labels)
    ]
    (tmp_path / "all.json").write_text(json.dumps(entries))
    return tmp_path


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_several_classes_a_video(command: Command, several: Path, kind: str) -> None:
    lists = [f"data={kind}", f"data.train=all.{kind}", f"data.val=all.{kind}", "data.multi_label=true"]
    result = command("train", "experiment=motion", *lists, *BASE[1:], "mixing=mixup_cutmix")
    assert result.code == 0, result.err
    weights = several / "run" / "checkpoints" / "best.ckpt"
    best = torch.load(weights, weights_only=True)
    history = next(value for key, value in best["callbacks"].items() if key == "History")["epochs"]
    model = mv.load_model(weights)
    assert model.multi_label
    assert model.class_names == ("eat", "sit", "stand")

    evaluated = command(
        "eval", *lists, f"weights={weights}", "num_workers=0", "views=1x1", "hydra.run.dir=eval"
    )
    assert evaluated.code == 0, evaluated.err
    results = json.loads((several / "eval" / "results.json").read_text())
    assert results["map"] == pytest.approx(history[-1]["val/map"], abs=1e-5)
    assert {name: row["videos"] for name, row in results["per_class"].items()} == {
        "eat": 4,
        "sit": 4,
        "stand": 3,
    }
    splits = mv.csv_splits("all.csv", "all.csv", multi_label=True)
    metrics = mv.evaluate(model, splits.val, "from_python", num_clips=1, num_workers=0)
    assert metrics.accuracy["map"] == pytest.approx(results["map"], abs=1e-5)
    for folder in ("eval", "from_python"):
        assert f">{100 * results['map']:.2f} %<" in (several / folder / "report.html").read_text()
        assert (several / folder / "per_class.csv").read_text().count("\n") == 4
    again = command("eval", "scores=eval/scores.parquet", "hydra.run.dir=again", "combine=max")
    assert again.code == 0, again.err
    assert json.loads((several / "again" / "results.json").read_text())["map"] == results["map"]

    scores = mv.Recognizer(model, topk=3, num_clips=1)([several / f"{number}.mp4" for number in range(8)])
    table = torch.tensor(
        [[dict(zip(p.classes, p.scores, strict=True))[n] for n in model.class_names] for p in scores]
    )
    targets = torch.tensor(
        [[1, 1, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 0, 1], [1, 0, 0], [0, 1, 0]]
    )
    found = multilabel_average_precision(table, targets, 3)
    assert results["map"] == pytest.approx(float(found), abs=1e-5)


def test_a_threshold_of_several_classes(command: Command, several: Path) -> None:
    torch.manual_seed(0)
    model = mv.create_model("mvitv2_nano_8x4", num_classes=3)
    model.class_names, model.multi_label = ("eat", "sit", "stand"), True
    torch.nn.init.zeros_(model.head.projection.weight)
    model.head.projection.bias.data = torch.tensor([2.0, 0.0, -2.0])  # 0.88, 0.5, 0.12 for every clip
    from mvit_video.weights import save_weights

    save_weights(model, "three.safetensors")
    for least, classes in ((0.0, ["eat", "sit", "stand"]), (0.4, ["eat", "sit"]), (0.9, [""])):
        file = several / f"{least}.csv"
        result = command(
            "predict", "0.mp4", "weights=three.safetensors", f"min_score={least}", f"output={file}"
        )
        assert result.code == 0, result.err
        with file.open() as lines:
            assert [row["class"] for row in csv.DictReader(lines)] == classes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["data.multi_label=true", "data.balance=loss"], "data.balance"),
        (["data.multi_label=true", "data.val=all.csv", "data.group=folder"], "data.group"),
        (["data.multi_label=true", "data.class_names=[sit,eat]"], "stand"),
    ],
)
def test_what_does_not_go_with_several_classes(
    command: Command, several: Path, arguments: list[str], told: str
) -> None:
    result = command("train", "experiment=motion", "data=csv", "data.train=all.csv", *BASE[1:], *arguments)
    assert told in error_line(result, "train")


def test_one_kind_of_model_for_one_kind_of_data(command: Command, several: Path, checkpoint: Path) -> None:
    lists = ["data=csv", "data.train=all.csv", "data.val=all.csv", "data.multi_label=true"]
    classes = ["class_map=names", "num_workers=0"]
    assert command("eval", *lists, f"weights={checkpoint}", *classes).code == 1
    index = command("data", "prepare", *lists)
    assert "multi_label" in error_line(index, "data")
