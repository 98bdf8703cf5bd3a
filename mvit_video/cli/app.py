"""What jobs are built from: model, decoder and device as a configuration describes them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from mvit_video.data import timing
from mvit_video.data.datasets import OpenVideo, training_loader, validation_loader
from mvit_video.data.decode import FREE_KEYS, device_of
from mvit_video.data.loader import WORKER_TYPES, ClipLoader
from mvit_video.data.ranks import Ranks, process_group, use_own_gpu
from mvit_video.errors import ConfigError, refusing
from mvit_video.io.writing import sole_writer
from mvit_video.model import ClipSpec, VideoModel
from mvit_video.model.variants import change_views
from mvit_video.weights import build_for_weights, load_model, load_weights
from mvit_video.weights.reading import read_task

log = logging.getLogger(__name__)


def build(config: Any, **kwargs: Any) -> Any:
    """``hydra.utils.instantiate`` with plain lists and dicts as arguments.

    Raises ConfigError where nothing says what is built, as in a group of which no option is chosen.
    """
    plain: Any = OmegaConf.to_container(config) if OmegaConf.is_dict(config) else None
    if plain and not any("_target_" in node for node in (plain, *plain.values()) if isinstance(node, dict)):
        group = config._get_full_key(None)
        raise ConfigError(f"{group} has values and no option; choose one by {group}=NAME")
    return hydra.utils.instantiate(config, _convert_="all", **kwargs)


def task_of(config: DictConfig) -> str:
    """What ``config.task`` says, else what the checkpoint that is given is of."""
    task: str = config.task or read_task(config.weights)
    return task


def build_data(data: DictConfig) -> Any:
    """The data set; ``balance`` isn't part of it, but how a training draws from it."""
    own = copy.copy(data)
    with open_dict(own):
        own.pop("balance", None)
    return build(own)


def build_model(config: DictConfig, num_classes: int | None = None) -> VideoModel:
    """The model that ``config.weights`` describes, or ``config.model`` with these weights, in eval mode.

    ``config.views`` replaces parts of its protocol. Without weights the model stays as it was initialised.
    """
    if "model" in config:
        if OmegaConf.select(config, "model.weights"):  # published: they bring their classes
            num_classes = None
        if config.weights:
            model, report = build_for_weights(partial(build, config.model), config.weights, num_classes)
            log.info("weights of %s\n%s", config.weights, report)
        else:
            model = build(config.model, num_classes=num_classes)
    elif config.weights:
        model = load_model(config.weights)
    else:
        raise ConfigError("no weights given: set weights=FILE (or model=NAME for an untrained model)")
    model.protocol = override_protocol(model.protocol, config.views)
    timing.watch(model)
    return model.eval()


def load_weights_of(config: DictConfig, model: Any) -> None:
    """Load ``config.weights``, if there are any, into a model, with or without its head."""
    if config.weights:
        report = load_weights(model, config.weights, head=config.get("head", "strict"))
        log.info("weights of %s\n%s", config.weights, report)


def build_module(config: DictConfig, model: Any, own: Mapping[str, str] | None = None, **options: Any) -> Any:
    """What trains a model as ``config.optim`` says, or with ``own`` in the place of some of it."""
    kind = build(config.optim, _partial_=True, **(own or {}))
    return kind(model, batch_size=config.batch_size, seed=config.seed, **options)


def build_decoder(config: DictConfig) -> OpenVideo:
    """What ``config.decoder`` opens files with.

    Raises ConfigError for what isn't possible on this machine.
    """
    open_file = build(config.decoder)
    device = device_of(open_file)
    if device.type != "cpu" and config.num_workers and config.get("loader") == "workers":
        raise ConfigError(f"decoding on {device} happens in threads of this process: loader=threads")
    return open_file


def decoding(config: DictConfig) -> dict[str, Any]:
    """The part of ``config.decoder`` that what is decoded depends on."""
    settings: Any = OmegaConf.to_container(config.decoder, resolve=True)
    return {key: value for key, value in settings.items() if f"decoder.{key}" not in FREE_KEYS}


@contextmanager
def evaluation(config: DictConfig) -> Iterator[tuple[Ranks, Path]]:
    """The processes of an evaluation, and the folder that they alone write to, in which nothing is resumed
    once the block has ended well.
    """
    from mvit_video.evaluation.run import output_folder, remove_journals  # which imports pyarrow

    with process_group() as ranks, ExitStack() as locks:
        if ranks.rank:
            logging.getLogger().setLevel(logging.WARNING)
        own = Path(HydraConfig.get().runtime.output_dir)
        output = ranks.broadcast_from_rank0(lambda: output_folder(config.resume, own))
        ranks.broadcast_from_rank0(lambda: locks.enter_context(sole_writer(output)))
        use_own_gpu()
        yield ranks, output
        if ranks.rank == 0:
            remove_journals(output)


def chosen_split(splits: Any, split: str) -> Any:
    """The part of a data set that is called so. Raises ConfigError where it has none."""
    index = getattr(splits, split, None)
    if index is None:
        raise ConfigError(f"split={split}: the data set has no such split")
    return index


def loading(config: DictConfig, trainer: Any) -> dict[str, Any]:
    """How samples become batches in a training: arguments that all loaders share."""
    return {
        "batch_size": config.batch_size,
        "num_workers": config.num_workers,
        "rank": trainer.global_rank,
        "num_replicas": trainer.world_size,
        "worker_type": WORKER_TYPES[config.loader],
        "pin_memory": torch.cuda.is_available() and config.num_workers > 0,
    }


def build_loaders(
    config: DictConfig, trainer: Any, training: Any, validation: Any, collate: Callable[[list[Any]], Any]
) -> tuple[ClipLoader[Any], ClipLoader[Any]]:
    """The loaders of a training's two data sets."""
    shared, shuffle = loading(config, trainer), not config.trainer.overfit_batches
    return (
        training_loader(training, collate, shuffle=shuffle, **shared),
        validation_loader(validation, collate, **shared),
    )


def texts(value: Any) -> list[str]:
    """A key's texts, of which one may stand alone."""
    return [str(text) for text in value] if OmegaConf.is_list(value) else [str(value)] if value else []


def override_protocol(protocol: ClipSpec, views: DictConfig) -> ClipSpec:
    """A copy of a protocol with the values of the ``views`` group that aren't null."""
    values: Any = OmegaConf.to_container(views, resolve=True, throw_on_missing=True)
    try:
        return change_views(protocol, **values)
    except ValueError as error:
        raise ConfigError(f"views: {error}") from None


def choose_device(device: str) -> str:
    """Resolve "auto"; ConfigError for a device that isn't there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    with refusing(ConfigError, f"device {device!r} can't be used here"):
        torch.empty(0, device=device)
    return device
