"""PySlowFast's configurations in terms of ``MViTConfig`` and ``ClipSpec``, and the other way.

Options and defaults are those of ``slowfast/config/defaults.py`` in
https://github.com/facebookresearch/SlowFast at 287ec007.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import yaml

from mvit_video.errors import CheckpointError, refusing
from mvit_video.model.clip_spec import ClipSpec
from mvit_video.model.config import (
    Grid,
    MViTConfig,
    block_factors,
    plan_blocks,
    pooling_strides,
    same_padding,
)
from mvit_video.weights.description import MAX_BLOCKS, Description
from mvit_video.weights.reading import find_weights, require_bounded

Sections = dict[str, dict[str, Any]]

# Options that mean what a field of MViTConfig means, most by its own name.
_FIELDS: dict[str, dict[str, str]] = {
    "MVIT": {
        "CLS_EMBED_ON": "class_token",
        "DIM_MUL_IN_ATT": "dim_mul_in_attention",
        "DROPOUT_RATE": "dropout",
        "DROPPATH_RATE": "drop_path",
        "MODE": "pool_mode",
        "USE_MEAN_POOLING": "mean_pooling",
        **{
            field.upper(): field
            for field in (
                *("embed_dim", "head_init_scale", "mlp_ratio", "norm_stem", "num_heads", "patch_2d"),
                *("pool_first", "qkv_bias", "rel_pos_spatial", "rel_pos_temporal", "rel_pos_zero_init"),
                *("residual_pooling", "separate_qkv"),
            )
        },
    },
    "MODEL": {
        "NUM_CLASSES": "num_classes",
        "DROPOUT_RATE": "head_dropout",
        "ACT_CHECKPOINT": "checkpoint_blocks",
    },
    "DATA": {"NUM_FRAMES": "num_frames", "TRAIN_CROP_SIZE": "crop_size"},
}
# The official defaults of these, where they differ from ours.
_OFFICIAL = MViTConfig(
    dim_mul_in_attention=False,
    drop_path=0.1,
    num_frames=8,
    rel_pos_spatial=False,
    rel_pos_temporal=False,
    residual_pooling=False,
)
# Defaults of the others. Options that shape nothing here (weight decay, layer scale, which no block reads)
# are known so that they aren't refused.
_OTHER: Sections = {
    "MVIT": {
        "DEPTH": 16,
        "DIM_MUL": [],
        "HEAD_MUL": [],
        "LAYER_SCALE_INIT_VALUE": 0.0,
        "NORM": "layernorm",
        "PATCH_KERNEL": [3, 7, 7],
        "PATCH_PADDING": [2, 4, 4],
        "PATCH_STRIDE": [2, 4, 4],
        "POOL_KVQ_KERNEL": None,
        "POOL_KV_STRIDE": [],
        "POOL_KV_STRIDE_ADAPTIVE": None,
        "POOL_Q_STRIDE": [],
        "REV": {},
        "SEP_POS_EMBED": False,
        "USE_ABS_POS": True,
        "USE_FIXED_SINCOS_POS": False,
        "ZERO_DECAY_POS_CLS": True,
    },
    "MODEL": {"MODEL_NAME": "MViT", "HEAD_ACT": "softmax"},
    "DATA": {
        "SAMPLING_RATE": 8,
        "TEST_CROP_SIZE": None,  # the official model takes no other size than the training crop
        "TARGET_FPS": 30,
        "TRAIN_JITTER_SCALES": None,  # officially [256, 320], whatever the crop
        "INPUT_CHANNEL_NUM": [3],
        "REVERSE_INPUT_CHANNEL": False,
        "MEAN": [0.45, 0.45, 0.45],
        "STD": [0.225, 0.225, 0.225],
    },
    "TEST": {"DATASET": "kinetics", "NUM_ENSEMBLE_VIEWS": 5, "NUM_SPATIAL_CROPS": 1},
    "DETECTION": {"ENABLE": False},
    "MASK": {"ENABLE": False},
}
# What can be built of options that allow more.
_BUILDABLE: dict[str, tuple[Any, ...]] = {
    "MVIT.NORM": ("layernorm",),
    "MVIT.MODE": ("conv", "conv_unshared", "max", "avg"),
    "MVIT.USE_FIXED_SINCOS_POS": (False,),
    "MVIT.REV.ENABLE": (False,),
    "MODEL.MODEL_NAME": ("MViT",),
    "MODEL.HEAD_ACT": ("softmax", "none"),
    "DATA.INPUT_CHANNEL_NUM": ([3],),
    "DETECTION.ENABLE": (False,),
    "MASK.ENABLE": (False,),
}
# Fields that the blocks laid out by ``plan_blocks`` already show, or that shape nothing without them.
_IN_PLAN = {
    *("attention", "window", "stages", "dim_mul", "head_mul", "pool_q_every_block"),
    *("q_stride", "q_strides", "kv_stride", "kv_strides", "patch_padding"),
}


def read_cfg(checkpoint: Mapping[str, Any], name: str) -> Description:
    """The model that the "cfg" of a PySlowFast checkpoint describes. Raises CheckpointError."""
    weights = find_weights({"model_state": checkpoint.get("model_state")}, name)[0]
    return parse_cfg(checkpoint["cfg"], name, weights)


def parse_cfg(cfg: Any, name: str, weight_names: Iterable[str] = ()) -> Description:
    """The model and the test protocol that an official configuration describes.

    Args:
        cfg: its sections, or yaml text of them; missing options have the official defaults.
        name: of the file, for errors.
        weight_names: of the checkpoint that the configuration came with, see ``infer_layout``.

    Raises:
        CheckpointError: the configuration is malformed, or has an option that can't be built; names it.
    """
    if isinstance(cfg, str):
        with refusing(CheckpointError, f"{name}: its cfg is no plain yaml"):
            cfg = yaml.safe_load(cfg)  # tags that would make objects are refused
    if not isinstance(cfg, Mapping) or not isinstance(cfg.get("MVIT"), Mapping):
        raise CheckpointError(f"{name}: its cfg is no MViT configuration, it has no section MVIT")
    with refusing(CheckpointError, f"{name}: its cfg is no MViT configuration"):
        require_bounded(cfg)
        options = {
            section: {option: getattr(_OFFICIAL, field) for option, field in _FIELDS.get(section, {}).items()}
            | defaults
            | {option: _plain(value) for option, value in (cfg.get(section) or {}).items()}
            for section, defaults in _OTHER.items()
        }
        _require_buildable(options, name)
        config = infer_layout(_model_config(options), set(weight_names))
        return Description(config, _clip_spec(options))


def make_cfg(config: MViTConfig, spec: ClipSpec) -> Sections:
    """The official configuration of a model: ``parse_cfg`` the other way.

    Raises:
        CheckpointError: no official options give that model; names the fields that they can't express.
    """
    start = int(config.patch_2d)  # options of single frames lack the time axis
    q_strides, kv_strides = pooling_strides(config)
    dim_mul, head_mul = block_factors(config)
    cfg: Sections = {
        section: {option: getattr(config, field) for option, field in options.items()}
        for section, options in _FIELDS.items()
    }
    cfg["MVIT"] |= {
        "DEPTH": sum(config.stages),
        "DIM_MUL": [list(item) for item in dim_mul.items()],
        "HEAD_MUL": [list(item) for item in head_mul.items()],
        "PATCH_KERNEL": list(config.patch_kernel[start:]),
        "PATCH_PADDING": list(config.patch_pad[start:]),
        "PATCH_STRIDE": list(config.patch_stride[start:]),
        "POOL_KVQ_KERNEL": list(config.pool_kernel) if isinstance(config.pool_kernel, tuple) else None,
        "POOL_KV_STRIDE": [[block, *stride] for block, stride in kv_strides.items()],
        "POOL_Q_STRIDE": [[block, *stride] for block, stride in q_strides.items()],
        "SEP_POS_EMBED": config.abs_pos == "separable",
        "USE_ABS_POS": config.abs_pos != "none",
    }
    cfg["MODEL"] |= {"MODEL_NAME": "MViT", "ARCH": "mvit"}
    jitter = spec.short_side if spec.num_crops == 1 else config.crop_size * 256 // 224
    cfg["DATA"] |= {
        "SAMPLING_RATE": spec.stride,
        "TARGET_FPS": spec.target_fps,
        "TEST_CROP_SIZE": spec.crop,
        "TRAIN_JITTER_SCALES": [jitter, jitter * 5 // 4],
        "MEAN": list(spec.mean),
        "STD": list(spec.std),
    }
    cfg["TEST"] = {"NUM_ENSEMBLE_VIEWS": spec.num_clips, "NUM_SPATIAL_CROPS": spec.num_crops}
    if spec.sampling == "segment":
        # Officially, frames for these are BGR until channels are swapped, behind the normalisation.
        cfg["DATA"] |= {"MEAN": list(spec.mean[::-1]), "STD": list(spec.std[::-1]), "RANDOM_FLIP": False}
        cfg["DATA"] |= {"REVERSE_INPUT_CHANNEL": True, "INV_UNIFORM_SAMPLE": True}
        cfg["TEST"]["DATASET"] = "ssv2"
    elif spec.sampling == "uniform":
        cfg["DATA"]["USE_OFFSET_SAMPLING"] = True

    back: Any = parse_cfg(cfg, "export").config
    names = [field.name for field in fields(MViTConfig) if field.name not in _IN_PLAN]
    lost = [field for field in names if getattr(back, field) != getattr(config, field)]
    if lost or list(plan_blocks(back)) != list(plan_blocks(config)):
        values = ", ".join(f"{field}={getattr(config, field)!r}" for field in lost or ["attention", "stages"])
        raise CheckpointError(f"PySlowFast has no options for a model with {values}")
    return cfg


def _plain(value: Any) -> Any:
    """PySlowFast's files write tuples and None as Python would: strings to yaml."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
    return list(value) if isinstance(value, tuple) else value


