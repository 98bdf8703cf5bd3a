"""The model, for benchmarks/gpu.py: whether it is right on the device, and how near to the limit."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import math
import multiprocessing
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn.functional as F
from gpu_decoding import clip_at, decode_on, kinetics_like
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mvit_video.model import MViT, describe, kernels
from mvit_video.model.variants import VARIANTS, build

if TYPE_CHECKING:
    from gpu import Run

Json = dict[str, Any]
Step = Callable[[], Tensor]

# Model and clips in a batch, for inference and training; halved where memory doesn't hold them.
SIZES = {"S": ("mvitv2_s_16x4", 64, 32), "B": ("mvitv2_b_32x3", 32, 16), "L": ("mvitv2_l_40x3", 8, 4)}
COMPILING = 40  # seconds below which no compiling is begun
TINY = {"nano": ("mvitv2_nano_8x4", 2, 2)}


def sizes_of(run: Run) -> dict[str, tuple[str, int, int]]:
    return TINY if run.quick else SIZES


def allow_tf32(allowed: bool) -> None:
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


@functools.cache
def matrix_speed(run: Run, precision: str) -> float:
    """GFLOP/s of the best of ten turns of large matrix products."""
    n = 8192 if run.on_gpu else 256
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, n, n, device=run.device).to(dtype)
    allow_tf32(precision == "tf32")
    seconds = [run.seconds(lambda: a @ b, 3) for _ in range(11)]
    return 2 * n**3 / min(seconds[1:]) / 1e9


def check_models(run: Run) -> None:
    for size, (name, *_) in ({"S": SIZES["S"]} | TINY if not run.quick else TINY).items():
        for precision in ("fp32", "bf16"):
            run.case(f"{size} logits {precision}", same_logits, run, name, precision)
    run.case("nano gradients fp32", same_gradients, run, "mvitv2_nano_8x4")
    run.case("layouts of poolings", same_layouts, run)


def fresh(name: str, device: torch.device) -> tuple[MViT, Tensor]:
    """A model without anything random in training, every parameter of it random, and two clips."""
    torch.manual_seed(0)
    model = build(VARIANTS[name], drop_path=0.0, head_dropout=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.to(device), torch.randn(2, 3, *model.config.input_size).to(device)


def same_logits(run: Run, name: str, precision: str) -> Json:
    allow_tf32(False)
    model, clips = fresh(name, torch.device("cpu"))
    with torch.inference_mode():
        expected = model.eval()(clips)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        found = model.to(run.device, dtype)(clips.to(run.device, dtype)).float().cpu()
    return difference(found, expected, 5e-2 if precision == "bf16" else 1e-3)


def same_gradients(run: Run, name: str) -> Json:
    allow_tf32(False)
    gradients = []
    for device in (torch.device("cpu"), run.device):
        model, clips = fresh(name, device)
        model(clips).square().mean().backward()
        gradients.append(
            torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
        )
    return difference(gradients[1], gradients[0], 1e-3)


def same_layouts(run: Run) -> Json:
    allow_tf32(False)
    model, clips = fresh("mvitv2_nano_8x4", run.device)
    with torch.inference_mode():
        expected = model.eval()(clips)
        found = {}
        for layout in LAYOUTS:
            with pooled_in(layout):
                found[layout] = difference(model(clips), expected, 1e-3)
    return found


def difference(found: Tensor, expected: Tensor, allowed: float) -> Json:
    """Greatest difference relative to the greatest value, and whether that is as small as it should be."""
    relative = ((found - expected).abs().max() / expected.abs().max()).item()
    return {"relative difference": relative, "ok": relative <= allowed}


def pool_contiguous(pool: Any, x: Tensor, stride: Any = None) -> Tensor:
    """``kernels.pool_heads`` by contiguous volumes, whatever the device."""
    volume = x.permute(0, 4, 5, 1, 2, 3).flatten(0, 1).contiguous()
    volume = F.conv3d(volume, pool.weight, None, stride or pool.stride, pool.padding, groups=x.shape[-1])
    return volume.unflatten(0, (x.shape[0], x.shape[-2])).permute(0, 3, 4, 5, 1, 2)


def pool_channels_last(pool: Any, x: Tensor, stride: Any = None) -> Tensor:
    """``kernels.pool_heads`` by channels-last volumes of all heads, whatever the device."""
    heads, width = x.shape[-2:]
    volume, weight = x.flatten(-2).permute(0, 4, 1, 2, 3), pool.weight.repeat(heads, 1, 1, 1, 1)
    volume = F.conv3d(volume, weight, None, stride or pool.stride, pool.padding, groups=heads * width)
    return volume.permute(0, 2, 3, 4, 1).unflatten(-1, (heads, width))


LAYOUTS = {"contiguous": pool_contiguous, "channels-last": pool_channels_last}


def pooled_in(layout: str | None) -> contextlib.AbstractContextManager[Any]:
    """The model pools by volumes of this layout; None leaves it its own."""
    if layout is None:
        return contextlib.nullcontext()
    return mock.patch.object(kernels, "pool_heads", LAYOUTS[layout])


def torchvision_model(ours: MViT) -> nn.Module:
    from peers import torchvision_twin  # type: ignore[import-not-found]

    twin: nn.Module = torchvision_twin(ours)
    return twin


def step_of(model: nn.Module, clips: Tensor, kind: str, precision: str) -> Step:
    """An inference (bf16: with weights in it), or forward and backward (bf16: by autocast)."""
    model.train(kind == "training")
    bf16 = precision == "bf16"
    if bf16 and kind == "inference":
        model, clips = model.bfloat16(), clips.bfloat16()

    def infer() -> Tensor:
        with torch.inference_mode():
            return model(clips)

    def train() -> Tensor:
        with torch.autocast(clips.device.type, torch.bfloat16, enabled=bf16):
            loss = model(clips).float().logsumexp(1).mean()
        loss.backward()
        model.zero_grad()
        return loss.detach()

    return infer if kind == "inference" else train


class Contender:
    """A model, in the largest batch that fits."""

    def __init__(self, run: Run, model: nn.Module, kind: str, precision: str, layout: str | None) -> None:
        self.run, self.layout = run, layout
        self.peak: float | None = None  # GB that a step needs above models and clips
        self._make = functools.partial(step_of, model, kind=kind, precision=precision)

    def fit(self, clips: Tensor) -> None:
        """Find the batch; the steps that try it compile and warm up. Raises torch.OutOfMemoryError."""
        start = time.perf_counter()
        while True:
            try:
                self.step, self.batch = self._make(clips), len(clips)
                self.seconds(2)
                break
            except torch.OutOfMemoryError:
                if len(clips) == 1:
                    raise
            clips = clips[: len(clips) // 2]
            torch.cuda.empty_cache()
        self.starting = time.perf_counter() - start
        if self.run.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()  # models and clips
            self.seconds(1)
            self.peak = (torch.cuda.max_memory_allocated() - held) / 1e9

    def seconds(self, times: int) -> float:
        with pooled_in(self.layout):
            return self.run.seconds(self.step, times)


def models(run: Run, compiled: bool = False) -> None:
    for size in sizes_of(run):
        for kind in ("inference",) if compiled and run.quick else ("inference", "training"):
            for precision in ("bf16", "tf32") if size == "S" else ("bf16",):
                run.case(f"{size} {kind} {precision}", compare, run, size, kind, precision, compiled)


def compare(run: Run, size: str, kind: str, precision: str, compiled: bool) -> Json:
    """Clips a second of ours, of ours by the other layout of poolings, and of torchvision's, in turns."""
    gc.collect()
    if compiled:
        torch.compiler.reset()
        config: Any = importlib.import_module("torch._dynamo.config")
        config.recompile_limit = 64  # more than there are kinds of blocks
    name, *batches = sizes_of(run)[size]
    speed = matrix_speed(run, precision)
    allow_tf32(precision == "tf32")
    found: Json = {"ours": None, "torchvision": None, "channels-last" if run.on_gpu else "contiguous": None}
    problems: dict[str, str] = {}

    def enter(label: str) -> Contender | None:
        if compiled and (run.left() < COMPILING or (run.quick and label != "ours")):
            problems[label] = "left out for being quick" if run.quick else "out of time"
            return None
        try:
            model: Any = fresh(name, run.device)[0]
            clips = torch.randn(batches[kind == "training"], 3, *model.config.input_size, device=run.device)
            model = torchvision_model(model).to(run.device) if label == "torchvision" else model
            if compiled:
                for block in model.blocks:
                    block.compile(backend="inductor" if run.on_gpu else "eager")
            contender = Contender(run, model, kind, precision, label if label in LAYOUTS else None)
            contender.fit(clips)
            return contender
        except Exception as error:
            problems[label] = f"{type(error).__name__}: {str(error)[:300]}"
            return None

    contenders = {label: contender for label in found if (contender := enter(label)) is not None}
    times = 1 if run.quick else 4
    turns = [
        {label: contender.seconds(times) for label, contender in contenders.items()}
        for _ in range(2 if run.quick else 5)
    ]
    gflop = 2 * describe(VARIANTS[name].config).gmacs * (3 if kind == "training" else 1)
    for label, contender in contenders.items():
        a_clip = statistics.median(turn[label] for turn in turns) / contender.batch
        found[label] = {"clips/s": 1 / a_clip, "share": gflop / a_clip / speed, "batch": contender.batch}
        found[label] |= {"peak GB": contender.peak, "first steps, s": contender.starting}
    return found | {"matrix GFLOP/s": speed, "problems": problems}


