"""Masks, features and models against the official figures (facebookresearch/SlowFast at 287ec007)."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import golden_weights as golden
import numpy as np
import pytest
import torch
from torch import Tensor

import mvit_video as mv
from mvit_video.errors import CheckpointError, ConfigError
from mvit_video.model import MViT, MViTConfig
from mvit_video.pretraining import MaskFeat, cube_mask, frame_mask, hog, hog_targets, tube_mask
from mvit_video.training.module import learning_rate, parameter_groups
from mvit_video.weights import build_for_weights

REFERENCE = Path(__file__).parents[1] / "reference" / "maskfeat"
MODELS, MASKS, HOG, FINETUNE, STEPS = (
    json.loads((REFERENCE / f"{name}.json").read_text())
    for name in ("models", "masks", "hog", "finetune", "train_steps")
)
TINY = MViTConfig(
    embed_dim=32,
    stages=(1, 2, 1),
    num_frames=8,
    crop_size=64,
    kv_stride=(1, 4, 4),
    drop_path=0.0,
    head_dropout=0.0,
    dim_mul_in_attention=False,
)


def as_mask(frames: list[str]) -> Tensor:
    """Of rows of 0 and 1, joined by /, for each frame."""
    return torch.tensor([[[int(cell) for cell in row] for row in frame.split("/")] for frame in frames])


def golden_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    shapes = [(name, value.shape) for name, value in model.named_parameters()]
    return {name: torch.from_numpy(value) for name, value in golden.weights(shapes).items()}


def golden_clips(arguments: list[Any]) -> Tensor:
    return torch.from_numpy(np.concatenate([golden.clip(*each) for each in arguments]))


def golden_model(name: str) -> MaskFeat:
    case = MODELS[name]
    if name.startswith("tiny"):
        changes = {k: tuple(map(tuple, v)) if k == "q_strides" else v for k, v in case["config"].items()}
        features: Any = "pixels" if "pixels" in name else "hog"
        model = MaskFeat(MViTConfig(**{**vars(TINY), **changes}), depths=case["depths"], features=features)
    else:
        model = mv.create_pretrainer("maskfeat_mvitv2_s_16x4")
    assert sum(parameter.numel() for parameter in model.parameters()) == case["param_count"]
    mv.load_weights(model, golden_weights(model))
    return model


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * ("k400" in name)) for name in MODELS]
)
def test_models_predict_and_learn_as_officially(name: str) -> None:
    case, model = MODELS[name], golden_model(name)
    clips, masks = golden_clips(case["input"]), torch.stack([as_mask(mask) for mask in case["mask"]])
    for found, expected in zip(model(clips, masks), case["outputs"], strict=True):
        for tensor, kind in zip(found, ("prediction", "target"), strict=True):
            figures = expected[kind]
            ends = torch.cat([tensor.detach().flatten()[:8], tensor.detach().flatten()[-8:]])
            assert list(tensor.shape) == figures["shape"]
            atol = 1e-4 * figures["std"] if kind == "prediction" else 1e-5
            torch.testing.assert_close(
                ends, torch.tensor(figures["first"] + figures["last"]), atol=atol, rtol=0
            )
    loss = model.loss(clips, masks)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    loss.backward()
    norms = {
        name: value.grad.norm().item() for name, value in model.named_parameters() if value.grad is not None
    }
    assert len(norms) == len(list(model.parameters()))
    assert {name: norms[name] for name in case["grad_norms"]} == pytest.approx(case["grad_norms"], rel=1e-3)


def test_steps_of_adamw_are_the_official_ones() -> None:
    model = golden_model("tiny")
    clips, masks = golden_clips(STEPS["input"]), torch.stack([as_mask(mask) for mask in STEPS["mask"]])
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), betas=(0.9, 0.999), eps=1e-8)
    for step in STEPS["steps"]:
        for group in optimizer.param_groups:
            group["lr"] = step["lr"]
        optimizer.zero_grad()
        loss = model.loss(clips, masks)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.02)
        assert (loss.item(), norm.item()) == pytest.approx(
            (step["loss_before"], step["grad_norm_before_clipping"]), rel=1e-4
        )
        optimizer.step()
    for name, values in STEPS["after"].items():
        found = model.get_parameter(name).detach().flatten()[:8]
        torch.testing.assert_close(found, torch.tensor(values), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("case", "create"),
    [
        (FINETUNE["groups"][0], lambda: mv.create_pretrainer("maskfeat_mvitv2_s_16x4")),
        (FINETUNE["groups"][1], lambda: mv.create_model("mvitv2_s_16x4", dim_mul_in_attention=False)),
    ],
)
def test_parameter_groups_are_the_official_ones(case: dict[str, Any], create: Any) -> None:
    with torch.device("meta"):
        model = create()
    groups = parameter_groups(model, 0.05, 1.0 if len(case["groups"]) == 2 else 0.75)
    found = sorted((group["lr_scale"], group["weight_decay"], len(group["params"])) for group in groups)
    expected = sorted((group["lr_factor"], group["weight_decay"], group["count"]) for group in case["groups"])
    assert [pytest.approx(group, rel=1e-12) for group in expected] == found


@pytest.mark.parametrize("case", FINETUNE["schedule"])
def test_schedules_are_the_official_ones(case: dict[str, Any]) -> None:
    rate = partial(
        learning_rate,
        lr=case["base_lr"],
        epochs=case["max_epoch"],
        warmup_epochs=case["warmup_epochs"],
        warmup_start_lr=case["warmup_start"],
        end_lr=case["end_lr"],
    )
    assert [rate(epoch) for epoch, _ in case["values"]] == pytest.approx([lr for _, lr in case["values"]])


@pytest.mark.parametrize("kind", ["cube", "frames", "tube", "image"])
def test_masks_are_the_official_ones(kind: str) -> None:
    make = {"cube": cube_mask, "frames": frame_mask}.get(kind, tube_mask)
    for case in MASKS[kind]:
        window = (8 if kind == "tube" else 1, *case["window"])[-3:]
        rng = random.Random(case["seed"])
        for expected in (case[key] for key in ("mask", "second") if key in case):
            assert make(rng, window, case["ratio"]).equal(as_mask(expected).bool())
        assert rng.random() == case["next_random"]


def test_cubes_are_spread_as_officially() -> None:
    rng, expected = random.Random(0), MASKS["distribution"]
    masks = torch.stack([cube_mask(rng, (8, 7, 7), 0.4) for _ in range(1000)]).float()
    sums = masks.sum((1, 2, 3))
    assert sums.max() <= expected["target"]
    assert sums.mean().item() == pytest.approx(expected["sum_mean"], abs=0.3)
    assert masks.mean((0, 2, 3)).tolist() == pytest.approx(expected["per_frame_probability"], abs=0.05)


@pytest.mark.parametrize(
    ("window", "ratio"), [((8, 7), 0.4), ((8, 0, 7), 0.4), ((8, 7, 7), 0.0), ((8, 7, 7), 1.0)]
)
def test_masks_of_nothing_or_everything_are_refused(window: Any, ratio: float) -> None:
    with pytest.raises(ValueError, match=r"window|ratio"):
        cube_mask(random.Random(0), window, ratio)


def test_histograms_are_the_official_ones() -> None:
    for case in HOG["layer"]:
        _, height, width, tag = case["input"]
        found = hog(torch.from_numpy(golden.image(height, width, tag)), cell=case["cell"])
        assert list(found.shape) == case["shape"]
        torch.testing.assert_close(
            found.flatten()[case["index"]], torch.tensor(case["values"]), atol=1e-5, rtol=0
        )
    for case in HOG["targets"][1:]:
        found = hog_targets(golden_clips([case["input"]]), tuple(case["grid"]))[0, case["token_index"]]
        expected = torch.tensor(case["token_values"])
        torch.testing.assert_close(found[:, : expected.shape[1]], expected, atol=1e-5, rtol=0)


def test_histograms_of_ramps() -> None:
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    ramps = {
        "constant": torch.ones(24, 24), "x": x, "-x": -x, "y": y, "-y": -y, "x+y": x + y, "x-y": x - y,
        "2x+y": 2 * x + y, "x+3y": x + 3 * y,
    }  # fmt: skip
    for case in HOG["ramps"]:
        found = hog(ramps[case["case"]].expand(1, 3, 24, 24))[0, 0]
        torch.testing.assert_close(found[:, 1, 1], torch.tensor(case["centre"]), atol=1e-6, rtol=0)
        torch.testing.assert_close(found[:, 0, 0], torch.tensor(case["corner"]), atol=1e-6, rtol=0)


def test_features_are_in_float32_under_autocast() -> None:
    model, clips = golden_model("tiny"), golden_clips([[8, 64, 64, "auto"]])
    masks = torch.ones(1, 4, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        ((predictions, targets),) = model(clips, masks)
        loss = model.loss(clips, masks)
    assert predictions.dtype == torch.bfloat16
    assert targets.equal(hog_targets(clips, (4, 4, 4))[0])
    assert loss.dtype == torch.float32


def test_shapes_that_do_not_fit_are_named() -> None:
    model, clips = golden_model("tiny"), torch.zeros(2, 3, 8, 64, 64)
    for masks in (
        torch.ones(2, 8, 4, 4),
        torch.ones(2, 4, 4),
        torch.ones(1, 4, 4, 4),
        torch.zeros(2, 4, 4, 4),
    ):
        with pytest.raises(ValueError, match="mask"):
            model.loss(clips, masks)
    with pytest.raises(ValueError, match="72"):
        model.loss(torch.zeros(2, 3, 8, 72, 72), torch.ones(2, 4, 4, 4))
    with pytest.raises(ValueError, match="312"):
        mv.create_pretrainer("maskfeat_mvitv2_nano_8x4", stages=(1, 1, 1, 1), crop_size=312)
    for depths in ((), (4,), (3, 1), (1, 1)):
        with pytest.raises(ValueError, match="depths"):
            MaskFeat(TINY, depths=depths)


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [("maskfeat_mvitv2_s_16x4", 398, 36_253_356), ("maskfeat_mvitv2_l_16x4", 1166, 217_247_580)],
)
def test_pretrainers_by_name(name: str, tensors: int, parameters: int) -> None:
    with torch.device("meta"):
        model = mv.create_pretrainer(name)
        ordinary = mv.create_pretrainer(name, dim_mul_in_attention=True)
    assert len(model.state_dict()) == tensors
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert ordinary.get_submodule("pred_head.projections.0").out_features == 108
    assert name in mv.list_pretrainers()
    with pytest.raises(ConfigError, match=name):
        mv.create_pretrainer(f"{name}x")
    with pytest.raises(ConfigError, match="embed_dim"):
        mv.create_pretrainer(name, embed_dimm=8)


def official_file(model: MaskFeat) -> dict[str, Any]:
    constants = {f"hogs.0.weight_{axis}": torch.zeros(3, 1, 3, 3) for axis in "xy"}
    return {"epoch": 300, "model_state": golden_weights(model) | constants, "cfg": "MASK:\n  ENABLE: true"}


def test_official_files_go_into_pretrainers(tmp_path: Path) -> None:
    model = mv.create_pretrainer("maskfeat_mvitv2_nano_8x4")
    torch.save(official_file(model), tmp_path / "pt.pyth")
    assert not mv.load_weights(model, tmp_path / "pt.pyth").fresh
    assert model.mask_token.equal(golden_weights(model)["mask_token"])
    for change in ({"features": "pixels"}, {"depths": (1, 2)}):
        other = mv.create_pretrainer("maskfeat_mvitv2_nano_8x4", **change)
        with pytest.raises(CheckpointError, match="pred_head"):
            mv.load_weights(other, tmp_path / "pt.pyth")
        fresh = mv.load_weights(other, tmp_path / "pt.pyth", head="new").fresh
        assert len(fresh) == len([name for name in other.state_dict() if name.startswith("pred_head")])
        with pytest.raises(ConfigError, match="head must be 'strict' or 'new'"):
            other.load_weights(tmp_path / "pt.pyth", head="old")


def test_fine_tuning_takes_what_the_official_code_takes() -> None:
    expected = FINETUNE["load"]["tiny"]
    one, pool = (1, 1, 1), (1, 2, 2)
    before, after = (
        MViTConfig(**{**vars(TINY), "num_classes": 5, "mean_pooling": True, "q_strides": strides})
        for strides in (
            ((0, *one), (1, *pool), (2, *one), (3, *one)),
            ((0, *one), (1, *pool), (2, *pool), (3, *one)),
        )
    )
    source = official_file(MaskFeat(before, depths=(3,)))
    model = MViT(after)
    report = mv.load_weights(model, source, head="new")
    tables = {table["name"]: table for table in expected["interpolated_linear_along_rows"]}
    assert set(report.interpolated) == set(tables)
    assert {*report.loaded, *report.interpolated} == {*expected["copied"], *tables}
    assert set(report.fresh) == {name for name, _ in expected["left_at_initialisation"]}
    for name, table in tables.items():
        found = model.get_parameter(name).detach()
        assert list(found.shape) == table["to"]
        assert found.flatten()[:8].tolist() == pytest.approx(table["first8"], abs=1e-6)
        assert found.flatten()[-8:].tolist() == pytest.approx(table["last8"], abs=1e-6)
    golden_ones = golden_weights(model)
    model.load_state_dict({name: golden_ones[name] for name in report.fresh}, strict=False)
    with torch.no_grad():
        logits = model.eval()(golden_clips([expected["after_load"]["input"][1:]]))[0]
    assert logits.tolist() == pytest.approx(expected["after_load"]["logits"], abs=1e-4)


def test_the_whole_official_s_goes_into_its_classifier(tmp_path: Path) -> None:
    with torch.device("meta"):
        pretrained = mv.create_pretrainer("maskfeat_mvitv2_s_16x4")
    weights = {name: torch.zeros(value.shape) for name, value in pretrained.state_dict().items()}
    torch.save({"model_state": weights}, tmp_path / "pt.pyth")
    build = partial(mv.create_model, "mvitv2_s_16x4")
    _, report = build_for_weights(build, tmp_path / "pt.pyth", 400, head="new")
    expected = FINETUNE["load"]["k400_s"]
    assert len(report.loaded) + len(report.interpolated) == expected["num_copied"] + 2
    assert set(report.interpolated) == {row["name"] for row in expected["interpolated_linear_along_rows"]}
    assert set(report.fresh) == {name for name, _ in expected["left_at_initialisation"]}


def test_blocks_can_stay_fresh() -> None:
    pretrained = mv.create_pretrainer("maskfeat_mvitv2_nano_8x4", embed_dim=8).state_dict()
    classifier = mv.create_model("mvitv2_nano_8x4", num_classes=3, mean_pooling=True, embed_dim=8)
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    parts = ("blocks.1", "blocks.2")
    report = mv.load_weights(classifier, pretrained, head="new", fresh=parts)
    for key, value in classifier.state_dict().items():
        fresh = key.startswith(("blocks.1.", "blocks.2.", "norm.", "head."))
        assert torch.equal(value, before[key] if fresh else pretrained[key]), key
        assert (key in report.fresh) == fresh
    with pytest.raises(ConfigError, match=r"fresh: .*'blocks\.3'"):
        mv.load_weights(classifier, pretrained, head="new", fresh=("blocks.3",))


def test_a_pretrained_model_is_no_classifier(tmp_path: Path) -> None:
    torch.save(official_file(mv.create_pretrainer("maskfeat_mvitv2_nano_8x4")), tmp_path / "pt.pyth")
    classifier = mv.create_model("mvitv2_nano_8x4")
    for use in (mv.load_model, mv.from_slowfast, partial(mv.load_weights, classifier)):
        with pytest.raises(CheckpointError, match="head=new"):
            use(tmp_path / "pt.pyth")
    wide = mv.create_model("mvitv2_nano_8x4", dim_mul_in_attention=False)
    with pytest.raises(CheckpointError, match="model=mvitv2_nano_8x4"):
        mv.load_weights(wide, tmp_path / "pt.pyth", head="new")
