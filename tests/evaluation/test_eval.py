"""Evaluation by the command: each video once, all views averaged, the same however it is batched."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Command, error_line

import mvit_video as mv
import mvit_video.evaluation.run as run_module
from mvit_video.cli.app import override_protocol
from mvit_video.cli.conf import CONF_DIR
from mvit_video.data.index import LabelledVideo
from mvit_video.errors import DataError
from mvit_video.evaluation.run import score_videos
from mvit_video.evaluation.score_files import read_scores
from mvit_video.evaluation.scores import ScoreTable
from mvit_video.io.writing import sole_writer
from mvit_video.weights.checkpoint import METADATA_KEY, model_metadata


@pytest.fixture
def drawn() -> None:
    """For tests that look at the report."""


@pytest.fixture(autouse=True)
def without_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all else in these runs."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("mvit_video.evaluation.results.write_report", lambda *_, **__: None)


def test_scores_do_not_depend_on_the_batch(
    command: Command, two_classes: Path, checkpoint: Path, tmp_path: Path
) -> None:
    arguments = [f"data.root={two_classes}", f"weights={checkpoint}", "split=train", "views=5x3"]
    arguments.append("views.num_clips=2")
    for name, more in (("a", ["batch_size=1", "num_workers=0"]), ("b", ["batch_size=7", "num_workers=2"])):
        assert command("eval", *arguments, *more, f"hydra.run.dir={name}").code == 0
    a, b = (pq.read_table(tmp_path / name / "scores.parquet") for name in "ab")
    assert len(a) == 10 * 6
    for column in ("id", "view", "label", "start", "end"):
        assert a[column].equals(b[column])
    np.testing.assert_allclose(a["scores"].to_pylist(), b["scores"].to_pylist(), atol=1e-5)


def test_views_can_be_chosen(command: Command, two_classes: Path, checkpoint: Path, tmp_path: Path) -> None:
    arguments = [f"data.root={two_classes}", f"weights={checkpoint}", "num_workers=0", "hydra.run.dir=run"]
    for views, count in ((["views=1x1"], 1), (["views=1x3_segment"], 3), (["views.num_clips=2"], 2)):
        assert command("eval", *arguments, *views).code == 0
        assert len(pq.read_table(tmp_path / "run" / "scores.parquet")) == 2 * count


@pytest.mark.parametrize(("batch_size", "sizes"), [(7, [7, 7, 6]), (5, [5] * 4), (64, [20]), (1, [1] * 20)])
def test_views_of_several_videos_fill_the_batch(
    two_classes: Path, checkpoint: Path, tmp_path: Path, batch_size: int, sizes: list[int]
) -> None:
    model = mv.load_model(checkpoint)
    found: list[int] = []
    model.register_forward_pre_hook(lambda _, arguments: found.append(len(arguments[0])))
    paths = [two_classes / "cats" / f"{number}.mp4" for number in range(4)]
    paths = [tmp_path / "gone.mp4", *paths[:2], tmp_path / "gone too.mp4", *paths[2:], tmp_path / "last.mp4"]
    videos = [LabelledVideo(str(path), 0, path.stem) for path in paths]
    scores = list(score_videos(model, videos, batch_size=batch_size))
    assert found == sizes
    assert [views.video for views, _ in scores] == videos
    assert [len(rows) for _, rows in scores] == [0, 5, 5, 0, 5, 5, 0]
    assert [views.error is not None for views, _ in scores] == [True, False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        ("5x1", {"num_clips": 5, "num_crops": 1, "short_side": 256}),
        ("1x1", {"num_clips": 1, "num_crops": 1, "short_side": 256}),
        ("10x3", {"num_clips": 10, "num_crops": 3, "short_side": 224}),  # PySlowFast's for three crops
        ("7x3", {"num_clips": 7, "num_crops": 3, "short_side": 224}),
        ("1x3_segment", {"num_clips": 1, "num_crops": 3, "short_side": 224, "sampling": "segment"}),
        ("1x1_segment", {"num_clips": 1, "num_crops": 1, "short_side": 256, "sampling": "segment"}),
        ("torchvision", {"num_clips": 5, "short_side": 256, "pixels": "torchvision"}),
    ],
)
def test_protocols_by_name(views: str, expected: dict[str, object]) -> None:
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = hydra.compose("eval", [f"views={views}"])
    protocol = override_protocol(mv.Protocol(), config.views)
    assert {name: getattr(protocol, name) for name in expected} == expected
    config.views.short_side = 300
    assert override_protocol(mv.Protocol(), config.views).short_side == 300


def test_scoring_equals_the_model_on_hand_cut_clips(two_classes: Path, checkpoint: Path) -> None:
    model = mv.load_model(checkpoint)
    path = two_classes / "cats" / "5.mp4"
    (prediction,) = mv.predict(path, model, num_clips=3)
    with mv.open_video(path) as video:
        plan = mv.kinetics_frame_indices(video.num_frames, video.fps, clip_frames=8, stride=4, num_clips=3)
        frames = [video.get_frames(clip).float() / 255 for clip in plan]
        (view,) = mv.spatial_views(video.height, video.width, short_side=64, crop=64)
    clips = torch.stack(frames).transpose(1, 2).sub(0.45).div(0.225).flatten(0, 1)  # (V * C, T, H, W)
    clips = torch.nn.functional.interpolate(
        clips, size=(view.resized_height, view.resized_width), mode="bilinear"
    ).unflatten(0, (3, 3))
    clips = clips[..., view.top : view.top + 64, view.left : view.left + 64]
    with torch.no_grad():
        expected = model(clips).softmax(-1)
    names = {"cats": 0, "dogs and birds": 1}
    for clip, scores in zip(prediction.clips, expected, strict=True):
        for name, score in zip(clip.classes, clip.scores, strict=True):
            assert score == pytest.approx(scores[names[name]].item(), abs=1e-5)
    best = expected.mean(0).argmax().item()
    assert names[prediction.classes[0]] == best


@pytest.mark.usefixtures("drawn")
def test_results_say_how_they_came_about(
    command: Command, two_classes: Path, checkpoint: Path, tmp_path: Path
) -> None:
    command("eval", f"data.root={two_classes}", f"weights={checkpoint}", "split=train", "hydra.run.dir=run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["weights_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    protocol = mv.load_model(checkpoint).protocol
    assert results["protocol"] == str(protocol)
    assert results["views"] == json.loads(json.dumps(asdict(protocol)))
    assert results["versions"]["torch"] == torch.__version__
    assert (results["videos"], results["views_per_video"], results["missing_videos"]) == (10, 5, 0)
    low, high = results["video_top1_interval"]
    assert low <= results["video_top1"] <= high
    assert {name: row["videos"] for name, row in results["per_class"].items()} == {
        "cats": 5,
        "dogs and birds": 5,
    }
    assert results["mean_class_accuracy"] == pytest.approx(results["video_top1"])
    assert len(results["top1_by_views"]) == 5
    assert results["command"].startswith(
        f"mvit-eval data.root={two_classes} weights={checkpoint} split=train"
    )
    assert results["data_path"] == str(two_classes)
    videos = pq.read_table(tmp_path / "run" / "videos.parquet")
    assert sum(videos["correct"].to_pylist()) == results["video_top1"] * 10
    table = read_scores(tmp_path / "run" / "scores.parquet")
    np.testing.assert_allclose(videos["scores"].to_pylist(), table.views.mean(1), atol=1e-6)
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert not (tmp_path / "run" / "unfinished").exists()


# Killed and taken up again


class Stops:
    """Scores of the first videos, then the end of the world; counts what it is asked for."""

    def __init__(self, after: int | None) -> None:
        self.after = after
        self.asked: list[str] = []
        self.given = 0

    def __call__(self, model, videos, **settings) -> Iterator[Any]:
        self.asked += [video.id for video in videos]
        for number, scores in enumerate(score_videos(model, videos, **settings)):
            if number == self.after:
                raise DataError("power cut")
            self.given += 1
            yield scores


@pytest.fixture
def arguments(two_classes: Path, checkpoint: Path) -> list[str]:
    return [
        f"data.root={two_classes}",
        f"weights={checkpoint}",
        "split=train",
        "num_workers=0",
        "batch_size=7",
    ]


@pytest.fixture
def killed(command: Command, arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of an evaluation that has scored 4 of 10 videos."""
    monkeypatch.setattr(run_module, "score_videos", Stops(after=4))
    folder = tmp_path / "runs" / "day" / "time"
    assert "power cut" in command("eval", *arguments, f"hydra.run.dir={folder}").err
    return folder


