"""The edge between the command line and the jobs: Hydra in, one clear line out when something is wrong.

Nothing here imports torch, so that ``--help``, a misspelt key and tab completion answer at once.
"""

from __future__ import annotations

import math
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from mvit_video.cli.arguments import quote, split_files, split_options, without_null_groups
from mvit_video.cli.conf import CONF_DIR, compose
from mvit_video.cli.help import help_page
from mvit_video.cli.messages import explain_composition, is_users, one_line
from mvit_video.cli.schema import check
from mvit_video.cli.sweep import leave_result
from mvit_video.data.ranks import rank_and_size
from mvit_video.io.console import accept_all_text, printable, protect_terminal


def run(command: str, load: Callable[[], Callable[..., Any]], arguments: list[str]) -> None:
    """Run a job as a Hydra application on ``conf/<command>.yaml``.

    What a user can mend (bad overrides, bad data, bad files) ends the process with status 1 and one line on
    standard error. ``HYDRA_FULL_ERROR=1`` shows the stack trace instead.

    Args:
        load: imports the job, which takes the checked configuration, and for mvit-predict a list of files.
    """
    before = os.environ.get("HYDRA_FULL_ERROR")
    full_error = before == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing
    accept_all_text()
    files: list[list[str]] = []
    failed: list[Exception] = []

    def job(config: DictConfig) -> Any:
        value, error = math.nan, None
        try:
            value = _checked(command, load, config, *files)
        except Exception as raised:  # Hydra would add lines of its own, and end the other jobs of a sweep
            error = raised
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            leave_result(command, value, error, full_error)
        elif error is not None:
            failed.append(error)
        return value

    try:
        options, arguments = split_options(arguments)
        if command == "predict":
            named, arguments = split_files(arguments)
            files.append(named)
        arguments = options + without_null_groups(arguments, command)
        sweep = bool({"-m", "--multirun"} & set(arguments))
        sys.argv[1:] = [quote(argument, command, sweep=sweep) for argument in arguments]
        sys.argv += _of_several_processes(command, arguments)
        if {"-h", "--help"} & set(arguments):
            print(help_page(command, compose(command, sys.argv[1:])))
        else:
            hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=command)(job)()
        if failed:
            raise failed[0]
        if sys.stdout is not None:  # as it is where a shell has closed it
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stderr.write(f"mvit-{command}: interrupted\n")
        _end(128 + signal.SIGINT)
    except Exception as error:
        if _output_is_closed(error):  # whoever read the output has had enough, such as head
            _end(128 + signal.SIGPIPE)
        if full_error or (failed and not is_users(error)):
            raise
        text = one_line(error) if failed else explain_composition(error, command, sys.argv[1:])
        sys.stderr.write(f"mvit-{command}: error: {printable(text)}\n")
        _end(1)
    finally:
        del os.environ["HYDRA_FULL_ERROR"]
        os.environ |= {} if before is None else {"HYDRA_FULL_ERROR": before}


def _checked(
    command: str, load: Callable[[], Callable[..., Any]], config: DictConfig, *files: list[str]
) -> Any:
    """What the job returns for a configuration whose values fit."""
    protect_terminal()
    check(config, command)
    job = load()
    if not (config.get("profile") and rank_and_size()[0] == 0):
        return job(config, *files)
    from mvit_video.data import timing

    with timing.profiled(Path(HydraConfig.get().runtime.output_dir)):
        return job(config, *files)


def _of_several_processes(command: str, arguments: list[str]) -> list[str]:
    """What gives the processes of a training one folder; without a launcher, nothing is imported for it."""
    if command != "train" or not {"RANK", "SLURM_JOB_ID"} & os.environ.keys():
        return []
    from mvit_video.training import processes

    return processes.overrides(arguments)


def _output_is_closed(error: Exception) -> bool:
    """Whether it is the standard output that broke, and not another pipe."""
    if not isinstance(error, BrokenPipeError):
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))  # errors are told unasked


def _end(status: int) -> NoReturn:
    """End the process, without what can't be written any more, which Python would try again."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
