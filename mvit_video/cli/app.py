"""The edge between the command line and the toolkit: Hydra in, one clear line out when something is wrong."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from mvit_video.data import timing
from mvit_video.data.datasets import OpenVideo
from mvit_video.data.decode.cuda import SAMPLE
from mvit_video.data.loader import KINDS
from mvit_video.errors import ConfigError, MVitVideoError, did_you_mean
from mvit_video.io.console import printable, protect_terminal
from mvit_video.model import ClipSpec, VideoModel
from mvit_video.model.variants import change_views
from mvit_video.weights import load_model, load_weights

log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parents[1]
# A wheel carries conf/ inside the package; a checkout has it beside the package.
CONF_DIR = next(d for d in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if d.is_dir())


def run(job: Callable[[DictConfig], None], config_name: str) -> None:
    """Run ``job`` as a Hydra application on ``conf/<config_name>.yaml`` with the arguments in ``sys.argv``.

    What a user can mend (bad overrides, bad data, bad files) ends the process with status 1 and one line on
    standard error. ``HYDRA_FULL_ERROR=1`` shows the stack trace instead.
    """
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing

    def guarded_job(config: DictConfig) -> None:
        # Hydra prints a line of its own for exceptions that leave the job, so ours must not leave it.
        try:
            protect_terminal()
            _quiet_libraries()
            _check_types(config, config_name)
            folder = Path(HydraConfig.get().runtime.output_dir)
            first = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0
            with timing.profiled(folder) if first and config.get("profile") else nullcontext():
                job(config)
        except (MVitVideoError, InstantiationException, OmegaConfBaseException, OSError) as error:
            if full_error:
                raise
            _exit(config_name, _one_line(error))
        except KeyboardInterrupt:
            sys.stderr.write(f"mvit-{config_name}: interrupted\n")
            sys.exit(128 + signal.SIGINT)

    application = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(
        guarded_job
    )
    try:
        application()
    except (HydraException, OmegaConfBaseException) as error:
        if full_error:
            raise
        _exit(config_name, _explain_composition(error, config_name))


def build(config: Any, **kwargs: Any) -> Any:
    """``hydra.utils.instantiate`` with plain lists and dicts as arguments."""
    return hydra.utils.instantiate(config, _convert_="all", **kwargs)


def build_model(config: DictConfig, num_classes: int | None = None) -> VideoModel:
    """The model that ``config.weights`` describes, or ``config.model`` with these weights, in eval mode.

    ``config.views`` replaces parts of its protocol. Without weights the model stays as it was initialised.
    """
    if "model" in config:
        published = OmegaConf.select(config, "model.weights")  # which bring their classes
        model = build(config.model, num_classes=None if published else num_classes)
        if config.weights:
            log.info("weights of %s\n%s", config.weights, load_weights(model, config.weights))
    elif config.weights:
        model = load_model(config.weights)
    else:
        raise ConfigError("nothing to run: give weights=FILE, or model=NAME to see random weights at work")
    model.protocol = override_protocol(model.protocol, config.views)
    timing.watch(model)
    return model.eval()


def build_decoder(config: DictConfig) -> OpenVideo:
    """What ``config.decoder`` opens files with, tried on a packaged clip.

    Raises ConfigError for what isn't possible on this machine.
    """
    open_file = build(config.decoder)
    with open_file(SAMPLE) as video:
        device = video.get_frames([0]).device
    if device.type != "cpu" and config.num_workers and config.get("loader") == "workers":
        raise ConfigError(f"decoding on {device} happens in threads of this process: loader=threads")
    return open_file


def check_loading(config: DictConfig) -> None:
    """ConfigError for a batch without clips, or workers of an unknown kind or negative number."""
    if config.batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {config.batch_size}")
    if config.num_workers < 0:
        raise ConfigError(f"num_workers must be at least 0, got {config.num_workers}")
    if "loader" in config and config.loader not in KINDS:
        raise ConfigError(f"loader must be one of {', '.join(KINDS)}, got {config.loader!r}")


def override_protocol(protocol: ClipSpec, views: DictConfig) -> ClipSpec:
    """A copy of a protocol with the values of the ``views`` group that aren't null."""
    values = OmegaConf.to_container(views, resolve=True)
    assert isinstance(values, dict)
    try:
        return change_views(protocol, {str(k): v for k, v in values.items() if v is not None})
    except ValueError as error:
        raise ConfigError(f"views: {error}") from None


def _exit(config_name: str, message: str) -> None:
    sys.stderr.write(f"mvit-{config_name}: error: {printable(message)}\n")
    sys.exit(1)


def _one_line(error: BaseException) -> str:
    if isinstance(error, MissingMandatoryValue):
        key = error.full_key or str(error).rsplit(" ", 1)[-1]
        return f"{key} isn't set; give {key}=..."
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        where = re.search(r"full_key: (\S+)", str(error))
        prefix = f"{where[1]}: " if where else ""
        cause = error.__cause__
        return _one_line(cause) if isinstance(cause, MissingMandatoryValue) else prefix + _one_line(cause)
    if isinstance(error, OSError) and error.strerror:  # a folder without permission, a full disk
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error)
    return " ".join(text.split())


def _explain_composition(error: HydraException | OmegaConfBaseException, config_name: str) -> str:
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        nearest = did_you_mean(choice, error.options, "{}")
        return f"{group} has no {choice!r}{nearest}; it has: {', '.join(error.options)}"
    unknown = re.search(r"Could not override '([^'@]+)'", str(error))
    return _explain_unknown_key(unknown[1], config_name) if unknown else _one_line(error)


def _explain_unknown_key(key: str, config_name: str) -> str:
    """Name the nearest key and what the composed config has in the place of ``key``."""
    config = _compose_defaults(config_name, sys.argv[1:])
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if parent and node is None:
        return _explain_unknown_key(parent, config_name)
    if not isinstance(node, DictConfig):
        return f"there is no {key!r}: {parent} is a value ({node})"
    known = sorted({str(k) for k in node} | (set() if parent else _groups()))
    nearest = did_you_mean(name, known, f"{parent}.{{}}" if parent else "{}")
    return f"there is no {key!r}{nearest}; {parent or 'the top level'} has: {', '.join(known)}"


def _check_types(config: DictConfig, config_name: str) -> None:
    """ConfigError for an override that turns a number or a switch into something else."""
    overrides = list(HydraConfig.get().overrides.task)
    defaults = _compose_defaults(config_name, overrides)
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        default, value = OmegaConf.select(defaults, key), OmegaConf.select(config, key)
        for kind, allowed, expected in (
            (bool, (bool,), "true or false"),
            (int, (int,), "a whole number"),
            (float, (int, float), "a number"),
        ):
            if type(default) is kind and value is not None and type(value) not in allowed:
                raise ConfigError(f"{key} is {value!r}, expected {expected} (the default is {default})")


def _compose_defaults(config_name: str, overrides: list[str]) -> DictConfig:
    """The config as the chosen group options leave it, without any value from the command line."""
    choices = [o for o in overrides if o.lstrip("+~").partition("=")[0] in _groups()]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        try:
            return hydra.compose(config_name, choices)
        except HydraException:  # a choice is the mistake
            return hydra.compose(config_name)


def _groups() -> set[str]:
    return {entry.name for entry in CONF_DIR.iterdir() if entry.is_dir()}


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


def choose_device(device: str) -> str:
    """Resolve "auto"; ConfigError for a device that isn't there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {device!r} can't be used here: {' '.join(str(error).split())[:200]}"
        ) from None
    return device