@pytest.mark.parametrize("how", ["same folder", "named", "last"])
def test_a_killed_evaluation_goes_on(
    command: Command,
    arguments: list[str],
    checkpoint: Path,
    killed: Path,
    monkeypatch,
    tmp_path: Path,
    how: str,
) -> None:
    again = Stops(after=None)
    monkeypatch.setattr(run_module, "score_videos", again)
    more = {
        "same folder": [f"hydra.run.dir={killed}"],
        "named": [f"resume={killed}", "hydra.run.dir=other"],
        "last": ["resume=last", f"hydra.run.dir={killed.parent}/later", "decoder.max_pixels=9999999"],
    }
    result = command("eval", *arguments, *more[how], "max_bad_videos=0")
    assert result.code == 0, result.err
    assert len(again.asked) == 6
    table = read_scores(killed / "scores.parquet")
    assert len({video.id for video in table.videos}) == 10
    whole = torch.stack([scores for _, scores in score_videos(mv.load_model(checkpoint), table.videos)])
    torch.testing.assert_close(table.views, whole, atol=1e-5, rtol=0)
    predicted = pq.read_table(killed / "videos.parquet")["predicted"].to_pylist()
    assert predicted == whole.mean(1).argmax(1).tolist()


def other_weights(arguments: list[str], tmp_path: Path) -> str:
    content = torch.load(arguments[1].removeprefix("weights="), weights_only=True)
    content["state_dict"]["model.head.projection.bias"] += 1e-3
    torch.save(content, tmp_path / "other.ckpt")
    return f"weights={tmp_path}/other.ckpt"


