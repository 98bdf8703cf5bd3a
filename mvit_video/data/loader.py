"""Batches made ahead by threads or by processes; which samples, in which order, depends on neither.

Samples are made one by one from their keys, handed over in the order of the keys, and put together, and
pinned for a GPU, by a thread beside the one that trains. A bounded number of them is under way.

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
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import cached_property
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
import torch.multiprocessing  # tensors go from process to process without being copied
from torch.utils._pytree import tree_leaves
from torch.utils.data._utils.pin_memory import pin_memory as pinned  # of whole batches

from mvit_video.data import timing
from mvit_video.data.decode import device_of
from mvit_video.data.ranks import processes_per_node
from mvit_video.data.threads import submit_ahead, thread_pool
from mvit_video.errors import ConfigError, DataError
from mvit_video.io.writing import interrupts_deferred

log = logging.getLogger(__name__)

WorkerType = Literal["auto", "thread", "process"]
# By what the config key ``loader`` may say.
WORKER_TYPES: dict[str, WorkerType] = {"auto": "auto", "threads": "thread", "workers": "process"}

MAX_THREADS = 2  # that one interpreter keeps busy
PREFETCH_MEMORY_FRACTION = 1 / 8  # of the memory that samples made ahead may fill
WARN_AFTER_S = 60.0  # a sample that takes longer is named
KILL_AFTER_S = 1.0  # a process that was told to end; it may hang

_LONGEST_PATH = 4096  # bytes, with the process's number


class Batches(Protocol):
    """Keys of samples, a list for each batch of an epoch."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[Any]]: ...


