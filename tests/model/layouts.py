"""One attention from the sizes that matter to it, instead of a whole model's configuration."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from mvit_video.model.ablations import make_attention
from mvit_video.model.attention import PoolingAttention
from mvit_video.model.config import BlockPlan, MViTConfig

PLAN = {field.name for field in fields(BlockPlan)}


def one_attention(dim: int, dim_out: int, heads: int, *, grid: Any, **layout: Any) -> PoolingAttention:
    """``layout`` has fields of ``BlockPlan`` and ``MViTConfig``, and ``kernel`` for ``pool_kernel``."""
    if "kernel" in layout:
        layout["pool_kernel"] = layout.pop("kernel")
    one = (1, 1, 1)
    plan = {
        "q_stride": one,
        "kv_stride": one,
        "pools_q": True,
        "pools_kv": True,
        "window": None,
        "shifted": False,
    }
    plan |= {name: layout.pop(name) for name in list(layout) if name in PLAN}
    sizes = {"dim": dim, "attention_dim": dim_out, "dim_out": dim_out, "num_heads": heads, "grid": grid}
    return make_attention(BlockPlan(stage=0, drop_path=0.0, **sizes, **plan), MViTConfig(**layout))