def _require_buildable(options: Sections, name: str) -> None:
    for option, allowed in _BUILDABLE.items():
        section, key, *deeper = option.split(".")
        found = options[section][key]
        if deeper:
            found = (found or {}).get(deeper[0], False)
        if found not in allowed:
            only = " or ".join(map(str, allowed))
            raise CheckpointError(f"{name}: {option} = {found!s:.80} can't be built; only {only} can")
    mvit = options["MVIT"]
    for option in sorted(set(mvit) - set(_FIELDS["MVIT"]) - set(_OTHER["MVIT"])):
        found = f"MVIT.{option[:80]} = {mvit[option]!s:.80}"
        raise CheckpointError(f"{name}: {found} can't be built; it is unknown")
    depth = mvit["DEPTH"]
    if type(depth) is not int or not 0 < depth <= MAX_BLOCKS:
        raise CheckpointError(
            f"{name}: MVIT.DEPTH = {depth!s:.80} can't be built; only 1 to {MAX_BLOCKS} can"
        )


def _model_config(options: Sections) -> MViTConfig:
    mvit, depth = options["MVIT"], options["MVIT"]["DEPTH"]
    same = {field: options[section][o] for section, names in _FIELDS.items() for o, field in names.items()}
    dim_mul, head_mul = (
        {block: float(factor) for block, factor in _rows(mvit, option, "[block, factor]")}
        for option in ("DIM_MUL", "HEAD_MUL")
    )
    q_strides, kv_strides = (  # the last of several for one block counts
        {block: (t, h, w) for block, t, h, w in _rows(mvit, option, "[block, T, H, W]")}
        for option in ("POOL_Q_STRIDE", "POOL_KV_STRIDE")
    )
    widened = sorted(block for block, factor in dim_mul.items() if factor != 1 and block)
    edges = [0, *(block for block in widened if block < depth), depth]
    frame = mvit["PATCH_2D"]  # patches of single frames: options lack the time axis
    kernel = _grid(mvit, "PATCH_KERNEL", [1] * bool(frame))
    padding = _grid(mvit, "PATCH_PADDING", [0] * bool(frame))
    adaptive = mvit["POOL_KV_STRIDE_ADAPTIVE"] is not None  # overrules the list
    config = MViTConfig(
        **same,
        stages=tuple(b - a for a, b in itertools.pairwise(edges)),
        patch_kernel=kernel,
        patch_stride=_grid(mvit, "PATCH_STRIDE", [1] * bool(frame)),
        patch_padding=None if padding == same_padding(kernel) else padding,
        pool_kernel="stride" if mvit["POOL_KVQ_KERNEL"] is None else _grid(mvit, "POOL_KVQ_KERNEL"),
        pool_q_every_block=len(q_strides) == depth,
        q_stride=q_strides.get(widened[0], (1, 1, 1)) if widened else (1, 1, 1),
        kv_stride=_grid(mvit, "POOL_KV_STRIDE_ADAPTIVE") if adaptive else kv_strides.get(0, (1, 1, 1)),
        abs_pos=("separable" if mvit["SEP_POS_EMBED"] else "joint") if mvit["USE_ABS_POS"] else "none",
    )
    # The lists that name blocks one by one stay, where they differ from what ``stages`` already says.
    doubled = dict.fromkeys(config.stage_starts[1:], 2.0)
    lists: dict[str, Any] = {}
    if dim_mul != doubled:
        lists["dim_mul"] = tuple(dim_mul.items())
    if head_mul != doubled:
        lists["head_mul"] = tuple(head_mul.items())
    if q_strides != pooling_strides(config)[0]:
        lists["q_strides"] = tuple((block, *stride) for block, stride in q_strides.items())
        config = replace(config, q_strides=lists["q_strides"])
    if not adaptive and kv_strides != pooling_strides(config)[1]:
        lists["kv_strides"] = tuple((block, *stride) for block, stride in kv_strides.items())
    return replace(config, **lists)


