"""PySlowFast's configurations: what their MViT sections mean, in terms of ours."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from mvit_video.errors import CheckpointError
from mvit_video.model.clip_spec import ClipSpec
from mvit_video.model.config import (
    Grid,
    MViTConfig,
    block_factors,
    plan_blocks,
    pooling_strides,
    same_padding,
)

# What the official code assumes where a configuration file is silent. Options that shape nothing here
# (weight decay, fusion of reversible blocks, layer scale, which no block reads) have no defaults to compare.
_MVIT_DEFAULTS: dict[str, Any] = {
    "CLS_EMBED_ON": True,
    "DEPTH": 16,
    "DIM_MUL": [],
    "DIM_MUL_IN_ATT": False,
    "DROPOUT_RATE": 0.0,
    "DROPPATH_RATE": 0.1,
    "EMBED_DIM": 96,
    "HEAD_INIT_SCALE": 1.0,
    "HEAD_MUL": [],
    "LAYER_SCALE_INIT_VALUE": 0.0,
    "MLP_RATIO": 4.0,
    "MODE": "conv",
    "NORM": "layernorm",
    "NORM_STEM": False,
    "NUM_HEADS": 1,
    "PATCH_2D": False,
    "PATCH_KERNEL": [3, 7, 7],
    "PATCH_PADDING": [2, 4, 4],
    "PATCH_STRIDE": [2, 4, 4],
    "POOL_FIRST": False,
    "POOL_KVQ_KERNEL": None,
    "POOL_KV_STRIDE": [],
    "POOL_KV_STRIDE_ADAPTIVE": None,
    "POOL_Q_STRIDE": [],
    "QKV_BIAS": True,
    "REL_POS_SPATIAL": False,
    "REL_POS_TEMPORAL": False,
    "REL_POS_ZERO_INIT": False,
    "RESIDUAL_POOLING": False,
    "REV": {},
    "SEPARATE_QKV": False,
    "SEP_POS_EMBED": False,
    "USE_ABS_POS": True,
    "USE_FIXED_SINCOS_POS": False,
    "USE_MEAN_POOLING": False,
    "ZERO_DECAY_POS_CLS": True,
}
_DATA_DEFAULTS: dict[str, Any] = {
    "NUM_FRAMES": 8,
    "SAMPLING_RATE": 8,
    "TRAIN_CROP_SIZE": 224,
    "TEST_CROP_SIZE": None,  # the official model takes no other size than the training crop
    "TARGET_FPS": 30,
    "TRAIN_JITTER_SCALES": None,  # officially [256, 320], whatever the crop
    "INPUT_CHANNEL_NUM": [3],
    "REVERSE_INPUT_CHANNEL": False,
    "MEAN": [0.45, 0.45, 0.45],
    "STD": [0.225, 0.225, 0.225],
}
_MODEL_DEFAULTS: dict[str, Any] = {
    "NUM_CLASSES": 400,
    "DROPOUT_RATE": 0.5,
    "MODEL_NAME": "MViT",
    "HEAD_ACT": "softmax",
    "ACT_CHECKPOINT": False,
}


# Fields that the blocks laid out by ``plan_blocks`` already show, or that shape nothing without them.
_IN_PLAN = {
    "attention",
    "dim_mul",
    "head_mul",
    "kv_stride",
    "kv_strides",
    "pool_q_every_block",
    "q_stride",
    "q_strides",
    "stages",
    "window",
}
_COMPARED = [field.name for field in fields(MViTConfig) if field.name not in {*_IN_PLAN, "patch_padding"}]


def translate_config(
    cfg: Mapping[str, Any], name: str, weight_names: Iterable[str] = ()
) -> tuple[MViTConfig, ClipSpec]:
    """Translate an official configuration to the model and the test protocol that it describes.

    Args:
        cfg: its sections; missing options have the official defaults.
        name: of the file, for errors.
        weight_names: of the checkpoint that the configuration came with. Where they tell that channels double
            elsewhere or queries are pooled in other blocks than the configuration says, they are believed.

    Raises:
        CheckpointError: the configuration is malformed, or has an option that can't be built; names it.
    """
    if not isinstance(cfg, Mapping) or not isinstance(cfg.get("MVIT"), Mapping):
        raise CheckpointError(f"{name}: its cfg is no MViT configuration, it has no section MVIT")
    mvit = _MVIT_DEFAULTS | {key: _plain(value) for key, value in cfg["MVIT"].items()}
    data, model = (
        defaults | {key: _plain(value) for key, value in (cfg.get(section) or {}).items()}
        for section, defaults in (("DATA", _DATA_DEFAULTS), ("MODEL", _MODEL_DEFAULTS))
    )
    _refuse_what_cannot_be_built(cfg, mvit, data, model, name)
    try:
        config = _model_config(mvit, data, model)
        config = believe_weights(config, set(weight_names))
        return config, _protocol(cfg, data)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{name}: its cfg is no MViT configuration ({error})") from None


def slowfast_config(config: MViTConfig, protocol: ClipSpec) -> dict[str, Any]:
    """The official configuration of a model: ``translate_config`` the other way.

    Raises:
        CheckpointError: no official options give that model; names the fields that they can't express.
    """
    first = int(config.patch_2d)  # options of single frames lack the time axis
    padding = config.patch_pad
    q_strides, kv_strides = pooling_strides(config)
    dim_mul, head_mul = block_factors(config)
    mvit = {
        "CLS_EMBED_ON": config.class_token,
        "DEPTH": sum(config.stages),
        "DIM_MUL": [list(item) for item in dim_mul.items()],
        "DIM_MUL_IN_ATT": config.dim_mul_in_attention,
        "DROPOUT_RATE": config.dropout,
        "DROPPATH_RATE": config.drop_path,
        "EMBED_DIM": config.embed_dim,
        "HEAD_INIT_SCALE": config.head_init_scale,
        "HEAD_MUL": [list(item) for item in head_mul.items()],
        "MLP_RATIO": config.mlp_ratio,
        "MODE": config.pool_mode,
        "NORM_STEM": config.norm_stem,
        "NUM_HEADS": config.num_heads,
        "PATCH_2D": config.patch_2d,
        "PATCH_KERNEL": list(config.patch_kernel[first:]),
        "PATCH_PADDING": list(padding[first:]),
        "PATCH_STRIDE": list(config.patch_stride[first:]),
        "POOL_FIRST": config.pool_first,
        "POOL_KVQ_KERNEL": list(config.pool_kernel) if isinstance(config.pool_kernel, tuple) else None,
        "POOL_KV_STRIDE": [list(entry) for entry in _entries(kv_strides)],
        "POOL_Q_STRIDE": [list(entry) for entry in _entries(q_strides)],
        "QKV_BIAS": config.qkv_bias,
        "REL_POS_SPATIAL": config.rel_pos_spatial,
        "REL_POS_TEMPORAL": config.rel_pos_temporal,
        "REL_POS_ZERO_INIT": config.rel_pos_zero_init,
        "RESIDUAL_POOLING": config.residual_pooling,
        "SEPARATE_QKV": config.separate_qkv,
        "SEP_POS_EMBED": config.abs_pos == "separable",
        "USE_ABS_POS": config.abs_pos != "none",
        "USE_MEAN_POOLING": config.mean_pooling,
    }
    cfg = {"MVIT": mvit, **_other_sections(config, protocol)}
    back, _ = translate_config(cfg, "export")
    lost = [name for name in _COMPARED if getattr(back, name) != getattr(config, name)]
    if lost or list(plan_blocks(back)) != list(plan_blocks(config)):
        values = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost or ["attention", "stages"])
        raise CheckpointError(f"PySlowFast has no options for a model with {values}")
    return cfg


def _other_sections(config: MViTConfig, protocol: ClipSpec) -> dict[str, Any]:
    segments = protocol.sampling == "segment"
    # Officially, frames for these are BGR until channels are swapped, behind the normalisation.
    order = -1 if segments else 1
    jitter = protocol.short_side if protocol.num_crops == 1 else config.crop_size * 256 // 224
    return {
        "MODEL": {
            "MODEL_NAME": "MViT",
            "ARCH": "mvit",
            "NUM_CLASSES": config.num_classes,
            "DROPOUT_RATE": config.head_dropout,
            "ACT_CHECKPOINT": config.checkpoint_blocks,
        },
        "DATA": {
            "NUM_FRAMES": config.num_frames,
            "SAMPLING_RATE": protocol.stride,
            "TARGET_FPS": protocol.target_fps,
            "TRAIN_CROP_SIZE": config.crop_size,
            "TEST_CROP_SIZE": protocol.crop,
            "TRAIN_JITTER_SCALES": [jitter, jitter * 5 // 4],
            "MEAN": list(protocol.mean[::order]),
            "STD": list(protocol.std[::order]),
            **({"REVERSE_INPUT_CHANNEL": True, "INV_UNIFORM_SAMPLE": True} if segments else {}),
            **({"RANDOM_FLIP": False} if segments else {}),
            **({"USE_OFFSET_SAMPLING": True} if protocol.sampling == "uniform" else {}),
        },
        "TEST": {
            **({"DATASET": "ssv2"} if segments else {}),
            "NUM_ENSEMBLE_VIEWS": protocol.num_clips,
            "NUM_SPATIAL_CROPS": protocol.num_crops,
        },
    }


def _plain(value: Any) -> Any:
    """PySlowFast's files write tuples and None as Python would: strings to yaml."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
    return list(value) if isinstance(value, tuple) else value