class Samples(Protocol):
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
        device: where samples lie; None: where the dataset's ``open_file`` decodes.
        pin_memory: batches of CPU memory are put where a GPU fetches them fast.

    Raises, when iterated over:
        DataError: a process was killed; it names the video that it was reading.
        ConfigError: processes were asked for, but files are decoded on a GPU.
        Whatever the dataset raises.
    """

    _collating: ThreadPoolExecutor  # where there are workers

    def __init__(
        self,
        dataset: Samples,
        batches: Batches,
        collate: Callable[[list[Any]], Collated],
        *,
        num_workers: int,
        worker_type: WorkerType = "auto",
        device: torch.device | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.batches = batches
        self.batch_sampler = SimpleNamespace(sampler=batches)  # where Lightning finds its ``set_epoch``
        self._dataset, self._collate = dataset, collate
        self._num_workers, self._worker_type = num_workers, worker_type
        self._samples_on, self._pin_memory = device, pin_memory
        self._workers: _Threads | _Processes | None = None
        self._futures: Generator[Future[Any], None, None] | None = None  # of the newest iteration
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
        for batch in self._made_ahead(batches) if self._num_workers else map(self._make, batches):
            self._delivered += 1
            yield batch

    def close(self) -> None:
        """End threads and processes; the loader may still be iterated over, with new ones."""
        if self._futures is not None:
            self._futures.close()
        if self._workers is not None:
            self._workers.close()
            self._collating.shutdown(cancel_futures=True)
        self._workers = None

    def _make(self, keys: list[Any]) -> Collated:
        with timing.stage("transform"):
            return self._put_together([self._dataset[key] for key in keys])

    def _put_together(self, samples: list[Any]) -> Collated:
        batch = self._collate(samples)
        return pinned(batch) if self._pin_memory and self._device.type == "cpu" else batch

    def _made_ahead(self, batches: list[list[Any]]) -> Iterator[Collated]:
        if self._futures is not None:
            self._futures.close()
        if self._workers is None:
            with interrupts_deferred():  # so that what has started is closed
                self._workers, self._collating = self._start(), thread_pool(1)
        workers, largest = self._workers, max(map(len, batches), default=1)
        most = self._most_ahead(largest)
        on_gpu = self._device.type != "cpu"  # then streams meet in the thread that takes the samples
        is_ahead = not on_gpu and most >= largest + self._num_workers  # so is a whole batch
        keys = [key for keys in batches for key in keys]
        self._futures = futures = submit_ahead(
            workers.pool, workers.make, keys, most - largest if is_ahead else most
        )
        taken: deque[list[Future[Any]]] = deque()  # of each batch

        def groups() -> Iterator[list[Future[Any]]]:
            for keys in batches:
                taken.append([next(futures) for _ in keys])
                yield taken[-1]

        def collate(group: list[Future[Any]]) -> Collated | None:
            return None if on_gpu else self._put_together([future.result()[0] for future in group])

        jobs = submit_ahead(self._collating, collate, groups(), 2 if is_ahead else 1)
        try:
            for job in jobs:
                samples = [self._wait(future) for future in taken[0]]
                with timing.stage("wait for data"):
                    batch = job.result()
                taken.popleft()
                yield self._put_together(samples) if batch is None else batch
                del samples, batch
        finally:
            jobs.close()
            futures.close()
            for future in (future for group in taken for future in group):
                future.cancel()

    def _wait(self, future: Future[Any]) -> Any:
        """Its sample, for this thread's stream of the GPU."""
        workers = self._workers
        assert workers is not None
        try:
            with timing.stage("wait for data"):
                while not wait([future], WARN_AFTER_S).done:
                    files = ", ".join(filter(None, workers.current_files().values()))
                    log.warning("no sample for %g s; being read: %s", WARN_AFTER_S, files)
                    if workers.what_died():
                        raise BrokenProcessPool  # Python 3.11 forgets to say so of cancelled futures
                sample, seconds, event = future.result()
        except BrokenProcessPool as error:
            died = workers.what_died()
            self.close()
            raise error if died is None else DataError(died) from None
        except KeyboardInterrupt:  # a process that hangs would keep the interpreter from ending
            self.close()
            raise
        if (clock := timing.clock()) is not None:
            clock.add_sample(seconds)
        if event is not None:
            _hand_over(sample, event)
        return sample

    @cached_property
    def _device(self) -> torch.device:
        """Where samples lie."""
        return self._samples_on or device_of(self._dataset.open_file)

    def _most_ahead(self, largest: int) -> int:
        """Samples under way: two batches and one a worker, or what memory has room for, but one a worker."""
        most = 2 * largest + self._num_workers
        size = self._dataset.sample_nbytes
        fitting = int(memory_of(self._device) * PREFETCH_MEMORY_FRACTION / size) if size else most
        return min(most, max(self._num_workers, fitting))

    def _start(self) -> _Threads | _Processes:
        on_gpu = self._device.type != "cpu"
        if on_gpu and self._worker_type == "process":
            raise ConfigError(
                f"decoding on {self._device} happens in threads of this process: loader=threads"
            )
        few = self._worker_type == "auto" and self._num_workers <= MAX_THREADS
        if on_gpu or few or self._worker_type == "thread":
            return _Threads(self._dataset, self._num_workers, self._device)
        return _Processes(self._dataset, self._num_workers)


def memory_of(device: torch.device) -> int:
    """Bytes that samples may fill: free ones of the GPU, or this process's share of the machine's."""
    if device.type == "cuda":  # what torch has set aside and doesn't use is free, too
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
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


class _Making:
    """Makes samples from keys, each with the seconds of its stages, and notes which file it reads."""

    def __init__(self, dataset: Samples, note: Callable[[str], None], *, measured: bool) -> None:
        self._note, self._open_file, self._measured = note, dataset.open_file, measured
        self._dataset = copy.copy(dataset)
        self._dataset.open_file = self._open

    def __call__(self, key: Any) -> tuple[Any, dict[str, float]]:
        try:
            if not self._measured:
                return self._dataset[key], {}
            with timing.measured("transform") as clock:
                sample = self._dataset[key]
            return sample, dict(clock.seconds)
        finally:
            self._note("")

    def _open(self, path: str) -> Any:
        self._note(path)
        return self._open_file(path)


