"""Detectors against detectron2's figures (``projects/MViTv2`` at 02b5c4e2; see ``golden_weights_det``)."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import golden_weights_det as golden
import numpy as np
import pytest
import torch
from torch import Tensor

import mvit_video as mv
from mvit_video.detection import Detector, create_detector, list_detectors
from mvit_video.detection.masks import to_mask
from mvit_video.detection.weights import from_detectron2
from mvit_video.errors import CheckpointError, ConfigError
from mvit_video.model.config import plan_blocks

REFERENCE = Path(__file__).parents[1] / "reference" / "detection"
NAMES = {"mask": "mask_rcnn_mvitv2_t", "cascade": "cascade_mask_rcnn_mvitv2_t"}
LEVELS = ("p2", "p3", "p4", "p5", "p6")
PARAMETERS = {
    "mask_rcnn_mvitv2_t": 43_679_568,
    "cascade_mask_rcnn_mvitv2_t": 75_847_614,
    "cascade_mask_rcnn_mvitv2_s": 86_544_510,
    "cascade_mask_rcnn_mvitv2_b": 103_147_038,
    "cascade_mask_rcnn_mvitv2_l": 265_110_654,
    "cascade_mask_rcnn_mvitv2_h": 718_155_998,
}
# The last blocks of the three coarser scales; the first two of them have twice the stride of their scale.
WITHOUT_WINDOW = {"t": (2, 7, 9), "s": (2, 13, 15), "b": (4, 20, 23), "l": (7, 43, 47), "h": (11, 71, 79)}


def reference(name: str) -> Any:
    return json.loads((REFERENCE / f"{name}.json").read_text())


def official(method: str, **overrides: Any) -> Detector:
    """A detector with the golden weights."""
    names = reference(f"names_{method}_t")
    detector = create_detector(NAMES[method], **overrides)
    shapes = {name: value.shape for name, value in detector.state_dict().items()}
    values = golden.weights(names["params"] + names["buffers"])
    weights = {
        from_detectron2(name): torch.from_numpy(np.ascontiguousarray(value)) for name, value in values.items()
    }
    detector.load_state_dict({name: value.reshape(shapes[name]) for name, value in weights.items()})
    return detector


def difference(found: Tensor, expected: dict[str, Any]) -> float:
    sample = torch.tensor(expected["sample"])
    flat = found.detach().flatten()
    index = [i * len(flat) // len(sample) for i in range(len(sample))]
    return max((flat[index] - sample).abs().max().item(), abs(flat.double().mean().item() - expected["mean"]))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_and_blocks_are_those_of_the_official_models(name: str) -> None:
    with torch.device("meta"):
        detector = create_detector(name, rpn_batch_size_per_image=10**6, box_batch_size_per_image=10**6)
    assert sum(p.numel() for p in detector.parameters()) == PARAMETERS[name]
    assert name in list_detectors()
    plans = list(plan_blocks(detector.config.backbone))
    whole = {number: plan.kv_stride[1] for number, plan in enumerate(plans) if plan.window is None}
    assert whole == dict(zip(WITHOUT_WINDOW[name[-1]], (4, 2, 1), strict=True))


def test_an_unknown_name_or_option_is_named() -> None:
    with pytest.raises(ConfigError, match="mask_rcnn_mvitv2_t"):
        create_detector("mask_rcnn_mvitv2_tt")
    with pytest.raises(ConfigError, match="box_score_thresh"):
        create_detector("mask_rcnn_mvitv2_t", box_score_tresh=0.1)


def test_maps_of_the_backbone() -> None:
    detector = official("mask").eval()
    for case in reference("features_mask_t_dev")["inputs"]:
        size = case["input"]
        images = torch.from_numpy(golden.feature_input(size["h"], size["w"], size["tag"])).float()
        with torch.no_grad():
            scales = detector.backbone.bottom_up(images)
            maps = detector.backbone(images)
        for number, found in enumerate(scales, start=2):
            assert difference(found, case["bottom_up"][f"scale{number}"]) < 1e-4
        assert tuple(maps) == LEVELS
        for level, found in maps.items():
            assert difference(found, case["fpn"][level]) < 1e-4


SLOW_CASCADE = pytest.param("cascade", marks=pytest.mark.slow)


@pytest.mark.parametrize("method", ["mask", SLOW_CASCADE])
def test_detections(method: str) -> None:
    expected = reference(f"inference_{method}_t_dev")
    few = {"rpn_pre_nms_top_n_test": 300, "rpn_post_nms_top_n_test": 150}
    detector = official(method, **(few if method == "cascade" else {})).eval()
    size = expected["input"]
    image = torch.from_numpy(golden.image_u8(size["h"], size["w"], size["tag"]))
    with torch.no_grad():
        batch, sizes = detector.batched([image])
        assert difference(batch, expected["padded"]) < 1e-6
        maps = list(detector.backbone(batch).values())
        logits, deltas = detector.proposal_generator.head(maps)
        for level, score, delta in zip(LEVELS, logits, deltas, strict=True):
            assert difference(score, expected["rpn"][level]["logits"]) < 1e-4
            assert difference(delta, expected["rpn"][level]["deltas"]) < 1e-4
        ((proposals,), _) = detector.proposal_generator(maps, sizes)
        assert len(proposals) == expected["proposals"]["count"]
        best = torch.tensor(expected["proposals"]["top20_boxes"])
        assert (proposals[:20] - best).abs().max() < 1e-4 * size["w"]
        (raw,) = detector.roi_heads.detect(maps, [proposals], sizes)
        (found,) = detector([image], output_sizes=[(size["height"], size["width"])])
    golden_detections = expected["detections"]
    pairs = matched(golden_detections, raw.boxes, raw.scores, raw.labels, size["w"])
    last = golden_detections["scores"][-1]
    certain = [i for i, score in enumerate(golden_detections["scores"]) if score - last > 1e-4]
    assert set(certain) <= set(pairs)
    assert found["masks"].shape == (len(found["boxes"]), size["height"], size["width"])
    processed = expected["postprocessed"]
    for i, (box, area) in enumerate(zip(processed["boxes"], processed["mask_area_pixels"], strict=True)):
        if i in pairs:
            assert (found["boxes"][pairs[i]] - torch.tensor(box)).abs().max() < 1e-4 * size["width"]
            # A row of probabilities near one half may fall on either side of it.
            assert abs(int(found["masks"][pairs[i]].sum()) - area) <= 20


def matched(
    expected: dict[str, Any], boxes: Tensor, scores: Tensor, labels: Tensor, side: int
) -> dict[int, int]:
    """Golden detections and ours of the same class, score and place: equal scores may change places."""
    free = torch.ones(len(scores), dtype=torch.bool)
    pairs = {}
    for i, (box, score, label) in enumerate(
        zip(expected["boxes"], expected["scores"], expected["classes"], strict=True)
    ):
        near = free & (labels == label) & ((scores - score).abs() < 1e-4)
        near &= (boxes - torch.tensor(box)).abs().amax(1) < 1e-4 * side
        if near.any():
            pairs[i] = int(near.nonzero()[0])
            free[pairs[i]] = False
    return pairs


@pytest.mark.parametrize(
    ("method", "variant"),
    [
        ("mask", "official_sizes"),
        pytest.param("mask", "all_taken_bitmask", marks=pytest.mark.slow),
        pytest.param("mask", "all_taken", marks=pytest.mark.slow),
        pytest.param("cascade", "official_sizes", marks=pytest.mark.slow),
        pytest.param("cascade", "all_taken", marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients(method: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = reference(f"losses_{method}_t_dev")
    case, size = expected["variants"][variant], expected["input"]
    height, width = size["h"], size["w"]
    sizes = (
        {
            "rpn_batch_size_per_image": 10**6,
            "box_batch_size_per_image": 10**6,
            "rpn_pre_nms_top_n_train": 300,
            "rpn_post_nms_top_n_train": 150,
        }
        if case["overrides"]
        else {}
    )
    detector = official(method, drop_path=0.0, **sizes).train()
    boxes, labels, masks = golden.targets(height, width)
    if case["gt_masks"] == "bitmask":
        masks = torch.from_numpy(np.stack([to_mask(parts, height, width) for parts in masks]))
    target = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels), "masks": masks}
    # Officially drawn at random; the figures are of the first ones.
    monkeypatch.setattr(torch, "randperm", lambda count, **kwargs: torch.arange(count, **kwargs))
    losses = detector([torch.from_numpy(golden.image_u8(height, width, size["tag"]))], [target])
    assert {name: pytest.approx(loss.item(), abs=1e-4) for name, loss in losses.items()} == case["losses"]
    sum(losses.values()).backward()
    parameters = dict(detector.named_parameters())
    for name, norm in case["grad_norm"].items():
        gradient = parameters[from_detectron2(name)].grad
        assert gradient is not None
        assert gradient.double().norm().item() == pytest.approx(norm, rel=3e-3), name
    for name, values in case.get("running_mean_after", {}).items():
        found = detector.get_buffer(from_detectron2(name))[: len(values)]
        torch.testing.assert_close(found, torch.tensor(values), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["mask", "cascade"])
def test_images_without_objects_train_too(method: str) -> None:
    detector = create_detector(NAMES[method], num_classes=3, box_batch_size_per_image=16).train()
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "masks": []}
    some = {
        "boxes": torch.tensor([[4.0, 4.0, 60.0, 50.0]]),
        "labels": torch.tensor([2]),
        "masks": torch.ones(1, 64, 80, dtype=torch.bool),
    }
    images = [torch.zeros(3, 64, 80, dtype=torch.uint8), torch.full((3, 50, 64), 255, dtype=torch.uint8)]
    for targets in ([some, none], [none, none]):
        losses = detector(images, targets)
        assert all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        assert all(parameter.grad is not None for parameter in detector.roi_heads.parameters())


def test_every_image_gets_detections_of_its_own_size() -> None:
    torch.manual_seed(0)
    detector = create_detector("mask_rcnn_mvitv2_t", num_classes=3, box_score_thresh=0.0).eval()
    images = [
        torch.randint(0, 256, (3, height, width), dtype=torch.uint8) for height, width in ((64, 80), (33, 50))
    ]
    with torch.no_grad():
        found = detector(images)
    for image, detections in zip(images, found, strict=True):
        number = len(detections["boxes"])
        assert 0 < number <= 100
        assert detections["masks"].shape == (number, *image.shape[1:])
        assert detections["masks"].dtype == torch.bool
        assert (detections["scores"].diff() <= 0).all()
        assert set(detections["labels"].tolist()) <= {0, 1, 2}
        assert (detections["boxes"] <= torch.tensor([image.shape[2], image.shape[1]] * 2)).all()
    with pytest.raises(ValueError, match="targets"):
        detector.train()(images)


def test_official_files_are_read(tmp_path: Path) -> None:
    """detectron2's names from a dict, a .pkl and a .pyth; what a checkpoint of other classes needs."""
    source = official("mask")
    names = reference("names_mask_t")
    shapes = dict(names["params"])
    weights = {
        name: source.get_parameter(from_detectron2(name)).detach().reshape(shapes[name]) for name in shapes
    }
    arrays = {name: value.numpy() for name, value in weights.items()}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}))
    torch.save({"model_state": weights}, tmp_path / "model.pyth")
    for given in (weights, tmp_path / "model.pkl", tmp_path / "model.pyth"):
        detector = create_detector("mask_rcnn_mvitv2_t")
        report = mv.load_weights(detector, given)
        assert len(report.loaded) + len(report.reshaped) == len(shapes)
        assert not report.fresh
        for name, value in source.state_dict().items():
            assert detector.state_dict()[name].equal(value), name
    other = create_detector("mask_rcnn_mvitv2_t", num_classes=3)
    with pytest.raises(CheckpointError, match="head=new"):
        mv.load_weights(other, weights)
    assert len(mv.load_weights(other, weights, head="new").fresh) == 6
    with pytest.raises(ConfigError, match="head must be 'strict' or 'new'"):
        other.load_weights(weights, head="old")


