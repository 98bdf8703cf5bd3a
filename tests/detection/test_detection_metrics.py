"""Average precision against torchmetrics, and schedules and parameters against the published recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from make_shapes import generate
from torchmetrics.detection import MeanAveragePrecision

from mvit_video.cli import app
from mvit_video.cli.help import CONF_DIR
from mvit_video.cli.schema import check
from mvit_video.detection.coco import AnnotatedImage, Annotation, CocoImages, coco_splits
from mvit_video.detection.masks import to_mask
from mvit_video.detection.metrics import ImageResult, measure, to_result
from mvit_video.detection.training import DetectorTraining

NAMES = {"AP": "map", "AP50": "map_50", "AP75": "map_75", "APS": "map_small", "APM": "map_medium"}


def guesses(coco: CocoImages, seed: int) -> list[dict[str, torch.Tensor]]:
    """Objects near the annotated ones, some of another class, and some of nothing."""
    rng = np.random.default_rng(seed)
    found = []
    for image in coco.images:
        boxes = np.array([a.box for a in image.annotations for _ in range(2)])
        boxes = boxes + rng.normal(0, 3, boxes.shape)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 2)
        labels = np.array([a.label for a in image.annotations for _ in range(2)])
        labels = np.where(rng.random(len(labels)) < 0.2, rng.integers(0, 4, len(labels)), labels)
        outlines = [[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes]
        found.append(
            {
                "boxes": torch.from_numpy(boxes.astype(np.float32)),
                "scores": torch.from_numpy(rng.random(len(boxes)).astype(np.float32)),
                "labels": torch.from_numpy(labels),
                "masks": masks_of(image, outlines),
            }
        )
    return found


def masks_of(image: AnnotatedImage, outlines: list[Any]) -> torch.Tensor:
    masks = [to_mask(outline, image.height, image.width) for outline in outlines]
    return torch.from_numpy(np.stack(masks))


def truth_of(image: AnnotatedImage) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor([a.box for a in image.annotations]),
        "labels": torch.tensor([a.label for a in image.annotations]),
        "masks": masks_of(image, [a.outline for a in image.annotations]),
    }


def results_of(coco: CocoImages, found: list[dict[str, torch.Tensor]]) -> list[ImageResult]:
    return [
        to_result(image.id, (image.height, image.width), objects, coco.category_ids)
        for image, objects in zip(coco.images, found, strict=True)
    ]


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> CocoImages:
    root = tmp_path_factory.mktemp("shapes")
    for split in ("train", "val"):
        generate(root, split, 8)
    images = list(coco_splits(str(root)).val.images)
    crowd = Annotation(1, (10.0, 10.0, 60.0, 60.0), None, True, 2500.0)
    first = images[0]
    images[0] = type(first)(first.id, first.path, first.height, first.width, (*first.annotations, crowd))
    return CocoImages(tuple(images), ("a", "b", "c", "d"), (5, 9, 3, 7))


def test_precision_is_that_of_torchmetrics(coco: CocoImages) -> None:
    found = guesses(coco, 0)
    theirs = MeanAveragePrecision(iou_type=("bbox", "segm"), class_metrics=True)
    for image, objects in zip(coco.images, found, strict=True):
        truth = truth_of(image) | {
            "iscrowd": torch.tensor([int(a.crowd) for a in image.annotations]),
            "area": torch.tensor([a.area for a in image.annotations]),
        }
        theirs.update([objects], [truth])
    expected = theirs.compute()
    results = results_of(coco, found)
    measured = measure(coco, results)
    for kind, prefix in (("box", "bbox"), ("mask", "segm")):
        for name, key in NAMES.items():
            value = float(expected[f"{prefix}_{key}"])
            # Theirs rounds recalls.
            assert measured[kind].summary[name] == pytest.approx(value, abs=1e-3), (kind, name)
        known = expected[f"{prefix}_map_per_class"].numpy()
        per_class = np.nan_to_num(measured[kind].per_class, nan=-1)
        np.testing.assert_allclose(per_class[np.unique(expected["classes"].numpy())], known, atol=1e-3)
    # What several processes find is one list, in any order.
    again = measure(coco, [*results[1::2], *results[::2]])
    assert again["mask"].summary == measured["mask"].summary


def test_perfect_and_empty_detections(coco: CocoImages) -> None:
    nothing = [ImageResult(image.id, []) for image in coco.images]
    measured = measure(coco, nothing)
    assert measured["box"].summary["AP"] == 0
    objects = {image.id: sum(not a.crowd for a in image.annotations) for image in coco.images}
    assert measured["box"].mistakes == objects
    perfect = [truth_of(image) | {"scores": torch.ones(len(image.annotations))} for image in coco.images]
    measured = measure(coco, results_of(coco, perfect))
    assert measured["box"].summary["AP"] == pytest.approx(1)
    assert measured["mask"].summary["AP"] == pytest.approx(1)
    assert set(measured["mask"].mistakes.values()) == {0}
    assert measured["mask"].curves[0.5].min() == pytest.approx(1)


# Facts of detectron2's projects/MViTv2/configs at 02b5c4e2: rate, steps, where it falls, drop path, recipe.
MULTI, JITTER = "MultiScale", "LargeScaleJitter"
RECIPES = {
    "coco_mask_rcnn_mvitv2_t": (1.6e-4, 67500, (52500, 62500), 0.2, MULTI),
    "coco_cascade_mask_rcnn_mvitv2_t": (1.6e-4, 67500, (52500, 62500), 0.2, MULTI),
    "coco_cascade_mask_rcnn_mvitv2_s": (1.6e-4, 67500, (52500, 62500), 0.2, MULTI),
    "coco_cascade_mask_rcnn_mvitv2_b": (1.6e-4, 67500, (52500, 62500), 0.4, MULTI),
    "coco_cascade_mask_rcnn_mvitv2_l": (1.0e-4, 92187, (81944, 88773), 0.5, JITTER),
    "coco_cascade_mask_rcnn_mvitv2_h": (1.6e-4, 67500, (52500, 62500), 0.6, JITTER),
}


def composed(experiment: str, *overrides: str) -> Any:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        loggers = [f"logger.{name}.save_dir=x" for name in ("csv", "tensorboard")]
        config = compose("train", overrides=[f"experiment={experiment}", *loggers, *overrides])
    check(config, "train")
    return config


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_published_ones(name: str) -> None:
    lr, steps, falls, drop_path, recipe = RECIPES[name]
    config = composed(name, "data.root=/data/coco")
    assert config.trainer.max_steps == steps
    assert (config.optim.lr, config.optim.lr_batch_size) == (lr, 64)
    assert config.trainer.gradient_clip_val is None
    assert type(app.build(config.augment)).__name__ == recipe
    with torch.device("meta"):
        detector = app.build(config.model)
        module: DetectorTraining = app.build(config.optim, model=detector)
    assert detector.config.backbone.drop_path == drop_path
    assert detector.config.cascade == config.trainer.sync_batchnorm == ("cascade" in name)
    factors = {0: 0.001, 125: 0.5005, 250: 1.0, falls[0] - 1: 1.0, falls[0]: 0.1, falls[1]: 0.01}
    for step, factor in factors.items():
        assert module.lr_factor(step, steps) == pytest.approx(factor), step
    decayed, plain = module.parameter_groups()
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in detector.named_parameters()}
    without = {names[id(parameter)] for parameter in plain["params"]}
    assert len(without) + len(decayed["params"]) == len(names)
    assert "backbone.bottom_up.blocks.0.attn.qkv.bias" not in without
    for part in ("norm1.bias", "attn.rel_pos_h"):
        assert f"backbone.bottom_up.blocks.0.{part}" in without
    assert any(".1.weight" in name and "mask_head" in name for name in without) == detector.config.cascade


@pytest.mark.parametrize(
    "override",
    ["mixing=mixup_cutmix", "augment=light", "model=mvitv2_t_224", "augment.crop_probability=2"],
)
def test_what_detection_does_not_take_is_named(command: Any, tmp_path: Path, override: str) -> None:
    generate(tmp_path / "s", "train", 2)
    generate(tmp_path / "s", "val", 2)
    result = command("train", "experiment=shapes", f"data.root={tmp_path / 's'}", override)
    assert result.code == 1
    assert override.partition("=")[0].partition(".")[0] in result.err.splitlines()[-1]
