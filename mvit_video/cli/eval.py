"""mvit-eval: measure a model on labelled videos with several views of each, or report scores on disk."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mvit_video.cli import app
from mvit_video.data.bad_videos import BadVideos, allowed_bad_videos
from mvit_video.data.class_names import check_same_classes, read_class_names
from mvit_video.data.datasets import BadVideo, OpenVideo
from mvit_video.data.index import VideoIndex, VideoSplits
from mvit_video.data.ranks import Ranks, process_group, use_own_gpu
from mvit_video.errors import ConfigError, DataError
from mvit_video.evaluation.importers import SUFFIXES, read_foreign_scores
from mvit_video.evaluation.results import report_comparison, report_table, versions
from mvit_video.evaluation.scoring import VideoScores, score_videos
from mvit_video.evaluation.tables import (
    COMBINATIONS,
    Combination,
    ScoreLog,
    ScoreTable,
    aligned,
    class_matrix,
    combine,
    ensemble,
    map_classes,
    read_logs,
    read_scores,
    with_labels,
    write_scores,
)
from mvit_video.io.fingerprint import file_sha256
from mvit_video.model import VideoModel
from mvit_video.model.inference import prepare
from mvit_video.weights import weights_sha256

log = logging.getLogger(__name__)

UNFINISHED = "unfinished"  # folder of scores that a killed evaluation leaves
# Scores are only added to others that were made with the same of these.
MUST_AGREE = ("model_sha256", "protocol", "class_map", "precision")


def evaluate(config: DictConfig) -> None:
    """Score every video of a split once with all its views, or read scores; print and save the metrics."""
    if config.split not in ("train", "val", "test"):
        raise ConfigError(
            f"split is {config.split!r}; it must be train or val, or test where the data set has one"
        )
    if config.combine not in COMBINATIONS:
        raise ConfigError(f"combine is {config.combine!r}; it must be one of {', '.join(COMBINATIONS)}")
    output = Path(HydraConfig.get().runtime.output_dir)
    if config.scores:
        _evaluate_files(config, output)
        return
    allowed_bad_videos(config.max_bad_videos, 0)
    with process_group() as ranks:
        if ranks.rank:
            logging.getLogger().setLevel(logging.WARNING)
        output = ranks.share(lambda: _output_folder(config.resume, output))
        table, open_file = _score_data_set(config, output, ranks)
    if table is None:  # the first process reports
        return
    write_scores(table, output / "scores.parquet")
    if any(video.label is None for video in table.videos):
        log.info("videos without labels: scores.parquet in %s is all there is to tell", output)
        shutil.rmtree(output / UNFINISHED)
        return
    report_table(
        table,
        output,
        how=config.combine,
        seed=config.seed,
        num_mistakes=config.worst_mistakes,
        open_file=open_file,
    )
    shutil.rmtree(output / UNFINISHED)


# Scoring


def _score_data_set(
    config: DictConfig, output: Path, ranks: Ranks
) -> tuple[ScoreTable | None, OpenVideo | None]:
    """Every video's scores, in the order of the data set, in the first process; None in the others."""
    device = app.choose_device(config.device)
    use_own_gpu()
    open_file = app.build_decoder(config)
    model = app.build_model(config) if "model" not in config else None
    splits: VideoSplits = app.build(config.data)
    weights_classes = read_class_names(config.class_names) if config.class_names else None
    if model is None:
        model = app.build_model(config, num_classes=len(weights_classes or splits.class_names))
    matrix = _class_matrix(model, weights_classes or model.class_names, splits.class_names, config.class_map)
    index = _chosen_split(splits, config.split)
    facts = _facts(config, model)
    prepare(model, device, precision=config.precision, compiled=config.compile)
    facts["precision"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    folder, bad_file = output / UNFINISHED, output / "bad_videos.csv"

    def left_over() -> tuple[set[str], int]:
        found = read_logs(folder, splits.class_names, facts, MUST_AGREE)
        bad_file.unlink(missing_ok=True)  # they are tried again
        return {video.id for video in found.videos} if found else set(), len(list(folder.glob("*.arrows")))

    done, logs = ranks.share(left_over)
    log.info("%d videos; %s", len(index), model.protocol)
    if done:
        log.info(
            "%d of them have been scored before, see %s", len(done & {v.id for v in index.videos}), folder
        )
    videos = [video for video in index.videos if video.id not in done][ranks.rank :: ranks.size]
    bad = BadVideos(
        bad_file,
        allowed=allowed_bad_videos(config.max_bad_videos, len(index)),
        total=len(index),
        go_on=True,
    )
    with (
        ScoreLog(folder / f"{logs:06d}-{ranks.rank:04d}.arrows", splits.class_names, facts) as score_log,
        _progress(len(videos), config.combine, shown=ranks.rank == 0) as advance,
    ):
        for scores in score_videos(
            model,
            videos,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            loader=config.loader,
            device=device,
            open_file=open_file,
        ):
            if scores.error is not None:
                bad.note([BadVideo(scores.video.path, scores.error)])
            elif matrix is not None:
                scores = replace(scores, views=map_classes(scores.views, matrix))
            if scores.error is None:
                score_log.append(scores)
            advance(scores)
    for found in ranks.gather(bad.found):
        bad.found |= found
    if ranks.rank:
        return None, None
    bad.check()
    table = read_logs(folder, splits.class_names, facts, MUST_AGREE)
    if table is None:
        raise DataError("no video could be read")
    facts["left_out_videos"] = [
        {"id": out.video.id, "path": out.video.path, "reason": out.reason} for out in index.left_out
    ]
    facts["bad_videos"] = [
        {"id": video.id, **bad.found[video.path]._asdict()}
        for video in index.videos
        if video.path in bad.found
    ]
    return with_labels(replace(table, facts=facts), index.videos, splits.class_names), open_file


@contextmanager
def _progress(total: int, how: Combination, *, shown: bool) -> Iterator[Any]:
    """Gives a function that takes each video's scores and shows videos/s and the top-1 so far."""
    columns = (
        TextColumn("scoring"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.2f} videos/s, top-1 {task.fields[top1]:.4f}"),
        TimeRemainingColumn(),
    )
    start = time.perf_counter()
    right = seen = 0
    with Progress(*columns, disable=not shown) as progress:
        task = progress.add_task("scoring", total=total, rate=0.0, top1=0.0)

        def advance(scores: VideoScores) -> None:
            nonlocal right, seen
            if scores.error is None:
                seen += 1
                right += int(combine(scores.views, how).argmax()) == scores.video.label
            done = progress.tasks[0].completed + 1
            rate = done / (time.perf_counter() - start)
            progress.update(task, advance=1, rate=rate, top1=right / max(seen, 1))

        yield advance


def _facts(config: DictConfig, model: VideoModel) -> dict[str, Any]:
    """How the scores come about; the values of ``MUST_AGREE`` decide whether scores can be put together."""
    weights = config.weights or OmegaConf.select(config, "model.weights") or "random"
    facts = {
        "weights": str(weights),
        "weights_sha256": file_sha256(Path(weights)) if config.weights else None,
        "model_sha256": weights_sha256(model),
        "protocol": asdict(model.protocol),
        "protocol_text": str(model.protocol),
        "class_map": _read_class_map(config.class_map),
        "decoder": OmegaConf.to_container(config.decoder, resolve=True),
        "split": config.split,
        "versions": versions(),
    }
    return json.loads(json.dumps(facts, default=str))


def _output_folder(resume: str | None, output: Path) -> Path:
    """Where results go: Hydra's folder, or the one that ``resume`` names ("last": the newest unfinished)."""
    if resume is None:
        return output
    if resume == "last":
        runs = output.parents[1]
        found = sorted(runs.glob(f"*/*/{UNFINISHED}"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise ConfigError(f"resume=last: no evaluation below {runs} is unfinished")
        return found[-1].parent
    if not (Path(resume) / UNFINISHED).is_dir():
        raise ConfigError(f"resume={resume}: no evaluation there is unfinished (there is no {UNFINISHED}/)")
    return Path(resume)


def _chosen_split(splits: VideoSplits, split: str) -> VideoIndex:
    index: VideoIndex | None = getattr(splits, split)
    if index is None:
        raise ConfigError(f"split={split}: the data set has no such split")
    return index


# Classes


def _class_matrix(
    model: VideoModel, known: Sequence[str] | None, class_names: Sequence[str], class_map: str | None
) -> torch.Tensor | None:
    """How the model's classes, ``known``, become the data set's; None where they are the same."""
    num_classes = model.config.num_classes
    if known and len(known) != num_classes:
        raise DataError(f"class_names has {len(known)} names, the weights know {num_classes} classes")
    if class_map:
        if known is None:
            raise ConfigError("class_map needs the names of the weights' classes: give class_names=...")
        return class_matrix(known, class_names, _read_class_map(class_map))
    check_same_classes(known, num_classes, class_names, "; class_map=names evaluates a part of them")
    return None


def _read_class_map(class_map: str | None) -> dict[str, Any] | None:
    """A json or yaml file of {data set's class: model's class or list of them}; {} for "names"."""
    if class_map is None or class_map == "names":
        return None if class_map is None else {}
    try:
        content = yaml.safe_load(Path(class_map).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"class_map={class_map}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"class_map={class_map}: expected {{class of the data set: class of the model}}")
    return {
        str(name): [str(v) for v in value] if isinstance(value, list) else str(value)
        for name, value in content.items()
    }


# Scores on disk


def _evaluate_files(config: DictConfig, output: Path) -> None:
    """Report one file of scores; compare several, or put them together. No video is opened."""
    files = [config.scores] if isinstance(config.scores, str) else [str(file) for file in config.scores]
    names = _distinct_names(files)
    given = any(o.lstrip("+").startswith(("data=", "data.")) for o in HydraConfig.get().overrides.task)
    splits: VideoSplits | None = app.build(config.data) if given else None
    tables = {name: _read_table(Path(file), config, splits) for name, file in zip(names, files, strict=True)}
    if len(tables) > 1:
        tables = aligned(tables)
    if config.ensemble and len(tables) > 1:
        tables = {"ensemble": ensemble(tables, config.combine)}
    if len(tables) == 1:
        (table,) = tables.values()
        write_scores(table, output / "scores.parquet")
        report_table(table, output, how=config.combine, seed=config.seed, num_mistakes=config.worst_mistakes)
    else:
        report_comparison(tables, output, how=config.combine, seed=config.seed)


def _read_table(file: Path, config: DictConfig, splits: VideoSplits | None) -> ScoreTable:
    foreign = file.suffix in SUFFIXES
    table = read_foreign_scores(file) if foreign else read_scores(file)
    if config.class_names:
        names = read_class_names(config.class_names)
        if len(names) != len(table.class_names):
            raise DataError(
                f"class_names has {len(names)} names, {file} has {len(table.class_names)} classes"
            )
        table = replace(table, class_names=names)
    if splits is None:
        if config.class_map:
            raise ConfigError("class_map needs the data set whose classes are meant: give data=...")
        return table
    videos = _chosen_split(splits, config.split).videos
    if foreign:
        table = _in_order_of(table, videos, file)
    if config.class_map:
        matrix = class_matrix(table.class_names, splits.class_names, _read_class_map(config.class_map))
        table = replace(table, views=map_classes(table.views, matrix))
    elif len(table.class_names) != splits.num_classes:
        raise DataError(
            f"{file} has {len(table.class_names)} classes, the data set {splits.num_classes}; "
            "class_map=names evaluates a part of them"
        )
    elif table.class_names not in (splits.class_names, tuple(map(str, range(splits.num_classes)))):
        raise DataError(
            f"{file} and the data set call their classes differently; class_map=names reorders them"
        )
    return with_labels(table, videos, splits.class_names)


def _in_order_of(table: ScoreTable, videos: Sequence[Any], file: Path) -> ScoreTable:
    """Give the rows of a file without names the videos of a data set, one after the other."""
    if len(table) != len(videos):
        raise DataError(f"{file} has scores of {len(table)} videos, the data set lists {len(videos)}")
    for row, (scored, video) in enumerate(zip(table.videos, videos, strict=True)):
        if scored.label not in (None, video.label):
            raise DataError(
                f"{file}, row {row}: label {scored.label}, but {video.label} in the data set ({video.id}); "
                "its videos must come in the data set's order"
            )
    return replace(table, videos=tuple(videos))


def _distinct_names(files: Sequence[str]) -> list[str]:
    """File names, or whole paths where these are the same: runs all call theirs scores.parquet."""
    if len(set(files)) < len(files):
        raise ConfigError("scores names a file twice")
    names = [Path(file).name for file in files]
    return names if len(set(names)) == len(names) else list(files)