def test_a_classifier_goes_into_the_backbone() -> None:
    classifier = mv.create_model("mvitv2_t_224")
    detector = create_detector("mask_rcnn_mvitv2_t", num_classes=2)
    report = mv.load_weights(detector, classifier.state_dict())
    backbone = detector.backbone.bottom_up.state_dict()
    for name, value in classifier.state_dict().items():
        if not name.startswith(("norm.", "head.")):
            assert backbone[name].equal(value), name
    assert {name for name in report.fresh if name.startswith("backbone.bottom_up")} == {
        f"backbone.bottom_up.scale{number}_norm.{kind}"
        for number in range(2, 6)
        for kind in ("weight", "bias")
    }


def test_tensors_that_are_no_weights_are_refused() -> None:
    detector = create_detector("mask_rcnn_mvitv2_t", num_classes=2)
    weights = detector.state_dict()
    key = "roi_heads.mask_predictor.mask_fcn_logits.bias"
    value = weights[key]
    for odd in (
        value.to_sparse(),
        value.to(torch.int8),
        torch.zeros(1).expand(len(value)),
        value * torch.nan,
    ):
        with pytest.raises(CheckpointError, match=key):
            mv.load_weights(detector, {**weights, key: odd})


class Malicious:
    def __reduce__(self) -> Any:
        return print, ("code has run",)