def profiles(run: Run) -> None:
    size = next(iter(sizes_of(run)))
    for kind in ("inference", "training"):
        run.case(f"{size} {kind} bf16", profile_step, run, size, kind)


def profile_step(run: Run, size: str, kind: str) -> Json:
    name, *batches = sizes_of(run)[size]
    model = fresh(name, run.device)[0]
    clips = torch.randn(batches[kind == "training"], 3, *model.config.input_size, device=run.device)
    contender = Contender(run, model, kind, "bf16", None)
    contender.fit(clips)
    steps, plain = 3, contender.seconds(3)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * run.on_gpu
    with profile(activities=activities) as record:
        contender.seconds(steps)
    device = "CUDA" if run.on_gpu else "CPU"
    events = [e for e in record.events() if not e.is_user_annotation]
    there = sorted((e for e in events if e.device_type.name == device), key=lambda e: e.time_range.start)
    busy, end, longest = 0.0, -math.inf, Counter[str]()
    for event in there:
        busy += max(0.0, event.time_range.end - max(end, event.time_range.start))
        end = max(end, event.time_range.end)
        longest[event.name[:80]] += event.time_range.end - event.time_range.start
    names = Counter(e.name for e in events)

    def count(*parts: str) -> float:
        return sum(number for key, number in names.items() if any(part in key for part in parts)) / steps

    ms = {key: microseconds / steps / 1e3 for key, microseconds in longest.most_common(12)}
    found: Json = {
        "batch": contender.batch,
        "ms": plain * 1e3,
        "busy ms": busy / steps / 1e3,
        "longest, ms": ms,
    }
    found |= {"idle share": 1 - busy / steps / 1e6 / plain, "peak GB": contender.peak}
    on_host = {"host to device copies": count("HtoD"), "device to host copies": count("DtoH")}
    on_host["synchronisations"] = count("cudaStreamSynchronize", "cudaEventSynchronize")
    on_host["kernels"] = sum(not e.name.startswith("Mem") for e in there) / steps
    return found | (on_host if run.on_gpu else dict.fromkeys(on_host))  # nothing of the kind on a CPU


