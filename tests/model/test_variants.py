"""The named models: published counts, official logits, other implementations, config files."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from golden_models import golden, golden_input, golden_state
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from peers import randomized, torchvision_twin
from torch import Tensor

from mvit_video.errors import ConfigError
from mvit_video.model import ClipSpec, MViT, MViTConfig, describe, list_models
from mvit_video.model.baselines import BASELINES
from mvit_video.model.clip_spec import IMAGENET_MEAN, IMAGENET_STD
from mvit_video.model.variants import VARIANTS
from mvit_video.weights import create_model, from_slowfast, load_weights

CONF = Path(__file__).parents[2] / "conf" / "model"
TOLERANCE = 1e-4  # float32 against float32, on logits of a standard deviation of 3

# Parameters and billions of multiply-adds, of the official code or (v1, H) as published.
COUNTS = {
    "mvitv2_s_16x4": (34_537_744, 64.457),
    "mvitv2_b_32x3": (51_230_128, 225.170),
    "mvitv2_l_40x3": (213_390_112, 2828.101),
    "mvitv1_b_16x4": (36_610_672, 70.804),
    "mvitv1_b_32x3": (36_611_440, 170.37),
    "mvitv2_t_224": (24_173_320, 4.7042),
    "mvitv2_s_224": (34_870_216, 6.998),
    "mvitv2_b_224": (51_472_744, 10.159),
    "mvitv2_l_224": (217_992_952, 43.869),
    "mvitv2_h_224": (666_879_912, 120.64),
}


def assert_logits(model: MViT, case: str) -> None:
    with torch.inference_mode():
        found = model(golden_input(case).unsqueeze(2))[0]
    torch.testing.assert_close(found, torch.tensor(golden(case)["logits"]), atol=TOLERANCE, rtol=0)


# Counts


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_the_published_ones(name):
    parameters, gmacs = COUNTS[name]
    found = describe(VARIANTS[name].config)
    assert found.parameters == parameters
    assert found.gmacs == pytest.approx(gmacs, rel=5e-5)


@pytest.mark.parametrize("case", ["k400_s_16x4", "in1k_t"])
def test_multiply_adds_are_the_official_ones(case):
    recorded = golden(case)
    with torch.device("meta"):
        config = from_slowfast(recorded["cfg"]).config
    # The recorded products of relative positions are rounded to four digits.
    assert describe(config).gmacs == pytest.approx(recorded["gflops_fvcore"]["total"], rel=1e-6)


@pytest.mark.parametrize(
    ("position", "millions"),
    [
        ({"rel_pos_temporal": False, "rel_pos_spatial": False}, 34.4),
        ({"rel_pos_temporal": False, "rel_pos_spatial": False, "abs_pos": "separable"}, 34.7),
        ({"rel_pos_spatial": False}, 34.4),
        ({"rel_pos_temporal": False}, 34.5),
        ({}, 34.5),
        ({"rel_pos_joint": "space"}, 37.1),
        ({"rel_pos_joint": "space_time"}, 73.7),
    ],
)
def test_positions_have_the_papers_parameters(position, millions):
    with torch.device("meta"):
        config = create_model("mvitv2_s_16x4", **position).config
    assert round(describe(config).parameters / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("attention", "kv_stride", "billions"),
    [
        ("pooling", 4, 7.0),
        ("pooling", 8, 6.3),
        ("pooling_shifted_window", 4, 6.3),
        ("pooling_hybrid_window", 4, 6.4),
    ],
)
def test_attention_costs_what_it_does_in_the_paper(attention, kv_stride, billions):
    # The paper gives 6.4 and 6.5 with windows, whose sizes at 224 pixels it doesn't name.
    with torch.device("meta"):
        config = create_model("mvitv2_s_224", attention=attention, kv_stride=(1, kv_stride, kv_stride)).config
    assert round(describe(config).gmacs, 1) == billions


def test_stages_of_the_small_model():
    found = describe(VARIANTS["mvitv2_s_16x4"].config)
    assert [(s.blocks, s.tokens, s.channels, s.num_heads) for s in found.stages] == [
        (1, (8, 56, 56), 96, 1),
        (2, (8, 28, 28), 192, 2),
        (11, (8, 14, 14), 384, 4),
        (2, (8, 7, 7), 768, 8),
    ]
    assert [s.kv_stride for s in found.stages] == [(1, 8, 8), (1, 4, 4), (1, 2, 2), (1, 1, 1)]
    assert [s.q_stride for s in found.stages] == [(1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2)]
    assert sum(s.gmacs for s in found.stages) < found.gmacs  # which has the patch embedding and the head, too


# Protocols


@pytest.mark.parametrize(
    ("name", "frames", "stride", "crop", "short_side", "views", "imagenet"),
    [
        ("mvitv2_s_16x4", 16, 4, 224, 256, (5, 1), False),
        ("mvitv2_b_32x3", 32, 3, 224, 256, (5, 1), False),
        ("mvitv2_l_40x3", 40, 3, 312, 312, (5, 3), True),
        ("mvitv1_b_16x4", 16, 4, 224, 256, (5, 1), False),
        ("mvitv1_b_32x3", 32, 3, 224, 256, (5, 1), False),
        *((f"mvitv2_{size}_224", 1, 1, 224, 256, (1, 1), True) for size in "tsblh"),
    ],
)
def test_protocols(name, frames, stride, crop, short_side, views, imagenet):
    found = VARIANTS[name].protocol
    assert (found.clip_frames, found.stride, found.crop, found.short_side) == (
        frames,
        stride,
        crop,
        short_side,
    )
    assert (found.num_clips, found.num_crops) == views
    assert ((found.mean, found.std) == (IMAGENET_MEAN, IMAGENET_STD)) is imagenet


# The official code


def test_official_image_configuration_is_the_named_model():
    with torch.device("meta"):
        assert from_slowfast(golden("in1k_t")["cfg"]).config == VARIANTS["mvitv2_t_224"].config


def test_official_image_logits():
    state = golden_state("in1k_t")
    model = create_model("mvitv2_t_224")
    load_weights(model, state)  # with the patch embedding's four axes
    assert_logits(model.eval(), "in1k_t")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_official_image_logits_of_the_other_repository():
    case = "in1k_t_mvitrepo"
    state = golden_state(case)
    pooling = {name: kernel.unsqueeze(2) for name, kernel in state.items() if ".pool_" in name}
    model = create_model("mvitv2_t_224")
    load_weights(model, state | pooling)
    assert_logits(model.eval(), case)


B_CFG = {
    "MVIT": {
        "USE_ABS_POS": False,
        "REL_POS_SPATIAL": True,
        "REL_POS_TEMPORAL": True,
        "DEPTH": 24,
        "PATCH_KERNEL": "(3, 7, 7)",  # as the files write them
        "PATCH_PADDING": "(1, 3, 3)",
        "DROPPATH_RATE": 0.3,
        "DIM_MUL": [[2, 2.0], [5, 2.0], [21, 2.0]],
        "HEAD_MUL": [[2, 2.0], [5, 2.0], [21, 2.0]],
        "POOL_KVQ_KERNEL": [3, 3, 3],
        "POOL_KV_STRIDE_ADAPTIVE": [1, 8, 8],
        "POOL_Q_STRIDE": [[i, 1, *([2, 2] if i in (2, 5, 21) else [1, 1])] for i in range(24)],
        "DIM_MUL_IN_ATT": True,
        "RESIDUAL_POOLING": True,
    },
    "DATA": {"NUM_FRAMES": 32, "SAMPLING_RATE": 3, "TEST_CROP_SIZE": 224},
    "TEST": {"NUM_SPATIAL_CROPS": 1, "NUM_ENSEMBLE_VIEWS": 5},
}
L_CFG = {
    "MVIT": B_CFG["MVIT"]
    | {
        "DEPTH": 48,
        "NUM_HEADS": 2,
        "EMBED_DIM": 144,
        "DROPPATH_RATE": 0.75,
        "DIM_MUL": [[2, 2.0], [8, 2.0], [44, 2.0]],
        "HEAD_MUL": [[2, 2.0], [8, 2.0], [44, 2.0]],
        "POOL_Q_STRIDE": [[i, 1, *([2, 2] if i in (2, 8, 44) else [1, 1])] for i in range(48)],
    },
    "DATA": {
        "NUM_FRAMES": 40,
        "SAMPLING_RATE": 3,
        "TRAIN_CROP_SIZE": 312,
        "TEST_CROP_SIZE": 312,
        "MEAN": list(IMAGENET_MEAN),
        "STD": list(IMAGENET_STD),
    },
    "TEST": {"NUM_SPATIAL_CROPS": 3, "NUM_ENSEMBLE_VIEWS": 5},
}
V1_CFG = {
    "MVIT": {
        "SEP_POS_EMBED": True,
        "PATCH_PADDING": "(1, 3, 3)",
        "DROPPATH_RATE": 0.2,
        "DIM_MUL": [[1, 2.0], [3, 2.0], [14, 2.0]],
        "HEAD_MUL": [[1, 2.0], [3, 2.0], [14, 2.0]],
        "POOL_KVQ_KERNEL": [3, 3, 3],
        "POOL_KV_STRIDE_ADAPTIVE": [1, 8, 8],
        "POOL_Q_STRIDE": [[1, 1, 2, 2], [3, 1, 2, 2], [14, 1, 2, 2]],
    },
    "DATA": {"NUM_FRAMES": 16, "SAMPLING_RATE": 4},
}
OFFICIAL_CFGS = {"mvitv2_b_32x3": B_CFG, "mvitv2_l_40x3": L_CFG, "mvitv1_b_16x4": V1_CFG}


@pytest.mark.parametrize("name", OFFICIAL_CFGS)
def test_official_configuration_is_the_named_model(name, tmp_path):
    path = tmp_path / "official.yaml"
    path.write_text(yaml.safe_dump(OFFICIAL_CFGS[name]))
    with torch.device("meta"):
        for source in (OFFICIAL_CFGS[name], path):
            model = from_slowfast(source)
            assert model.config == VARIANTS[name].config
            assert model.protocol == VARIANTS[name].protocol


def test_segments_and_swapped_channels_of_something_something():
    data = L_CFG["DATA"] | {"REVERSE_INPUT_CHANNEL": True}
    test = {"DATASET": "ssv2", "NUM_SPATIAL_CROPS": 3, "NUM_ENSEMBLE_VIEWS": 1}
    with torch.device("meta"):
        protocol = from_slowfast(L_CFG | {"DATA": data, "TEST": test}).protocol
    assert protocol.sampling == "segment"
    assert (protocol.num_clips, protocol.num_crops, protocol.short_side) == (1, 3, 312)
    assert (protocol.mean, protocol.std) == (IMAGENET_MEAN[::-1], IMAGENET_STD[::-1])


@pytest.mark.parametrize("dim_mul_in_attention", [True, False])
@pytest.mark.parametrize("pool_q_every_block", [True, False])
def test_layout_is_believed_from_the_weights(dim_mul_in_attention, pool_q_every_block):
    # The published L has another number of parameters than its configuration gives.
    layout = {"dim_mul_in_attention": dim_mul_in_attention, "pool_q_every_block": pool_q_every_block}
    other = create_model("mvitv2_t_224", **layout)
    model = from_slowfast({"model_state": other.state_dict(), "cfg": golden("in1k_t")["cfg"]})
    assert model.config == other.config
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


# Other implementations


@torch.inference_mode()
@pytest.mark.parametrize("name", ["mvitv2_s_16x4", "mvitv1_b_16x4"])
@pytest.mark.parametrize(
    "size",
    [{"stages": (1, 1), "num_frames": 4, "crop_size": 64}, pytest.param({}, marks=pytest.mark.slow)],
    ids=["small", "full"],
)
def test_torchvision_computes_the_same(name, size):
    model = randomized(create_model(name, num_classes=7, **size), std=0.04)
    clips = torch.randn(1, 3, model.config.num_frames, *[model.config.crop_size] * 2)
    found = model(clips)
    assert found.std() > 0.1
    torch.testing.assert_close(found, torchvision_twin(model)(clips), atol=TOLERANCE, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("mvitv2_t_224", "mvitv2_tiny"),
        pytest.param("mvitv2_s_224", "mvitv2_small", marks=pytest.mark.slow),
        pytest.param("mvitv2_b_224", "mvitv2_base", marks=pytest.mark.slow),
        pytest.param("mvitv2_l_224", "mvitv2_large", marks=pytest.mark.slow),
    ],
)
def test_timm_computes_the_same(name, peer):
    timm = pytest.importorskip("timm")
    model = randomized(create_model(name), std=0.03)
    twin = timm.create_model(peer).eval()
    twin.load_state_dict(timm_state(model))
    images = torch.randn(1, 3, 224, 224)
    found = model(images.unsqueeze(2))
    assert found.std() > 0.1
    torch.testing.assert_close(found, twin(images), atol=TOLERANCE, rtol=0)


def timm_state(model: MViT) -> dict[str, Tensor]:
    """timm groups blocks in stages and has no time axis in its kernels."""
    starts = model.config.stage_starts
    shortcut = "shortcut_proj_attn" if model.config.dim_mul_in_attention else "shortcut_proj_mlp"

    def rename(match: re.Match[str]) -> str:
        index = int(match[1])
        stage = sum(start <= index for start in starts) - 1
        part = shortcut if match[2] == "proj" else match[2]
        return f"stages.{stage}.blocks.{index - starts[stage]}.{part}."

    state = {}
    for name, value in model.state_dict().items():
        name = re.sub(r"^blocks\.(\d+)\.(\w+)\.", rename, name).replace("head.projection", "head.fc")
        state[name] = value.squeeze(2) if ".pool_" in name else value
    return state


# Config files


def composed(name: str, *overrides: str) -> Any:
    with initialize_config_dir(str(CONF.parent), version_base="1.3"):
        return compose(overrides=[f"+model={name}", *overrides]).model


def test_every_model_has_a_config_file():
    names = {path.stem for path in CONF.glob("[!_]*.yaml")}
    assert names >= set(list_models()) | set(BASELINES)


@pytest.mark.parametrize("name", list_models())
def test_config_file_builds_its_model(name):
    with torch.device("meta"):
        model = instantiate(composed(name), num_classes=3)
    assert model.config.num_classes == 3
    assert model.config == create_config(name, num_classes=3)
    assert model.protocol == VARIANTS[name].protocol


def create_config(name: str, **overrides: Any) -> MViTConfig:
    with torch.device("meta"):
        return create_model(name, **overrides).config


def test_config_file_lists_every_field():
    listed = yaml.safe_load((CONF / "_fields.yaml").read_text())
    names = [field.name for field in fields(MViTConfig) if field.name != "num_classes"]
    assert list(listed) == [*names, "weights"]
    assert set(listed.values()) == {None}


def test_fields_can_be_overridden_from_the_command_line():
    name = "mvitv2_nano_8x4"
    overrides = [
        "drop_path=0.3",
        "stages=[1,1]",
        "q_strides=[[1,1,2,2]]",
        "attention=full",
        "pool_kernel=stride",
    ]
    with torch.device("meta"):
        model = instantiate(composed(name, *(f"model.{override}" for override in overrides)))
    expected = create_config(
        name,
        drop_path=0.3,
        stages=(1, 1),
        q_strides=((1, 1, 2, 2),),
        attention="full",
        pool_kernel="stride",
    )
    assert model.config == expected


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("none", ("none", False, False, "none")),
        ("absolute", ("separable", False, False, "none")),
        ("time", ("none", True, False, "none")),
        ("space", ("none", False, True, "none")),
        ("space_time", ("none", True, True, "none")),
        ("joint_space", ("none", True, True, "space")),
        ("joint_space_time", ("none", True, True, "space_time")),
    ],
)
def test_position_files_are_the_papers_ablation(position, expected):
    with torch.device("meta"):
        model = instantiate(composed("mvitv2_nano_8x4", f"+model/position={position}"))
    config = model.config
    found = (config.abs_pos, config.rel_pos_temporal, config.rel_pos_spatial, config.rel_pos_joint)
    assert found == expected


def test_a_model_that_no_machine_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match="billion parameters"):
        create_model("mvitv2_nano_8x4", embed_dim=200_000)
    with pytest.raises(ValueError, match="crop_size 4 is too small"):
        create_model("mvitv2_nano_8x4", crop_size=4)


def test_settings_take_lists_and_numpys_numbers():
    spec = ClipSpec(clip_frames=np.int64(8), target_fps=np.float32(25), mean=[0.5, np.float64(0.25), 0])
    assert spec == ClipSpec(clip_frames=8, target_fps=25.0, mean=(0.5, 0.25, 0))
    assert {type(spec.clip_frames), type(spec.target_fps)} == {int, float}  # as checkpoints can hold them
    for wrong in ({"clip_frames": True}, {"mean": [0.5, 0.5]}, {"target_fps": float("nan")}, {"crop": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ClipSpec(**wrong)
