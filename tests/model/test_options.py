"""The options beyond MViTv2's own: the first version's, the paper's ablations, features."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from layouts import one_attention
from peers import pytorchvideo_twin, randomized
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mvit_video.errors import ConfigError
from mvit_video.model import MViT, MViTConfig, describe, layer_groups
from mvit_video.model.attention import PoolingAttention
from mvit_video.model.config import plan_blocks, round_width
from mvit_video.model.describe import attention_macs, pooled_grids, window_pairs
from mvit_video.model.positions import relative_index
from mvit_video.weights import create_model

Grid = tuple[int, int, int]

TINY = MViTConfig(
    num_classes=5,
    num_frames=4,
    crop_size=32,
    embed_dim=16,
    stages=(1, 2, 1),
    kv_stride=(1, 4, 4),
    window=(2, 4, 4),
    drop_path=0.0,
    head_dropout=0.0,
)
V1 = replace(
    TINY,
    abs_pos="separable",
    rel_pos_temporal=False,
    rel_pos_spatial=False,
    residual_pooling=False,
    pool_q_every_block=False,
    dim_mul_in_attention=False,
    separate_qkv=True,
)
WINDOWS = ["window", "shifted_window", "hybrid_window", "pooling_shifted_window", "pooling_hybrid_window"]


@pytest.fixture
def clips() -> Tensor:
    return torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


# The first version


@torch.inference_mode()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"abs_pos": "joint"},
        {"class_token": False},
        {"pool_mode": "max"},
        {"pool_first": True},
        {"pool_first": True, "pool_mode": "max"},
        {"pool_kernel": "stride"},
        {"qkv_bias": False},
        {"q_stride": (2, 2, 2), "kv_stride": (2, 4, 4)},
    ],
    ids=str,
)
def test_pytorchvideo_computes_the_same(options, clips):
    model = randomized(MViT(replace(V1, **options)))
    found = model(clips)
    assert found.std() > 0.1
    torch.testing.assert_close(found, pytorchvideo_twin(model)(clips), atol=1e-5, rtol=0)


# Attention, cell by cell


def slow_attention(attention: PoolingAttention, x: Tensor, grid: Grid) -> Tensor:
    """What the attention must return, with the bias of every pair and windows as a mask over all pairs."""
    heads, first = attention.num_heads, attention.num_prefix_tokens

    def project(x: Tensor, which: int) -> Tensor:
        if attention.qkv is not None:
            return attention.qkv(x).chunk(3, -1)[which]
        return getattr(attention, "qkv"[which])(x)

    def pool(x: Tensor, name: str) -> tuple[Tensor, Grid]:
        pooling, norm = getattr(attention, f"pool_{name}"), getattr(attention, f"norm_{name}")
        if pooling is None:
            return x, grid
        width = pooling.in_channels if isinstance(pooling, torch.nn.Conv3d) else x.shape[-1]
        parts, shape = [], grid
        for part in x.split(width, -1):
            volume = pooling(part[:, first:].transpose(1, 2).unflatten(2, grid))
            shape = tuple(volume.shape[2:])
            part = torch.cat([part[:, :first], volume.flatten(2).transpose(1, 2)], 1)
            parts.append(part if norm is None else norm(part))
        return torch.cat(parts, -1), shape

    pooled, grids = [], []
    for which, name in enumerate("qkv"):
        if attention.pool_first:
            tokens, pooled_grid = pool(x, name)
            tokens = project(tokens, which)
        else:
            tokens, pooled_grid = pool(project(x, which), name)
        pooled.append(tokens.unflatten(-1, (heads, -1)).transpose(1, 2))
        grids.append(pooled_grid)
    q, k, v = pooled

    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    logits = logits + F.pad(slow_positions(attention, q[:, :, first:], *grids[:2]), (first, 0, first, 0))
    meets = F.pad(slow_windows(attention, grid, *grids[:2]), (first, 0, first, 0), value=True)
    out = logits.masked_fill(~meets, -math.inf).softmax(-1) @ v
    if attention.residual_pooling:
        out = out + F.pad(q[:, :, first:], (0, 0, first, 0))
    return attention.proj(out.transpose(1, 2).flatten(2))


def cells(grid: Grid) -> list[Grid]:
    return list(itertools.product(*map(range, grid)))


def slow_positions(attention: PoolingAttention, q: Tensor, q_grid: Grid, k_grid: Grid) -> Tensor:
    """(B, n, N, M): what every query says about the position of every key."""
    rows = [relative_index(n, m) for n, m in zip(q_grid, k_grid, strict=True)]
    bias = q.new_zeros(*q.shape[:3], math.prod(k_grid))
    tables = {"t": attention.rel_pos_t, "h": attention.rel_pos_h, "w": attention.rel_pos_w}
    tables |= {"hw": attention.rel_pos_hw, "thw": attention.rel_pos_thw}
    for (i, query), (j, key) in itertools.product(enumerate(cells(q_grid)), enumerate(cells(k_grid))):
        row = {axis: rows[a][query[a], key[a]] for a, axis in enumerate("thw")}
        for axes, table in tables.items():
            if table is not None:
                bias[:, :, i, j] += q[:, :, i] @ table[tuple(row[axis] for axis in axes)]
    return bias


def slow_windows(attention: PoolingAttention, grid: Grid, q_grid: Grid, k_grid: Grid) -> Tensor:
    """(N, M): whether a query's first cell is in a window that holds one of the key's cells."""
    if attention.plan.window is None:
        return torch.ones(math.prod(q_grid), math.prod(k_grid), dtype=torch.bool)

    def window_of(cell: int, axis: int) -> int:
        size = attention.plan.window[axis]
        shift = size - size // 2 if attention.plan.shifted and size < grid[axis] and size > 1 else 0
        return (cell + shift) // size

    def meets(query: int, key: int, axis: int) -> bool:
        stride = attention.plan.kv_stride[axis]
        covered = range(key * stride, min((key + 1) * stride, grid[axis]))
        window = window_of(query * attention.plan.q_stride[axis], axis)
        return any(window_of(cell, axis) == window for cell in covered)

    pairs = itertools.product(cells(q_grid), cells(k_grid))
    flat = [all(meets(q[a], k[a], a) for a in range(3)) for q, k in pairs]
    return torch.tensor(flat).reshape(math.prod(q_grid), math.prod(k_grid))


LAYOUTS = {
    "joint space": {"rel_pos_joint": "space"},
    "joint space without time": {"rel_pos_joint": "space", "rel_pos_temporal": False},
    "joint space-time": {"rel_pos_joint": "space_time"},
    "joint, strided queries": {"rel_pos_joint": "space_time", "q_stride": (1, 2, 2), "kv_stride": (2, 1, 1)},
    "window": {"window": (1, 2, 4)},
    "window, strided keys": {"window": (1, 4, 4), "grid": (1, 8, 8), "kv_stride": (1, 2, 2)},
    "window, strided queries": {"window": (1, 4, 4), "grid": (1, 8, 8), "q_stride": (1, 2, 2)},
    "window that doesn't divide": {"window": (2, 3, 4), "grid": (3, 5, 3)},
    "window smaller than the stride": {"window": (1, 3, 3), "grid": (1, 8, 8), "kv_stride": (1, 4, 4)},
    "window over strides that don't divide": {"window": (1, 5, 5), "grid": (1, 9, 7), "q_stride": (1, 2, 2)},
    "window wider than the grid": {"window": (9, 9, 9)},
    "shifted": {"window": (2, 2, 2), "grid": (4, 4, 4), "shifted": True},
    "shifted by cells that don't divide": {"window": (2, 3, 3), "grid": (3, 5, 4), "shifted": True},
    "shifted, strided": {
        "window": (2, 4, 4),
        "grid": (3, 8, 6),
        "shifted": True,
        "q_stride": (1, 2, 2),
        "kv_stride": (1, 4, 4),
    },
    "windows and joint space": {"window": (1, 2, 2), "rel_pos_joint": "space"},
    "average pooling": {"pool_mode": "avg", "kv_stride": (1, 2, 2)},
    "maximum pooling": {"pool_mode": "max", "kv_stride": (1, 2, 2)},
    "pool first": {"pool_first": True, "kv_stride": (1, 2, 2)},
    "pool first, a kernel for every channel": {"pool_first": True, "pool_mode": "conv_unshared"},
    "separate projections": {"separate_qkv": True},
    "overlap by stride": {"kernel": "stride", "q_stride": (2, 1, 1), "kv_stride": (1, 2, 2)},
    "nothing pooled": {"pools_q": False, "pools_kv": False},
    "no positions": {"rel_pos_temporal": False, "rel_pos_spatial": False},
}


@pytest.mark.parametrize("class_token", [True, False], ids=["class token", "no class token"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_attention_equals_its_slow_form(layout, class_token):
    layout = {"grid": (2, 4, 4), **layout}
    torch.manual_seed(0)
    attention = one_attention(8, 12, 2, class_token=class_token, **layout).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    x = torch.randn(2, math.prod(layout["grid"]) + class_token, 8, dtype=torch.float64, requires_grad=True)
    found, _ = attention(x, layout["grid"])
    expected = slow_attention(attention, x, layout["grid"])
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    weights = torch.randn_like(found)
    gradients = [
        torch.autograd.grad((out * weights).sum(), x, retain_graph=True)[0] for out in (found, expected)
    ]
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=0)


# Positions


def test_relative_index_is_the_float32_arithmetic_of_the_official_code():
    for q, k in itertools.product((1, 2, 3, 5, 7, 10, 13, 14, 20, 28, 39, 56, 78, 97), repeat=2):
        q_step, k_step = max(k / q, 1.0), max(q / k, 1.0)
        distance = torch.arange(q)[:, None] * q_step - torch.arange(k)[None, :] * k_step
        distance += (k - 1) * k_step
        assert torch.equal(relative_index(q, k), distance.long()), (q, k)


@torch.inference_mode()
@pytest.mark.parametrize("joint", ["space", "space_time"])
@pytest.mark.parametrize("size", [(4, 32, 32), (6, 40, 24)], ids=["as made for", "interpolated"])
def test_joint_tables_of_sums_equal_decomposed_ones(joint, size):
    decomposed = randomized(MViT(TINY))
    state = decomposed.state_dict()
    for name in [name for name in state if name.endswith("rel_pos_h")]:
        block = name.removesuffix("h")
        space = state.pop(f"{block}h")[:, None] + state.pop(f"{block}w")
        if joint == "space":
            state[f"{block}hw"] = space
        else:
            state[f"{block}thw"] = state.pop(f"{block}t")[:, None, None] + space
    model = MViT(replace(TINY, rel_pos_joint=joint)).eval()
    model.load_state_dict(state)
    clips = torch.randn(2, 3, *size)
    torch.testing.assert_close(model(clips), decomposed(clips), atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("size", [(4, 32, 32), (6, 40, 24)], ids=["as made for", "interpolated"])
def test_separable_positions_are_summed(class_token, size):
    config = replace(TINY, abs_pos="separable", class_token=class_token)
    separable = randomized(MViT(config))
    state = separable.state_dict()
    times, places = state.pop("pos_embed_temporal"), state.pop("pos_embed_spatial")
    rows = [state.pop("pos_embed_class")] if class_token else []
    rows += [times[:, t, None] + places for t in range(2)]
    joint = MViT(replace(config, abs_pos="joint")).eval()
    joint.load_state_dict(state | {"pos_embed": torch.cat(rows, 1)})
    clips = torch.randn(2, 3, *size)
    torch.testing.assert_close(joint(clips), separable(clips), atol=1e-5, rtol=0)


def test_positions_of_a_clip_of_another_size_are_interpolated():
    model = randomized(MViT(replace(TINY, abs_pos="joint")))
    before = model.embed(torch.zeros(1, 3, 8, 32, 32))[0]
    model.pos_embed = None
    tokens = before - model.embed(torch.zeros(1, 3, 8, 32, 32))[0]
    table = randomized(MViT(replace(TINY, abs_pos="joint"))).pos_embed
    assert torch.equal(tokens[:, :1].round(decimals=5), table[:, :1].round(decimals=5))
    # Two rows of times become four: the first and the last stay, two lie between.
    frames, made_for = tokens[:, 1:].unflatten(1, (4, 64)), table[:, 1:].unflatten(1, (2, 64))
    expected = [made_for[:, 0] * (1 - part) + made_for[:, 1] * part for part in (0, 0.25, 0.75, 1)]
    torch.testing.assert_close(frames, torch.stack(expected, 1), atol=1e-5, rtol=0)


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@torch.inference_mode()
@pytest.mark.parametrize("layout", [{}, {"window": (2, 8, 8)}], ids=str)
def test_no_tensor_is_as_large_as_the_bias(layout):
    grid = (4, 24, 24)
    attention = one_attention(16, 16, 1, grid=grid, **layout).eval()
    tokens = torch.randn(1, math.prod(grid) + 1, 16)
    with LargestTensor() as largest:
        attention(tokens, grid)
    assert largest.numel < math.prod(grid) ** 2 / 3


# Windows


def test_windows_restrict_attention_to_neighbours():
    config = replace(
        TINY,
        attention="window",
        class_token=False,
        stages=(1,),
        patch_kernel=(1, 4, 4),
        patch_padding=(0, 0, 0),
    )
    config = replace(config, patch_stride=(1, 4, 4), window=(1, 4, 4))
    model = randomized(MViT(config)).double()
    clip = torch.randn(1, 3, 4, 32, 32, dtype=torch.float64)
    (before,) = model.forward_stages(clip)
    clip[:, :, 2, :16, 16:] += 1
    (after,) = model.forward_stages(clip)
    changed = (before - after).abs().amax((0, 1)) > 1e-12
    expected = torch.zeros(4, 8, 8, dtype=torch.bool)
    expected[2, :4, 4:] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize(
    ("attention", "windows", "shifted"),
    [
        ("pooling", set(), set()),
        ("full", set(), set()),
        ("window", set(range(10)), set()),
        ("shifted_window", set(range(10)), {3, 6, 8}),
        ("pooling_shifted_window", set(range(10)), {3, 6, 8}),
        ("hybrid_window", set(range(10)) - {4, 6, 9}, set()),
        ("pooling_hybrid_window", set(range(10)) - {4, 6, 9}, set()),
    ],
)
def test_which_blocks_have_windows(attention, windows, shifted):
    plans = list(plan_blocks(MViTConfig(stages=(1, 1, 3, 2, 3), attention=attention)))
    assert {index for index, plan in enumerate(plans) if plan.window} == windows
    assert {index for index, plan in enumerate(plans) if plan.shifted} == shifted


def test_windows_shrink_with_the_grid():
    plans = plan_blocks(MViTConfig(attention="window", window=(8, 56, 56)))
    # A stage's first block gets the tokens of the stage before.
    assert [plan.window[1] for plan in plans] == [56, 56, 28, 28] + [14] * 11 + [7]


@pytest.mark.parametrize("attention", ["full", "window", "shifted_window", "hybrid_window"])
def test_without_pooling_only_stages_pool_queries(attention):
    model = MViT(replace(TINY, attention=attention))
    pooled = {name for name, _ in model.named_modules() if ".pool_" in name}
    assert pooled == {"blocks.1.attn.pool_q", "blocks.3.attn.pool_q"}


@torch.inference_mode()
@pytest.mark.parametrize("attention", WINDOWS)
@pytest.mark.parametrize("frames", [1, 4], ids=["image", "clip"])
def test_windows_over_the_whole_grid_change_nothing(attention, frames):
    config = replace(TINY, window=(9, 99, 99), num_frames=frames)
    without = "pooling" if "pooling" in attention else "full"
    model, plain = (randomized(MViT(replace(config, attention=a))) for a in (attention, without))
    clips = torch.randn(2, 3, frames, 32, 32)
    assert torch.equal(model(clips), plain(clips))
    small = randomized(MViT(replace(config, attention=attention, window=(1, 4, 4))))
    assert not torch.allclose(small(clips), plain(clips), atol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("attention", WINDOWS)
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("size", [(1, 32, 32), (5, 37, 50), (8, 8, 8)])
def test_windows_take_any_size(attention, class_token, size):
    model = randomized(MViT(replace(TINY, attention=attention, class_token=class_token)))
    assert model(torch.randn(1, 3, *size)).isfinite().all()


@pytest.mark.parametrize("attention", WINDOWS)
def test_counted_pairs_are_those_that_meet(attention):
    config = replace(TINY, attention=attention, crop_size=40, window=(1, 3, 4))
    grid = (2, 10, 10)
    counted = 0
    for plan, block in zip(plan_blocks(config), MViT(config).blocks, strict=True):
        q_grid, k_grid = pooled_grids(plan, config, grid)
        if plan.window is not None:
            meets = slow_windows(block.attn, grid, q_grid, k_grid)
            assert window_pairs(plan, grid, q_grid, k_grid) == meets.sum()
            counted += 1
        grid = q_grid
    assert counted


# Layout


@torch.inference_mode()
@pytest.mark.parametrize(
    "options",
    [
        {"dim_mul": ((1, 1.5), (3, 2.0)), "head_mul": ((1, 2.0),)},
        {"dim_mul": ((2, 3.0),), "head_mul": (), "dim_mul_in_attention": False},
        {"q_strides": ((0, 1, 2, 2), (2, 2, 1, 1)), "kv_strides": ((0, 2, 2, 2), (3, 1, 1, 1))},
        {"q_strides": (), "kv_strides": (), "dim_mul": (), "head_mul": ()},
        {"q_stride": (2, 2, 2), "kv_stride": (4, 4, 4)},
        {"pool_first": True, "pool_mode": "max"},
        {"pool_first": True, "pool_mode": "conv_unshared"},
        {"pool_kernel": (1, 1, 1), "kv_stride": (1, 1, 1)},
        {"patch_padding": (0, 0, 0)},
        {"mean_pooling": True},
        {"norm_stem": True, "abs_pos": "joint"},
        {"dropout": 0.5},
        {"rel_pos_joint": "space_time", "class_token": False},
    ],
    ids=str,
)
def test_layouts_run_and_are_counted(options, clips):
    from fvcore.nn import FlopCountAnalysis

    model = randomized(MViT(replace(TINY, **options)))
    assert model(clips).isfinite().all()
    described = describe(model.config)
    assert described.parameters == sum(p.numel() for p in model.parameters())
    # Everything but attention itself, which is one fused call that fvcore doesn't see into.
    analysis = FlopCountAnalysis(model, clips[:1]).unsupported_ops_warnings(False)
    analysis.uncalled_modules_warnings(False).tracer_warnings("none")
    seen = sum(
        count for name, count in analysis.by_operator().items() if name in ("conv", "linear", "layer_norm")
    )
    attention = attention_macs_of(model, clips)
    assert described.gmacs * 1e9 == pytest.approx(seen + attention, rel=1e-9)


def attention_macs_of(model: MViT, clips: Tensor) -> int:
    config, (_, grid), total = model.config, model.embed(clips), 0
    for plan in plan_blocks(config):
        q_grid, (t, h, w) = pooled_grids(plan, config, grid)
        positions = t + h + w if config.rel_pos_joint == "none" else t * h * w
        cells, keys = math.prod(q_grid), t * h * w + config.class_token
        expected = plan.attention_dim * (2 * (cells + config.class_token) * keys + cells * positions)
        assert attention_macs(plan, config, grid) == expected
        total, grid = total + expected, q_grid
    return total


def test_strides_in_time_shorten_the_grid(clips):
    model = MViT(replace(TINY, q_stride=(2, 2, 2), kv_stride=(4, 4, 4)))
    assert [tuple(x.shape[2:]) for x in model.forward_stages(clips)] == [(2, 8, 8), (1, 4, 4), (1, 2, 2)]
    # Tables in time don't know of strides, as in the official code.
    assert [len(block.attn.rel_pos_t) for block in model.blocks] == [3, 3, 1, 1]


@pytest.mark.parametrize(
    ("width", "factor", "divisor", "expected"),
    [
        (96, 2.0, 2, 192),
        (16, 1.3, 4, 20),  # 20.8
        (16, 1.25, 16, 32),  # 16 would be less than nine tenths of 20
        (3, 1.5, 1, 5),
        (1, 0.1, 1, 1),
    ],
)
def test_rounding_of_widths(width, factor, divisor, expected):
    assert round_width(width, factor, divisor) == expected


def test_heads_that_cannot_share_channels_are_named():
    config = replace(TINY, dim_mul=((1, 1.3), (3, 2.0)), head_mul=((1, 2.0), (3, 1.5)))
    with pytest.raises(ValueError, match="dim_mul and head_mul give block 3 40 channels, which 3 heads"):
        MViT(config)


# Reading out, initialisation, training


@torch.inference_mode()
def test_mean_pooling_leaves_the_class_token_out_and_norms_last(clips):
    model = randomized(MViT(replace(TINY, mean_pooling=True)))
    cells = model.forward_stages(clips)[-1]
    expected = model.norm(cells.flatten(2).mean(-1))
    torch.testing.assert_close(model.forward_features(clips), expected, atol=1e-6, rtol=0)


def test_initial_scales():
    torch.manual_seed(0)
    plain = MViT(TINY)
    torch.manual_seed(0)
    scaled = MViT(replace(TINY, head_init_scale=0.01, rel_pos_zero_init=True))
    assert all((p == 0).all() for name, p in scaled.named_parameters() if "rel_pos" in name)
    assert all(p.std() > 0.01 for name, p in plain.named_parameters() if "rel_pos" in name)
    assert scaled.head.projection.weight.std() < 0.02 * plain.head.projection.weight.std()
    assert torch.allclose(scaled.head.projection.bias, torch.tensor(0.0002))


def test_recomputed_blocks_have_the_same_gradients(clips):
    gradients = []
    for recompute in (False, True):
        model = randomized(
            MViT(replace(TINY, checkpoint_blocks=recompute, drop_path=0.3, dropout=0.1))
        ).train()
        torch.manual_seed(0)
        model(clips).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@torch.inference_mode()
def test_dropout_is_for_training(clips):
    model = randomized(MViT(replace(TINY, dropout=0.5)))
    plain = randomized(MViT(TINY))
    assert torch.equal(model(clips), plain(clips))
    assert not torch.equal(model.train()(clips), plain(clips))


@torch.inference_mode()
def test_images_in_two_dimensions_are_clips_of_a_frame():
    flat = replace(TINY, num_frames=1, patch_kernel=(1, 7, 7), patch_stride=(1, 4, 4), patch_2d=True)
    model = randomized(MViT(flat))
    deep = MViT(replace(flat, patch_2d=False)).eval()
    state = model.state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].unsqueeze(2)
    deep.load_state_dict(state)
    for frames in (1, 3):
        clips = torch.randn(2, 3, frames, 32, 32)
        torch.testing.assert_close(model(clips), deep(clips), atol=1e-6, rtol=0)


# Features


@torch.inference_mode()
@pytest.mark.parametrize("class_token", [True, False])
def test_stages_are_maps_whose_last_is_what_the_head_reads(class_token, clips):
    model = randomized(MViT(replace(TINY, class_token=class_token)))
    maps = model.forward_stages(clips)
    assert [tuple(x.shape) for x in maps] == [(2, 16, 2, 8, 8), (2, 32, 2, 4, 4), (2, 64, 2, 2, 2)]
    described = describe(model.config).stages
    assert [tuple(x.shape[1:]) for x in maps] == [(s.channels, *s.tokens) for s in described]
    features = model.forward_features(clips)
    assert features.shape == (2, 64)
    torch.testing.assert_close(model.head(features), model(clips))
    if not class_token:
        normed = model.norm(maps[-1].movedim(1, -1)).mean((1, 2, 3))
        torch.testing.assert_close(features, normed, atol=1e-5, rtol=0)


def test_layer_groups_go_from_input_to_output():
    model = MViT(replace(TINY, abs_pos="separable", norm_stem=True))
    groups = layer_groups(model)
    assert len(groups) == 6
    assert sorted(itertools.chain(*groups)) == sorted(name for name, _ in model.named_parameters())
    assert groups[0] == [
        "cls_token",
        "pos_embed_spatial",
        "pos_embed_temporal",
        "pos_embed_class",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "norm_stem.weight",
        "norm_stem.bias",
    ]
    for depth in range(1, 5):
        assert all(name.startswith(f"blocks.{depth - 1}.") for name in groups[depth])
    assert groups[-1] == ["norm.weight", "norm.bias", "head.projection.weight", "head.projection.bias"]


# Configurations


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pool_mode": "median"}, "pool_mode .*conv, conv_unshared, max, avg, got 'median'"),
        ({"attention": "linear"}, "attention .*full.* got 'linear'"),
        ({"abs_pos": "rope"}, "abs_pos .*none, joint, separable, got 'rope'"),
        ({"rel_pos_joint": "time"}, "rel_pos_joint .*none, space, space_time, got 'time'"),
        ({"pool_mode": "conv_unshared"}, "pool_mode .*pool_first"),
        ({"rel_pos_joint": "space", "rel_pos_spatial": False}, "rel_pos_joint .*rel_pos_spatial"),
        ({"rel_pos_joint": "space_time", "rel_pos_temporal": False}, "rel_pos_joint .*rel_pos_temporal"),
        ({"rel_pos_joint": "space_time", "attention": "window"}, "rel_pos_joint .*attention 'window'"),
        ({"patch_2d": True}, r"patch_2d .*kernel=\(3, 7, 7\)"),
        ({"patch_padding": (1, 3)}, r"patch_padding .*got \(1, 3\)"),
        ({"patch_padding": (4, 3, 3)}, r"patch_padding .*\(3, 7, 7\), got \(4, 3, 3\)"),
        ({"patch_kernel": (18, 7, 7), "patch_padding": (0, 3, 3)}, r"patch_kernel .*\(16, 230, 230\).*18"),
        ({"dim_mul": ((16, 2.0),)}, r"dim_mul .*15.*\(16, 2.0\)"),
        ({"head_mul": ((1, 0.0),)}, r"head_mul .*positive"),
        ({"q_strides": ((1, 2, 2),)}, r"q_strides .*\(1, 2, 2\)"),
        ({"kv_strides": ((1, 0, 2, 2),)}, r"kv_strides .*positive"),
        ({"window": (0, 7, 7)}, r"window .*positive"),
        ({"window": (1, 4096, 4096)}, r"window .*tokens"),
        ({"window_padding": True, "attention": "window"}, r"window_padding .*class token"),
        ({"drop_path": "high"}, "drop_path must be a number, got 'high'"),
        ({"mlp_ratio": math.nan}, "mlp_ratio must be a number, got nan"),
        ({"embed_dim": 96.5}, "embed_dim must be a whole number, got 96.5"),
        ({"num_heads": True}, "num_heads must be a whole number, got True"),
        ({"class_token": 1}, "class_token must be true or false, got 1"),
        ({"stages": 4}, "stages .*got 4"),
        ({"q_stride": (1, 2.5, 2)}, r"q_stride .*got \(1, 2.5, 2\)"),
        ({"pool_kernel": "strid"}, "pool_kernel .*stride, got 'strid'"),
        ({"dim_mul": (1, 2.0)}, r"dim_mul .*got \(1, 2.0\)"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_options_out_of_range_are_named(options, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        MViTConfig(**options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pool_kernel": (1, 4096, 4096)}, "kernel"),
        ({"pool_kernel": "stride", "kv_stride": (1, 10**6, 10**6)}, "kernel"),
        ({"q_stride": (10**9, 2, 2)}, "kernel"),
        (
            {"attention": "window", "window_padding": True, "window": (1, 7, 7), "class_token": False},
            "window",
        ),
    ],
)
def test_layouts_that_no_model_has_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        list(plan_blocks(MViTConfig(**options)))


def test_clips_smaller_than_a_patch_are_named():
    model = MViT(replace(TINY, patch_padding=(0, 3, 3)))
    with pytest.raises(ValueError, match=r"clips of \(2, 32, 32\) .* patch_kernel \(3, 7, 7\)"):
        model(torch.zeros(1, 3, 2, 32, 32))


def test_none_leaves_the_value_of_the_variant():
    with torch.device("meta"):
        model = create_model("mvitv1_b_16x4", num_classes=None, abs_pos=None, stages=None, drop_path=None)
        assert model.config == create_model("mvitv1_b_16x4").config
        with pytest.raises(ConfigError, match="has no 'droppath'"):
            create_model("mvitv1_b_16x4", droppath=None)
