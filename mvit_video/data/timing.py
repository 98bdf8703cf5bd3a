"""Where the time goes: seconds of each stage, measured where a job was started with ``profile=true``.

A stage ends where another begins inside it and goes on after that, so stages of a thread add up. Elsewhere, a
stage costs a look at a variable of its thread.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import nn

from mvit_video.io.writing import write_json

LOADER_STAGES = ("demux", "decode", "convert", "transform")
MAIN_STAGES = ("wait for data", "transfer", "model", "rest")
_ON_GPU = ("transfer", "model")  # which only queue work there


class Clock:
    """Seconds of the stages of one thread, and of the threads and processes that worked for it.

    Attributes:
        seconds: by stage, of the thread.
        helpers: by stage, of its helpers, all together.
        samples: how many these have made.
    """

    def __init__(self, stage: str) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.helpers: defaultdict[str, float] = defaultdict(float)
        self.samples = 0
        self._stage, self._since = stage, time.perf_counter()

    def switch(self, stage: str) -> str:
        """Begin another stage; returns the one that ends."""
        ended = self._stage
        if (stage in _ON_GPU or ended in _ON_GPU) and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[ended] += now - self._since
        self._stage, self._since = stage, now
        return ended

    def add_sample(self, seconds: dict[str, float]) -> None:
        """Count what a helper has made."""
        for name, value in seconds.items():
            self.helpers[name] += value
        self.samples += 1


_current: ContextVar[Clock | None] = ContextVar("clock", default=None)  # of each thread


def clock() -> Clock | None:
    """This thread's, where it is being measured."""
    return _current.get()


@contextmanager
def measured(stage: str) -> Iterator[Clock]:
    """Measure this thread; what is no other stage is ``stage``."""
    current = Clock(stage)
    token = _current.set(current)
    try:
        yield current
    finally:
        current.switch(stage)
        _current.reset(token)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A block of code, or as a decorator a function, is a stage where this thread is being measured."""
    current = clock()
    if current is None:
        yield
        return
    outer = current.switch(name)
    try:
        yield
    finally:
        current.switch(outer)


def watch(model: nn.Module) -> None:
    """Make the model's forward passes a stage, where this thread is being measured."""
    if clock() is not None:
        model.forward = stage("model")(model.forward)


@contextmanager
def profiled(folder: Path) -> Iterator[None]:
    """Measure a job; print a table of its stages at the end and save it as ``profile.json``."""
    with measured("rest") as current:
        yield
    main = {name: current.seconds[name] for name in MAIN_STAGES}
    # Without helpers, the main thread does their work while it waits.
    found = current.helpers if current.samples else current.seconds
    loader = {name: found[name] for name in LOADER_STAGES}
    if not current.samples:
        main["wait for data"] += sum(loader.values())
    rows = []
    for part, stages in (("loader, all workers", loader), ("main process", main)):
        whole = sum(stages.values()) or 1.0
        for name, seconds in stages.items():
            a_video = 1000 * seconds / current.samples if current.samples else ""
            rows.append((part, name, seconds, f"{seconds / whole:.1%}", a_video))
    verdict = _verdict(main)
    from mvit_video.io.console import print_table  # it needs rich, decoding doesn't

    print_table("where the time went", ("", "stage", "seconds", "share", "ms a video"), rows)
    print(verdict)
    saved = {"loader": loader, "main": main, "videos": current.samples or None, "verdict": verdict}
    write_json(folder / "profile.json", saved)


def _verdict(main: dict[str, float]) -> str:
    waiting, working = main["wait for data"], main["transfer"] + main["model"]
    share = waiting / (waiting + working or 1.0)
    if share > 0.1:
        return f"The model waits {share:.0%} of the time: loading is the limit (more num_workers or cores)."
    return f"The model waits {share:.0%} of the time only: the model is the limit."
