"""Batches made ahead by threads or by processes; which samples, in which order, depends on neither.

Samples are made one by one from their keys, handed over in the order of the keys, and put together by the
process that trains. A bounded number of them is under way.

Threads share memory and so make more clips a second than processes, which send theirs
(benchmarks/README.md). But they also share one interpreter, whose lock each holds for a fifth to two fifths
of its time. So few workers are threads and more are processes; where a GPU decodes, whose memory belongs to
one process, all are threads.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from functools import partial
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mvit_video.data import timing
from mvit_video.data.decode import device_of
from mvit_video.data.ranks import processes_per_node
from mvit_video.data.threads import threaded_map
from mvit_video.errors import ConfigError, DataError

log = logging.getLogger(__name__)

WorkerType = Literal["auto", "thread", "process"]
# By what the config key ``loader`` may say.
WORKER_TYPES: dict[str, WorkerType] = {"auto": "auto", "threads": "thread", "workers": "process"}

MAX_THREADS = 2  # that one interpreter keeps busy
PREFETCH_MEMORY_FRACTION = 1 / 8  # of the memory that samples made ahead may fill
WARN_AFTER_S = 60.0  # a sample that takes longer is named
JOIN_TIMEOUT_S = 5.0  # for threads and processes that were told to end

_LONGEST_PATH = 4096  # bytes, with the process's number


class Batches(Protocol):
    """Keys of samples, a list for each batch of an epoch."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[Any]]: ...

    def set_epoch(self, epoch: int) -> None:
        """The Trainer calls it before each epoch."""


class Clips(Protocol):
    """Makes a sample from its key, and opens files with ``open_file`` for it."""

    open_file: Callable[[str], Any]
    sample_nbytes: int  # of one sample's tensors, for the bound on memory

    def __getitem__(self, key: Any) -> Any: ...


Collated = TypeVar("Collated")


class ClipLoader(Generic[Collated]):
    """Batches of ``dataset``, again and again, an epoch for each ``iter()``; one is iterated over at a time.

    Where it was in an epoch is its state: a loader with the same arguments that loads it gives the next batch
    first. Batches count once they are handed out, however many more were made ahead.

    Args:
        dataset: makes samples from keys.
        batches: the keys of an epoch's batches.
        collate: makes a batch from its samples.
        num_workers: threads or processes; 0 makes samples when they are asked for.
        worker_type: "thread" of this process, "process", or "auto": threads if there are at most two, else
            processes; and always threads, each with a stream of its own, where files are decoded on a GPU.
        prefetch: how many samples are under way at most; None: two batches and one more for each worker,
            but fewer where they would fill more than an eighth of the memory (of the GPU, where they lie
            there), unless every worker is to have one.

    Raises, when iterated over:
        DataError: a process was killed; it names the video that it was reading.
        ConfigError: processes were asked for, but files are decoded on a GPU.
        Whatever the dataset raises.
    """

    def __init__(
        self,
        dataset: Clips,
        batches: Batches,
        collate: Callable[[list[Any]], Collated],
        *,
        num_workers: int,
        worker_type: WorkerType = "auto",
        prefetch: int | None = None,
    ) -> None:
        self.batches = batches
        self.batch_sampler = SimpleNamespace(sampler=batches)  # where Lightning looks for ``set_epoch``
        self._dataset, self._collate = dataset, collate
        self._num_workers, self._worker_type, self._prefetch = num_workers, worker_type, prefetch
        self._workers: _Threads | _Processes | None = None
        self._samples: Generator[Any, None, None] | None = None  # of the newest iteration
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
        samples = self._iterate([key for keys in batches for key in keys])
        for keys in batches:
            batch = self._collate([next(samples) for _ in keys])
            self._delivered += 1
            yield batch

    def close(self) -> None:
        """End threads and processes; the loader may still be iterated over, with new ones."""
        if self._samples is not None:
            self._samples.close()
        if isinstance(self._workers, _Processes):
            self._workers.close()
        self._workers = None

    def _iterate(self, keys: Sequence[Any]) -> Iterator[Any]:
        if not self._num_workers:
            for key in keys:
                with timing.stage("transform"):
                    sample = self._dataset[key]
                yield sample
            return
        if isinstance(self._workers, _Processes) and self._workers.is_broken:
            self.close()
        if self._workers is None:
            self._workers = self._start()
        if self._samples is not None:
            self._samples.close()
        workers, clock = self._workers, timing.clock()
        self._samples = samples = workers.map(keys)
        try:
            for _ in keys:
                with timing.stage("wait for data"), _naming_slow_files(workers.current_files):
                    sample, seconds = next(samples)
                if clock is not None:
                    clock.add_sample(seconds)
                yield sample
        finally:
            samples.close()

    def _start(self) -> _Threads | _Processes:
        device = device_of(self._dataset.open_file)
        on_gpu = device.type != "cpu"
        if on_gpu and self._worker_type == "process":
            raise ConfigError(f"decoding on {device} happens in threads of this process: loader=threads")
        largest = max((len(keys) for keys in self.batches), default=1)
        most = self._prefetch or 2 * largest + self._num_workers
        size = self._dataset.sample_nbytes
        fitting = int(memory_of(device) * PREFETCH_MEMORY_FRACTION / size) if size else most
        prefetch = min(most, max(self._num_workers, fitting))
        few = self._worker_type == "auto" and self._num_workers <= MAX_THREADS
        if on_gpu or few or self._worker_type == "thread":
            return _Threads(self._dataset, self._num_workers, prefetch, device)
        return _Processes(self._dataset, self._num_workers, prefetch)


