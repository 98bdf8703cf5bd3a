"""Where to decode: settled once per process by trying, and said once in the log."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from av.codec.hwaccel import hwdevices_available
from av.error import FFmpegError

from mvit_video.data.decode.frames import NotOnHardware
from mvit_video.data.decode.pyav import PyAVVideo
from mvit_video.data.decode.video import CPU
from mvit_video.errors import ConfigError, brief

log = logging.getLogger(__name__)

SAMPLE = Path(__file__).with_name("sample.mp4")  # NVDEC refuses very small pictures; this one is 256 x 256

_lock = threading.Lock()  # so that threads that start together measure once
_TOLERANCE = 3  # levels between swscale's colours and ours
_MAX_THREADS = 7  # as many NVDEC units as an H100 has


def resolve(device: str, *, nvdec_possible: bool = True) -> tuple[torch.device, bool]:
    """The device where frames end up, and whether PyAV decodes on it.

    Where the CPU decodes best, "auto" is the CPU: its loaders are then free to use processes.

    Raises `ConfigError`.
    """
    device = str(device)  # of a torch.device
    if device == "cpu":
        return CPU, False
    if device == "auto":
        with _lock:
            return _best()
    target = _parse(device)
    with _lock:
        problem = why_no_nvdec(target.index) if nvdec_possible else why_no_gpu(target.index)
    if problem is not None:
        raise ConfigError(f"decoder device {device!r} is not possible here: {problem}; 'auto' or 'cpu' is")
    return target, nvdec_possible


def _parse(device: str) -> torch.device:
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError):
        target = torch.device("meta")
    if target.type != "cuda":
        raise ConfigError(f"decoder device {device!r} is not possible, choose 'auto', 'cpu' or 'cuda'")
    current = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return target if target.index is not None else torch.device("cuda", current)


@functools.cache
def why_no_gpu(index: int = 0) -> str | None:
    """Why PyTorch can't use a GPU here; None if it can."""
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA (pip install torch from https://pytorch.org/get-started)"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU, or no driver for it (nvidia-smi must work, in a container too)"
    if index >= torch.cuda.device_count():
        return f"there is no GPU {index}, only {torch.cuda.device_count()}"
    return None


@functools.cache
def why_no_nvdec(index: int = 0) -> str | None:
    """Why frames can't be decoded on a GPU here, found by trying and looking at them; None if they can."""
    if "cuda" not in hwdevices_available():
        return "this PyAV is built without CUDA (pip install --force-reinstall av)"
    if problem := why_no_gpu(index):
        return problem
    try:
        is_right = _is_right(torch.device("cuda", index))
    except (FFmpegError, NotOnHardware, NotImplementedError, RuntimeError) as error:
        return (
            f"NVDEC does not work ({brief(error)}); in a container the driver's video part is needed "
            "(NVIDIA_DRIVER_CAPABILITIES=compute,video,utility)"
        )
    wrong = "NVDEC gives other pictures than the CPU decoder (is the driver up to date?)"
    return None if is_right else wrong


def _is_right(device: torch.device) -> bool:
    """Whether the packaged clip looks as it should, by a new decoder and by a kept one, at any place."""
    with PyAVVideo(SAMPLE) as video:
        expected = video.get_frames(range(video.num_frames)).int()
    last = len(expected) - 1
    for indices in ([*range(last + 1)], [0, last // 2, last], [last], [0, 1]):
        with PyAVVideo(SAMPLE, device=device) as video:
            frames = video.decode_on_gpu(indices).cpu().int()
        if (frames - expected[indices]).abs().max() > _TOLERANCE:
            return False
    return True


@functools.cache
def _best() -> tuple[torch.device, bool]:
    gpu = _parse("cuda")
    reason = why_no_gpu() or why_no_nvdec(gpu.index)
    if reason is not None:
        log.info("decoding with PyAV on the CPU: %s", reason)
        return CPU, False
    on_cpu, on_gpu = _clips_a_second(CPU, nvdec=False), _clips_a_second(gpu, nvdec=True)
    chosen = gpu if on_gpu > on_cpu else CPU
    log.info("decoding with PyAV on %s: %.0f small clips/s on %s, %.0f on cpu", chosen, on_gpu, gpu, on_cpu)
    return chosen, on_gpu > on_cpu


def _clips_a_second(device: torch.device, nvdec: bool) -> float:
    """Of the packaged clip, by as many threads as could work at once there."""
    threads = os.cpu_count() or 1
    if nvdec:
        threads = min(threads, _MAX_THREADS)

    def decode(count: int) -> None:
        for _ in range(count):
            with PyAVVideo(SAMPLE, device=device, nvdec=nvdec) as video:
                video.get_frames(range(0, video.num_frames, 4))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(decode, [1] * threads))  # decoders are made the first time
        start = time.perf_counter()
        list(pool.map(decode, [4] * threads))
        return 4 * threads / (time.perf_counter() - start)
