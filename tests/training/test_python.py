"""Training from Python: the same run as by command."""

import json
import logging
from pathlib import Path

import pytest
import torch
from small_models import small_model

import mvit_video as mv
from mvit_video.training.resume import FINGERPRINT_KEY

QUIET = {"accelerator": "cpu", "log_every_n_steps": 1}


def tiny(num_classes: int = 2) -> mv.MViT:
    return small_model(num_classes=num_classes, crop_size=32)


def test_a_folder_is_trained_on_and_its_best_weights_predict(
    two_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a script
    splits = mv.folder_splits(two_classes)
    model, modes = tiny().eval(), set()
    model.register_forward_pre_hook(lambda module, _: modes.add((module.training, torch.is_grad_enabled())))
    settings = {"batch_size": 2, "num_workers": 0, "trainer": QUIET}
    best = mv.train(model, splits, tmp_path / "run", max_epochs=1, **settings)
    out, err = capfd.readouterr()
    assert (out.count("\nepoch 1/1: train/loss "), err) == (1, "")
    assert model.class_names == splits.class_names
    assert modes == {(True, True), (False, False)}  # with dropout in training, without in validation
    assert not model.training
    (answer,) = mv.predict([splits.val.videos[0].path], mv.load_model(best))
    assert set(answer.classes) == set(splits.class_names)
    assert (tmp_path / "run" / "learning_curve.png").stat().st_size > 5000

    metrics = mv.evaluate(model, splits.val, tmp_path / "eval", num_clips=2, num_workers=0)
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["video_top1"] == metrics.accuracy["video_top1"]
    assert results["views_per_video"] == 2
    assert (tmp_path / "eval" / "report.html").is_file()
    assert model.protocol.num_clips != 2

    mv.train(tiny(), splits, tmp_path / "run", max_epochs=2, resume=True, **settings)
    capfd.readouterr()
    monkeypatch.setattr(logging.getLogger("mvit_video"), "level", logging.WARNING)
    twice = mv.train(tiny(), splits, tmp_path / "other", max_epochs=2, **settings)
    assert capfd.readouterr() == ("", "")
    on, whole = (torch.load(file.with_name("last.ckpt"), weights_only=True) for file in (best, twice))
    assert on["epoch"] == whole["epoch"] == 1
    assert on[FINGERPRINT_KEY]["data"] == whole[FINGERPRINT_KEY]["data"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"monitor": "val/topp1"}, "val/topp1"),
        ({"trainer": {"precision": "fp8"}}, "fp8"),
        ({"num_classes": 3}, "3"),
    ],
)
def test_what_can_not_work_is_named(two_classes: Path, tmp_path: Path, changes: dict, named: str) -> None:
    model = tiny(changes.pop("num_classes", 2))
    with pytest.raises(mv.MVitVideoError, match=named):
        mv.train(
            model, mv.folder_splits(two_classes), tmp_path, num_workers=0, **{"trainer": QUIET, **changes}
        )