def memory_of(device: torch.device) -> int:
    """Bytes of the memory that samples lie in: of the GPU, or this process's share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return memory_limit() // processes_per_node()


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


@contextmanager
def _naming_slow_files(current_files: Callable[[], list[str]]) -> Iterator[None]:
    """Say which files are being read when the block takes very long."""

    def warn() -> None:
        log.warning("no sample for %g s; being read: %s", WARN_AFTER_S, ", ".join(current_files()))

    timer = threading.Timer(WARN_AFTER_S, warn)
    timer.daemon = True  # Ctrl-C may come before it can be cancelled
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _make_timed(dataset: Any, key: Any, measured: bool) -> tuple[Any, dict[str, float]]:
    """A sample, and the seconds of its stages."""
    if not measured:
        return dataset[key], {}
    with timing.measured("transform") as clock:
        sample = dataset[key]
    return sample, dict(clock.seconds)


class _Threads:
    """Threads of this process. On a GPU they need nothing but streams and events to hand samples over."""

    def __init__(self, dataset: Clips, num_workers: int, prefetch: int, device: torch.device) -> None:
        self._num_workers, self._prefetch, self._device = num_workers, prefetch, device
        self._measured = timing.clock() is not None
        self._thread = threading.local()
        self._current_files: dict[int, str] = {}  # by thread
        self._dataset = copy.copy(dataset)
        self._dataset.open_file = partial(self._open, dataset.open_file)

    def map(self, keys: Sequence[Any]) -> Generator[tuple[Any, dict[str, float]], None, None]:
        for sample, seconds, made in threaded_map(
            self._make, keys, self._num_workers, prefetch=self._prefetch
        ):
            if made is not None:
                current = torch.cuda.current_stream(self._device)
                current.wait_event(made)  # the GPU waits, not this thread
                for tensor in _tensors(sample):
                    if tensor.is_cuda:  # all but the placeholder for a bad video
                        tensor.record_stream(current)  # its memory is free after this stream's work on it
            yield sample, seconds

    def current_files(self) -> list[str]:
        return list(self._current_files.values())

    def _make(self, key: Any) -> tuple[Any, dict[str, float], torch.cuda.Event | None]:
        try:
            if self._device.type != "cuda":
                return *_make_timed(self._dataset, key, self._measured), None
            if not hasattr(self._thread, "stream"):
                torch.cuda.set_device(self._device)  # new threads are on the first GPU
                self._thread.stream = torch.cuda.Stream(self._device)
            with torch.cuda.stream(self._thread.stream):
                sample, seconds = _make_timed(self._dataset, key, self._measured)
                return sample, seconds, self._thread.stream.record_event()
        finally:
            self._current_files.pop(threading.get_ident(), None)

    def _open(self, open_file: Callable[[str], Any], path: str) -> Any:
        self._current_files[threading.get_ident()] = path
        return open_file(path)


def _tensors(sample: Any) -> Iterator[Tensor]:
    """All tensors in tuples, lists and dataclasses."""
    if isinstance(sample, Tensor):
        yield sample
    elif isinstance(sample, tuple | list):
        for part in sample:
            yield from _tensors(part)
    elif is_dataclass(sample):
        yield from _tensors([getattr(sample, field.name) for field in fields(sample)])


class _Processes:
    """The processes of a ``DataLoader``, kept from epoch to epoch."""

    def __init__(self, dataset: Clips, num_workers: int, prefetch: int) -> None:
        self._worker_side = _WorkerSide(dataset, num_workers)
        self._num_workers, self._prefetch_factor = num_workers, max(prefetch // num_workers, 1)
        self._keys: list[Any] = []
        self._loader: DataLoader[Any] | None = None
        # No frame of an exception refers to this iterator, so that its threads end when it is dropped.
        self._samples: Iterator[Any] = iter(())
        self._processes: list[Any] = []
        self._threads: list[threading.Thread] = []

    @property
    def is_broken(self) -> bool:
        return any(process.exitcode is not None for process in self._processes)

    def map(self, keys: Sequence[Any]) -> Generator[tuple[Any, dict[str, float]], None, None]:
        self._keys[:] = keys
        if self._loader is None:
            self._start()
        else:
            self._samples = iter(self._loader)
        for _ in keys:
            try:
                found = next(self._samples)
            except Exception:  # torch's, or that of a connection to a process that is no more
                died = self._what_died()
                if died is None:
                    raise
                found = DataError(died), ""
            if isinstance(found[0], Exception):
                error, trace = found
                raise error from (RuntimeError(trace) if trace else None)
            yield found

    def current_files(self) -> list[str]:
        return [path for path in self._worker_side.current_files().values() if path]

    def close(self) -> None:
        """Kill the processes, for one may hang, and wait until they and their threads have ended."""
        for process in self._processes:
            process.kill()
        self._loader, self._samples = None, iter(())
        for ending in (*self._processes, *self._threads):
            ending.join(JOIN_TIMEOUT_S)

    def _start(self) -> None:
        sigchld = signal.getsignal(signal.SIGCHLD)
        others, other_threads = multiprocessing.active_children(), threading.enumerate()
        with interrupts_deferred(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*worker processes in total.*")
            self._loader = DataLoader(
                self._worker_side,
                batch_size=None,
                sampler=self._keys,
                persistent_workers=True,
                collate_fn=_as_it_is,
                worker_init_fn=_start_worker,
                generator=torch.Generator(),  # else each epoch would draw from the global one
                num_workers=self._num_workers,
                prefetch_factor=self._prefetch_factor,
            )
            self._samples = iter(self._loader)
            if threading.current_thread() is threading.main_thread():
                # torch's handler raises wherever the main thread is just then. Without it, a process that
                # died is noticed by whoever waits for its sample, a few seconds later.
                torchs = getattr(sigchld, "__module__", "").startswith("torch.")  # of a loader before
                signal.signal(signal.SIGCHLD, signal.SIG_DFL if torchs else sigchld or signal.SIG_DFL)
            self._processes = [child for child in multiprocessing.active_children() if child not in others]
            self._threads = [
                thread
                for thread in threading.enumerate()
                if thread not in other_threads and thread.name.startswith("QueueFeederThread")
            ]

    def _what_died(self) -> str | None:
        processes = {process.sentinel: process for process in self._processes}
        ended = connection.wait(processes, timeout=1)
        if not ended:
            return None
        died = processes[ended[0]]
        died.join(JOIN_TIMEOUT_S)
        code = died.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        reading = self._worker_side.current_files().get(died.pid)
        where = f"while it read {reading}" if reading else "between two videos"
        advice = " (out of memory? fewer num_workers need less)" if code == -signal.SIGKILL else ""
        return f"a process of the loader {how} {where}{advice}"


class _WorkerSide(Dataset[Any]):
    """What lies in each process: makes samples, and tells which file is being read in case it is killed."""

    def __init__(self, dataset: Clips, num_workers: int) -> None:
        context = multiprocessing.get_context()
        self._files = [context.Array("c", _LONGEST_PATH, lock=False) for _ in range(num_workers)]
        self._measured = timing.clock() is not None
        self._dataset = copy.copy(dataset)
        self._dataset.open_file = partial(self._open, dataset.open_file)

    def __getitem__(self, key: Any) -> tuple[Any, Any]:
        """A sample and the seconds of its stages, or an exception and its stack trace."""
        try:
            return _make_timed(self._dataset, key, self._measured)
        except Exception as error:
            return _portable(error), "".join(traceback.format_exception(error))
        finally:
            self._note("")

    def current_files(self) -> dict[int, str]:
        """By process id; empty between two videos."""
        notes = [bytes(file.value).partition(b" ") for file in self._files]
        return {int(pid): os.fsdecode(path) for pid, _, path in notes if pid}

    def _open(self, open_file: Callable[[str], Any], path: str) -> Any:
        self._note(path)
        return open_file(path)

    def _note(self, path: str) -> None:
        worker = get_worker_info()
        assert worker is not None
        self._files[worker.id].value = (b"%d " % os.getpid() + os.fsencode(path))[: _LONGEST_PATH - 1]


def _portable(error: Exception) -> Exception:
    """The error as another process can raise it."""
    try:
        return cast(Exception, pickle.loads(pickle.dumps(error)))
    except Exception:  # it holds something that stays in its process
        return RuntimeError(f"{type(error).__name__}: {error}")


def _as_it_is(sample: Any) -> Any:
    return sample


def _start_worker(_: int) -> None:
    # Ctrl-C and a scheduler's signals reach all processes; the one that trains decides what happens then.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Ctrl-C takes effect when the block has ended.

    Python drops exceptions in what it runs after a fork, and so would drop KeyboardInterrupt.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    deferred: list[Any] = []
    signal.signal(signal.SIGINT, lambda *frame: deferred.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if deferred:
            handler(*deferred[0])
