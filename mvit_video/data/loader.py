"""Batches made ahead, by threads or by processes; which batches, and in which order, depends on neither.

Samples are made one by one from their keys, handed over in the order of the keys, and put together by the
process that trains. A bounded number of them is under way.

Threads share memory and so make more clips a second than processes, which send theirs
(benchmarks/README.md). But they also share one interpreter, which each holds for a fifth to two fifths of its
time. So few workers are threads and more are processes; where a GPU decodes, whose memory belongs to one
process, all are threads.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from mvit_video.data import timing
from mvit_video.data.decode import device_of
from mvit_video.errors import ConfigError, DataError

log = logging.getLogger(__name__)

Kind = Literal["auto", "threads", "workers"]
KINDS = ("auto", "threads", "workers")

_GRACE = 5  # seconds that processes have to end
_PATIENCE = 60  # seconds after which a sample that doesn't come is talked about
_LONGEST_NOTE = 4096  # bytes
_FEW = 2  # workers that one interpreter keeps busy
_SHARE = 1 / 8  # of the memory that samples made ahead may fill


class Batches(Protocol):
    """Keys of samples, a list for each batch of an epoch."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[Any]]: ...

    def set_epoch(self, epoch: int) -> None:
        """The Trainer calls it before each epoch."""


class Clips(Protocol):
    """Makes a sample from its key, and opens files with ``open_file`` for it."""

    open_file: Callable[[str], Any]

    def __getitem__(self, key: Any) -> Any: ...


Collated = TypeVar("Collated")