def test_an_evaluation_of_other_work_is_not_resumed(
    command: Command, arguments: list[str], killed: Path, tmp_path: Path
) -> None:
    shutil.copytree(arguments[0].removeprefix("data.root="), tmp_path / "second")
    left = {file: file.read_bytes() for file in (killed / "unfinished").iterdir()}
    for change, named in (
        ("views=1x1", "protocol: num_clips 5 -> 1"),
        (other_weights(arguments, tmp_path), "weights: sha256"),
        ("precision=bf16", "precision float32 -> bfloat16"),
        ("decoder.frame_rate=25", "decoder: frame_rate 30 -> 25"),
        ("data.root=second", "data: root"),
        ("split=val", "split train -> val"),
        ("data.val_fraction=0.5", "data: val_fraction 0.2 -> 0.5"),
        ("class_map=names", "class_map null ->"),
    ):
        line = error_line(command("eval", *arguments, f"hydra.run.dir={killed}", change), "eval")
        assert named in line
        assert "choose another hydra.run.dir" in line
    assert {file: file.read_bytes() for file in (killed / "unfinished").iterdir()} == left


def test_scores_of_an_older_version_are_left_alone(
    command: Command, arguments: list[str], tmp_path: Path
) -> None:
    """They are logs in Arrow's format, which no run makes any more."""
    old = tmp_path / "runs" / "day" / "time" / "unfinished" / "000000-0000.arrows"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"scores")
    for choice in (
        ["resume=last", f"hydra.run.dir={old.parents[2]}/later"],
        [f"hydra.run.dir={old.parents[1]}"],
    ):
        line = error_line(command("eval", *arguments, *choice), "eval")
        assert "older version" in line
        assert "hydra.run.dir" in line
    assert [file.read_bytes() for file in old.parent.iterdir()] == [b"scores"]