def _refuse_what_cannot_be_built(
    cfg: Mapping[str, Any], mvit: dict[str, Any], data: dict[str, Any], model: dict[str, Any], name: str
) -> None:
    detection, masking = cfg.get("DETECTION") or {}, cfg.get("MASK") or {}
    checks: dict[str, tuple[Any, list[Any]]] = {
        "MVIT.NORM": (mvit["NORM"], ["layernorm"]),
        "MVIT.MODE": (mvit["MODE"], ["conv", "conv_unshared", "max", "avg"]),
        "MVIT.USE_FIXED_SINCOS_POS": (mvit["USE_FIXED_SINCOS_POS"], [False]),
        "MVIT.REV.ENABLE": ((mvit["REV"] or {}).get("ENABLE", False), [False]),
        "MODEL.MODEL_NAME": (model["MODEL_NAME"], ["MViT"]),
        "MODEL.HEAD_ACT": (model["HEAD_ACT"], ["softmax", "none"]),
        "DATA.INPUT_CHANNEL_NUM": (data["INPUT_CHANNEL_NUM"], [[3]]),
        "DETECTION.ENABLE": (detection.get("ENABLE", False), [False]),
        "MASK.ENABLE": (masking.get("ENABLE", False), [False]),
    }
    for option, (found, allowed) in checks.items():
        if found not in allowed:
            only = " or ".join(map(str, allowed))
            raise CheckpointError(f"{name}: {option} = {found} can't be built; only {only} can")
    unknown = sorted(set(mvit) - set(_MVIT_DEFAULTS))
    if unknown:
        raise CheckpointError(f"{name}: MVIT.{unknown[0]} = {mvit[unknown[0]]} can't be built; it is unknown")


