"""Action detectors against PySlowFast's figures (``MViT`` with ``ResNetRoIHead`` at 287ec007)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import golden_weights
import pytest
import torch
import torch.nn.functional as F
from golden_models import golden_state
from torch import Tensor
from torchvision.ops import roi_align

import mvit_video as mv
from mvit_video.action_detection import ActionDetector
from mvit_video.action_detection.boxes import cut_regions
from mvit_video.errors import CheckpointError, ConfigError

REFERENCE = Path(__file__).parents[1] / "reference" / "ava"
TINY = {
    "num_classes": 6,
    "num_frames": 8,
    "crop_size": 64,
    "embed_dim": 32,
    "stages": (1, 2, 1),
    "kv_stride": (1, 4, 4),
}
CASES: dict[str, dict[str, Any]] = {
    "roi_tiny": {},
    "roi_tiny_wide": {},
    "roi_tiny_legacy": {"aligned": False},
    "roi_tiny_maskfeat_style": {"dim_mul_in_attention": False, "mean_pooling": True},
    "roi_tiny_stride8": {"last_stage_stride": 1, "class_token": False, "roi_size": 5},
}


def reference(name: str) -> Any:
    return json.loads((REFERENCE / f"{name}.json").read_text())


def tiny(**overrides: Any) -> ActionDetector:
    return mv.create_action_detector("mvitv2_s_16x4", **(TINY | overrides))


def clips_and_boxes(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    clips = [torch.from_numpy(golden_weights.clip(*args)) for args in case["input"]["args"]]
    return torch.cat(clips), torch.tensor(case["boxes"], dtype=torch.float32)


def official_state(case: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(w) for name, w in golden_weights.weights(case["params"]).items()}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_official_ones(name: str) -> None:
    case = reference(name)
    detector = tiny(**CASES[name]).eval()
    detector.load_state_dict(official_state(case))
    with torch.no_grad():
        logits = detector(*clips_and_boxes(case))
    assert sum(p.numel() for p in detector.parameters()) == case["param_count"]
    torch.testing.assert_close(logits, torch.tensor(case["logits"]), atol=1e-4, rtol=0)


@pytest.mark.slow  # the tiny ones cover it
def test_logits_of_s_are_the_official_ones() -> None:
    case = reference("roi_mvitv2_s")
    detector = mv.create_action_detector("mvitv2_s_16x4").eval()
    head = [entry for entry in case["params"] if entry[0].startswith("head.")]
    detector.load_state_dict(golden_state("k400_s_16x4") | official_state(case | {"params": head}))
    with torch.no_grad():
        logits = detector(*clips_and_boxes(case))
    torch.testing.assert_close(logits, torch.tensor(case["logits"]), atol=1e-4, rtol=0)


def test_gradients_are_the_official_ones() -> None:
    case = reference("roi_tiny")
    detector = tiny(head_dropout=0.0, drop_path=0.0).train()
    detector.load_state_dict(official_state(case))
    expected = case["training"]
    targets = torch.tensor([[float(digit) for digit in row] for row in expected["labels"]])
    loss = F.binary_cross_entropy_with_logits(detector(*clips_and_boxes(case)), targets)
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss_bce_mean_over_boxes_and_classes"], abs=1e-5)
    parameters = dict(detector.named_parameters())
    for name, norm in expected["grad_norms"].items():
        gradient = parameters[name].grad
        assert gradient is not None
        assert gradient.norm().item() == pytest.approx(norm, rel=3e-3)


@pytest.mark.parametrize(
    ("overrides", "stride"),
    [
        ({}, 16.0),
        ({"last_stage_stride": 1}, 8.0),
        ({"roi_stride": 12}, 12.0),
        ({"patch_stride": (2, 8, 8)}, 32.0),
    ],
)
def test_the_map_has_its_true_stride_unless_told(overrides: dict[str, Any], stride: float) -> None:
    detector = tiny(**overrides)
    assert detector.roi_stride == (stride, stride)
    again = ActionDetector(detector.config, detector.protocol, **detector.roi_options)
    assert again.roi_stride == detector.roi_stride


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_regions_are_those_of_roi_align(size: int, aligned: bool) -> None:
    torch.manual_seed(size)
    maps = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    corners = (torch.rand(20, 2, 2, dtype=torch.float64) * 30 - 10).sort(1).values.flatten(1)
    corners = torch.cat(
        [corners, torch.tensor([[0, 0, 7, 5], [1, 1, 1, 1], [-7, -5, 14, 10], [-9, -9, -5, -5]])]
    )
    boxes = torch.cat([torch.arange(len(corners))[:, None] % 2, corners], 1)
    ours = cut_regions(maps, boxes, size, aligned=aligned)
    theirs = roi_align(maps, boxes, size, sampling_ratio=0, aligned=aligned)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(cut.square().sum(), maps)[0] for cut in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_every_kind_of_derivative_is_there() -> None:
    detector, (clips, along) = tiny().eval(), torch.randn(2, 1, 3, 4, 32, 32)
    boxes = torch.tensor([[0, 2.0, 3.0, 30.0, 25.0]])

    def total(clips: Tensor) -> Tensor:
        return detector(clips, boxes).sum()

    clips.requires_grad_()
    (first,) = torch.autograd.grad(total(clips), clips, create_graph=True)
    (second,) = torch.autograd.grad((first * along).sum(), clips)
    torch.testing.assert_close(torch.func.jvp(total, (clips,), (along,))[1], (first * along).sum())
    torch.testing.assert_close(torch.func.jvp(torch.func.grad(total), (clips,), (along,))[1], second)


def test_a_clip_may_have_no_box_or_many() -> None:
    detector = tiny().eval()
    clips = torch.randn(2, 3, 8, 64, 96)
    with torch.no_grad():
        assert detector(clips, torch.zeros(0, 5)).shape == (0, 6)
        rows = torch.tensor([[1, 0, 0, 40, 40], [0, 5, 5, 60, 60], [1, 0, 0, 40, 40]], dtype=torch.float32)
        logits = detector(clips, rows)
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize(
    "boxes", [torch.zeros(3, 4), torch.tensor([[2.0, 0, 0, 9, 9]]), torch.zeros(5)], ids=str
)
def test_boxes_of_no_clip_are_refused(boxes: Tensor) -> None:
    with pytest.raises(ValueError, match="boxes"):
        tiny()(torch.randn(2, 3, 8, 64, 64), boxes)


@pytest.mark.parametrize("overrides", [{}, {"last_stage_stride": 1}], ids=str)
def test_a_classifier_gives_everything_but_the_head(overrides: dict[str, Any]) -> None:
    classifier = mv.create_model("mvitv2_s_16x4", **(TINY | {"num_classes": 9}))
    detector = tiny(**overrides)
    with pytest.raises(CheckpointError):
        mv.load_weights(detector, classifier.state_dict())
    report = mv.load_weights(detector, classifier.state_dict(), head="new")
    assert report.fresh == ("head.projection.weight", "head.projection.bias")
    assert torch.equal(detector.norm.weight, classifier.norm.weight)
    assert mv.load_weights(detector, detector.state_dict()).fresh == ()


@pytest.mark.parametrize(
    ("error", "overrides"),
    [
        (ConfigError, {"aligend": True}),
        (ValueError, {"roi_size": 0}),
        (ValueError, {"roi_stride": -1}),
        (ValueError, {"last_stage_stride": 0}),
    ],
    ids=str,
)
def test_what_can_not_be_is_refused(error: type[Exception], overrides: dict[str, Any]) -> None:
    with pytest.raises(error, match=next(iter(overrides))):
        tiny(**overrides)
    with pytest.raises(ConfigError, match="mvitv2_s_16x4"):
        mv.create_action_detector("mvitv2_s_16x5")
