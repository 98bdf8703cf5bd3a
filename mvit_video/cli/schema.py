"""What each key of the configuration may be, so that one look at a command line refuses what can't work.

A key has the type of its default in ``conf/``; where that is null, it is text or null. ``_LIMITS`` has what
can't be seen there: ranges, choices, the entries of lists, and what else a null stands for. Keys that aren't
in ``conf/`` (those of a user's own data set, say) may be anything.
"""

from __future__ import annotations

import functools
import math
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import yaml
from omegaconf import DictConfig, OmegaConf

from mvit_video.cli.conf import defaults
from mvit_video.errors import ConfigError


@dataclass(frozen=True)
class Number:
    """Numbers from ``low`` to ``high``, without an end that is open."""

    low: float = 0
    high: float = math.inf
    whole: bool = False
    open_low: bool = False
    open_high: bool = False

    def fit(self, value: Any) -> Any:
        is_finite = isinstance(value, int | float) and abs(value) <= sys.float_info.max
        if isinstance(value, bool) or not is_finite or (self.whole and value != int(value)):
            raise ValueError
        if not self.low <= value <= self.high:
            raise ValueError
        if (self.open_low and value == self.low) or (self.open_high and value == self.high):
            raise ValueError
        return int(value) if self.whole else value

    def __str__(self) -> str:
        low, high = (f"{end:.12g}" for end in (self.low, self.high))
        kind = "a whole number" if self.whole else "a number"
        if self.low == -math.inf:
            return kind
        if self.high == math.inf:
            return f"{kind} above {low}" if self.open_low else f"{kind} of at least {low}"
        return f"{kind} {'above' if self.open_low else 'from'} {low} to {'below ' * self.open_high}{high}"


