"""Weights of other implementations, other sizes and other classes, through ``load_weights``."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import golden_weights
import pytest
import torch
import torchvision
from peers import randomized, torchvision_twin
from safetensors.torch import save_file

import mvit_video as mv
from mvit_video.model.variants import VARIANTS
from mvit_video.weights import save_weights
from mvit_video.weights.formats import to_pyslowfast_keys
from mvit_video.weights.pyslowfast import make_cfg, parse_cfg

REFERENCE = Path(__file__).parents[1] / "reference"
NAMES = json.loads((REFERENCE / "name_maps.json").read_text())
IMAGE_TO_VIDEO = json.loads((REFERENCE / "train_facts.json").read_text())["image_to_video"]
TINY = {"embed_dim": 16, "stages": (1, 1), "num_frames": 4, "crop_size": 32, "num_classes": 5}


def tiny(**overrides) -> mv.MViT:
    return randomized(mv.create_model("mvitv2_s_16x4", **{**TINY, **overrides}))


@pytest.mark.parametrize("source", ["torchvision", "timm_tiny"])
def test_names_are_mapped_as_in_the_verified_tables(source: str) -> None:
    pairs = dict(NAMES[source])
    theirs = {name: torch.empty(0) for name in pairs.values()}
    assert sorted(to_pyslowfast_keys(theirs)) == sorted(pairs)


def test_official_names_stay() -> None:
    state = tiny().state_dict()
    assert list(to_pyslowfast_keys(state)) == list(state)


@pytest.mark.parametrize("version", ["v2", "v1"])
def test_a_torchvision_model_computes_the_same_here(version: str) -> None:
    options = {} if version == "v2" else {"crop_size": 64}
    name = {"v2": "mvitv2_s_16x4", "v1": "mvitv1_b_16x4"}[version]
    model = randomized(mv.create_model(name, **{**TINY, **options}))
    twin = torchvision_twin(model)
    other = mv.create_model(name, **{**TINY, **options}).eval()
    report = mv.load_weights(other, twin.state_dict())
    assert "cls_token" in report.reshaped
    clips = torch.randn(2, 3, 4, other.config.crop_size, other.config.crop_size)
    with torch.inference_mode():
        torch.testing.assert_close(other(clips), twin(clips), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_torchvisions_full_model_computes_the_same_here() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.video.mvit_v2_s().eval()
    ours = mv.create_model("mvitv2_s_16x4").eval()
    mv.load_weights(ours, theirs.state_dict())
    clips = torch.randn(1, 3, 16, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(ours(clips), theirs(clips), atol=1e-4, rtol=0)


def test_a_timm_model_computes_the_same_here() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("mvitv2_tiny", num_classes=7).eval()
    ours = mv.create_model("mvitv2_t_224", num_classes=7).eval()
    report = mv.load_weights(ours, theirs.state_dict())
    assert any("pool_q" in name for name in report.reshaped)
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images[:, :, None]), theirs(images), atol=1e-4, rtol=0)


@pytest.mark.parametrize("squeezed", [False, True], ids=["5-d pooling kernels", "4-d pooling kernels"])
def test_image_weights_become_a_video_models_as_in_pyslowfast(squeezed: bool) -> None:
    facts = IMAGE_TO_VIDEO["image_init"]
    weights = {
        name: torch.from_numpy(value)
        for name, value in golden_weights.weights(IMAGE_TO_VIDEO["image_params"]).items()
    }
    if squeezed:
        weights = {n: v.squeeze(2) if ".pool_" in n else v for n, v in weights.items()}
    model = mv.create_model(
        "mvitv2_s_16x4",
        num_classes=3,
        embed_dim=32,
        stages=(1, 2, 1),
        kv_stride=(1, 4, 4),
        num_frames=IMAGE_TO_VIDEO["video_frames"],
        crop_size=IMAGE_TO_VIDEO["video_crop"],
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = mv.load_weights(model, weights, head="new")
    assert sorted(report.fresh) == sorted(facts["not_loaded"])
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in report.fresh)
    assert sorted(set(after) - set(report.fresh)) == sorted(facts["loaded"])
    for name, fact in facts["loaded"].items():
        value = after[name]
        assert list(value.shape) == fact["shape"]
        assert value.double().sum().item() == pytest.approx(fact["sum"], abs=1e-2)
        assert value.double().abs().sum().item() == pytest.approx(fact["abs_sum"], rel=1e-5)
        torch.testing.assert_close(value.flatten()[:8], torch.tensor(fact["first8"]), atol=1e-6, rtol=0)


def test_tables_fit_another_resolution_and_length() -> None:
    source = tiny()
    larger = mv.create_model("mvitv2_s_16x4", **{**TINY, "crop_size": 64, "num_frames": 8}).eval()
    report = mv.load_weights(larger, source.state_dict())
    assert len(report.interpolated) == 6
    clips = torch.randn(1, 3, 8, 64, 64)
    with torch.inference_mode():  # the tables that a model interpolates at run time are the same
        torch.testing.assert_close(larger(clips), source(clips), atol=1e-5, rtol=0)


def test_absolute_positions_fit_too() -> None:
    source = randomized(mv.create_model("mvitv1_b_16x4", **TINY))
    larger = mv.create_model("mvitv1_b_16x4", **{**TINY, "crop_size": 64, "num_frames": 8})
    report = mv.load_weights(larger, source.state_dict())
    assert sorted(report.interpolated) == ["pos_embed_spatial", "pos_embed_temporal"]


def test_a_new_head_is_kept_when_asked_for() -> None:
    source, model = tiny(), tiny(num_classes=9)
    source.class_names = tuple("abcde")
    with pytest.raises(mv.CheckpointError, match=r"its head has 5 classes, the model has 9; .*head=new"):
        mv.load_weights(model, source.state_dict())
    head = model.head.projection.weight.clone()
    report = mv.load_weights(model, source.state_dict(), head="new")
    assert report.fresh == ("head.projection.weight", "head.projection.bias")
    assert torch.equal(model.head.projection.weight, head)
    assert torch.equal(model.norm.weight, source.norm.weight)
    assert "2 fresh: head.projection.weight" in str(report)
    with pytest.raises(mv.ConfigError, match="head must be 'strict' or 'new', got 'old'"):
        mv.load_weights(model, source.state_dict(), head="old")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda s: s.update({"blocks.0.attn.rel_pos_h": torch.zeros(7, 4)}),
            "blocks.0.attn.rel_pos_h is (7, 4)",
        ),
        (
            lambda s: s.update({"patch_embed.proj.weight": torch.zeros(16, 3, 2, 7, 7)}),
            "patch_embed.proj.weight is (16, 3, 2, 7, 7)",
        ),
        (
            lambda s: s.update({"norm.bias": torch.zeros(32).to_sparse()}),
            "norm.bias holds torch.float32 (torch.sparse_coo), expected dense floats",
        ),
        (
            lambda s: s.update({"norm.bias": torch.zeros(32, dtype=torch.int8)}),
            "norm.bias holds torch.int8 (torch.strided), expected dense floats",
        ),
    ],
)
def test_anything_else_is_an_error_and_changes_nothing(change, expected: str) -> None:
    state, model = dict(tiny().state_dict()), tiny()
    change(state)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(mv.CheckpointError) as error:
        mv.load_weights(model, state)
    assert expected in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["model.safetensors", "model.pyth"])
def test_saved_weights_come_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    model = tiny(pool_mode="max", class_token=False, q_strides=((0, 1, 1, 1), (1, 1, 2, 2)))
    model.class_names = tuple("vwxyz")
    save_weights(model, tmp_path / name)
    again = mv.load_model(tmp_path / name)
    assert again.config == model.config
    assert again.protocol == model.protocol
    assert again.class_names == model.class_names
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True)
    )
    other = mv.create_model("mvitv2_s_16x4", **TINY, pool_mode="max", class_token=False)
    mv.load_weights(other, tmp_path / name)
    assert torch.equal(other.norm.weight, model.norm.weight)


def test_bare_and_broken_safetensors(tmp_path: Path) -> None:
    model = tiny()
    save_file(dict(model.state_dict()), tmp_path / "bare.safetensors")
    mv.load_weights(tiny(), tmp_path / "bare.safetensors")
    with pytest.raises(mv.CheckpointError, match=r"bare\.safetensors: holds weights but not which model"):
        mv.load_model(tmp_path / "bare.safetensors")
    whole = (tmp_path / "bare.safetensors").read_bytes()
    for content in (b"", b"no weights", whole[: len(whole) // 2]):
        (tmp_path / "broken.safetensors").write_bytes(content)
        with pytest.raises(mv.CheckpointError, match=r"broken\.safetensors: not a safetensors file"):
            mv.load_weights(tiny(), tmp_path / "broken.safetensors")


@torch.inference_mode()
@pytest.mark.parametrize("joint", ["space", "space_time"])
def test_joint_relative_tables_fit_another_size(joint: str) -> None:
    source = tiny(rel_pos_joint=joint)
    larger = tiny(rel_pos_joint=joint, crop_size=64, num_frames=8)
    assert mv.load_weights(larger, source.state_dict()).interpolated
    clips = torch.randn(1, 3, 8, 64, 64)
    torch.testing.assert_close(larger(clips), source(clips), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("size", [{"crop_size": 64}, {"num_frames": 8}], ids=str)
def test_joint_absolute_table_fits_other_frames_or_another_number(size: dict[str, int]) -> None:
    source, larger = tiny(abs_pos="joint"), tiny(abs_pos="joint", **size)
    assert "pos_embed" in mv.load_weights(larger, source.state_dict()).interpolated
    clips = torch.randn(1, 3, larger.config.num_frames, *[larger.config.crop_size] * 2)
    torch.testing.assert_close(larger(clips), source(clips), atol=1e-5, rtol=1e-5)


def test_joint_absolute_table_of_an_unknown_grid_is_refused() -> None:
    options = {"abs_pos": "joint", "rel_pos_spatial": False, "rel_pos_temporal": False}
    source, other = tiny(**options), tiny(**options, crop_size=64, num_frames=6)
    with pytest.raises(mv.CheckpointError, match=r"pos_embed is .*, expected "):
        mv.load_weights(other, source.state_dict())


def test_timms_class_token_is_refused() -> None:
    weights = {"stages.0.blocks.0.norm1.weight": torch.ones(8), "cls_token": torch.zeros(1, 1, 8)}
    with pytest.raises(mv.CheckpointError, match="timm adds the pooled queries to it"):
        mv.load_weights(tiny(), weights)


def test_report_takes_the_blocks_together() -> None:
    report = mv.load_weights(tiny(), tiny(crop_size=64).state_dict())
    assert "4 interpolated: blocks.*.attn.rel_pos_h (x2), blocks.*.attn.rel_pos_w (x2)" in str(report)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model_state": {"norm.bias": "os.system", "norm.weight": torch.ones(1)}}, r"'norm\.bias' is a str"),
        ({"model_state": {3: torch.ones(1)}}, "3 is a Tensor|no weights"),
        ({"model_state": "os.system"}, "no weights found; its keys are model_state"),
        ({"state_dict": {}}, "no weights found; its keys are state_dict"),
        ({"epoch": 3, "weights": [1.0]}, "no weights found; its keys are epoch, weights"),
    ],
)
def test_entries_that_are_no_weights_are_named(content, said: str) -> None:
    with pytest.raises(mv.CheckpointError, match=said):
        mv.load_weights(tiny(), content)


def test_safetensors_without_a_suffix(tmp_path: Path) -> None:
    source = tiny()
    save_weights(source, tmp_path / "model.safetensors")
    path = (tmp_path / "model.safetensors").rename(tmp_path / "model")
    assert torch.equal(mv.load_model(path).norm.weight, source.norm.weight)


# PySlowFast's configuration of a model


@pytest.mark.parametrize("name", [n for n in mv.list_models() if n != "mvitv2_nano_8x4"])
def test_named_models_have_official_configurations(name: str) -> None:
    variant = VARIANTS[name]
    described = parse_cfg(make_cfg(variant.config, variant.protocol), name)
    assert replace(described.config, kv_stride=variant.config.kv_stride) == variant.config
    assert described.protocol == variant.protocol


def test_an_exported_configuration_reads_frames_as_ours_does() -> None:
    variant = VARIANTS["mvitv2_l_40x3"]
    segments = replace(
        variant.protocol,
        sampling="segment",
        num_clips=1,
        mean=variant.protocol.mean[::-1],
        std=(0.1, 0.2, 0.3),
    )
    exported = make_cfg(variant.config, segments)
    assert exported["DATA"]["REVERSE_INPUT_CHANNEL"] is True
    assert exported["DATA"]["MEAN"] == list(variant.protocol.mean)
    assert parse_cfg(exported, "cfg").protocol == segments
    assert make_cfg(variant.config, variant.protocol)["DATA"]["USE_OFFSET_SAMPLING"] is True


@pytest.mark.parametrize(
    ("data", "short_side"),
    [
        ({"TRAIN_CROP_SIZE": 312, "TRAIN_JITTER_SCALES": [356, 446]}, 356),
        ({"TRAIN_CROP_SIZE": 224}, 256),
        ({"TRAIN_CROP_SIZE": 288, "NUM_FRAMES": 1}, 329),
    ],
)
def test_one_crop_is_cut_out_of_the_short_side_of_the_training(data: dict, short_side: int) -> None:
    cfg = make_cfg(VARIANTS["mvitv2_s_16x4"].config, VARIANTS["mvitv2_s_16x4"].protocol)
    cfg["DATA"] = data
    assert parse_cfg(cfg, "cfg").protocol.short_side == short_side


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": False, "mean_pooling": True},
        {"dim_mul_in_attention": False, "abs_pos": "separable", "norm_stem": True},
        {"pool_mode": "max", "separate_qkv": True},
        {"pool_kernel": "stride", "pool_q_every_block": False, "patch_padding": (0, 3, 3)},
        {"attention": "full", "qkv_bias": False},
        {"q_strides": ((0, 1, 2, 2),), "kv_strides": ((1, 1, 2, 2),)},
    ],
    ids=str,
)
@torch.inference_mode()
def test_pyslowfast_files_carry_their_configuration(options, tmp_path: Path) -> None:
    model = tiny(**options)
    save_weights(model, tmp_path / "model.pyth")
    content = torch.load(tmp_path / "model.pyth", weights_only=True)
    again = mv.from_slowfast({key: content[key] for key in ("model_state", "cfg")})
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())
    clips = torch.randn(1, 3, 4, 32, 32)
    assert torch.equal(again(clips), model(clips))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rel_pos_joint": "space"}, "rel_pos_joint='space'"),
        ({"attention": "window", "window": (1, 2, 2)}, "attention='window'"),
    ],
)
def test_what_pyslowfast_cannot_express_is_named_and_left_out(options, named: str, tmp_path: Path) -> None:
    model = tiny(**options)
    with pytest.raises(mv.CheckpointError, match=f"PySlowFast has no options for a model with .*{named}"):
        make_cfg(model.config, model.protocol)
    save_weights(model, tmp_path / "model.pyth")
    assert "cfg" not in torch.load(tmp_path / "model.pyth", weights_only=True)
    assert mv.load_model(tmp_path / "model.pyth").config == model.config


def test_ctrl_c_while_saving_comes_when_the_file_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def interrupted(content: object, file: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save(content, file)

    monkeypatch.setattr(torch, "save", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
    model = mv.create_model("mvitv2_nano_8x4", 3, embed_dim=8, stages=(1, 1), crop_size=16, num_frames=2)
    try:
        with pytest.raises(KeyboardInterrupt):
            save_weights(model, tmp_path / "model.pyth")
    finally:
        signal.signal(signal.SIGINT, before)
    assert mv.load_model(tmp_path / "model.pyth").config == model.config