def beside(run: Run) -> None:
    """Steps and clips a second, of training and of decoding at the same time."""
    num_frames = 24 if run.quick else 300
    path = kinetics_like(run, num_frames)
    context = multiprocessing.get_context("fork")
    go, stop = context.Event(), context.Event()
    count = 1 if run.quick else min(14, max(1, (os.cpu_count() or 2) - 2))
    counts = [context.Value("i", 0) for _ in range(count)]
    # Before anything runs on the GPU, as processes can't be forked behind that.
    processes = [context.Process(target=decode_until, args=(path, num_frames, n, go, stop)) for n in counts]
    for process in processes:
        process.start()
    try:
        size, (name, _, batch) = next(iter(sizes_of(run).items()))
        model, clips = fresh(name, run.device)
        batch = max(1, batch // 4)  # of a size that any GPU holds
        clips = clips[:1].expand(batch, -1, -1, -1, -1).contiguous()
        step = step_of(model, clips, "training", "bf16")
        run.case(f"{size} alone", train_beside, run, step, batch, None, None)
        decode = functools.partial(decode_on(run.device.type), path)
        for threads in (1,) if run.quick else (4, 7):
            for stream in ("default", "side"):
                at = f"{size}, {threads} threads, {stream} stream"
                run.case(at, train_beside, run, step, batch, (decode, threads, num_frames), stream)
        go.set()
        before, start = sum(n.value for n in counts), time.perf_counter()
        found = run.case(f"{size}, {count} processes on the CPU", train_beside, run, step, batch, None, None)
        elapsed = time.perf_counter() - start
        decoded = sum(n.value for n in counts) - before
        run.case("clips/s of the processes", lambda: None if found is None else decoded / elapsed)
    finally:
        stop.set()
        go.set()
        for process in processes:
            process.join(5)
            process.kill()


def decode_until(path: Path, num_frames: int, decoded: Any, go: Any, stop: Any) -> None:
    torch.set_num_threads(1)
    go.wait()
    while not stop.is_set():
        decode_on("cpu")(path, clip_at(decoded.value, num_frames))
        decoded.value += 1


def train_beside(run: Run, step: Step, batch: int, decoders: Any, stream: str | None) -> Json:
    """Trained and decoded clips a second."""
    side = torch.cuda.Stream() if run.on_gpu and stream == "side" else None
    decoded: Counter[int] = Counter()
    stop = threading.Event()

    def work(thread: int) -> None:
        decode, _, num_frames = decoders
        while not stop.is_set():
            decode(clip_at(decoded[thread], num_frames))
            decoded[thread] += 1

    threads = 0 if decoders is None else decoders[1]
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        jobs = [pool.submit(work, thread) for thread in range(threads)]
        try:
            with torch.cuda.stream(side) if side is not None else contextlib.nullcontext():
                run.seconds(step, 1 if run.quick else 3)
                before, start = decoded.total(), time.perf_counter()
                seconds = run.seconds(step, 2 if run.quick else 20)
                speed = (decoded.total() - before) / (time.perf_counter() - start)
        finally:
            stop.set()
        for job in jobs:
            job.result()
    return {"trained clips/s": batch / seconds, "decoded clips/s": speed if threads else None}
