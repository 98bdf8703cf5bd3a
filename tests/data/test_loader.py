"""The loader: the same batches whoever makes them, exact state, bounded, and clear about what went wrong."""

from __future__ import annotations

import faulthandler
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from videos import write_numbered_video

from mvit_video.data import loader as loader_module
from mvit_video.data.datasets import (
    Augment,
    Batch,
    ClipDataset,
    ViewDataset,
    collate_training,
    training_loader,
    validation_loader,
)
from mvit_video.data.decode import open_video
from mvit_video.data.index import LabelledVideo
from mvit_video.data.loader import ClipLoader, WorkerType
from mvit_video.data.samplers import AllVideos, EpochBatches
from mvit_video.data.threads import threaded_map
from mvit_video.errors import ConfigError, DataError
from mvit_video.model import ClipSpec

PROTOCOL = ClipSpec(clip_frames=4, stride=2, target_fps=25, num_clips=2, short_side=48, crop=48)
BOTH = pytest.mark.parametrize("kind", ["thread", "process"])


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[LabelledVideo]:
    root = tmp_path_factory.mktemp("numbered")
    files = [write_numbered_video(root / f"{i}.mp4", 12 + i, height=48, width=64) for i in range(8)]
    return [LabelledVideo(str(file), i % 2, file.stem) for i, file in enumerate(files)]


def training(videos: list[LabelledVideo], open_file=open_video, **loading) -> ClipLoader[Batch]:
    dataset = ClipDataset(videos, PROTOCOL, Augment(), seed=0, open_file=open_file)
    return training_loader(dataset, batch_size=2, **loading)


def assert_same(batches: list[Batch], others: list[Batch]) -> None:
    assert len(batches) == len(others)
    for one, other in zip(batches, others, strict=True):
        assert torch.equal(one.clips, other.clips)
        assert torch.equal(one.labels, other.labels)


@BOTH
@pytest.mark.parametrize("workers", [1, 3])
def test_batches_depend_neither_on_kind_nor_on_number(
    videos: list[LabelledVideo], kind: WorkerType, workers: int
) -> None:
    plain = training(videos, num_workers=0)
    with closing(training(videos, num_workers=workers, worker_type=kind)) as loader:
        assert len(loader) == 4
        for epoch in range(2):
            plain.batches.set_epoch(epoch)
            loader.batches.set_epoch(epoch)
            batches = list(loader)
            assert len(batches) == 4
            assert_same(batches, list(plain))


@BOTH
@pytest.mark.parametrize("taken", [1, 4])
def test_a_loader_goes_on_where_another_was(
    videos: list[LabelledVideo], kind: WorkerType, taken: int
) -> None:
    """However many batches were made ahead, those count that were handed out."""
    whole = list(training(videos, num_workers=0))
    with closing(training(videos, num_workers=2, worker_type=kind)) as loader:
        assert_same(list(islice(iter(loader), taken)), whole[:taken])
        state = loader.state_dict()
    with closing(training(videos, num_workers=2, worker_type=kind)) as resumed:
        resumed.load_state_dict(state)
        assert_same(list(resumed), whole[taken:])
        assert_same(list(resumed), whole)  # the next epoch is whole
        assert len(resumed) == 4


@BOTH
def test_two_loaders_work_at_once(videos: list[LabelledVideo], kind: WorkerType) -> None:
    views = ViewDataset(videos, PROTOCOL)
    with (
        closing(training(videos, num_workers=2, worker_type=kind)) as one,
        closing(validation_loader(views, batch_size=3, num_workers=2, worker_type=kind)) as two,
    ):
        pairs = list(zip(one, two, strict=False))
    assert_same([first for first, _ in pairs], list(training(videos, num_workers=0))[:3])
    assert_same([second for _, second in pairs], list(validation_loader(views, batch_size=3, num_workers=0)))


class Counted:
    """A dataset that counts what was made."""

    open_file = staticmethod(open_video)
    sample_nbytes = 8

    def __init__(self) -> None:
        self.made = [0]

    def __getitem__(self, key: int) -> torch.Tensor:
        self.made[0] += 1
        return torch.tensor(key)


