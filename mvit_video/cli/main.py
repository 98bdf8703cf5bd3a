"""Entry points of the commands. Torch and Hydra are imported inside, so that Ctrl-C ends imports quietly."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn


def _run(command: str, job: str) -> None:
    """Run a job, given as ``module.function`` of this package, as a Hydra application."""
    with _signals(command) as job_begins:
        from mvit_video.cli import edge

        def load() -> Callable[..., Any]:
            module, _, function = job.partition(".")
            loaded: Callable[..., Any] = getattr(
                importlib.import_module(f"mvit_video.cli.{module}"), function
            )
            job_begins()
            return loaded

        edge.run(command, load, sys.argv[1:])


train = partial(_run, "train", "train.train")
evaluate = partial(_run, "eval", "eval.evaluate")
predict = partial(_run, "predict", "predict.predict_files")
export = partial(_run, "export", "export.export_and_check")
demo = partial(_run, "demo", "demo.serve")


def info() -> None:
    """The command ``mvit-info``, which describes a model, or behind ``system`` this machine."""
    if sys.argv[1:2] == ["system"]:
        del sys.argv[1]
        _run("info", "info.print_system")
    else:
        _run("info", "info.print_model")


def data() -> None:
    """The command ``mvit-data``, whose first argument is a job."""
    jobs = {"prepare": "data.prepare_index", "check": "data.check_index"}
    job = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else None
    if job not in jobs and (job or len(sys.argv) == 1):
        what = f"unknown command {job!r}" if job else "missing command"
        sys.stderr.write(f"mvit-data: error: {what}: {' or '.join(jobs)}\n")
        sys.exit(1)
    _run("data", jobs[job or "prepare"])


@contextmanager
def _signals(command: str) -> Iterator[Callable[[], None]]:
    """Ctrl-C ends imports at once; after a call of what this gives, signals raise, so that jobs clean up.

    A signal that is ignored, as in a background shell, stays so.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def end_now(*_: object) -> NoReturn:
        os.write(2, f"mvit-{command}: interrupted\n".encode())
        os._exit(128 + signal.SIGINT)

    def end(*_: object) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)

    def job_begins() -> None:
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if is_main and before[signal.SIGTERM] == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, end)

    is_main = threading.current_thread() is threading.main_thread()
    interruptible = is_main and before[signal.SIGINT] is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, end_now)
    try:
        yield job_begins
    finally:
        for number, handler in before.items() if is_main else ():
            signal.signal(number, handler)
