"""Threads that work ahead of whoever takes their results."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

In = TypeVar("In")
Out = TypeVar("Out")


def threaded_map(
    function: Callable[[In], Out], items: Iterable[In], num_workers: int
) -> Generator[Out, None, None]:
    """``map`` by threads that work ahead of the reader; results come in the order of the items.

    FFmpeg and torch release the interpreter's lock while they work.

    Args:
        items: taken one by one, when there is room for another result: two for each thread.
        num_workers: threads; 0 calls the function when its result is asked for.

    Yields the results; an exception of the function ends it. When it ends or is closed, so have the threads.
    """
    if num_workers == 0:
        yield from map(function, items)
        return
    with thread_pool(num_workers) as pool:
        # A loop would hold on to each result while the next is made.
        yield from map(Future.result, submit_ahead(pool, function, items, 2 * num_workers))


def submit_ahead(
    pool: Executor, function: Callable[[In], Out], items: Iterable[In], most: int
) -> Generator[Future[Out], None, None]:
    """A future for each item, in order, with at most ``most`` of them under way; the rest ends with it."""
    rest, pending = iter(items), deque[Future[Out]]()
    try:
        while True:
            pending.extend(pool.submit(function, item) for item in islice(rest, most - len(pending)))
            if not pending:
                return
            yield pending.popleft()
    finally:
        for future in pending:
            future.cancel()


def thread_pool(num_workers: int) -> ThreadPoolExecutor:
    """Threads that each use one thread of torch; the number of other threads stays as it is."""
    all_started = threading.Barrier(num_workers + 1)
    torch_threads = torch.get_num_threads()

    def start() -> None:
        torch.get_num_threads()  # until it was asked for, a new thread's number is that of all threads
        torch.set_num_threads(1)  # also the number of threads to come

    pool = ThreadPoolExecutor(num_workers, "decode", start)
    try:
        for _ in range(num_workers):
            pool.submit(all_started.wait)
        all_started.wait()
    except BaseException:  # Ctrl-C
        all_started.abort()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    finally:
        torch.set_num_threads(torch_threads)
    return pool