def _model_config(mvit: dict[str, Any], data: dict[str, Any], model: dict[str, Any]) -> MViTConfig:
    depth = mvit["DEPTH"]
    widened = sorted({block for block, factor in _factors(mvit, "DIM_MUL").items() if factor != 1 and block})
    edges = [0, *(block for block in widened if block < depth), depth]
    q_strides = _strides(mvit, "POOL_Q_STRIDE")
    frame = mvit["PATCH_2D"]  # patches of single frames: options lack the time axis
    patch_kernel = _grid(mvit, "PATCH_KERNEL", *([1] if frame else []))
    patch_padding = _grid(mvit, "PATCH_PADDING", *([0] if frame else []))
    config = MViTConfig(
        num_classes=model["NUM_CLASSES"],
        num_frames=data["NUM_FRAMES"],
        crop_size=data["TRAIN_CROP_SIZE"],
        embed_dim=mvit["EMBED_DIM"],
        num_heads=mvit["NUM_HEADS"],
        stages=tuple(b - a for a, b in itertools.pairwise(edges)),
        mlp_ratio=mvit["MLP_RATIO"],
        qkv_bias=mvit["QKV_BIAS"],
        patch_kernel=patch_kernel,
        patch_stride=_grid(mvit, "PATCH_STRIDE", *([1] if frame else [])),
        patch_padding=None if patch_padding == same_padding(patch_kernel) else patch_padding,
        patch_2d=frame,
        pool_kernel="stride" if mvit["POOL_KVQ_KERNEL"] is None else _grid(mvit, "POOL_KVQ_KERNEL"),
        pool_mode=mvit["MODE"],
        pool_first=mvit["POOL_FIRST"],
        pool_q_every_block=len(q_strides) == depth,
        separate_qkv=mvit["SEPARATE_QKV"],
        q_stride=q_strides.get(widened[0], (1, 1, 1)) if widened else (1, 1, 1),
        class_token=mvit["CLS_EMBED_ON"],
        mean_pooling=mvit["USE_MEAN_POOLING"],
        residual_pooling=mvit["RESIDUAL_POOLING"],
        abs_pos=("separable" if mvit["SEP_POS_EMBED"] else "joint") if mvit["USE_ABS_POS"] else "none",
        rel_pos_temporal=mvit["REL_POS_TEMPORAL"],
        rel_pos_spatial=mvit["REL_POS_SPATIAL"],
        rel_pos_zero_init=mvit["REL_POS_ZERO_INIT"],
        norm_stem=mvit["NORM_STEM"],
        dim_mul_in_attention=mvit["DIM_MUL_IN_ATT"],
        dropout=mvit["DROPOUT_RATE"],
        drop_path=mvit["DROPPATH_RATE"],
        head_dropout=model["DROPOUT_RATE"],
        head_init_scale=mvit["HEAD_INIT_SCALE"],
        checkpoint_blocks=model["ACT_CHECKPOINT"],
    )
    return _with_block_lists(config, mvit, q_strides)


