"""mvit-info speed: how fast this machine is at each part of the work, what is the limit and what to set."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from mvit_video.cli import app
from mvit_video.data.augment import Augment
from mvit_video.data.clips import read_test_views
from mvit_video.data.datasets import ClipDataset, training_loader
from mvit_video.data.decode import open_video
from mvit_video.data.index import LabelledVideo
from mvit_video.data.threads import threaded_map
from mvit_video.io.clips import write_clip
from mvit_video.io.console import print_table
from mvit_video.io.writing import write_json
from mvit_video.model import ClipSpec, kernels

LIMIT = 90  # seconds until the last measurement begins
MATRIX = 2048  # rows and columns of the product that gives the machine's own speed
BATCHES = (1, 2, 4, 8)
ENOUGH = 0.95  # of the largest speed: a smaller batch that reaches it is as good
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Speed:
    """What was measured: billions of multiply-adds, and clips, a second; None where time was out.

    Attributes:
        matrix: a large product of matrices, by precision.
        inference, training: a model, by precision, with one clip at once; "fp32, plain" is without the
            toolkit's own kernels, "... compiled" by torch.compile.
        batches: inference in the faster precision, by clips at once.
        decoding: clips decoded and resized for a test, by threads.
        loading: clips decoded and augmented for training, by workers.
    """

    cores: int
    device: str
    matrix: dict[str, float | None]
    inference: dict[str, float | None]
    training: dict[str, float | None]
    batches: dict[int, float | None]
    decoding: dict[int, float | None]
    loading: dict[int, float | None]


@dataclass(frozen=True)
class Advice:
    """The part that training waits for, and what to set."""

    limit: str
    settings: dict[str, Any]


class Stopwatch:
    """Measures each thing for some seconds, but begins with none later than ``limit`` seconds from now."""

    def __init__(self, device: str, seconds: float, limit: float) -> None:
        self.device, self.seconds, self.end = device, seconds, time.perf_counter() + limit

    def per_second(self, count: float, run: Callable[..., Any], *arguments: Any) -> float | None:
        """How much of the ``count`` of a run is done in a second, the median; None where time is out."""
        if time.perf_counter() > self.end:
            return None
        given, cores = {"run": run, "arguments": arguments}, len(os.sched_getaffinity(0))
        timer = Timer("run(*arguments)", globals=given, num_threads=cores)
        return count / timer.blocked_autorange(min_run_time=self.seconds).median


def print_speed(config: DictConfig) -> None:
    """Measure, print a table, the limit and the settings to take; ``config.output`` gets them as JSON."""
    device, cores = app.choose_device(config.device), len(os.sched_getaffinity(0))
    watch = Stopwatch(device, config.seconds, math.inf if config.compile else LIMIT)
    torch.manual_seed(0)
    model = app.build(config.model, weights=None)
    clip = torch.randn(1, 3, model.config.num_frames, *[model.config.crop_size] * 2, device=device)
    with tempfile.TemporaryDirectory() as folder:
        video = config.video or write_sample(Path(folder) / "sample.mp4")
        decoding, loading = _reading(watch, str(video), model.protocol, cores)
        matrix = {name: _matrix(watch, dtype) for name, dtype in _DTYPES.items()}
        inference, training = _models(watch, model.to(device), clip, config.compile)
        batches = _batches(watch, model, clip, inference)
    speed = Speed(cores, device, matrix, inference, training, batches, decoding, loading)
    advice = advise(speed)
    _show(speed, advice, config.model.name)
    if config.output:
        write_json(config.output, {"model": config.model.name, **asdict(speed), **asdict(advice)})


def advise(speed: Speed) -> Advice:
    """What limits training on such a machine, and the settings that make the best of it."""
    training = {name: clips for name, clips in speed.training.items() if clips}
    precision, clips = max(training.items(), key=lambda item: item[1], default=("fp32", math.inf))
    one_worker, all_workers = (speed.loading.get(workers) or math.inf for workers in (1, speed.cores))
    workers = min(max(math.ceil(clips / one_worker), 1), speed.cores) if math.isfinite(clips) else 1
    inference = {name: value for name, value in speed.inference.items() if value}
    compiled = [inference[name] for name in inference if name.endswith("compiled")]
    plain = [inference[name] for name in inference if not name.endswith("compiled")]
    batches = {size: value for size, value in speed.batches.items() if value}
    best = max(batches.values(), default=0.0)
    settings: dict[str, Any] = {"num_workers": workers}
    if len(training) > 1:  # what there was no time to compare isn't advised
        settings["trainer.precision"] = "bf16-mixed" if precision == "bf16" else "32-true"
    if len(batches) > 1:
        settings["batch_size"] = next(size for size, value in batches.items() if value >= ENOUGH * best)
    if compiled:
        settings["compile"] = max(compiled) > max(plain)
    return Advice("loading" if all_workers < clips else "the model", settings)


def write_sample(path: Path) -> Path:
    """Ten seconds of moving noise in h264, 340 x 256 at 30 frames a second, as Kinetics is often kept."""
    noise = np.random.RandomState(0).randint(0, 256, (32, 43, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    pictures = (np.roll(noise, 2 * number, 1)[:256, :340] for number in range(300))
    with path.open("wb") as file:
        write_clip(file, pictures, 30)
    return path


def _matrix(watch: Stopwatch, dtype: torch.dtype) -> float | None:
    x, weight = (torch.randn(MATRIX, MATRIX, device=watch.device).to(dtype) for _ in range(2))
    with torch.inference_mode():
        return watch.per_second(MATRIX**3 / 1e9, kernels.linear, x, weight, None)


def _models(
    watch: Stopwatch, model: nn.Module, clip: Tensor, compiled: bool
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    inference: dict[str, float | None] = {}
    training: dict[str, float | None] = {}

    def step(dtype: torch.dtype) -> None:
        with torch.autocast(clip.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(clip).float().square().mean()
        loss.backward()
        model.zero_grad()

    @torch.inference_mode()
    def infer(dtype: torch.dtype) -> float | None:
        model.to(dtype).eval()
        return watch.per_second(1, model, clip.to(dtype))

    for name, dtype in _DTYPES.items():
        inference[name] = infer(dtype)
        model.float().train()
        training[name] = watch.per_second(1, step, dtype)
    with kernels.plain():
        inference |= {f"{name}, plain": infer(dtype) for name, dtype in _DTYPES.items()}
    if compiled:
        model.compile()
        inference |= {f"{name}, compiled": infer(dtype) for name, dtype in _DTYPES.items()}
    return inference, training


@torch.inference_mode()
def _batches(
    watch: Stopwatch, model: nn.Module, clip: Tensor, inference: dict[str, float | None]
) -> dict[int, float | None]:
    fastest = max(_DTYPES, key=lambda name: inference[name] or 0)
    model.to(_DTYPES[fastest]).eval()
    found: dict[int, float | None] = {1: inference[fastest]}
    for batch in BATCHES[1:]:
        clips = clip.to(_DTYPES[fastest]).expand(batch, -1, -1, -1, -1)
        try:
            found[batch] = watch.per_second(batch, model, clips)
        except torch.OutOfMemoryError:
            break
    return found


def _reading(
    watch: Stopwatch, path: str, spec: ClipSpec, cores: int
) -> tuple[dict[int, float | None], dict[int, float | None]]:
    """Clips a second of decoding and of loading, by one worker and by as many as there are cores."""
    one_view = replace(spec, num_clips=1, num_crops=1)

    def decode(_: int) -> None:
        with open_video(path) as video:
            read_test_views(video, one_view)

    def decode_all(count: int, workers: int) -> None:
        list(threaded_map(decode, range(count), workers))

    decoding: dict[int, float | None] = {}
    loading: dict[int, float | None] = {}
    for workers in sorted({1, cores}):
        count = 4 * workers
        decoding[workers] = watch.per_second(count, decode_all, count, workers)
        clips = ClipDataset([LabelledVideo(path, 0, "")] * count, spec, Augment(), seed=0)
        with contextlib.closing(training_loader(clips, batch_size=2, num_workers=workers)) as loader:
            loading[workers] = watch.per_second(count, list, loader)
    return decoding, loading


def _show(speed: Speed, advice: Advice, model: str) -> None:
    parts: dict[str, Mapping[Any, float | None]] = {
        f"product of {MATRIX} x {MATRIX} matrices, billions of multiply-adds": speed.matrix,
        f"{model}, inference, clips": speed.inference,
        f"{model}, training, clips": speed.training,
        f"{model}, inference, clips, by clips at once": speed.batches,
        "decoding for a test, clips, by threads": speed.decoding,
        "loading for training, clips, by workers": speed.loading,
    }
    rows = [
        (what, str(kind), "out of time" if value is None else f"{value:.3g}")
        for what, kinds in parts.items()
        for kind, value in kinds.items()
    ]
    print_table(f"{speed.device}, {speed.cores} CPU cores", ("a second", "", ""), rows)
    print(f"the limit of training: {advice.limit}")
    print("settings: " + " ".join(f"{key}={str(value).lower()}" for key, value in advice.settings.items()))
    if "compile" not in advice.settings:
        print("compile: not measured, as compiling takes minutes; mvit-info speed compile=true does")
