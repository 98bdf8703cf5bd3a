"""What each key of the configuration may be. ``conf/`` has the defaults, this the types and ranges.

A class describes the keys of a command or of a config group, so one look at a command line is enough to
refuse what can't work. Keys that aren't described (those of a user's own data set, say) may be anything.
"""

from __future__ import annotations

import functools
import math
import sys
from contextlib import suppress
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf

from mvit_video.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """Allowed numbers, ends included unless ``above`` or ``below`` say otherwise."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        return (self.low < value or (self.low == value and not self.above)) and (
            value < self.high or (value == self.high and not self.below)
        )

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low:g}" if self.above else f"of at least {self.low:g}"
        low, high = (f"{end:.12g}" for end in (self.low, self.high))
        return f"{'above' if self.above else 'from'} {low} {'to below' if self.below else 'to'} {high}"


@dataclass(frozen=True)
class Length:
    """How many entries a list has."""

    count: int

    def holds(self, value: list[Any]) -> bool:
        return len(value) == self.count

    def __str__(self) -> str:
        return f"with {self.count} entries"


# Upper ends keep a slip of the finger from filling the memory or starting thousands of threads.
Whole = Annotated[int, Range(0, 1_000_000)]
Count = Annotated[int, Range(1, 1_000_000)]
Few = Annotated[int, Range(1, 10_000)]
Workers = Annotated[int, Range(0, 1024)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
Share = Annotated[float, Range(0, 1)]
ShareBelow1 = Annotated[float, Range(0, 1, below=True)]
Rate = Annotated[float, Range(0, 10_000, above=True)]
Grid = Annotated[list[Few], Length(3)]
Batches = Annotated[float, Range(0, 1, above=True)] | Count | None  # a share of them, or so many
Table = list[list[float]]


class Group:
    """Keys of a config group, or of a part of one."""


class Model(Group):
    name: str
    weights: str | None
    num_frames: Few | None
    crop_size: Few | None
    embed_dim: Few | None
    num_heads: Few | None
    stages: list[Annotated[int, Range(1, 1000)]] | None
    mlp_ratio: Annotated[float, Range(0, 1000, above=True)] | None
    qkv_bias: bool | None
    patch_kernel: Grid | None
    patch_stride: Grid | None
    patch_padding: Annotated[list[Whole], Length(3)] | None
    patch_2d: bool | None
    pool_kernel: Literal["stride"] | Grid | None
    pool_mode: str | None
    pool_first: bool | None
    pool_q_every_block: bool | None
    separate_qkv: bool | None
    q_stride: Grid | None
    kv_stride: Grid | None
    attention: str | None
    window: Grid | None
    window_padding: bool | None
    class_token: bool | None
    mean_pooling: bool | None
    residual_pooling: bool | None
    abs_pos: str | None
    rel_pos_temporal: bool | None
    rel_pos_spatial: bool | None
    rel_pos_joint: str | None
    rel_pos_zero_init: bool | None
    norm_stem: bool | None
    dim_mul_in_attention: bool | None
    dim_mul: Table | None
    head_mul: Table | None
    q_strides: list[list[Whole]] | None
    kv_strides: list[list[Whole]] | None
    dropout: ShareBelow1 | None
    drop_path: ShareBelow1 | None
    head_dropout: ShareBelow1 | None
    head_init_scale: NotNegative | None
    checkpoint_blocks: bool | None


class Data(Group):
    root: str | None
    path: str
    train: str | None
    val: str | None
    test: str | None
    labels: str | None
    videos: str | None
    frame_lists: Annotated[list[str], Length(2)] | None
    class_names: str | list[str] | None
    val_fraction: ShareBelow1
    max_missing: Share
    fold: Annotated[int, Range(1, 3)]
    seed: Seed


class Views(Group):
    clip_frames: Few | None
    stride: Few | None
    target_fps: Rate | None
    sampling: Literal["uniform", "segment", "torchvision"] | None
    pixels: Literal["slowfast", "torchvision", "image"] | None
    num_clips: Few | None
    num_crops: Literal[1, 3] | None
    short_side: Few | None
    crop: Few | None
    mean: Annotated[list[float], Length(3)] | None
    std: Annotated[list[Positive], Length(3)] | None


class Decoder(Group):
    backend: Literal["auto", "pyav", "torchcodec", "decord"]
    device: str
    frame_rate: Rate
    max_pixels: Annotated[int, Range(1, 1e12)]
    index_cache: str | None


class Augment(Group):
    short_side: Few | None
    rand_augment: str | None
    fill: Annotated[list[Annotated[int, Range(0, 255)]], Length(3)]
    bgr: bool
    colour_jitter: Share
    crop_first: bool
    area: Annotated[list[Annotated[float, Range(0, 1, above=True)]], Length(2)]
    aspect: Annotated[list[Positive], Length(2)]
    short_side_range: Annotated[list[Few], Length(2)] | None
    flip_probability: Share
    erase_probability: Share
    erase_count: Few
    repeats: Annotated[int, Range(1, 1000)]


class Mixing(Group):
    mixup: NotNegative
    cutmix: NotNegative
    probability: Share
    switch_probability: Share


class Optimizer(Group):
    betas: Annotated[list[ShareBelow1], Length(2)]
    eps: NotNegative
    momentum: ShareBelow1
    nesterov: bool


class Optim(Group):
    optimizer: Optimizer
    lr: NotNegative
    warmup: ShareBelow1
    warmup_start_lr: NotNegative
    end_lr: NotNegative
    weight_decay: NotNegative
    label_smoothing: ShareBelow1
    layer_decay: Annotated[float, Range(0, 1, above=True)]
    lr_batch_size: Count | None


class Trainer(Group):
    accelerator: str
    strategy: str
    devices: Annotated[int, Range(-1, 100_000)] | list[Whole] | str
    num_nodes: Count
    precision: Literal[
        "auto", "64", "64-true", "32", "32-true", "16", "16-mixed", "16-true", "bf16", "bf16-mixed",
        "bf16-true", "transformer-engine", "transformer-engine-float16",
    ]  # fmt: skip
    fast_dev_run: bool | Whole
    max_epochs: Annotated[int, Range(-1, 1_000_000)] | None
    min_epochs: Whole | None
    max_steps: Annotated[int, Range(-1, 1e12)]
    min_steps: Annotated[int, Range(0, 1e12)] | None
    max_time: str | None
    limit_train_batches: Batches
    limit_val_batches: Share | Whole | None
    overfit_batches: Share | Whole
    val_check_interval: Batches
    check_val_every_n_epoch: Count | None
    num_sanity_val_steps: Annotated[int, Range(-1, 1_000_000)]
    log_every_n_steps: Whole
    enable_checkpointing: bool
    enable_progress_bar: bool
    enable_model_summary: bool
    accumulate_grad_batches: Count
    gradient_clip_val: NotNegative | None
    gradient_clip_algorithm: Literal["norm", "value"] | None
    deterministic: bool | Literal["warn"] | None
    benchmark: bool | None
    profiler: Literal["simple", "advanced", "pytorch"] | None
    detect_anomaly: bool
    sync_batchnorm: bool
    use_distributed_sampler: bool


class LoggerFiles(Group):
    save_dir: str
    name: str
    project: str
    offline: bool


class Logger(Group):
    csv: LoggerFiles
    tensorboard: LoggerFiles
    wandb: LoggerFiles


class Command(Group):
    """Keys that commands share; each has those that its own file in ``conf/`` lists."""

    batch_size: Count
    num_workers: Workers
    device: str
    weights: str | None
    trust: bool
    profile: bool
    compile: bool
    loader: Literal["auto", "threads", "workers"]
    max_bad_videos: ShareBelow1 | Whole
    seed: Seed
    topk: Count


class Train(Command):
    task: Literal["classification", "detection", "action_detection", "pretraining"]
    monitor: str | None
    exact: bool
    model: Model
    data: Data
    views: Views
    decoder: Decoder
    augment: Augment
    mixing: Mixing | None
    optim: Optim
    trainer: Trainer
    logger: Logger | None
    head: Literal["strict", "new"]
    freeze: str | list[str] | None
    ema: Annotated[float, Range(0, 1, above=True, below=True)] | None
    early_stopping: Whole | None
    ckpt_path: str | None
    save_every_n_steps: Count | None


class Eval(Command):
    model: Model | None
    data: Data
    views: Views
    decoder: Decoder
    scores: str | list[str] | None
    ensemble: bool
    split: Literal["train", "val", "test"]
    precision: Literal["auto", "bf16", "fp32"]
    combine: Literal["mean", "max", "logits"]
    class_map: str | None
    class_names: str | list[str] | None
    resume: str | None
    worst_mistakes: Whole


class Predict(Command):
    model: Model | None
    views: Views
    decoder: Decoder
    videos: list[str]
    per_clip: bool
    output: str | None
    format: Literal["json", "jsonl", "csv", "parquet"] | None
    resume: bool
    window: Positive | None
    stride: Positive | None
    smoothing: NotNegative
    min_score: Share
    save: list[Literal["png", "srt", "vtt", "video"]]
    explain: Literal["gradcam", "rollout"] | None
    save_dir: str
    live: bool
    follow: NotNegative | None
    engine: Literal["local", "ray"]
    actors: Few
    ray_address: str | None
    precision: Literal["auto", "bf16", "fp32"]


class Info(Command):
    model: Model


class DataCommand(Group):
    data: Data
    index: str | None
    num_workers: Workers | None
    frame_rate: Rate
    index_cache: str | None


class Export(Command):
    model: Model | None
    views: Views
    output: str
    results: str | None
    licence: str | None
    compiled: bool
    tolerance: Positive
    runs: Count


class Demo(Command):
    model: Model | None
    views: Views
    decoder: Decoder
    host: str
    port: Annotated[int, Range(0, 65535)] | None
    max_megabytes: Positive
    max_seconds: Positive


COMMANDS: dict[str, type[Group]] = {
    "train": Train,
    "eval": Eval,
    "predict": Predict,
    "info": Info,
    "data": DataCommand,
    "export": Export,
    "demo": Demo,
}


def check(node: DictConfig, group: type[Group], parent: str = "") -> None:
    """Bring the values of a composed configuration to the types of ``group``, in place.

    A number where text is meant becomes text, and one value where a list is meant a list of it.

    Raises:
        ConfigError: for the first value that doesn't fit.
    """
    for name, hint in _hints(group).items():  # type: ignore[arg-type]  # mypy: a class's __hash__
        key = f"{parent}{name}"
        if name not in node or OmegaConf.is_missing(node, name):
            continue
        value, part = node[name], part_of(hint)
        if part is not None and isinstance(value, DictConfig):
            if not is_foreign(value):
                check(value, part, f"{key}.")
            continue
        plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        try:
            fitted = fit(plain, hint)
        except ValueError:
            shown = {"None": "null", "True": "true", "False": "false"}.get(repr(plain), repr(plain))
            shown = shown if len(shown) < 80 else f"{shown[:60]} ..."
            raise ConfigError(f"{key} is {shown}, expected {describe(hint)}") from None
        if type(fitted) is not type(plain) or fitted != plain:
            node[name] = fitted


@functools.cache
def _hints(group: Any) -> dict[str, Any]:
    return get_type_hints(group, include_extras=True)


def hint_of(key: str, group: type[Group]) -> Any:
    """The type of a dotted key; None where it isn't described."""
    name, _, rest = key.partition(".")
    hint = _hints(group).get(name)  # type: ignore[arg-type]
    part = part_of(hint)
    return (hint_of(rest, part) if part else None) if rest else hint