class ClipLoader(Generic[Collated]):
    """Batches of ``dataset``, again and again, an epoch for each ``iter()``.

    Where it was in an epoch is its state: a loader with the same arguments that loads it gives the next batch
    first. Batches count once they are handed out, however many more were made ahead.

    Args:
        dataset: makes samples from keys.
        batches: the keys of an epoch's batches.
        collate: makes a batch from its samples.
        num_workers: threads or processes; 0 makes samples when they are asked for.
        kind: "threads" of this process, "workers" that are processes of their own, or "auto": threads if they
            are at most two, else workers; and always threads, each with a stream of its own, where files are
            decoded on a GPU, which only they can.
        ahead: how many samples are under way at most; None: two batches and one more for each worker. There
            are fewer where they are large: together they fill an eighth of the memory (of the GPU, where they
            lie there), unless every worker is to have one.

    Raises, when iterated over:
        DataError: a process was killed; it names the video that it was reading.
        ConfigError: workers were asked for, but files are decoded on a GPU.
        Whatever the dataset raises.
    """

    def __init__(
        self,
        dataset: Clips,
        batches: Batches,
        collate: Callable[[list[Any]], Collated],
        *,
        num_workers: int,
        kind: Kind = "auto",
        ahead: int | None = None,
    ) -> None:
        self.batches = batches
        self.batch_sampler = SimpleNamespace(sampler=batches)  # where Lightning looks for ``set_epoch``
        self._dataset, self._collate = dataset, collate
        self._num_workers, self._kind, self._ahead = num_workers, kind, ahead
        self._pool: _Pool | None = None
        self._largest = 0  # bytes of a sample, so far
        self._first = 0  # batches that the next epoch leaves out: a former run has had them
        self._delivered = 0  # batches of this epoch

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict[str, Any]:
        """How many batches of the current epoch were handed out."""
        return {"delivered": self._delivered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next epoch begins where the state was taken."""
        self._first = self._delivered = state["delivered"]

    def __iter__(self) -> Iterator[Collated]:
        batches = list(self.batches)[self._first :]
        self._delivered, self._first = self._first, 0
        samples = self._samples([key for keys in batches for key in keys], max(map(len, batches), default=0))
        for keys in batches:
            batch = self._collate([next(samples) for _ in keys])
            self._delivered += 1
            yield batch

    def close(self) -> None:
        """End threads and processes; the loader may still be iterated over, with new ones."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _samples(self, keys: Sequence[Any], batch_size: int) -> Iterator[Any]:
        if not self._num_workers:
            for key in keys:
                with timing.stage("transform"):
                    sample = self._dataset[key]
                yield sample
            return
        if self._pool is None:
            self._pool = self._start()
        pool = self._pool
        most = self._ahead or 2 * batch_size + self._num_workers
        pending: deque[Future[Any]] = deque()
        try:
            for number in range(len(keys)):
                fitting = pool.memory() * _SHARE // self._largest if self._largest else 0
                ahead = min(most, max(self._num_workers, fitting))
                for key in keys[number + len(pending) : number + int(ahead)]:
                    pending.append(pool.submit(key))
                with timing.stage("wait for data"):
                    sample = pool.take(pending[0])
                pending.popleft()
                self._largest = max(self._largest, sum(tensor.nbytes for tensor in _tensors(sample)))
                yield sample
        except BrokenProcessPool:
            self._pool = None
            raise DataError(pool.why_broken()) from None
        finally:
            for future in pending:
                future.cancel()

    def _start(self) -> _Pool:
        device = device_of(self._dataset.open_file)
        if device.type != "cpu" and self._kind == "workers":
            raise ConfigError(f"decoding on {device} happens in threads of this process: loader=threads")
        few = self._kind == "auto" and self._num_workers <= _FEW
        if device.type != "cpu" or self._kind == "threads" or few:
            return _Threads(self._dataset, self._num_workers, device)
        return _Processes(self._dataset, self._num_workers)


def memory_limit(system: Path = Path("/")) -> int:
    """Bytes of memory that the processes of this container or job may take together."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    folder = system / "sys/fs/cgroup"
    files = [folder / "memory/memory.limit_in_bytes"]  # of version 1
    with suppress(OSError, IndexError):
        own = folder / (system / "proc/self/cgroup").read_text().split("0::/")[1].split("\n")[0]
        files += [group / "memory.max" for group in (own, *own.parents) if group.is_relative_to(folder)]
    for file in files:
        with suppress(OSError, ValueError):  # "max" where there is no limit
            limits.append(int(file.read_text()))
    return min(limits)


class _Pool:
    """Workers of either kind."""

    executor: Executor

    def submit(self, key: Any) -> Future[Any]:
        """Its result is the sample, as ``take`` needs it, and the seconds of its stages."""
        raise NotImplementedError

    def take(self, future: Future[Any]) -> Any:
        """The sample, ready for this thread; says so if it takes very long."""
        while not wait([future], _PATIENCE).done:
            log.warning("no sample for %d s; being read: %s", _PATIENCE, ", ".join(self.held()))
        sample, seconds = future.result()
        clock = timing.clock()
        if clock is not None:
            clock.add_sample(seconds)
        return sample

    def held(self) -> list[str]:
        """The paths that are being read."""
        raise NotImplementedError

    def memory(self) -> int:
        """Bytes of the memory that samples lie in, this process's share."""
        here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1
        return memory_limit() // int(here)

    def why_broken(self) -> str:
        return "a process of the loader died"

    def close(self) -> None:
        self.executor.shutdown(wait=True, cancel_futures=True)


class _Threads(_Pool):
    """Threads of this process. On a GPU they need nothing but streams and events to hand samples over."""

    def __init__(self, dataset: Clips, count: int, device: torch.device) -> None:
        self._dataset, self._device = copy.copy(dataset), device
        self._measured = timing.clock() is not None
        self._thread = threading.local()
        self._held: dict[int, str] = {}  # by thread
        self._dataset.open_file = partial(self._open, dataset.open_file)
        self._barrier = threading.Barrier(count + 1)
        self.executor = ThreadPoolExecutor(count, "clips", self._start)
        torch_threads = torch.get_num_threads()
        for _ in range(count):
            self.executor.submit(self._barrier.wait)
        self._barrier.wait()
        torch.set_num_threads(torch_threads)  # of this thread, and of those to come

    def _open(self, open_file: Callable[[str], Any], path: str) -> Any:
        self._held[threading.get_ident()] = path
        return open_file(path)

    def _start(self) -> None:
        torch.get_num_threads()  # asked first, this thread's own number is no longer that of all
        torch.set_num_threads(1)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # new threads are on the first GPU
            self._thread.stream = torch.cuda.Stream(self._device)

    def submit(self, key: Any) -> Future[Any]:
        return self.executor.submit(self._make, key)

    def _make(self, key: Any) -> tuple[tuple[Any, torch.cuda.Event | None], dict[str, float]]:
        try:
            if self._device.type != "cuda":
                sample, seconds = _make(self._dataset, key, self._measured)
                return (sample, None), seconds
            with torch.cuda.stream(self._thread.stream):
                sample, seconds = _make(self._dataset, key, self._measured)
                return (sample, self._thread.stream.record_event()), seconds
        finally:
            self._held.pop(threading.get_ident(), None)

    def take(self, future: Future[Any]) -> Any:
        sample, made = super().take(future)
        if made is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(made)  # the GPU waits, not this thread
            for tensor in _tensors(sample):
                if tensor.is_cuda:  # all but the placeholder for a bad video
                    tensor.record_stream(current)  # its memory is free again after this stream's work on it
        return sample

    def held(self) -> list[str]:
        return list(self._held.values())

    def memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.mem_get_info(self._device)[1]
        return super().memory()


class _Processes(_Pool):
    """Processes of their own, which tell what they are reading for the case that one is killed."""

    def __init__(self, dataset: Clips, count: int) -> None:
        context = multiprocessing.get_context()
        self._notes = [context.Array("c", _LONGEST_NOTE, lock=False) for _ in range(count)]
        started, measured = context.Value("i", 0), timing.clock() is not None
        self._pool = ProcessPoolExecutor(
            count, context, _start_process, (dataset, self._notes, started, measured)
        )
        self.executor = self._pool
        self._processes: dict[int, Any] = {}  # by id

    def submit(self, key: Any) -> Future[Any]:
        future = self.executor.submit(_make_in_process, key)
        if len(self._processes) < len(self._notes):
            self._processes |= self._pool._processes or {}
        return future

    def held(self) -> list[str]:
        return [path for _, path in self._read_notes() if path]

    def _read_notes(self) -> list[tuple[int, str]]:
        """Process id and path, empty between two videos, of every process."""
        notes = [note.value.partition(b" ") for note in self._notes]
        return [(int(pid), os.fsdecode(path)) for pid, _, path in notes if pid]

    def why_broken(self) -> str:
        died: list[Any] = []
        deadline = time.monotonic() + 5
        while not died and time.monotonic() < deadline:
            died = [process for process in self._processes.values() if process.exitcode is not None]
            time.sleep(0.01)
        for process in self._processes.values():
            process.kill()  # the pool waits for the others, which don't listen to its SIGTERM
        if not died:
            return super().why_broken()
        code = died[0].exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        reading = dict(self._read_notes()).get(died[0].pid)
        where = f"while it read {reading}" if reading else "between two videos"
        advice = " (out of memory? fewer num_workers need less)" if code == -signal.SIGKILL else ""
        return f"a process of the loader {how} {where}{advice}"

    def close(self) -> None:
        """Kill those that don't end."""
        self.executor.shutdown(wait=False, cancel_futures=True)
        running = {process.sentinel: process for process in self._processes.values()}
        deadline = time.monotonic() + _GRACE
        while running and (ended := connection.wait(running, max(0.0, deadline - time.monotonic()))):
            for sentinel in ended:
                del running[sentinel]
        for process in running.values():
            process.kill()
        super().close()


class _Process:
    """What a process of the loader knows."""

    dataset: Clips
    note: Any
    measured: bool


def _start_process(dataset: Clips, notes: list[Any], started: Any, measured: bool) -> None:
    # Ctrl-C and a scheduler's signals reach all processes; the one that trains decides what happens then.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with started.get_lock():
        _Process.note = notes[started.value]
        started.value += 1
    _write_note("")
    _Process.measured = measured
    _Process.dataset = copy.copy(dataset)
    _Process.dataset.open_file = partial(_open_noted, dataset.open_file)


def _make(dataset: Clips, key: Any, measured: bool) -> tuple[Any, dict[str, float]]:
    """A sample, and the seconds of its stages."""
    if not measured:
        return dataset[key], {}
    with timing.measured("transform") as clock:
        sample = dataset[key]
    return sample, dict(clock.seconds)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make_in_process(key: Any) -> Any:
    try:
        return _make(_Process.dataset, key, _Process.measured)
    finally:
        _write_note("")


def _open_noted(open_file: Callable[[str], Any], path: str) -> Any:
    _write_note(path)
    return open_file(path)


def _write_note(path: str) -> None:
    _Process.note.value = (b"%d " % os.getpid() + os.fsencode(path))[: _LONGEST_NOTE - 1]


def _tensors(sample: Any) -> Iterator[Tensor]:
    """All tensors in tuples, lists and dataclasses."""
    if isinstance(sample, Tensor):
        yield sample
    elif isinstance(sample, tuple | list):
        for part in sample:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(sample):
        yield from _tensors([getattr(sample, field.name) for field in dataclasses.fields(sample)])
