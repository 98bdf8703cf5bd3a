"""The fast attention against the paper's plain form, and the positions against the official tables."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import golden_weights
import plain_attention
import pytest
import torch
from layouts import one_attention
from torch import Tensor

from mvit_video.model import kernels
from mvit_video.model.attention import PoolingAttention
from mvit_video.model.positions import one_hot_keys, relative_index, relative_positions

RELPOS = json.loads((Path(__file__).parents[1] / "reference" / "relpos.json").read_text())
TOLERANCE = 1e-9  # float64: summation order alone

SWITCHES = [
    dict(zip(("class_token", "residual_pooling", "rel_pos_temporal", "rel_pos_spatial"), values, strict=True))
    for values in itertools.product((True, False), repeat=4)
]

# What the tables are made for, the grid that comes in (the same where absent) and the layout.
SHAPES = {
    "strided keys": {"made_for": (2, 8, 8), "kv_stride": (1, 4, 4)},
    "strided queries": {"made_for": (2, 8, 8), "q_stride": (1, 2, 2), "kv_stride": (1, 4, 4)},
    "more queries than keys": {"made_for": (2, 6, 6), "kv_stride": (1, 2, 2)},
    "more keys than queries": {"made_for": (2, 8, 8), "q_stride": (1, 2, 2)},
    "strides in time": {"made_for": (8, 4, 4), "q_stride": (2, 1, 1), "kv_stride": (4, 2, 2)},
    "four heads": {"made_for": (2, 6, 6), "heads": 4, "kv_stride": (1, 2, 2)},
    "heads as wide as a fused kernel": {"made_for": (2, 4, 4), "dim_out": 32, "heads": 2},
    "widening": {"made_for": (2, 6, 6), "dim": 6, "dim_out": 12, "q_stride": (1, 2, 2)},
    "no qkv bias": {"made_for": (2, 4, 4), "qkv_bias": False},
    "pooling without time": {"made_for": (3, 4, 4), "kernel": (1, 3, 3)},
    "one cell": {"made_for": (1, 1, 1)},
    "one frame": {"made_for": (1, 8, 8), "kv_stride": (1, 4, 4)},
    "odd grid": {"made_for": (3, 7, 5), "q_stride": (1, 2, 2), "kv_stride": (1, 2, 2)},
    "odd grid, keys pooled more": {"made_for": (3, 9, 11), "q_stride": (1, 2, 2), "kv_stride": (1, 4, 4)},
    "larger than the tables": {"made_for": (2, 4, 4), "grid": (3, 7, 6), "kv_stride": (1, 2, 2)},
    "smaller than the tables": {"made_for": (4, 8, 8), "grid": (2, 5, 3), "kv_stride": (1, 2, 2)},
    "a frame for tables of a clip": {"made_for": (4, 8, 8), "grid": (1, 8, 8), "kv_stride": (1, 4, 4)},
    "39 against 10, float32 decides": {"made_for": (1, 39, 10), "kv_stride": (1, 4, 1)},
    "78 against 10, float32 decides": {"made_for": (1, 2, 78), "kv_stride": (1, 1, 8)},
}


def make_attention(
    made_for, grid=None, dim=8, dim_out=12, heads=2, **layout
) -> tuple[PoolingAttention, Tensor, tuple[int, int, int]]:
    """An attention with random float64 parameters, tokens of a batch of two, and their grid."""
    torch.manual_seed(0)
    attention = one_attention(dim, dim_out, heads, grid=made_for, **layout).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    t, h, w = grid = grid or made_for
    tokens = torch.randn(2, t * h * w + attention.num_prefix_tokens, dim, dtype=torch.float64)
    return attention, tokens, grid


def value_and_gradients(form, attention, tokens, grid):
    tokens = tokens.clone().requires_grad_()
    attention.zero_grad()
    out, out_grid = form(tokens, grid)
    # A weighted sum, so that no gradient is lost in a symmetry.
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    (out * weights).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in attention.named_parameters()}
    return out.detach(), out_grid, gradients | {"input": tokens.grad}


def assert_forms_agree(attention, tokens, grid):
    fused, fused_grid, fused_gradients = value_and_gradients(attention, attention, tokens, grid)
    plain, plain_grid, plain_gradients = value_and_gradients(
        plain_attention.PlainAttention(attention), attention, tokens, grid
    )
    assert fused_grid == plain_grid
    torch.testing.assert_close(fused, plain, atol=TOLERANCE, rtol=0)
    assert fused_gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(
            fused_gradients[name], gradient, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "switches", SWITCHES, ids=lambda s: " ".join(k for k, on in s.items() if on) or "none"
)
def test_fused_equals_plain_with_every_switch(switches):
    assert_forms_agree(
        *make_attention((2, 6, 4), dim_out=16, q_stride=(1, 2, 2), kv_stride=(1, 2, 2), **switches)
    )


@pytest.mark.parametrize("class_token", [True, False], ids=["class token", "no class token"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fused_equals_plain_on_every_shape(shape, class_token):
    assert_forms_agree(*make_attention(**shape, class_token=class_token))


def test_positions_matter_in_the_comparison():
    # If tables were ignored by both forms, the comparisons above would pass as well.
    attention, tokens, grid = make_attention((2, 4, 4))
    before, _ = attention(tokens, grid)
    for axis in "thw":
        table = getattr(attention, f"rel_pos_{axis}")
        kept = table.detach().clone()
        torch.nn.init.zeros_(table)
        assert (attention(tokens, grid)[0] - before).abs().max() > 1e-3
        table.data.copy_(kept)


def test_tables_that_switches_leave_out_do_not_exist():
    attention, _, _ = make_attention((2, 4, 4), rel_pos_temporal=False)
    assert attention.rel_pos_t is None
    assert attention.rel_pos_h.shape == attention.rel_pos_w.shape == (7, 6)


@pytest.mark.parametrize(
    ("made_for", "q_stride", "kv_stride", "lengths"),
    [
        ((8, 56, 56), (1, 1, 1), (1, 8, 8), (15, 111, 111)),
        ((8, 56, 56), (1, 2, 2), (1, 4, 4), (15, 55, 55)),
        ((8, 14, 14), (1, 2, 2), (1, 1, 1), (15, 27, 27)),
        ((20, 39, 39), (1, 2, 2), (1, 4, 4), (39, 37, 37)),  # floor division, although 20 cells come out
    ],
)
def test_table_lengths(made_for, q_stride, kv_stride, lengths):
    attention = one_attention(4, 4, 1, grid=made_for, q_stride=q_stride, kv_stride=kv_stride)
    assert tuple(len(getattr(attention, f"rel_pos_{axis}")) for axis in "thw") == lengths


@pytest.mark.parametrize("case", RELPOS["index_tables"], ids=lambda c: f"{c['q']} to {c['k']}")
def test_relative_index_is_the_official_one(case):
    index = relative_index(case["q"], case["k"])
    assert index.tolist() == case["index"]
    assert index.min() == 0
    assert index.max() < case["table_len"]


@pytest.mark.parametrize(("q", "k", "cells_lower"), [(78, 10, 103), (39, 10, 38), (56, 7, 0)])
def test_relative_index_keeps_float32_truncation(q, k, cells_lower):
    exact = torch.tensor([[(i * k - j * q + (k - 1) * q) // k for j in range(k)] for i in range(q)])
    difference = exact - relative_index(q, k)
    assert set(difference.unique().tolist()) <= {0, 1}
    assert difference.sum() == cells_lower


@pytest.mark.parametrize("case", RELPOS["interpolation"], ids=lambda c: f"{c['src_len']} to {c['dst_len']}")
def test_table_interpolation_is_the_official_one(case):
    table = torch.from_numpy(golden_weights.unit(f"relpos{case['src_len']}", case["src_len"] * 2)).view(-1, 2)
    length = (case["dst_len"] + 1) // 2
    positions = relative_positions(table, [length], [length]).movedim(-1, 1).flip(1)
    # The last query has rows n-1 ... of the table's second half, the first query those of the first half.
    rows = torch.cat([positions[0].flip(0), positions[1:, 0]])
    torch.testing.assert_close(rows, torch.tensor(case["out"]), atol=1e-6, rtol=0)


def test_attention_of_a_clip_is_independent_of_its_neighbours():
    attention, tokens, grid = make_attention((2, 6, 6), kv_stride=(1, 2, 2))
    together, _ = attention(tokens, grid)
    for i in range(2):
        alone, _ = attention(tokens[i : i + 1], grid)
        torch.testing.assert_close(together[i : i + 1], alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("width", [1, 16, 17])
def test_padding_of_widths_changes_nothing(width):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 5, width, dtype=torch.float64)
    v = torch.randn(1, 2, 5, 1, dtype=torch.float64)
    expected = (q @ k.transpose(-2, -1)).softmax(-1) @ v
    found = kernels.attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("axes", ["t", "h", "w", "hw"])
@pytest.mark.parametrize("prefix", [0, 1])
def test_one_hot_keys(axes, prefix):
    grid = (2, 3, 4)
    keys = one_hot_keys((axes,), grid, prefix, 13, device="cpu", dtype=torch.float32)
    lengths = [grid["thw".index(axis)] for axis in axes]
    assert keys.shape == (prefix + 24, 13)
    assert keys[:prefix].eq(0).all()
    assert keys[prefix:].sum(1).eq(1).all()
    expected = []
    for cell in itertools.product(*map(range, grid)):
        column = 0
        for axis, length in zip(axes, lengths, strict=True):
            column = column * length + cell["thw".index(axis)]
        expected.append(math.prod(lengths) - 1 - column)  # from the last to the first
    assert keys[prefix:].argmax(1).tolist() == expected


@pytest.mark.parametrize(("q", "k"), [(56, 7), (7, 56), (9, 9), (1, 5), (5, 1), (78, 10), (10, 39), (3, 2)])
def test_positions_are_the_rows_of_the_official_index(q, k):
    table = torch.randn(2 * max(q, k) - 1, 3)
    expected = table[relative_index(q, k)]  # (q, k, c)
    assert torch.equal(relative_positions(table, [q], [k]), expected.flip(1).transpose(1, 2))


def test_positions_over_two_axes_are_the_rows_of_both_indices():
    table = torch.randn(15, 9, 3)
    rows, columns = relative_index(8, 2)[:, None, :, None], relative_index(3, 5)[None, :, None, :]
    expected = table[rows, columns].flip(2, 3).movedim(-1, 2)
    assert torch.equal(relative_positions(table, [8, 3], [2, 5]), expected)
