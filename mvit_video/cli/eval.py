"""mvit-eval: measure a model on labelled videos with several views of each, or report scores on disk."""

from __future__ import annotations

import importlib
import logging
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mvit_video.cli import app
from mvit_video.data.class_names import read_class_names
from mvit_video.data.datasets import OpenVideo
from mvit_video.data.files import existing
from mvit_video.data.index import VideoSplits
from mvit_video.data.ranks import Ranks
from mvit_video.errors import ConfigError, DataError
from mvit_video.evaluation.classes import matching_classes, read_class_map, require_same_kind
from mvit_video.evaluation.importers import as_in_data_set, read_table
from mvit_video.evaluation.provenance import provenance_of
from mvit_video.evaluation.run import score_data_set
from mvit_video.evaluation.score_files import write_scores
from mvit_video.evaluation.scores import ScoreTable, aligned, ensemble
from mvit_video.io.writing import keep_former, sole_writer
from mvit_video.model.inference import prepare

log = logging.getLogger(__name__)


def evaluate(config: DictConfig) -> None:
    """Score every video of a split once with all its views, or read scores; print and save the metrics."""
    if not config.scores and (task := app.task_of(config)) != "classification":
        importlib.import_module(f"mvit_video.cli.tasks.{task}").evaluate(config)
        return
    if config.scores:
        output = Path(HydraConfig.get().runtime.output_dir)
        with sole_writer(output):
            _report_files(config, output)
        return
    with app.evaluation(config) as (ranks, output):
        open_file = app.build_decoder(config)
        table = _score_data_set(config, output, ranks, open_file)
        if table is None:  # rank 0 reports
            return
        write_scores(table, output / "scores.parquet")
        if any(video.label is None for video in table.videos):
            log.info("videos without labels: only scores.parquet is written, in %s", output)
        else:
            _report({"": table}, config, output, open_file)


def _score_data_set(
    config: DictConfig, output: Path, ranks: Ranks, open_file: OpenVideo
) -> ScoreTable | None:
    """Every video's scores, in the order of the data set, in rank 0; None in the others."""
    device = app.choose_device(config.device)
    model = app.build_model(config) if "model" not in config else None
    splits = app.build(config.data)
    known = _class_names(config)
    if model is None:
        model = app.build_model(config, num_classes=len(known or splits.class_names))
    class_map = read_class_map(config.class_map)
    known = known or model.class_names
    matrix = matching_classes(known, model.config.num_classes, splits.class_names, class_map)
    require_same_kind(model, splits.multi_label, class_map=class_map is not None)
    index = app.chosen_split(splits, config.split)
    provenance = provenance_of(
        model,
        config.weights or OmegaConf.select(config, "model.weights"),
        class_map=class_map,
        model_classes=None if matrix is None else known,
        decoder=OmegaConf.to_container(config.decoder, resolve=True),
        split=config.split,
        data=_data_set(config.data),
        command=shlex.join(["mvit-eval", *HydraConfig.get().overrides.task]),
    )
    prepare(model, device, precision=config.precision, compiled=config.compile, batch_size=config.batch_size)
    return score_data_set(
        model,
        index,
        output,
        ranks=ranks,
        provenance=provenance,
        matrix=matrix,
        max_bad_videos=config.max_bad_videos,
        combination=config.combine,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        loader=config.loader,
        device=device,
        open_file=open_file,
    )


def _report_files(config: DictConfig, output: Path) -> None:
    """Report one file of scores; compare several, or average them. No video is opened."""
    files = [config.scores] if isinstance(config.scores, str) else [str(file) for file in config.scores]
    names = _distinct_names(files)
    given = any(o.lstrip("+").startswith(("data=", "data.")) for o in HydraConfig.get().overrides.task)
    splits = app.build(config.data) if given else None
    tables = {name: _read_table(Path(file), config, splits) for name, file in zip(names, files, strict=True)}
    if len(tables) > 1:
        tables = aligned(tables)
    if config.ensemble and len(tables) > 1:
        tables = {"ensemble": ensemble(tables, config.combine)}
    keep_former(output / "results.json")
    if len(tables) == 1:
        write_scores(next(iter(tables.values())), output / "scores.parquet")
    _report(tables, config, output)


def _read_table(file: Path, config: DictConfig, splits: VideoSplits | None) -> ScoreTable:
    table = read_table(file)
    names = _class_names(config)
    if names:
        if len(names) != len(table.class_names):
            has = f"{file} has {len(table.class_names)} classes"
            raise DataError(f"class_names has {len(names)} names, {has}")
        table = replace(table, class_names=names)
    if splits is not None:
        index = app.chosen_split(splits, config.split)
        return as_in_data_set(table, index, read_class_map(config.class_map), file)
    if config.class_map:
        raise ConfigError("class_map needs the data set whose classes are meant: give data=...")
    return table


def _report(
    tables: Mapping[str, ScoreTable], config: DictConfig, output: Path, open_file: OpenVideo | None = None
) -> None:
    from mvit_video.evaluation.results import report  # which imports matplotlib

    settings = {"how": config.combine, "seed": config.seed, "num_mistakes": config.worst_mistakes}
    report(tables, output, open_file=open_file, **settings)


def _class_names(config: DictConfig) -> tuple[str, ...] | None:
    """Names of the model's classes that the command line gives."""
    names = config.class_names
    return read_class_names(names if isinstance(names, str) else list(names)) if names else None


def _data_set(data: DictConfig) -> dict[str, Any]:
    """The settings that say which videos these are; paths mean the same from another folder."""
    settings: Any = OmegaConf.to_container(data, resolve=True)
    for key, value in settings.items():
        if isinstance(value, str):
            with suppress(DataError, RuntimeError):  # it is no path
                settings[key] = str(existing(value).absolute())
    return settings


def _distinct_names(files: Sequence[str]) -> list[str]:
    """File names, or whole paths where these are the same: runs all call theirs scores.parquet."""
    if len(set(files)) < len(files):
        raise ConfigError("scores names a file twice")
    names = [Path(file).name for file in files]
    return names if len(set(names)) == len(names) else list(files)
