"""Where to decode: settled once per process by trying, and said once in the log."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from mvit_video.data.decode import cuda
from mvit_video.data.decode.cuda import SAMPLE, why_no_gpu
from mvit_video.data.decode.pyav import PyAVVideo
from mvit_video.errors import ConfigError

log = logging.getLogger(__name__)

_lock = threading.Lock()  # so that threads that start together measure once
_TOLERANCE = 3  # levels between swscale's colours and ours
_MAX_THREADS = 7  # as many NVDEC units as an H100 has


def resolve(device: str, *, nvdec_possible: bool = True) -> tuple[torch.device, bool]:
    """The device where frames end up, and whether PyAV decodes on it.

    Where the CPU decodes best, "auto" is the CPU: its loaders are then free to use processes.

    Raises `ConfigError`.
    """
    if device == "cpu":
        return torch.device("cpu"), False
    if device == "auto":
        with _lock:
            return _best()
    target = _parse(device)
    with _lock:
        problem = why_no_nvdec(target.index) if nvdec_possible else why_no_gpu(target.index)
    if problem is not None:
        raise ConfigError(f"decoder device {device!r} is not possible here: {problem}; 'auto' or 'cpu' is")
    return target, nvdec_possible


@functools.cache
def why_no_nvdec(index: int = 0) -> str | None:
    """Why frames can't be decoded on a GPU here, found by trying and looking at them; None if they can."""
    problem = cuda.why_no_nvdec(index)
    if problem is not None:
        return problem
    try:
        if _is_right(torch.device("cuda", index), nvdec=True):
            return None
    except RuntimeError as error:  # of CUDA
        return f"decoding with NVDEC fails ({str(error).splitlines()[0]})"
    return "NVDEC gives other pictures than the CPU decoder (is the driver up to date?)"


def _is_right(device: torch.device, *, nvdec: bool) -> bool:
    """Whether the packaged clip looks as it should, from a new decoder and from a kept one, out of order."""
    with PyAVVideo(SAMPLE) as video:
        expected = video.get_frames(range(video.num_frames)).int()
    for _ in range(2):
        with PyAVVideo(SAMPLE, device=device, nvdec=nvdec) as video:
            for indices in (range(video.num_frames), [video.num_frames - 1, 0, video.num_frames // 2]):
                frames = video.get_frames(indices).cpu().int()
                if (frames - expected[list(indices)]).abs().max() > _TOLERANCE:
                    return False
    return True


def _parse(device: str) -> torch.device:
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError):
        target = torch.device("meta")
    if target.type != "cuda":
        raise ConfigError(f"decoder device {device!r} is not possible, choose 'auto', 'cpu' or 'cuda'")
    if ":" in device:
        return target
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


@functools.cache
def _best() -> tuple[torch.device, bool]:
    no_gpu = why_no_gpu()
    if no_gpu is not None:
        log.info("decoding with PyAV on the CPU: %s", no_gpu)
        return torch.device("cpu"), False
    device = _parse("cuda")
    no_nvdec = why_no_nvdec(device.index)
    if no_nvdec is not None:
        log.info("decoding with PyAV on the CPU: %s", no_nvdec)
        return torch.device("cpu"), False
    cpu = torch.device("cpu")
    on_cpu, on_gpu = _clips_a_second(cpu, nvdec=False), _clips_a_second(device, nvdec=True)
    chosen = device if on_gpu > on_cpu else cpu
    log.info(
        "decoding with PyAV on %s: %.0f small clips/s on %s, %.0f on cpu", chosen, on_gpu, device, on_cpu
    )
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