def wait_until(is_done: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_done() and time.monotonic() < end:
        time.sleep(0.01)


def batches_of_four(dataset: Counted) -> closing[ClipLoader[torch.Tensor]]:
    return closing(ClipLoader(dataset, AllVideos(200, 4), torch.stack, num_workers=3, worker_type="thread"))


def test_few_samples_are_made_ahead() -> None:
    dataset = Counted()
    with batches_of_four(dataset) as loader:
        batches = iter(loader)
        assert next(batches).tolist() == [0, 1, 2, 3]
        most = 3 + 2 * 4 + 3  # three were taken when so many were under way
        wait_until(lambda: dataset.made[0] == most)
        time.sleep(0.1)
        assert dataset.made[0] == most
        batches.close()
        time.sleep(0.1)
        assert dataset.made[0] == most


@pytest.mark.parametrize(
    ("group", "files", "limit"),
    [
        (None, {}, None),
        ("/", {"memory.max": "3000000"}, 3_000_000),
        ("/", {"memory.max": "max"}, None),
        ("/a/b", {"a/b/memory.max": "max", "a/memory.max": "5000000"}, 5_000_000),
        (None, {"memory/memory.limit_in_bytes": "4000000"}, 4_000_000),
        (None, {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
    ],
)
def test_memory_is_that_of_the_container(
    tmp_path: Path, group: str | None, files: dict[str, str], limit: int | None
) -> None:
    found = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    found |= {} if group is None else {"proc/self/cgroup": f"0::{group}"}
    for name, text in found.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert loader_module.memory_limit(tmp_path) == (limit or machine)


class Large(Counted):
    """Samples of a megabyte each."""

    sample_nbytes = 1 << 20

    def __getitem__(self, key: int) -> torch.Tensor:
        return super().__getitem__(key).expand(1 << 17).clone()


@pytest.mark.parametrize(("megabytes", "ahead"), [(0.1, 3), (5, 5), (1000, 2 * 4 + 3)])
def test_large_samples_are_made_ahead_by_their_bytes(
    monkeypatch: pytest.MonkeyPatch, megabytes: float, ahead: int
) -> None:
    """At most so many megabytes, but one sample a worker."""
    monkeypatch.setattr(loader_module, "PREFETCH_MEMORY_FRACTION", 0.5)
    monkeypatch.setattr(loader_module, "memory_of", lambda device: int(2 * megabytes * (1 << 20)))
    dataset = Large()
    with batches_of_four(dataset) as loader:
        batches = iter(loader)
        next(batches)  # four samples; the last was taken when so many were under way
        wait_until(lambda: dataset.made[0] == 3 + ahead)
        time.sleep(0.1)
        assert dataset.made[0] == 3 + ahead
        batches.close()


def test_of_a_gpu_free_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what torch has set aside there and doesn't use."""
    found = {"mem_get_info": (50, 800), "memory_reserved": 10, "memory_allocated": 4}
    for name, value in found.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert loader_module.memory_of(torch.device("cuda")) == 50 + 10 - 4


def test_batches_are_put_together_and_pinned_beside_the_training_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One is ready while another is trained with; errors come with their own batch."""
    made: list[tuple[list[int], threading.Thread]] = []

    def collate(samples: list[torch.Tensor]) -> torch.Tensor:
        made.append((torch.stack(samples).tolist(), threading.current_thread()))
        if made[-1][0][0] == 8:
            raise ZeroDivisionError
        return torch.stack(samples)

    def pin(batch: torch.Tensor) -> torch.Tensor:
        assert threading.current_thread() is made[-1][1]
        return batch + 100

    monkeypatch.setattr(loader_module, "pinned", pin)
    kind = {"num_workers": 3, "worker_type": "thread", "pin_memory": True}
    with closing(ClipLoader(Counted(), AllVideos(16, 4), collate, **kind)) as loader:
        batches = iter(loader)
        assert next(batches).tolist() == [100, 101, 102, 103]
        wait_until(lambda: len(made) == 2)
        assert next(batches).tolist() == [104, 105, 106, 107]
        with pytest.raises(ZeroDivisionError):
            next(batches)
    assert len({thread for _, thread in made}) == 1
    assert threading.current_thread() not in {thread for _, thread in made}


def failing(path: str, bad: str, failure):
    if path == bad:
        failure()
    return open_video(path)


def raise_error() -> None:
    raise ZeroDivisionError("a bug")


@BOTH
def test_an_exception_ends_the_epoch_at_once(videos: list[LabelledVideo], kind: WorkerType) -> None:
    open_file = partial(failing, bad=videos[5].path, failure=raise_error)
    with closing(training(videos, open_file, num_workers=2, worker_type=kind)) as loader:
        with pytest.raises(ZeroDivisionError, match="a bug"):
            list(loader)
        with pytest.raises(ZeroDivisionError, match="a bug"):  # and it can be asked again
            list(loader)


def kill_myself(number: signal.Signals) -> None:
    faulthandler.disable()  # pytest's, which says much
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV], ids=lambda number: number.name)
def test_a_killed_process_is_reported_by_the_video_it_held(
    videos: list[LabelledVideo], number: signal.Signals
) -> None:
    next(iter(DataLoader(range(2), num_workers=1)))  # torch's own leaves a handler of signals behind
    open_file = partial(failing, bad=videos[5].path, failure=partial(kill_myself, number))
    with closing(training(videos, open_file, num_workers=2, worker_type="process")) as loader:
        with pytest.raises(DataError) as raised:
            list(loader)
        assert f"was killed by {number.name} while it read {videos[5].path}" in str(raised.value)
        assert ("out of memory" in str(raised.value)) == (number is signal.SIGKILL)
        next(iter(loader))  # new processes


def hang() -> None:
    time.sleep(0.5)


@BOTH
def test_a_video_that_takes_very_long_is_named(
    videos: list[LabelledVideo],
    kind: WorkerType,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(loader_module, "WARN_AFTER_S", 0.1)
    open_file = partial(failing, bad=videos[5].path, failure=hang)
    with closing(training(videos, open_file, num_workers=2, worker_type=kind)) as loader:
        assert len(list(loader)) == 4
    assert f"being read: {videos[5].path}" in caplog.text


def hang_for_ever() -> None:
    threading.Event().wait()


def test_closing_kills_a_process_that_hangs(videos: list[LabelledVideo]) -> None:
    last = [key for batch in EpochBatches(8, 2, seed=0) for key in batch][-1]
    open_file = partial(failing, bad=videos[last[1]].path, failure=hang_for_ever)
    before = multiprocessing.active_children()
    loader = training(videos, open_file, num_workers=2, worker_type="process")
    assert len(list(islice(loader, 3))) == 3
    loader.close()  # or the test never ends
    assert multiprocessing.active_children() == before


@pytest.mark.parametrize("epochs", [0.5, 2])
@BOTH
def test_closing_ends_threads_and_processes(
    videos: list[LabelledVideo], kind: WorkerType, epochs: float
) -> None:
    threads, processes = set(threading.enumerate()), multiprocessing.active_children()
    loader = training(videos, num_workers=3, worker_type=kind)
    for _ in range(math.ceil(epochs)):
        assert len(list(islice(loader, int(min(epochs, 1) * 4)))) == min(epochs, 1) * 4
    loader.close()
    loader.close()
    assert set(threading.enumerate()) <= threads
    assert multiprocessing.active_children() == processes


def test_ctrl_c_while_processes_start_is_not_lost(
    videos: list[LabelledVideo], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Python runs after a fork would drop the exception."""
    parent, first = os.getpid(), [True]

    def interrupt() -> None:
        if first.pop():
            first.append(False)
            os.kill(parent, signal.SIGINT)

    os.register_at_fork(after_in_parent=lambda: first[0] and interrupt())
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
    try:
        with (
            closing(training(videos, num_workers=2, worker_type="process")) as loader,
            pytest.raises(KeyboardInterrupt),
        ):
            next(iter(loader))
    finally:
        signal.signal(signal.SIGINT, handler)
        first[:] = [False]
    assert not multiprocessing.active_children()


def test_what_a_loop_of_ones_own_needs(videos: list[LabelledVideo], tmp_path: Path) -> None:
    """Other crops in each epoch, also of processes that go on; bad videos are replaced and reported."""
    (tmp_path / "broken.mp4").write_text("no video")
    mixed = [LabelledVideo(str(tmp_path / "broken.mp4"), 0, "broken"), *videos[:3]]
    dataset = ClipDataset(mixed, PROTOCOL, Augment(), seed=0)
    loader = DataLoader(
        dataset, batch_size=2, num_workers=2, persistent_workers=True, collate_fn=collate_training
    )
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        epochs.append(list(loader))
    del loader
    assert [len(batch.labels) for batch in epochs[0]] == [2, 2]
    assert {bad.path for bad in epochs[0][0].bad} == {mixed[0].path}
    assert_same(epochs[0], epochs[2])
    assert not torch.equal(epochs[0][1].clips, epochs[1][1].clips)


def test_threads_end_with_the_reader() -> None:
    before, taken = set(threading.enumerate()), []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    squares = threaded_map(lambda number: number**2, items(), 2)
    assert list(islice(squares, 5)) == [0, 1, 4, 9, 16]
    squares.close()
    assert len(taken) <= 5 + 4
    assert set(threading.enumerate()) <= before
    assert list(threaded_map(str, range(7), 3)) == list(threaded_map(str, range(7), 0)) == list("0123456")


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_processes_share_the_same_steps_without_overlap(processes: int) -> None:
    one = EpochBatches(50, 12, seed=1)
    shares = [
        EpochBatches(50, 12 // processes, seed=1, rank=rank, num_replicas=processes)
        for rank in range(processes)
    ]
    for epoch in range(2):
        for sampler in (one, *shares):
            sampler.set_epoch(epoch)
        assert {len(sampler) for sampler in shares} == {len(one)} == {4}
        steps = [list(chain.from_iterable(batches)) for batches in zip(*shares, strict=True)]
        assert [sorted(step) for step in steps] == [sorted(batch) for batch in one]
        assert all(len(set(step)) == 12 for step in steps)


def test_every_validation_video_counts_once() -> None:
    for number, processes in ((10, 3), (11, 4), (3, 3), (8, 1)):
        shares = [list(AllVideos(number, 2, rank=rank, num_replicas=processes)) for rank in range(processes)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(chain.from_iterable(chain.from_iterable(shares))) == list(range(number))


def test_few_videos_for_many_processes() -> None:
    shares = [list(EpochBatches(7, 4, seed=0, rank=rank, num_replicas=3)) for rank in range(3)]
    assert [[len(batch) for batch in share] for share in shares] == [[2]] * 3
    with pytest.raises(DataError, match="3 processes can't share 2"):
        EpochBatches(2, 4, seed=0, num_replicas=3)


class OnGpu:
    """Stands for a video that is decoded on a GPU."""

    device = torch.device("meta")

    def __init__(self, path: str) -> None: ...

    def __enter__(self) -> OnGpu:
        return self

    def __exit__(self, *_: object) -> None: ...


def test_processes_are_refused_where_a_gpu_decodes(videos: list[LabelledVideo]) -> None:
    with (
        closing(training(videos, OnGpu, num_workers=1, worker_type="process")) as loader,
        pytest.raises(ConfigError, match="happens in threads of this process: loader=threads"),
    ):
        next(iter(loader))


@pytest.mark.parametrize(("workers", "processes"), [(1, 0), (2, 0), (3, 3)])
def test_few_workers_are_threads(videos: list[LabelledVideo], workers: int, processes: int) -> None:
    before = len(multiprocessing.active_children())
    with closing(training(videos, num_workers=workers)) as loader:
        assert_same(list(loader), list(training(videos, num_workers=0)))
        assert len(multiprocessing.active_children()) - before == processes


class TorchThreads(Counted):
    """How many threads torch uses where samples are made."""

    def __getitem__(self, key: int) -> torch.Tensor:
        return torch.tensor(torch.get_num_threads())


def test_threads_leave_torch_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each makes its samples with one of torch's threads, and the others have what they had."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        loader = ClipLoader(TorchThreads(), AllVideos(8, 4), torch.stack, num_workers=2, worker_type="thread")
        with closing(loader), ThreadPoolExecutor(1) as later:
            assert torch.cat(list(loader)).tolist() == [1] * 8
            assert torch.get_num_threads() == later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [1, 4, 8])
def test_threads_decode_on_the_gpu(tmp_path: Path, workers: int) -> None:
    """Batches are made on the device by several streams at once, and are those of one."""
    files = [write_numbered_video(tmp_path / f"{i}.mp4", 20 + i, height=256, width=256) for i in range(16)]
    videos = [LabelledVideo(str(file), 0, file.stem) for file in files]
    open_file = partial(open_video, device="cuda")
    plain = list(training(videos, open_file, num_workers=0))
    with closing(training(videos, open_file, num_workers=workers)) as loader:
        for _ in range(5):
            batches = []
            for batch in loader:
                assert batch.clips.device.type == "cuda"
                torch.cuda._sleep(10_000_000)  # the threads go on while this stream lags behind
                batches.append(Batch(batch.clips.clone(), batch.labels, batch.bad))
                del batch
            assert_same(batches, plain)


def test_the_private_attribute_of_process_pools_is_there() -> None:
    """``ProcessPoolExecutor._processes``, by which one that hangs is killed: Python 3.10 to 3.14 have it."""
    with ProcessPoolExecutor(1) as pool:
        pid = pool.submit(os.getpid).result()
        assert list(pool._processes) == [pid]