def _with_block_lists(config: MViTConfig, mvit: dict[str, Any], q_strides: dict[int, Grid]) -> MViTConfig:
    """Add the lists that name blocks one by one, where they differ from what ``stages`` already says."""
    doubled = dict.fromkeys(config.stage_starts[1:], 2.0)
    dim_mul, head_mul = _factors(mvit, "DIM_MUL"), _factors(mvit, "HEAD_MUL")
    if dim_mul != doubled:
        config = replace(config, dim_mul=tuple(dim_mul.items()))
    if head_mul != doubled:
        config = replace(config, head_mul=tuple(head_mul.items()))
    if q_strides != pooling_strides(config)[0]:
        config = replace(config, q_strides=_entries(q_strides))

    if mvit["POOL_KV_STRIDE_ADAPTIVE"] is not None:  # overrules the list
        return replace(config, kv_stride=_grid(mvit, "POOL_KV_STRIDE_ADAPTIVE"))
    kv_strides = _strides(mvit, "POOL_KV_STRIDE")
    config = replace(config, kv_stride=kv_strides.get(0, (1, 1, 1)))
    if kv_strides != pooling_strides(config)[1]:
        config = replace(config, kv_strides=_entries(kv_strides))
    return config


def believe_weights(config: MViTConfig, weight_names: set[str]) -> MViTConfig:
    """Correct where channels double and queries are pooled by which weights there are.

    The published L has another number of parameters than its configuration gives.
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


def _protocol(cfg: Mapping[str, Any], data: dict[str, Any]) -> ClipSpec:
    test = cfg.get("TEST") or {}
    crop = data["TEST_CROP_SIZE"] or data["TRAIN_CROP_SIZE"]
    num_crops = test.get("NUM_SPATIAL_CROPS", 1)
    segments = test.get("DATASET") == "ssv2"
    image = data["NUM_FRAMES"] == 1
    # What one crop is cut out of: for videos the least short side of the training, where that is told.
    jitter = data["TRAIN_JITTER_SCALES"]
    if image:
        margin = crop * 256 // 224
    elif jitter is not None:
        margin = max(jitter[0], crop)
    else:
        margin = 256 if crop == 224 else crop
    mean, std = tuple(data["MEAN"]), tuple(data["STD"])
    if data["REVERSE_INPUT_CHANNEL"]:  # channels are swapped behind the normalisation
        mean, std = mean[::-1], std[::-1]
    return ClipSpec(
        clip_frames=data["NUM_FRAMES"],
        stride=1 if image else data["SAMPLING_RATE"],
        target_fps=float(data["TARGET_FPS"]),
        pixels="image" if image else "slowfast",
        sampling="segment" if segments else "uniform",
        num_clips=1 if image or segments else test.get("NUM_ENSEMBLE_VIEWS", 5),
        num_crops=num_crops,
        short_side=crop if num_crops > 1 else margin,
        crop=crop,
        mean=mean,
        std=std,
    )


def _grid(mvit: dict[str, Any], option: str, *before: int) -> Grid:
    try:
        t, h, w = (int(value) for value in (*before, *mvit[option]))
    except (TypeError, ValueError):
        raise ValueError(f"MVIT.{option} = {mvit[option]} must be {3 - len(before)} numbers") from None
    return t, h, w


def _strides(mvit: dict[str, Any], option: str) -> dict[int, Grid]:
    """(block, T, H, W) entries; the last of several for one block counts."""
    try:
        return {int(block): (int(t), int(h), int(w)) for block, t, h, w in mvit[option]}
    except (TypeError, ValueError):
        raise ValueError(f"MVIT.{option} = {mvit[option]} must list [block, T, H, W]") from None


def _factors(mvit: dict[str, Any], option: str) -> dict[int, float]:
    try:
        return {int(block): float(factor) for block, factor in mvit[option]}
    except (TypeError, ValueError):
        raise ValueError(f"MVIT.{option} = {mvit[option]} must list [block, factor]") from None


def _entries(strides: dict[int, Grid]) -> tuple[tuple[int, int, int, int], ...]:
    return tuple((block, *stride) for block, stride in strides.items())
