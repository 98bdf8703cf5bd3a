"""Entry points of the commands. Torch and Hydra are imported inside, so that Ctrl-C ends imports quietly."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

# What each command runs, by its first argument where it has several jobs: module.function of this package.
JOBS = {
    "train": {"": "train.train"},
    "eval": {"": "eval.evaluate"},
    "predict": {"": "predict.predict_files"},
    "info": {"": "info.print_model", "system": "info.print_system", "speed": "speed.print_speed"},
    "data": {"prepare": "data.prepare_index", "check": "data.check_index"},
    "export": {"": "export.export_and_check"},
    "demo": {"": "demo.serve"},
}


def main(command: str) -> None:
    """Run the job that the command line asks for, as a Hydra application on ``conf/<command>.yaml``."""
    jobs, arguments = JOBS[command], sys.argv[1:]
    first = arguments[0] if arguments else ""
    if first and first in jobs:
        del arguments[0]
    elif "" not in jobs and not first.startswith("-"):
        what = f"unknown command {first!r}" if first else "missing command"
        sys.stderr.write(f"mvit-{command}: error: {what}: {' or '.join(jobs)}\n")
        sys.exit(1)
    try:
        Path.cwd()
    except OSError:
        sys.stderr.write(f"mvit-{command}: error: the current folder is gone; change to another\n")
        sys.exit(1)
    module, _, function = jobs.get(first, next(iter(jobs.values()))).partition(".")

    with _signals(command) as job_begins:
        from mvit_video.cli import edge

        def load() -> Callable[..., Any]:
            job: Callable[..., Any] = getattr(importlib.import_module(f"mvit_video.cli.{module}"), function)
            job_begins()
            return job

        edge.run(command, load, arguments)


train, evaluate, predict = partial(main, "train"), partial(main, "eval"), partial(main, "predict")
info, data, export, demo = (partial(main, name) for name in ("info", "data", "export", "demo"))


@contextmanager
def _signals(command: str) -> Iterator[Callable[[], None]]:
    """Ctrl-C ends imports at once; after a call of what this gives, signals raise, so that jobs clean up.

    A signal that is ignored, as in a background shell, stays so.
    """
    # SIGHUP: a terminal is closed.
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    hook = sys.unraisablehook

    def end_now(*_: object) -> NoReturn:
        os.write(2, f"mvit-{command}: interrupted\n".encode())
        os._exit(128 + signal.SIGINT)

    def job_begins() -> None:
        from mvit_video.io.console import begin_job, end_by_signal, hide_dropped

        begin_job()
        sys.unraisablehook = hide_dropped
        for number, handler in before.items():
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, end_by_signal)

    if before[signal.SIGINT] is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_now)
    try:
        yield job_begins
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
