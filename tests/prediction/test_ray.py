"""Predictions by Ray on this machine are those of the plain command."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from conftest import Command
from test_writer import rows_in

import mvit_video as mv
from mvit_video.prediction.prediction import Prediction
from mvit_video.prediction.ray import predict_with_ray


@pytest.fixture(autouse=True)
def found_by_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


@pytest.mark.slow
def test_ray_gives_what_the_plain_command_gives(predict: Command, two_classes: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_text("no video")
    arguments = ["broken.mp4", two_classes, "num_workers=1", "per_clip=true", "resume=false"]
    for options in ([], ["window=0.5", "save=[srt]"]):
        for engine in ("local", "ray"):
            extra = [f"engine={engine}", f"output={engine}.parquet", f"save_dir={engine}"]
            result = predict(*arguments, *options, *extra)
            assert result.code == 0, result.err
        plain, by_ray = rows_in(tmp_path / "local.parquet"), rows_in(tmp_path / "ray.parquet")
        assert len(plain) == len(by_ray)
        for one, other in zip(plain, by_ray, strict=True):
            assert other == one | {"score": pytest.approx(one["score"], abs=1e-5)}
    subtitles = [
        sorted((p.relative_to(tmp_path / e), p.read_text()) for p in (tmp_path / e).rglob("*.srt"))
        for e in ("local", "ray")
    ]
    assert subtitles[0] == subtitles[1]
    assert len(subtitles[0]) == 12


class DiesOnce:
    """Predicts, but ends its process on the third file, unless that has happened before."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __call__(self) -> object:
        return self.predict

    def predict(self, files: list[str]) -> list[Prediction]:
        found = []
        for file in files:
            if file == "2.mp4" and not self.mark.exists():
                self.mark.touch()
                os._exit(1)
            found.append(Prediction(file, ("a",), (1.0,)))
        return found


@pytest.mark.slow
def test_what_a_dead_actor_had_is_done_again(tmp_path: Path) -> None:
    files = [f"{number}.mp4" for number in range(100)]
    found = list(predict_with_ray(files, DiesOnce(tmp_path / "died"), actors=1, cpus=1, gpus=0))
    assert (tmp_path / "died").exists()
    assert [prediction.path for prediction in found] == files


def test_what_ray_can_not_do_is_said(predict: Command, two_classes: Path) -> None:
    for options, reason in ((["engine=spark"], "engine"), (["engine=ray", "actors=0"], "actors")):
        result = predict(two_classes, *options)
        assert result.code == 1
        assert reason in result.err


@pytest.mark.slow
def test_a_cluster_that_is_too_small_is_said() -> None:
    with pytest.raises(mv.ConfigError, match="1000 CPUs"):
        list(predict_with_ray(["a.mp4"], DiesOnce(Path("no")), actors=1, cpus=1000, gpus=0))