@pytest.mark.parametrize(
    "content", [{"model": {"a": Malicious()}}, {"model": {"a": np.array(["text"])}}, {"weights": {}}, 5]
)
def test_pickles_of_anything_but_arrays_are_refused(
    content: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"model\.pkl"):
        mv.load_weights(create_detector("mask_rcnn_mvitv2_t"), path)
    assert "code has run" not in capfd.readouterr().out


HWIN = {"attention": "pooling_hybrid_window"}
PLAIN = {"window_padding": False}


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "pooling", **PLAIN},
        {"attention": "pooling_shifted_window", **PLAIN},
        {"attention": "full", "kv_strides": (), **PLAIN},
        {**HWIN, "window_padding": True},
        {"fpn": False},
        {"rel_pos_joint": "space"},
        {"abs_pos": "joint", "rel_pos_spatial": False},
        {"rel_pos_spatial": False},
    ],
    ids=str,
)
def test_ablations_of_the_paper(changes: dict[str, Any]) -> None:
    """Maps of every kind of attention, pyramid and positions have the same sizes, and gradients."""
    small = {"stages": (1, 1, 1, 1), "kv_strides": (), "embed_dim": 8, "window": (1, 8, 8), "crop_size": 64}
    detector = create_detector("mask_rcnn_mvitv2_t", num_classes=2, channels=8, **{**small, **changes})
    maps = detector.backbone(torch.randn(1, 3, 64, 96))
    assert {name: tuple(level.shape) for name, level in maps.items()} == {
        "p2": (1, 8, 16, 24),
        "p3": (1, 8, 8, 12),
        "p4": (1, 8, 4, 6),
        "p5": (1, 8, 2, 3),
        "p6": (1, 8, 1, 2),
    }
    sum(level.sum() for level in maps.values()).backward()
    without = [name for name, parameter in detector.backbone.named_parameters() if parameter.grad is None]
    assert without == []