def members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def part_of(hint: Any) -> type[Group] | None:
    """The group that a type stands for, if it is one."""
    return next((m for m in members(hint) if isinstance(m, type) and issubclass(m, Group)), None)


def is_foreign(node: DictConfig) -> bool:
    """Whether a user's own class is built from it, whose arguments aren't known here."""
    target = str(node.get("_target_") or "mvit_video.")
    return not target.startswith(("mvit_video.", "pytorch_lightning.", "torch."))


def fit(value: Any, hint: Any) -> Any:
    """The value as a type has it; ValueError where it doesn't fit."""
    if len(members(hint)) > 1:
        for member in members(hint):
            with suppress(ValueError):
                return fit(value, member)
        raise ValueError
    if get_origin(hint) is Annotated:
        base, *limits = get_args(hint)
        value = fit(value, base)
        if not all(limit.holds(value) for limit in limits):
            raise ValueError
        return value
    if get_origin(hint) is list:
        (entry,) = get_args(hint)
        return [fit(item, entry) for item in (value if isinstance(value, list | ListConfig) else [value])]
    if get_origin(hint) is Literal:
        for choice in get_args(hint):
            if type(choice) is type(value) and choice == value:
                return choice
            if isinstance(choice, str) and isinstance(value, int | float) and choice == str(value):
                return choice
        raise ValueError
    return _fit_scalar(value, hint)


def _fit_scalar(value: Any, kind: type) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_number = is_number and abs(value) <= sys.float_info.max  # so it is finite, too
    if kind is str and isinstance(value, bool | int | float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    fits = {
        NoneType: value is None,
        str: isinstance(value, str) and value != "" and "\0" not in value,
        bool: isinstance(value, bool),
        int: is_number and value == int(value),
        float: is_number,
    }
    if not fits[kind]:
        raise ValueError
    return int(value) if kind is int else value


def describe(hint: Any) -> str:
    """A type in words."""
    if len(members(hint)) > 1:
        return " or ".join(describe(member) for member in members(hint))
    if get_origin(hint) is Annotated:
        base, *limits = get_args(hint)
        return " ".join([describe(base), *map(str, limits)])
    if get_origin(hint) is list:
        return f"a list [...] of ({describe(get_args(hint)[0])})"
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if part_of(hint):
        return "values by key"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(hint, "null")
