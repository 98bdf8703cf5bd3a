"""The loader: the same batches whoever makes them, exact state, bounded, and clear about what went wrong."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
from videos import write_numbered_video

from mvit_video.data import loader as loader_module
from mvit_video.data.datasets import (
    Augment,
    Batch,
    TestViews,
    TrainingClips,
    training_loader,
    validation_loader,
)
from mvit_video.data.decode import open_video
from mvit_video.data.index import LabelledVideo
from mvit_video.data.loader import ClipLoader, Kind
from mvit_video.data.samplers import AllVideos, EpochBatches
from mvit_video.errors import ConfigError, DataError
from mvit_video.model import ClipSpec

PROTOCOL = ClipSpec(clip_frames=4, stride=2, target_fps=25, num_clips=2, short_side=48, crop=48)
BOTH = pytest.mark.parametrize("kind", ["threads", "workers"])


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[LabelledVideo]:
    root = tmp_path_factory.mktemp("numbered")
    files = [write_numbered_video(root / f"{i}.mp4", 12 + i, height=48, width=64) for i in range(8)]
    return [LabelledVideo(str(file), i % 2, file.stem) for i, file in enumerate(files)]


def training(videos: list[LabelledVideo], open_file=open_video, **loading) -> ClipLoader[Batch]:
    dataset = TrainingClips(videos, PROTOCOL, Augment(), seed=0, open_file=open_file)
    return training_loader(dataset, batch_size=2, **loading)


def assert_same(batches: list[Batch], others: list[Batch]) -> None:
    assert len(batches) == len(others)
    for one, other in zip(batches, others, strict=True):
        assert torch.equal(one.clips, other.clips)
        assert torch.equal(one.labels, other.labels)


@BOTH
@pytest.mark.parametrize("workers", [1, 3])
def test_batches_depend_neither_on_kind_nor_on_number(
    videos: list[LabelledVideo], kind: Kind, workers: int
) -> None:
    plain = training(videos, num_workers=0)
    with closing(training(videos, num_workers=workers, kind=kind)) as loader:
        assert len(loader) == 4
        for epoch in range(2):
            plain.batches.set_epoch(epoch)
            loader.batches.set_epoch(epoch)
            batches = list(loader)
            assert len(batches) == 4
            assert_same(batches, list(plain))


@BOTH
@pytest.mark.parametrize("taken", [0, 1, 3, 4])
def test_a_loader_goes_on_where_another_was(videos: list[LabelledVideo], kind: Kind, taken: int) -> None:
    """However many batches were made ahead, those count that were handed out."""
    whole = list(training(videos, num_workers=0))
    with closing(training(videos, num_workers=2, kind=kind)) as loader:
        assert_same(list(islice(iter(loader), taken)), whole[:taken])
        state = loader.state_dict()
    with closing(training(videos, num_workers=2, kind=kind)) as resumed:
        resumed.load_state_dict(state)
        assert_same(list(resumed), whole[taken:])
        assert_same(list(resumed), whole)  # the next epoch is whole
        assert len(resumed) == 4


@BOTH
def test_two_loaders_work_at_once(videos: list[LabelledVideo], kind: Kind) -> None:
    views = TestViews(videos, PROTOCOL)
    with (
        closing(training(videos, num_workers=2, kind=kind)) as one,
        closing(validation_loader(views, batch_size=3, num_workers=2, kind=kind)) as two,
    ):
        pairs = list(zip(one, two, strict=False))
    assert_same([first for first, _ in pairs], list(training(videos, num_workers=0))[:3])
    assert_same([second for _, second in pairs], list(validation_loader(views, batch_size=3, num_workers=0)))


class Counted:
    """A dataset that counts what was made."""

    open_file = staticmethod(open_video)

    def __init__(self) -> None:
        self.made = [0]

    def __getitem__(self, key: int) -> torch.Tensor:
        self.made[0] += 1
        return torch.tensor(key)


def wait_until(is_done: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_done() and time.monotonic() < end:
        time.sleep(0.01)


def test_few_samples_are_made_ahead() -> None:
    dataset = Counted()
    with closing(
        ClipLoader(dataset, AllVideos(200, 4), torch.stack, num_workers=3, kind="threads")
    ) as loader:
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
    ("files", "limit"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "3000000\n"}, 3_000_000),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, None),
        (
            {
                "proc/self/cgroup": "0::/job_7/step_0\n",
                "sys/fs/cgroup/job_7/step_0/memory.max": "max\n",
                "sys/fs/cgroup/job_7/memory.max": "5000000\n",
            },
            5_000_000,
        ),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "4000000\n"}, 4_000_000),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
    ],
)
def test_memory_is_that_of_the_container(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert loader_module.memory_limit(tmp_path) == (limit or machine)


class Large(Counted):
    """Samples of a megabyte each."""

    def __getitem__(self, key: int) -> torch.Tensor:
        return super().__getitem__(key).expand(1 << 17).clone()


@pytest.mark.parametrize(("megabytes", "ahead"), [(0.1, 3), (5, 5), (1000, 2 * 4 + 3)])
def test_large_samples_are_made_ahead_by_their_bytes(
    monkeypatch: pytest.MonkeyPatch, megabytes: float, ahead: int
) -> None:
    """At most so many megabytes, but one sample a worker."""
    monkeypatch.setattr(loader_module, "_SHARE", 0.5)
    monkeypatch.setattr(loader_module._Pool, "memory", lambda self: int(2 * megabytes * (1 << 20)))
    dataset = Large()
    with closing(
        ClipLoader(dataset, AllVideos(200, 4), torch.stack, num_workers=3, kind="threads")
    ) as loader:
        batches = iter(loader)
        next(batches)  # four samples; the last was taken when so many were under way
        wait_until(lambda: dataset.made[0] == 3 + ahead)
        time.sleep(0.1)
        assert dataset.made[0] == 3 + ahead
        batches.close()


def failing(path: str, bad: str, failure):
    if path == bad:
        failure()
    return open_video(path)


def raise_error() -> None:
    raise ZeroDivisionError("a bug")


@BOTH
def test_an_exception_ends_the_epoch_at_once(videos: list[LabelledVideo], kind: Kind) -> None:
    open_file = partial(failing, bad=videos[5].path, failure=raise_error)
    start = time.monotonic()
    with closing(training(videos, open_file, num_workers=2, kind=kind)) as loader:
        with pytest.raises(ZeroDivisionError, match="a bug"):
            list(loader)
        with pytest.raises(ZeroDivisionError, match="a bug"):  # and it can be asked again
            list(loader)
    assert time.monotonic() - start < 10


def kill_myself(number: signal.Signals) -> None:
    faulthandler.disable()  # pytest's, which says much
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV], ids=lambda number: number.name)
def test_a_killed_process_is_reported_by_the_video_it_held(
    videos: list[LabelledVideo], number: signal.Signals
) -> None:
    open_file = partial(failing, bad=videos[5].path, failure=partial(kill_myself, number))
    start = time.monotonic()
    with closing(training(videos, open_file, num_workers=2, kind="workers")) as loader:
        with pytest.raises(DataError) as raised:
            list(loader)
        assert f"was killed by {number.name} while it read {videos[5].path}" in str(raised.value)
        assert ("out of memory" in str(raised.value)) == (number is signal.SIGKILL)
        next(iter(loader))  # new processes
    assert time.monotonic() - start < 10


def hang() -> None:
    time.sleep(1.5)


@BOTH
def test_a_video_that_takes_very_long_is_named(
    videos: list[LabelledVideo], kind: Kind, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loader_module, "_PATIENCE", 0.5)
    open_file = partial(failing, bad=videos[5].path, failure=hang)
    with closing(training(videos, open_file, num_workers=2, kind=kind)) as loader:
        assert len(list(loader)) == 4
    assert f"being read: {videos[5].path}" in caplog.text


def hang_long() -> None:
    time.sleep(60)


def test_a_process_that_hangs_is_killed_at_the_end(
    videos: list[LabelledVideo], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "_GRACE", 0.5)
    last = [key for batch in EpochBatches(8, 2, seed=0) for key in batch][-1]
    open_file = partial(failing, bad=videos[last[1]].path, failure=hang_long)
    loader = training(videos, open_file, num_workers=2, kind="workers")
    assert len(list(islice(loader, 3))) == 3
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 10


def test_closing_ends_threads_and_processes(videos: list[LabelledVideo]) -> None:
    before = threading.active_count()
    for kind in ("threads", "workers"):
        loader = training(videos, num_workers=2, kind=kind)
        next(iter(loader))
        loader.close()
        loader.close()
        assert threading.active_count() <= before


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_processes_share_the_same_steps_without_overlap(processes: int) -> None:
    one = EpochBatches(50, 12, seed=1)
    shares = [
        EpochBatches(50, 12 // processes, seed=1, process=rank, processes=processes)
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
        shares = [list(AllVideos(number, 2, process=rank, processes=processes)) for rank in range(processes)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(chain.from_iterable(chain.from_iterable(shares))) == list(range(number))


def test_few_videos_for_many_processes() -> None:
    shares = [list(EpochBatches(7, 4, seed=0, process=rank, processes=3)) for rank in range(3)]
    assert [[len(batch) for batch in share] for share in shares] == [[2]] * 3
    with pytest.raises(DataError, match="3 processes can't share 2"):
        EpochBatches(2, 4, seed=0, processes=3)


class OnGpu:
    """Stands for a video that is decoded on a GPU."""

    device = torch.device("meta")

    def __init__(self, path: str) -> None: ...

    def __enter__(self) -> OnGpu:
        return self

    def __exit__(self, *_: object) -> None: ...


def test_processes_are_refused_where_a_gpu_decodes(videos: list[LabelledVideo]) -> None:
    with (
        closing(training(videos, OnGpu, num_workers=1, kind="workers")) as loader,
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
        loader = ClipLoader(TorchThreads(), AllVideos(8, 4), torch.stack, num_workers=2, kind="threads")
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