def _rows(mvit: dict[str, Any], option: str, what: str) -> list[list[Any]]:
    """An option's rows of numbers. Raises ValueError, which names it, where they are none."""
    rows, width = mvit[option], what.count(",") + 1
    if not isinstance(rows, list) or any(
        not isinstance(row, list | tuple) or len(row) != width or type(row[0]) is not int for row in rows
    ):
        raise ValueError(f"MVIT.{option} = {rows!s:.80} must list {what}")
    return rows


def _grid(mvit: dict[str, Any], option: str, before: Iterable[int] = ()) -> Grid:
    try:
        t, h, w = (int(value) for value in (*before, *mvit[option]))
    except (TypeError, ValueError):
        raise ValueError(f"MVIT.{option} = {mvit[option]!s:.80} must list a number an axis") from None
    return t, h, w


def infer_layout(config: MViTConfig, weight_names: set[str]) -> MViTConfig:
    """Where channels double and which blocks pool queries, by the names of the weights.

    They count more than a configuration: the published L has another number of parameters than its
    configuration gives.
    """
    if not weight_names:
        return config
    for in_attention in (True, False):
        other = replace(config, dim_mul_in_attention=in_attention)
        widens = [f"blocks.{i}.proj.weight" for i, p in enumerate(plan_blocks(other)) if p.dim != p.dim_out]
        if widens and all(name in weight_names for name in widens):
            config = other
            break
    if config.q_strides is None and config.pool_mode == "conv" and config.q_stride != (1, 1, 1):
        unpooled = [i for i, plan in enumerate(plan_blocks(config)) if plan.q_stride == (1, 1, 1)]
        pooled = [f"blocks.{i}.attn.pool_q.weight" in weight_names for i in unpooled]
        if pooled and (all(pooled) or not any(pooled)):
            config = replace(config, pool_q_every_block=all(pooled))
    return config


