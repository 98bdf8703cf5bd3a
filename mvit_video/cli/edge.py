"""The edge between the command line and the jobs: Hydra in, one clear line out when something is wrong.

Nothing here imports torch, so that ``--help``, a misspelt key and tab completion answer at once.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from mvit_video.cli.arguments import quote, split_files, split_options
from mvit_video.cli.help import CONF_DIR, help_page
from mvit_video.cli.messages import compose_defaults, explain_composition, one_line
from mvit_video.cli.schema import COMMANDS, check
from mvit_video.errors import MVitVideoError
from mvit_video.io.console import accept_all_text, print_table, printable, protect_terminal
from mvit_video.io.writing import replacing

log = logging.getLogger(__name__)

_RESULT = "job.json"  # what a job of a sweep leaves in its folder


def run(command: str, load: Callable[[], Callable[..., Any]], arguments: list[str]) -> None:
    """Run a job as a Hydra application on ``conf/<command>.yaml``.

    What a user can mend (bad overrides, bad data, bad files) ends the process with status 1 and one line on
    standard error. ``HYDRA_FULL_ERROR=1`` shows the stack trace instead.

    Args:
        load: imports the job, which takes the checked configuration, and for mvit-predict a list of files.
    """
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing
    accept_all_text()
    begun = False  # before, whatever goes wrong lies in the arguments
    files: list[list[str]] = []

    def job(config: DictConfig) -> Any:
        nonlocal begun
        begun = True
        attempt = partial(_checked, command, load, config, *files)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return _job_of_sweep(command, attempt, full_error)
        try:
            return attempt()
        except Exception as error:  # Hydra adds lines to errors that leave a job
            if full_error or _output_is_closed(error) or not _is_users(error):
                raise
            _exit(command, one_line(error))

    try:
        options, arguments = split_options(arguments)
        if command == "predict":
            named, arguments = split_files(arguments)
            files.append(named)
        arguments = options + arguments
        sweep = bool({"-m", "--multirun"} & set(arguments))
        sys.argv[1:] = [quote(argument, COMMANDS[command], sweep=sweep) for argument in arguments]
        sys.argv += _of_several_processes(command, arguments)
        if {"-h", "--help"} & set(arguments):
            print(help_page(command, compose_defaults(command, sys.argv[1:], with_hydra=True)))
        else:
            _quiet_libraries()
            hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=command)(job)()
        _flush_output()
    except KeyboardInterrupt:
        sys.stderr.write(f"mvit-{command}: interrupted\n")
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if _output_is_closed(error):  # whoever read the output has had enough, such as head
            _drop_output()
            sys.exit(128 + signal.SIGPIPE)
        if full_error or (begun and not _is_users(error)):
            raise
        _exit(command, explain_composition(error, command))


def _output_is_closed(error: Exception) -> bool:
    """Whether it is the standard output that broke, and not another pipe."""
    if not isinstance(error, BrokenPipeError):
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))  # errors are told unasked


def _checked(
    command: str, load: Callable[[], Callable[..., Any]], config: DictConfig, *files: list[str]
) -> Any:
    """What the job returns for a configuration whose values fit."""
    protect_terminal()
    check(config, COMMANDS[command])
    job = load()
    if not (config.get("profile") and _is_first_process()):
        return job(config, *files)
    from mvit_video.data import timing

    with timing.profiled(Path(HydraConfig.get().runtime.output_dir)):
        return job(config, *files)


def _job_of_sweep(command: str, attempt: Callable[[], Any], full_error: bool) -> Any:
    """What one of several jobs returns, NaN where it fails, so that the others run; leaves its result."""
    problem = None
    try:
        value = attempt()
    except Exception as error:
        value, problem = float("nan"), one_line(error)
        if not _is_users(error):
            problem = f"{type(error).__name__}: {problem}"
        if full_error or not _is_users(error):
            log.exception("a job failed")
        sys.stderr.write(f"mvit-{command}: error in job {HydraConfig.get().job.num}: {printable(problem)}\n")
    if _is_first_process():
        _write_result(value, problem)
    return value


def _is_users(error: BaseException) -> bool:
    """Whether it tells of something that a user can mend, and not of a bug."""
    lightning = sys.modules.get("lightning_fabric.utilities.exceptions")
    kinds = (MVitVideoError, InstantiationException, OmegaConfBaseException, OSError)
    if isinstance(error, ValueError) and isinstance(error.__cause__, OSError):  # a log file can't be opened
        return True
    return isinstance(error, kinds) or (
        lightning is not None and isinstance(error, lightning.MisconfigurationException)
    )


def _is_first_process() -> bool:
    from mvit_video.data.ranks import rank_and_size

    return rank_and_size()[0] == 0


def _of_several_processes(command: str, arguments: list[str]) -> list[str]:
    """What gives the processes of a training one folder; without a launcher, nothing is imported for it."""
    if command != "train" or not {"RANK", "SLURM_JOB_ID"} & os.environ.keys():
        return []
    from mvit_video.training import processes

    return processes.overrides(arguments)


def _exit(command: str, message: str) -> NoReturn:
    sys.stderr.write(f"mvit-{command}: error: {printable(message)}\n")
    try:
        _flush_output()
    except OSError:
        _drop_output()
    sys.exit(1)


def _flush_output() -> None:
    if sys.stdout is not None:  # as it is where a shell has closed it
        sys.stdout.flush()


def _drop_output() -> None:
    """Forget what can't be written any more, which Python would try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _quiet_libraries() -> None:
    """Drop warnings of libraries that a user can do nothing about."""
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists.*",
        ".*isinstance.treespec, LeafSpec..*",
        ".*module.s. in eval mode at the start of training.*",
        ".*number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message)


def _write_result(value: Any, problem: str | None) -> None:
    config = HydraConfig.get()
    row = {
        "job": config.job.num,
        "overrides": list(config.overrides.task),
        "metric": float(value) if isinstance(value, int | float) and problem is None else None,
        "error": problem,
    }
    with replacing(Path(config.runtime.output_dir) / _RESULT, "w") as file:
        json.dump(row, file)


class SweepTable(Callback):
    """Shows and saves what the jobs of ``--multirun`` came to; status 1 if one of them failed."""

    def __init__(self) -> None:
        self._before: dict[Path, int] = {}  # results that another sweep has left in the same folder

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        found = Path(config.hydra.sweep.dir).glob(f"**/{_RESULT}")
        self._before = {file: file.stat().st_mtime_ns for file in found}

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        files = [f for f in folder.glob(f"**/{_RESULT}") if f.stat().st_mtime_ns != self._before.get(f)]
        rows = sorted((json.loads(file.read_text()) for file in files), key=lambda row: row["job"])
        if not rows:
            return
        common = set.intersection(*(set(row["overrides"]) for row in rows)) if len(rows) > 1 else set()
        table = [
            (
                row["job"],
                " ".join(override for override in row["overrides"] if override not in common),
                "" if row["metric"] is None else row["metric"],
                row["error"] or "",
            )
            for row in rows
        ]
        with replacing(folder / "jobs.csv", "w", newline="") as file:
            csv.writer(file).writerows([("job", "overrides", "metric", "error"), *table])
        print_table(f"{folder / 'jobs.csv'}:", ("job", "overrides", "metric", "error"), table)
        if any(row["error"] for row in rows):
            sys.exit(1)