class Choice:
    """One of a few values."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def fit(self, value: Any) -> Any:
        for choice in self.values:
            is_same = type(choice) is type(value) and choice == value
            if is_same or (isinstance(value, int | float) and choice == str(value)):
                return choice
        raise ValueError

    def __str__(self) -> str:
        return " or ".join(map(in_yaml, self.values))


class Text:
    """Text; what reads as a number or a truth value is meant as text, too."""

    def fit(self, value: Any) -> str:
        if isinstance(value, bool | int | float):
            return in_yaml(value)
        if not isinstance(value, str) or value == "" or "\0" in value:
            raise ValueError
        return value

    def __str__(self) -> str:
        return "text"


@dataclass(frozen=True)
class ListOf:
    """A list, of a certain length perhaps; a single value is a list of it."""

    entry: Kind
    length: int | None = None

    def fit(self, value: Any) -> list[Any]:
        entries = [self.entry.fit(item) for item in (value if isinstance(value, list) else [value])]
        if self.length not in (None, len(entries)):
            raise ValueError
        return entries

    def __str__(self) -> str:
        return f"a list [...] of {f'{self.length} entries, each ' if self.length else ''}({self.entry})"


# What a value may be: ``fit`` gives it as it is meant, or raises ValueError; ``str`` says it in words.
Kind: TypeAlias = Number | Choice | Text | ListOf

TEXT, FLAG, NULL = Text(), Choice(True, False), Choice(None)
NUMBER, NOT_NEGATIVE, POSITIVE = Number(-math.inf), Number(), Number(open_low=True)
SHARE = Number(0, 1)
SHARE_ABOVE_0, SHARE_BELOW_1 = Number(0, 1, open_low=True), Number(0, 1, open_high=True)
# Upper ends keep a slip of the finger from filling the memory or starting thousands of threads.
WHOLE, COUNT, FEW = Number(0, 1e6, whole=True), Number(1, 1e6, whole=True), Number(1, 10_000, whole=True)

# By name, which means the same wherever a key of that name stands, or by the whole key where it doesn't.
_LIMITS: dict[str, Kind | tuple[Kind, ...]] = {
    # whole numbers
    "batch_size topk runs num_nodes accumulate_grad_batches lr_batch_size val_every": COUNT,
    "rpn_pre_nms_top_n_train rpn_pre_nms_top_n_test rpn_post_nms_top_n_train": COUNT,
    "rpn_post_nms_top_n_test rpn_batch_size_per_image box_batch_size_per_image": COUNT,
    "box_detections_per_img": COUNT,
    "save_every_n_steps check_val_every_n_epoch": (COUNT, NULL),
    "num_frames crop_size embed_dim num_heads clip_frames views.stride num_clips short_side crop": FEW,
    "erase_count actors masking.cell min_size max_size channels box_channels": FEW,
    "max_side augment.size roi_size last_stage_stride": FEW,
    "early_stopping worst_mistakes min_epochs": WHOLE,
    "seed": Number(0, 2**32 - 1, whole=True),
    "num_workers": Number(0, 1024, whole=True),
    "port": (Number(0, 65535, whole=True), NULL),
    "repeats": Number(1, 1000, whole=True),
    "fold": Number(1, 3, whole=True),
    "max_pixels": Number(1, 1e12, whole=True),
    "max_epochs": (Number(-1, 1e6, whole=True), NULL),
    "num_sanity_val_steps": Number(-1, 1e6, whole=True),
    "max_steps": Number(-1, 1e12, whole=True),
    "min_steps": Number(0, 1e12, whole=True),
    "devices": (Number(-1, 100_000, whole=True), ListOf(WHOLE), TEXT),
    # numbers
    "window stride tolerance max_megabytes max_seconds roi_stride": POSITIVE,
    "frame_rate target_fps": Number(0, 10_000, open_low=True),
    "mlp_ratio": Number(0, 1000, open_low=True),
    "head_init_scale follow start_second": NOT_NEGATIVE,
    "gradient_clip_val": (NOT_NEGATIVE, NULL),
    "min_score min_person_score max_missing colour_jitter flip_probability erase_probability lighting": SHARE,
    "probability switch_probability crop_probability box_score_thresh box_nms_thresh": SHARE,
    "dropout drop_path head_dropout val_fraction momentum warmup label_smoothing": SHARE_BELOW_1,
    "layer_decay": SHARE_ABOVE_0,
    "ema masking.ratio": Number(0, 1, open_low=True, open_high=True),
    # shares or counts
    "max_bad_videos": (SHARE_BELOW_1, WHOLE),
    "limit_train_batches val_check_interval": (SHARE_ABOVE_0, COUNT),
    "limit_val_batches overfit_batches": (SHARE, WHOLE),
    # lists
    "save": ListOf(Choice("png", "srt", "vtt", "video")),
    "videos": ListOf(TEXT),
    "short_sides crop_short_sides": ListOf(FEW),
    "crop_range image_size": ListOf(FEW, 2),
    "scales": ListOf(POSITIVE, 2),
    "milestones": ListOf(SHARE),
    "frame_lists": ListOf(TEXT, 2),
    "train_boxes val_boxes train_persons val_persons": (TEXT, ListOf(TEXT)),
    "data.seconds": ListOf(NOT_NEGATIVE, 2),
    "stages": ListOf(Number(1, 1000, whole=True)),
    "patch_kernel patch_stride q_stride kv_stride model.window": ListOf(FEW, 3),
    "pool_kernel": (Choice("stride"), ListOf(FEW, 3)),
    "patch_padding": ListOf(WHOLE, 3),
    "q_strides kv_strides": ListOf(ListOf(WHOLE)),
    "depths": ListOf(WHOLE),
    "dim_mul head_mul": ListOf(ListOf(NUMBER)),
    "mean": ListOf(NUMBER, 3),
    "std": ListOf(POSITIVE, 3),
    "fill": ListOf(Number(0, 255, whole=True), 3),
    "area": ListOf(SHARE_ABOVE_0, 2),
    "aspect": ListOf(POSITIVE, 2),
    "short_side_range": ListOf(FEW, 2),
    "betas": ListOf(SHARE_BELOW_1, 2),
    # text
    "weights data.videos": (TEXT, NULL),
    "fresh freeze scores class_names": (TEXT, ListOf(TEXT)),
    # choices
    "qkv_bias patch_2d pool_first pool_q_every_block separate_qkv window_padding class_token": FLAG,
    "mean_pooling residual_pooling rel_pos_temporal rel_pos_spatial rel_pos_zero_init norm_stem": FLAG,
    "dim_mul_in_attention checkpoint_blocks benchmark fpn aligned": FLAG,
    "deterministic": (FLAG, Choice("warn")),
    "compile": (FLAG, Choice("auto")),
    "fast_dev_run": (FLAG, WHOLE),
    "task": Choice("classification", "detection", "action_detection", "pretraining"),
    "balance": Choice("sampler", "loss"),
    "loader": Choice("auto", "threads", "workers"),
    "head": Choice("strict", "new"),
    "precision": Choice("auto", "bf16", "fp32"),
    "trainer.precision": Choice(
        *("auto", "64", "64-true", "32", "32-true", "16", "16-mixed", "16-true", "bf16", "bf16-mixed"),
        *("bf16-true", "transformer-engine", "transformer-engine-float16"),
    ),
    "split": Choice("train", "val", "test"),
    "combine": Choice("mean", "max", "logits"),
    "format": Choice("json", "jsonl", "csv", "parquet"),
    "explain": Choice("gradcam", "rollout"),
    "engine": Choice("local", "ray"),
    "part": Choice("backbone", "detector"),
    "sampling": Choice("uniform", "segment", "torchvision"),
    "pixels": Choice("slowfast", "torchvision", "image"),
    "num_crops": Choice(1, 3),
    "backend": Choice("auto", "pyav", "torchcodec", "decord"),
    "masking.kind": Choice("cube", "frame", "tube"),
    "features": Choice("hog", "pixels"),
    "gradient_clip_algorithm": Choice("norm", "value"),
    "profiler": Choice("simple", "advanced", "pytorch"),
}
LIMITS = {
    name: kinds if isinstance(kinds, tuple) else (kinds,)
    for names, kinds in _LIMITS.items()
    for name in names.split()
}
_BY_TYPE: dict[type, Kind] = {bool: FLAG, int: WHOLE, float: NOT_NEGATIVE, str: TEXT}


@functools.cache
def kinds_of(command: str) -> dict[str, tuple[Kind, ...]]:
    """What each dotted key of a command may be."""
    found: dict[str, list[Kind]] = {}
    for key, written in defaults(command):
        limits = LIMITS.get(key) or LIMITS.get(key.rpartition(".")[2], ())
        kinds = found.setdefault(key, list(limits))
        default = yaml.safe_load(written)
        if default is None:
            kinds.append(NULL)
        elif not limits:
            kinds.append(_kind_of(default))
    return {
        key: tuple(dict.fromkeys([TEXT, NULL] if set(kinds) == {NULL} else kinds))
        for key, kinds in found.items()
    }


def _kind_of(default: Any) -> Kind:
    return ListOf(_kind_of(default[0])) if isinstance(default, list) else _BY_TYPE[type(default)]


def check(config: DictConfig, command: str) -> None:
    """Bring the values of a composed configuration to what they may be, in place.

    A number where text is meant becomes text, and one value where a list is meant a list of it.

    Raises:
        ConfigError: for the first value that doesn't fit.
    """
    _check(config, kinds_of(command), "")


def _check(node: DictConfig, kinds: dict[str, tuple[Kind, ...]], parent: str) -> None:
    for name in list(node):
        key = f"{parent}{name}"
        is_known = key in kinds
        if OmegaConf.is_missing(node, name) or (not is_known and OmegaConf.is_interpolation(node, name)):
            continue
        value = node[name]
        if isinstance(value, DictConfig) and not is_known:
            target = str(value.get("_target_") or "mvit_video.")  # a user's own class has keys of its own
            if target.startswith(("mvit_video.", "pytorch_lightning.", "torch.")):
                _check(value, kinds, f"{key}.")
            continue
        plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        if is_known:
            fitted = _fit(key, plain, kinds[key])
            if type(fitted) is not type(plain) or fitted != plain:
                node[name] = fitted
        elif plain is not None and any(known.startswith(f"{key}.") for known in kinds):
            raise ConfigError(f"{key} is {_shown(plain)}, expected values by key: {key}.NAME=...")


def _fit(key: str, value: Any, kinds: tuple[Kind, ...]) -> Any:
    for kind in kinds:
        with suppress(ValueError):
            return kind.fit(value)
    raise ConfigError(f"{key} is {_shown(value)}, expected {' or '.join(map(str, kinds))}")


def in_yaml(value: object) -> str:
    """A value as it is typed on a command line."""
    if isinstance(value, list):
        return f"[{','.join(map(in_yaml, value))}]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def _shown(value: object) -> str:
    shown = repr(value) if isinstance(value, str) else in_yaml(value)
    return shown if len(shown) < 80 else f"{shown[:60]} ..."