@pytest.mark.parametrize("what", ["content", "folder"])
def test_videos_that_were_replaced_are_scored_again(
    command: Command,
    arguments: list[str],
    two_classes: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch,
    what: str,
) -> None:
    """Also where the same words mean another folder, such as a relative path or a link."""
    shutil.copytree(two_classes, tmp_path / "first")
    (tmp_path / "data").symlink_to(tmp_path / "first")
    monkeypatch.setattr(run_module, "score_videos", Stops(after=4))
    run = ["eval", *arguments, "data.root=data", "hydra.run.dir=run"]
    assert "power cut" in command(*run).err
    again = Stops(after=None)
    monkeypatch.setattr(run_module, "score_videos", again)
    if what == "content":
        shutil.copy(tmp_path / "first" / "cats" / "5.mp4", tmp_path / "first" / "cats" / "0.mp4")
    else:
        (tmp_path / "second").mkdir()
        for name in ("cats", "dogs and birds"):  # the names of the first in another order
            (tmp_path / "second" / name).mkdir()
            for number in range(6):
                (file,) = (two_classes / name).glob(f"{5 - number}.*")
                shutil.copy(file, tmp_path / "second" / name / f"{number}{file.suffix}")
        (tmp_path / "data").unlink()
        (tmp_path / "data").symlink_to(tmp_path / "second")
    result = command(*run)
    assert result.code == 0, result.err
    assert len(again.asked) == (7 if what == "content" else 10)
    table = read_scores(tmp_path / "run" / "scores.parquet")
    whole = [scores for _, scores in score_videos(mv.load_model(checkpoint), table.videos)]
    torch.testing.assert_close(table.views, torch.stack(whole), atol=1e-5, rtol=0)


def test_other_names_of_the_models_classes_are_other_work(
    command: Command, two_classes: Path, three_class_weights: Path, tmp_path: Path, monkeypatch
) -> None:
    bare = torch.load(three_class_weights, weights_only=True)["state_dict"]
    torch.save({name.removeprefix("model."): value for name, value in bare.items()}, tmp_path / "bare.pth")
    run = ["eval", f"data.root={two_classes}", "weights=bare.pth", "class_map=names", "hydra.run.dir=run"]
    run += ["model=mvitv2_nano_8x4", "num_workers=0", "split=train"]
    monkeypatch.setattr(run_module, "score_videos", Stops(after=4))
    assert "power cut" in command(*run, "class_names=[fish,dogs and birds,cats]").err
    line = error_line(command(*run, "class_names=[cats,dogs and birds,fish]"), "eval")
    assert "model_classes" in line


def test_a_folder_without_an_unfinished_evaluation_is_not_resumed(
    command: Command, arguments: list[str], tmp_path: Path
) -> None:
    assert "resume=nowhere" in error_line(command("eval", *arguments, "resume=nowhere"), "eval")
    assert "resume=last" in error_line(command("eval", *arguments, "resume=last"), "eval")