class _Threads:
    """Threads of this process. On a GPU they need nothing but streams and events to hand samples over."""

    def __init__(self, dataset: Samples, num_workers: int, device: torch.device) -> None:
        self.pool = thread_pool(num_workers)
        self._device, self._thread = device, threading.local()
        self._files: dict[int, str] = {}  # by thread
        self._make = _Making(dataset, self._note, measured=timing.clock() is not None)

    def make(self, key: Any) -> tuple[Any, dict[str, float], torch.cuda.Event | None]:
        """A sample, the seconds of its stages, and when the GPU will have made it."""
        if self._device.type != "cuda":
            return *self._make(key), None
        if not hasattr(self._thread, "stream"):
            torch.cuda.set_device(self._device)  # new threads are on the first GPU
            self._thread.stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._thread.stream):
            return *self._make(key), self._thread.stream.record_event()

    def current_files(self) -> dict[int, str]:
        return self._files

    def what_died(self) -> str | None:
        return None  # threads go with this process

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)

    def _note(self, path: str) -> None:
        self._files[threading.get_ident()] = path


def _hand_over(sample: Any, made: torch.cuda.Event) -> None:
    """Let the current stream use what another one has made: the GPU waits, not this thread."""
    for part in tree_leaves(sample):
        if isinstance(part, torch.Tensor) and part.is_cuda:  # a bad video's placeholder isn't
            current = torch.cuda.current_stream(part.device)
            current.wait_event(made)
            part.record_stream(current)  # its memory is free after this stream's work on it


class _Processes:
    """Processes, each with a piece of shared memory that names the file that it reads."""

    def __init__(self, dataset: Samples, num_workers: int) -> None:
        context = multiprocessing.get_context()
        self._files = [context.Array("c", _LONGEST_PATH, lock=False) for _ in range(num_workers)]
        numbers = context.SimpleQueue()
        for number in range(num_workers):
            numbers.put(number)
        arguments = (dataset, self._files, numbers, timing.clock() is not None)
        self.pool = ProcessPoolExecutor(num_workers, context, _start_process, arguments)
        self.pool.submit(os.getpid)  # they start with the first job
        # To kill one that hangs: public as kill_workers() from Python 3.14 on, the same attribute there.
        self._processes: Any = self.pool._processes
        self.make = _make_in_process

    def current_files(self) -> dict[int, str]:
        """By the process's number."""
        notes = [bytes(file.value).partition(b" ") for file in self._files]
        return {int(pid): os.fsdecode(path) for pid, _, path in notes if pid}

    def what_died(self) -> str | None:
        """Which process has ended, how, and what it was reading; None where all are alive."""
        processes = {process.sentinel: process for process in self._processes.values()}
        ended = connection.wait(processes, timeout=1)
        if not ended:
            return None
        died = processes[ended[0]]
        while (code := died.exitcode) is None:  # the pool's thread is asking for it just now
            died.join(0.01)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        reading = self.current_files().get(died.pid)
        where = f"while it read {reading}" if reading else "between two videos"
        advice = " (out of memory? fewer num_workers need less)" if code == -signal.SIGKILL else ""
        return f"a process of the loader {how} {where}{advice}"

    def close(self) -> None:
        """End the processes and the pool's threads."""
        killer = threading.Timer(KILL_AFTER_S, self._kill)
        killer.start()
        self.pool.shutdown(cancel_futures=True)
        killer.cancel()
        killer.join()

    def _kill(self) -> None:
        for process in list(self._processes.values()):
            process.kill()


_making: _Making  # of this process, where it is one of them


def _make_in_process(key: Any) -> tuple[Any, dict[str, float], None]:
    return *_making(key), None


def _start_process(dataset: Samples, files: list[Any], numbers: Any, measured: bool) -> None:
    global _making
    # Ctrl-C and a scheduler's signals reach all processes; the one that trains decides what happens then.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    file = files[numbers.get()]

    def note(path: str) -> None:
        file.value = (b"%d " % os.getpid() + os.fsencode(path))[: _LONGEST_PATH - 1]

    _making = _Making(dataset, note, measured=measured)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