def _clip_spec(options: Sections) -> ClipSpec:
    data, test = options["DATA"], options["TEST"]
    crop, num_crops = data["TEST_CROP_SIZE"] or data["TRAIN_CROP_SIZE"], test["NUM_SPATIAL_CROPS"]
    segments, image = test["DATASET"] == "ssv2", data["NUM_FRAMES"] == 1
    # What one crop is cut out of: for videos the least short side of the training, where that is told.
    jitter = data["TRAIN_JITTER_SCALES"]
    if num_crops > 1:
        short_side = crop
    elif image:
        short_side = crop * 256 // 224
    elif jitter is not None:
        short_side = max(jitter[0], crop)
    else:
        short_side = 256 if crop == 224 else crop
    # Channels are swapped behind the normalisation.
    order = -1 if data["REVERSE_INPUT_CHANNEL"] else 1
    return ClipSpec(
        clip_frames=data["NUM_FRAMES"],
        stride=1 if image else data["SAMPLING_RATE"],
        target_fps=float(data["TARGET_FPS"]),
        pixels="image" if image else "slowfast",
        sampling="segment" if segments else "uniform",
        num_clips=1 if image or segments else test["NUM_ENSEMBLE_VIEWS"],
        num_crops=num_crops,
        short_side=short_side,
        crop=crop,
        mean=tuple(data["MEAN"])[::order],
        std=tuple(data["STD"])[::order],
    )