def test_what_others_put_beside_the_logs_stays(
    command: Command, arguments: list[str], killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "score_videos", score_videos)
    (killed / "unfinished" / "notes.txt").write_text("mine")
    for name in ("results.json", "scores.parquet"):
        (killed / name).write_text("another's")
    assert command("eval", *arguments, f"hydra.run.dir={killed}").code == 0
    assert [file.read_text() for file in killed.glob("*.former")] == ["another's"] * 2
    assert [file.name for file in (killed / "unfinished").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("more", [[], ["scores=a.parquet"]], ids=["videos", "scores"])
def test_two_evaluations_do_not_write_to_one_folder(
    command: Command, arguments: list[str], tmp_path: Path, more: list[str]
) -> None:
    with sole_writer(tmp_path / "run"):
        line = error_line(command("eval", *arguments, "hydra.run.dir=run", *more), "eval")
    assert "another run is writing there" in line
    assert not (tmp_path / "run" / "unfinished").exists()


def test_processes_that_cannot_meet_say_so(
    command: Command, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    line = error_line(command("eval", *arguments, "hydra.run.dir=run"), "eval")
    assert "rank 0 of 2" in line
    assert "MASTER_PORT" in line


# Not a number


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_ends_an_evaluation_with_the_first_batch(
    command: Command, arguments: list[str], tmp_path: Path, monkeypatch, value: float
) -> None:
    content = torch.load(arguments[1].removeprefix("weights="), weights_only=True)
    content["state_dict"]["model.head.projection.bias"][0] = value
    torch.save(content, tmp_path / "nan.ckpt")
    asked = Stops(after=None)
    monkeypatch.setattr(run_module, "score_videos", asked)
    line = error_line(command("eval", *arguments, f"weights={tmp_path}/nan.ckpt", "batch_size=5"), "eval")
    assert "0.mp4: the model gives NaN or infinite scores" in line or "nan.ckpt" in line
    assert asked.given == 0


def test_too_many_bad_videos_end_an_evaluation_at_once(
    command: Command, arguments: list[str], two_classes: Path, tmp_path: Path, monkeypatch
) -> None:
    shutil.copytree(two_classes, tmp_path / "data")
    for number in (0, 1):
        (tmp_path / "data" / "cats" / f"{number}.mp4").write_bytes(b"no video")
    asked = Stops(after=None)
    monkeypatch.setattr(run_module, "score_videos", asked)
    run = ["eval", *arguments, "data.root=data", "split=train", "data.val_fraction=0.01", "hydra.run.dir=run"]
    line = error_line(command(*run, "max_bad_videos=1"), "eval")
    assert "max_bad_videos" in line
    assert asked.given <= 3


# Other classes


@pytest.fixture
def three_class_weights(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    model = mv.create_model("mvitv2_nano_8x4", num_classes=3)
    model.class_names = ("fish", "dogs and birds", "cats")
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": weights, METADATA_KEY: model_metadata(model)}, tmp_path / "three.ckpt")
    return tmp_path / "three.ckpt"


def test_a_model_of_more_classes_is_evaluated_on_some(
    command: Command, two_classes: Path, three_class_weights: Path, tmp_path: Path
) -> None:
    (tmp_path / "map.yaml").write_text("cats: [cats, fish]", encoding="utf-8")
    arguments = [f"data.root={two_classes}", f"weights={three_class_weights}", "num_workers=0"]
    result = command("eval", *arguments)
    assert result.code == 1
    assert "class_map=names" in result.err
    scores = []
    for choice in ("names", "map.yaml"):
        result = command("eval", *arguments, f"class_map={choice}", "hydra.run.dir=run")
        assert result.code == 0, result.err
        scores.append(read_scores(tmp_path / "run" / "scores.parquet"))
    model = mv.load_model(three_class_weights)
    (prediction,) = mv.predict(scores[0].videos[0].path, model)
    for clip, by_name, by_map in zip(prediction.clips, scores[0].views[0], scores[1].views[0], strict=True):
        of = dict(zip(clip.classes, clip.scores, strict=True))
        two = torch.tensor([of["cats"], of["dogs and birds"]])
        torch.testing.assert_close(by_name, two / two.sum())
        torch.testing.assert_close(by_map, torch.tensor([of["cats"] + of["fish"], of["dogs and birds"]]))


def test_names_of_the_weights_classes_can_be_given(
    command: Command, two_classes: Path, three_class_weights: Path, tmp_path: Path
) -> None:
    bare = torch.load(three_class_weights, weights_only=True)["state_dict"]
    torch.save({name.removeprefix("model."): value for name, value in bare.items()}, tmp_path / "bare.pth")
    arguments = [f"data.root={two_classes}", "weights=bare.pth", "class_map=names", "hydra.run.dir=run"]
    arguments += ["model=mvitv2_nano_8x4", "num_workers=0"]
    assert "its head has 3 classes, the model has 2" in command("eval", *arguments).err
    (tmp_path / "names.txt").write_text("fish\ndogs and birds\ncats\n")
    result = command("eval", *arguments, "class_names=names.txt")
    assert result.code == 0, result.err
    by_file = read_scores(tmp_path / "run" / "scores.parquet")
    command("eval", *arguments[:1], *arguments[2:4], f"weights={three_class_weights}", "num_workers=0")
    torch.testing.assert_close(by_file.views, read_scores(tmp_path / "run" / "scores.parquet").views)


# From scores


@pytest.fixture
def scored(command: Command, arguments: list[str], two_classes: Path, tmp_path: Path) -> Path:
    """The folder of an evaluation whose videos are gone."""
    shutil.copytree(two_classes, tmp_path / "data")
    result = command("eval", *arguments, "data.root=data", "hydra.run.dir=run")
    assert result.code == 0, result.err
    shutil.move(tmp_path / "data", tmp_path / "moved")
    return tmp_path / "run"


@pytest.mark.usefixtures("drawn")
def test_scores_give_the_same_report_without_videos(command: Command, scored: Path, tmp_path: Path) -> None:
    result = command("eval", f"scores={scored}/scores.parquet", "hydra.run.dir=again")
    assert result.code == 0, result.err
    first, again = (json.loads((f / "results.json").read_text()) for f in (scored, tmp_path / "again"))
    assert again == first
    assert (tmp_path / "again" / "report.html").exists()
    for how in ("max", "logits"):
        assert (
            command("eval", f"scores={scored}/scores.parquet", f"combine={how}", "hydra.run.dir=again").code
            == 0
        )
    assert json.loads((tmp_path / "again" / "results.json.former").read_text()) == first
    assert (
        "combine is 'min', expected mean or max or logits"
        in command("eval", f"scores={scored}/scores.parquet", "combine=min").err
    )


def test_labels_and_scores_must_be_of_the_same_videos(command: Command, scored: Path, tmp_path: Path) -> None:
    arguments = [f"scores={scored}/scores.parquet", "data.root=moved", "split=train"]
    assert command("eval", *arguments).code == 0
    renamed = command("eval", *arguments, "class_names=[dogs and birds,cats]").err
    assert "class_map=names" in renamed
    shutil.copy(tmp_path / "moved" / "cats" / "0.mp4", tmp_path / "moved" / "cats" / "9.mp4")
    assert "cats/3.mp4: in the data set but not scored" in command("eval", *arguments).err
    (tmp_path / "moved" / "cats" / "9.mp4").unlink()
    line = command("eval", *arguments, "data.val_fraction=0.5").err  # three of each class, not five
    assert "and 1 more: scored but not in the data set" in line


def test_scores_are_compared_or_put_together(
    command: Command, arguments: list[str], scored: Path, two_classes: Path, tmp_path: Path
) -> None:
    other = command(
        "eval", *arguments, "views=1x3_segment", f"data.root={two_classes}", "hydra.run.dir=other"
    )
    assert other.code == 0
    both = f"scores=[{scored}/scores.parquet,{tmp_path}/other/scores.parquet]"
    result = command("eval", both, "hydra.run.dir=compared")
    assert result.code == 0, result.err
    assert "McNemar" in result.out
    compared = json.loads((tmp_path / "compared" / "results.json").read_text())
    (pair,) = compared["comparisons"]
    models = list(compared["models"].values())
    assert pair["difference"] == pytest.approx(models[1]["video_top1"] - models[0]["video_top1"])
    assert command("eval", both, "ensemble=true", "hydra.run.dir=together").code == 0
    a, b, together = (read_scores(tmp_path / f / "scores.parquet") for f in ("run", "other", "together"))
    torch.testing.assert_close(together.views.mean(1), (a.views.mean(1) + b.views.mean(1)) / 2)
    same = command("eval", f"scores=[{scored}/scores.parquet,{scored}/scores.parquet]")
    assert "names a file twice" in same.err


def labelled(table: ScoreTable) -> list[tuple[torch.Tensor, int | None]]:
    return [(views.mean(0), video.label) for views, video in zip(table.views, table.videos, strict=True)]


def test_scores_of_other_tools_are_reported(command: Command, scored: Path, tmp_path: Path) -> None:
    expected = json.loads((scored / "results.json").read_text())
    rows = labelled(read_scores(scored / "scores.parquet"))
    scores, labels = torch.stack([row for row, _ in rows]), torch.tensor([label for _, label in rows])
    (tmp_path / "slowfast.pkl").write_bytes(pickle.dumps([scores * 5, labels]))
    (tmp_path / "mmaction.json").write_text(json.dumps(scores.tolist()))
    result = command("eval", "scores=slowfast.pkl", "class_names=[cats,dogs and birds]", "hydra.run.dir=a")
    assert result.code == 0, result.err
    data = ["data.root=moved", "split=train", "hydra.run.dir=b"]
    result = command("eval", "scores=mmaction.json", *data)
    assert result.code == 0, result.err
    for folder in "ab":
        results = json.loads((tmp_path / folder / "results.json").read_text())
        for name in ("video_top1", "per_class", "videos"):
            assert results[name] == expected[name]
        assert results["calibration_error"] == pytest.approx(expected["calibration_error"], abs=1e-4)
    assert "0 has scores but no label; give data=" in command("eval", "scores=mmaction.json").err
    (tmp_path / "slowfast.pkl").write_bytes(pickle.dumps([scores, labels.flip(0)]))
    assert "row 0: label 1, but 0 in the data set" in command("eval", "scores=slowfast.pkl", *data).err
    (tmp_path / "slowfast.pkl").write_bytes(pickle.dumps([Path("x"), labels]))
    assert "asks for pathlib" in command("eval", "scores=slowfast.pkl").err
