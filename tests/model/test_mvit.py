"""The models against the official ones (tests/reference), and how they behave."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from golden_models import golden, golden_input, golden_state
from plain_attention import PlainAttention
from torch import Tensor

from mvit_video.errors import ConfigError
from mvit_video.model import ClipSpec, MViT, MViTConfig, list_models
from mvit_video.model import positions as positions_module
from mvit_video.model.mvit import Block, plan_blocks
from mvit_video.weights import create_model, from_slowfast, load_weights
from mvit_video.weights.pyslowfast import read_cfg

TOLERANCE = 5e-5  # float32 on both sides; the official code differs from its own float64 by 7e-6

CASES = [
    "tiny_v2",
    "tiny_v2_offsize",
    "tiny_v2_at_156",
    "k400_s_16x4",
    pytest.param("ssv2_s_16x4", marks=pytest.mark.slow),
    "in1k_t",
]

# The official image models have a 2-d patch embedding and strides listed block by block: a clip of one frame.
IMAGE_CONFIG = MViTConfig(
    num_classes=1000,
    num_frames=1,
    stages=(1, 2, 5, 2),
    patch_kernel=(1, 7, 7),
    patch_stride=(1, 4, 4),
    pool_kernel=(1, 3, 3),
    kv_stride=(1, 4, 4),
    class_token=False,
    rel_pos_temporal=False,
)


def build_golden(case: str) -> MViT:
    state = golden_state(case)
    if case != "in1k_t":
        return from_slowfast({"model_state": state, "cfg": golden(case)["cfg"]})
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].unsqueeze(2)
    model = MViT(IMAGE_CONFIG)
    load_weights(model, state)
    return model.eval()


@pytest.fixture(scope="module", params=CASES)
def case(request) -> str:
    return request.param


@pytest.fixture(scope="module")
@torch.inference_mode()
def found(case) -> dict[str, Any]:
    """One forward pass of a recorded case, with everything that its record tells about."""
    model = build_golden(case)
    clip = golden_input(case)
    clip = clip.unsqueeze(2) if clip.ndim == 4 else clip
    blocks: list[tuple[Tensor, tuple[int, int, int]]] = []
    lengths: list[tuple[int, int]] = []  # of queries and keys, per axis and block
    look_up = positions_module.relative_positions

    def spy(table, q_lengths, k_lengths):
        lengths.extend(zip(q_lengths, k_lengths, strict=True))
        return look_up(table, q_lengths, k_lengths)

    for block in model.blocks:
        block.register_forward_hook(lambda module, given, result: blocks.append(result))
    head_input: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda module, given: head_input.append(given[0]))
    patch_embed: list[Tensor] = []
    model.patch_embed.register_forward_hook(lambda module, given, result: patch_embed.append(result[0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(positions_module, "relative_positions", spy)
        logits = model(clip)
    return {
        "model": model,
        "patch_embed": patch_embed[0],
        "blocks": blocks,
        "lengths": lengths,
        "head_input": head_input[0][0],
        "logits": logits[0],
    }


def assert_matches_summary(tokens: Tensor, expected: dict[str, Any]) -> None:
    assert list(tokens.shape) == expected["shape"]
    flat = tokens.flatten()
    for values, key in ((flat[:8], "first8"), (flat[-8:], "last8")):
        torch.testing.assert_close(
            values,
            torch.tensor(expected[key]),
            atol=TOLERANCE,
            rtol=0,
            msg=lambda m, k=key: f"{k}: {m}",
        )
    assert tokens.double().mean().item() == pytest.approx(expected["mean"], abs=1e-6)
    assert tokens.double().std(correction=0).item() == pytest.approx(expected["std"], abs=1e-6)


class TestAgainstOfficialModel:
    def test_parameters(self, case, found):
        expected = {name: tuple(shape) for name, shape in golden(case)["params"]}
        if case == "in1k_t":
            expected["patch_embed.proj.weight"] = (96, 3, 1, 7, 7)
        model = found["model"]
        assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
        assert sum(p.numel() for p in model.parameters()) == golden(case)["param_count"]

    def test_patch_embedding(self, case, found):
        assert_matches_summary(found["patch_embed"], golden(case)["patch_embed"])

    def test_every_block(self, case, found):
        blocks = found["blocks"]
        assert len(blocks) == len(golden(case)["blocks"])
        for (tokens, grid), expected in zip(blocks, golden(case)["blocks"], strict=True):
            assert list(grid) == expected["thw"]
            assert_matches_summary(tokens, expected)

    def test_grids_of_queries_and_keys(self, case, found):
        axes = slice(0 if golden(case)["cfg"]["MVIT"]["REL_POS_TEMPORAL"] else 1, None)
        expected = [
            pair
            for block in golden(case)["blocks"]
            for pair in list(zip(block["thw"], block["k_thw"], strict=True))[axes]
        ]
        assert found["lengths"] == expected

    def test_head_input(self, case, found):
        expected = torch.tensor(golden(case)["head_input"])
        torch.testing.assert_close(found["head_input"], expected, atol=TOLERANCE, rtol=0)

    def test_logits(self, case, found):
        expected = torch.tensor(golden(case)["logits"])
        torch.testing.assert_close(found["logits"], expected, atol=TOLERANCE, rtol=0)


def test_named_model_is_the_official_one():
    state = golden_state("k400_s_16x4")
    model = create_model("mvitv2_s_16x4")
    load_weights(model, state)
    with torch.inference_mode():
        logits = model.eval()(golden_input("k400_s_16x4"))[0]
    expected = torch.tensor(golden("k400_s_16x4")["logits"])
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)

    official = read_cfg({"model_state": state, "cfg": golden("k400_s_16x4")["cfg"]}, "the official file")
    assert model.config == official.config
    assert model.protocol == official.protocol


def test_parameter_count_of_the_named_model():
    with torch.device("meta"):
        model = create_model("mvitv2_s_16x4")
        assert sum(p.numel() for p in model.parameters()) == 34_537_744
        model = create_model("mvitv2_s_16x4", num_classes=174)
        assert sum(p.numel() for p in model.parameters()) == golden("ssv2_s_16x4")["param_count"]


def multiply_adds(model: MViT, clip: Tensor) -> tuple[float, dict[str, float]]:
    """Billions of multiply-adds of the plain form as fvcore counts them: in all and by operator."""
    for block in model.blocks:
        block.attn = PlainAttention(block.attn)
    analysis = FlopCountAnalysis(model.eval(), clip).unsupported_ops_warnings(False)
    analysis.uncalled_modules_warnings(False).tracer_warnings("none")
    by_operator = {name: count / 1e9 for name, count in analysis.by_operator().items()}
    return sum(by_operator.values()), by_operator


@pytest.mark.filterwarnings("ignore")  # of tracing
@pytest.mark.parametrize(
    "case", ["tiny_v2", "tiny_v2_offsize", pytest.param("k400_s_16x4", marks=pytest.mark.slow)]
)
def test_multiply_adds(case):
    # 64.5 billion for the S model: convolutions, norms, linear layers, the matrix products of attention and
    # of positions in time and, as einsum, the positions along height and width.
    model = from_slowfast({"model_state": golden_state(case), "cfg": golden(case)["cfg"]})
    total, by_operator = multiply_adds(model, golden_input(case))
    expected = golden(case)["gflops_fvcore"]
    assert total == pytest.approx(expected["total"], rel=1e-4)
    assert by_operator == pytest.approx(expected["by_op"], rel=1e-4, abs=1e-6)


# Behaviour


def small_model(seed: int = 0, **overrides: Any) -> MViT:
    torch.manual_seed(seed)
    return create_model("mvitv2_nano_8x4", **({"num_classes": 5, "crop_size": 32} | overrides))


@pytest.fixture
def model() -> MViT:
    return small_model().eval()


@pytest.fixture
def clips() -> Tensor:
    return torch.randn(3, 3, 8, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_an_image_is_a_clip_of_one_frame(model):
    logits = model(torch.randn(2, 3, 1, 32, 32))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()


@torch.inference_mode()
@pytest.mark.parametrize("size", [(8, 32, 32), (5, 33, 47), (16, 64, 20), (1, 4, 4)])
@pytest.mark.parametrize("class_token", [True, False])
def test_other_sizes_than_the_config_names_work(size, class_token):
    assert small_model(class_token=class_token).eval()(torch.randn(1, 3, *size)).shape == (1, 5)


@pytest.mark.parametrize(
    "shape", [(3, 8, 32, 32), (2, 8, 3, 32, 32), (2, 1, 8, 32, 32), (2, 3, 32, 32), (0, 3, 8, 32, 32)]
)
def test_other_shapes_are_refused_by_name(model, shape):
    with pytest.raises(ValueError, match=r"expected clips of shape \(B, 3, T, H, W\), got") as caught:
        model(torch.zeros(shape))
    assert str(shape) in str(caught.value)


@torch.inference_mode()
def test_a_clip_is_independent_of_its_neighbours(model, clips):
    model, clips = model.double(), clips.double()
    alone = torch.cat([model(clip[None]) for clip in clips])
    torch.testing.assert_close(model(clips), alone, atol=1e-12, rtol=0)


@torch.inference_mode()
def test_eval_is_deterministic_and_training_drops(clips):
    model = small_model(drop_path=0.5, head_dropout=0.5)
    assert not torch.equal(model(clips), model(clips))
    model.eval()
    assert torch.equal(model(clips), model(clips))
    undropped = small_model(drop_path=0.0, head_dropout=0.0)
    undropped.load_state_dict(model.state_dict())
    assert torch.equal(undropped(clips), model(clips))  # undropped is in training mode


@torch.inference_mode()
def test_drop_path_keeps_the_expectation():
    config = MViTConfig(embed_dim=8, stages=(2,), num_frames=2, crop_size=8, drop_path=0.25)
    *_, plan = plan_blocks(config)
    torch.manual_seed(0)
    block = Block(plan, config).double()
    torch.nn.init.zeros_(block.mlp.fc2.weight)  # leaves the attention branch alone
    torch.nn.init.zeros_(block.mlp.fc2.bias)
    samples = 4000
    tokens = torch.randn(1, 5, 8, dtype=torch.float64).expand(samples, -1, -1)
    branch = block.eval()(tokens, (1, 2, 2))[0] - tokens
    dropped = block.train()(tokens, (1, 2, 2))[0] - tokens
    kept = dropped.abs().amax((1, 2)) > 0
    # Per sample all or nothing, kept ones scaled up.
    torch.testing.assert_close(dropped[kept], branch[kept] / 0.75, atol=1e-12, rtol=0)
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.03)  # four standard deviations


def test_drop_path_grows_linearly_over_the_depth():
    rates = [plan.drop_path for plan in plan_blocks(MViTConfig(stages=(1, 2, 1), drop_path=0.3))]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert [plan.drop_path for plan in plan_blocks(MViTConfig(stages=(1,), drop_path=0.3))] == [0.0]


def test_plan_of_the_small_model():
    # The paper's table 1 and the official configuration, written out.
    plans = list(plan_blocks(create_config("mvitv2_s_16x4")))
    assert [p.dim for p in plans] == [96, 96, 192, 192] + [384] * 11 + [768]
    assert [p.dim_out for p in plans] == [96] + [192] * 2 + [384] * 11 + [768] * 2
    assert [p.num_heads for p in plans] == [1] + [2] * 2 + [4] * 11 + [8] * 2
    assert [p.kv_stride[1] for p in plans] == [8] + [4] * 2 + [2] * 11 + [1] * 2
    assert [index for index, p in enumerate(plans) if p.q_stride == (1, 2, 2)] == [1, 3, 14]
    assert [p.grid for p in plans] == [(8, 56, 56)] * 2 + [(8, 28, 28)] * 2 + [(8, 14, 14)] * 11 + [(8, 7, 7)]


def create_config(name: str, **overrides: Any) -> MViTConfig:
    with torch.device("meta"):
        return create_model(name, **overrides).config


@pytest.mark.parametrize("class_token", [True, False], ids=["class token", "mean token"])
def test_gradients_reach_every_parameter_that_can_matter(class_token):
    overrides = {"embed_dim": 16, "class_token": class_token}
    model = small_model(**overrides, drop_path=0.0, head_dropout=0.0).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise, alpha=0.2)
    logits = model(torch.randn(2, 3, 8, 32, 32, generator=generator, dtype=torch.float64))
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()

    idle = {
        f"blocks.{i}.attn.norm_k.bias" for i in range(len(model.blocks))
    }  # shifts logits of a query alike
    if class_token:  # the last block's queries on the grid aren't read
        last = f"blocks.{len(model.blocks) - 1}.attn"
        idle |= {f"{last}.{name}" for name in ("pool_q.weight", "rel_pos_t", "rel_pos_h", "rel_pos_w")}
    largest = {name: parameter.grad.abs().max().item() for name, parameter in model.named_parameters()}
    assert {name for name, gradient in largest.items() if gradient < 1e-12} == idle
    assert min(gradient for name, gradient in largest.items() if name not in idle) > 1e-6


@torch.inference_mode()
def test_state_dict_round_trip(model, clips):
    other = small_model(seed=7).eval()
    assert not torch.equal(other(clips), model(clips))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(clips), model(clips))


def test_fresh_weights_follow_the_official_initialisation():
    state = small_model(embed_dim=64).state_dict()
    for name, value in state.items():
        if name.endswith("bias") and "patch_embed" not in name:
            assert value.eq(0.02).all(), name
        elif "norm" in name and name.endswith("weight"):
            assert value.eq(1).all(), name
        elif name.endswith("bias"):
            continue  # the patch embedding keeps torch's
        elif value.numel() > 1000:
            assert value.std().item() == pytest.approx(0.02, rel=0.1), name


# Configurations


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_classes", 0),
        ("num_frames", 0),
        ("crop_size", -1),
        ("embed_dim", 0),
        ("num_heads", 0),
        ("mlp_ratio", 0.0),
        ("drop_path", 1.0),
        ("drop_path", -0.1),
        ("head_dropout", 1.0),
        ("head_dropout", -0.1),
        ("patch_kernel", (3, 7)),
        ("patch_kernel", (3, 7, 0)),
        ("patch_stride", (2, 4, 4, 4)),
        ("patch_stride", (0, 4, 4)),
        ("pool_kernel", (3,)),
        ("pool_kernel", (3, -3, 3)),
        ("q_stride", (2, 2)),
        ("q_stride", (1, 0, 2)),
        ("kv_stride", ()),
        ("kv_stride", (1, 8, 0)),
        ("stages", ()),
        ("stages", (1, 0, 2)),
        ("num_heads", 5),
    ],
)
def test_config_out_of_range_names_the_field_and_the_value(field, value):
    with pytest.raises(ValueError, match=rf"\b{field}\b") as caught:
        MViTConfig(**{field: value})
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clip_frames", 0),
        ("stride", 0),
        ("target_fps", 0.0),
        ("target_fps", 1e-300),
        ("num_clips", 0),
        ("short_side", 0),
        ("crop", 0),
        ("crop", 300),
        ("sampling", "random"),
        ("num_crops", 2),
        ("mean", (0.5, 0.5)),
        ("std", (0.5, 0.5, 0.0)),
    ],
)
def test_protocol_out_of_range_names_the_field_and_the_value(field, value):
    with pytest.raises(ValueError, match=rf"\b{field}\b") as caught:
        ClipSpec(**{field: value})
    assert str(value) in str(caught.value)


def test_protocol_reads_as_a_line():
    assert str(ClipSpec()) == ("5 clips x 1 crop, 16 frames x stride 4 at 30 fps, short side 256, crop 224")
    segments = ClipSpec(sampling="segment", num_crops=3)
    assert str(segments) == "1 clip over segments x 3 crops, 16 frames, short side 256, crop 224"


# Models by name


def test_list_models_are_the_ones_that_can_be_made():
    assert list_models() == sorted(list_models())
    assert "mvitv2_s_16x4" in list_models()
    with torch.device("meta"):
        for name in list_models():
            model = create_model(name)
            assert model.protocol.clip_frames == model.config.num_frames
            assert model.protocol.crop == model.config.crop_size


def test_unknown_name_suggests_the_nearest_and_lists_all():
    with pytest.raises(
        ConfigError, match=r"unknown model 'mvitv2_s_16x5' \(did you mean 'mvitv2_s_16x4'\?\)"
    ) as e:
        create_model("mvitv2_s_16x5")
    assert all(name in str(e.value) for name in list_models())
    with pytest.raises(ConfigError, match=r"unknown model 'slowfast'; known: "):
        create_model("slowfast")


def test_unknown_field_suggests_the_nearest_and_lists_all():
    with pytest.raises(
        ConfigError, match=r"MViTConfig has no 'drop_paths' \(did you mean 'drop_path'\?\)"
    ) as e:
        create_model("mvitv2_nano_8x4", drop_paths=0.1)
    assert all(field in str(e.value) for field in asdict(MViTConfig()))


def test_overrides_change_their_fields_only():
    before = create_config("mvitv2_nano_8x4")
    after = create_config("mvitv2_nano_8x4", num_classes=7, drop_path=0.1, stages=[1, 1], kv_stride=[1, 2, 2])
    # Lists, as yaml gives them, become tuples.
    assert after == replace(before, num_classes=7, drop_path=0.1, stages=(1, 1), kv_stride=(1, 2, 2))
    assert create_config("mvitv2_nano_8x4") == before


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, (16, 256, 224)),
        ({"num_frames": 32}, (32, 256, 224)),
        ({"crop_size": 312}, (16, 356, 312)),
        ({"crop_size": 112, "num_frames": 8}, (8, 128, 112)),
        ({"num_classes": 10}, (16, 256, 224)),
    ],
)
def test_protocol_follows_frames_and_crop(overrides, expected):
    with torch.device("meta"):
        protocol = create_model("mvitv2_s_16x4", **overrides).protocol
    assert (protocol.clip_frames, protocol.short_side, protocol.crop) == expected
    assert (protocol.stride, protocol.num_clips, protocol.num_crops) == (4, 5, 1)


def test_protocol_of_a_bare_config():
    model = MViT(MViTConfig(embed_dim=8, stages=(1,), num_frames=4, crop_size=16))
    assert model.protocol == ClipSpec(clip_frames=4, short_side=16, crop=16)
