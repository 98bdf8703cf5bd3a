"""Detection of actions: who does what, where."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from mvit_video.action_detection.annotations import ActionIndex, ActionSplits, box_lines, read_boxes
from mvit_video.action_detection.checkpoint import load_action_detector
from mvit_video.action_detection.clips import ActionAugment, ActionClips, collate
from mvit_video.action_detection.detector import ActionDetector
from mvit_video.action_detection.evaluation import report, score_index
from mvit_video.action_detection.prediction import (
    SHOWN_SCORE,
    PeopleWatcher,
    PersonActions,
    people_painter,
    to_json,
    to_rows,
    to_segments,
    to_text,
)
from mvit_video.action_detection.training import ActionDetectorTraining
from mvit_video.cli import app
from mvit_video.cli.tasks.persons import PUBLISHED, find_people
from mvit_video.data.class_names import check_same_classes
from mvit_video.data.decode.container import MAX_PIXELS
from mvit_video.data.loader import WORKER_TYPES
from mvit_video.errors import ConfigError, DataError, VideoError
from mvit_video.evaluation.provenance import versions
from mvit_video.io.console import print_table, printable, track
from mvit_video.io.fingerprint import Fingerprint, file_sha256, fingerprint
from mvit_video.io.writing import replacing
from mvit_video.model.inference import autocast
from mvit_video.prediction.inputs import expand
from mvit_video.prediction.render import redraw_video
from mvit_video.prediction.saving import output_names, write_subtitles
from mvit_video.prediction.writer import Rows, format_of, open_live_output, rows_of_files
from mvit_video.training.module import Training
from mvit_video.training.recipe import freeze
from mvit_video.training.resume import files_identity, model_identity
from mvit_video.weights import load_weights, weights_sha256

log = logging.getLogger(__name__)

MAX_TABLE = 100  # rows; the others are in the output


def sketch(config: DictConfig) -> ActionDetector:
    """The model without memory. Raises ConfigError for whatever can be refused before data are read."""
    if not isinstance(app.build(config.augment), ActionAugment):
        raise ConfigError("augment= is for classification; action detection takes augment=action")
    app.build_decoder(config)
    with torch.device("meta"):
        return _build_detector(config, weights=None)


def train(config: DictConfig, trainer: pl.Trainer) -> Training:
    """A random part of the clip around each key frame for training, its middle for validation."""
    splits = _build_splits(config)
    detector = _build_detector(
        config, num_classes=splits.num_classes, **({"weights": None} if config.weights else {})
    )
    app.load_weights_of(config, detector)
    detector.class_names = splits.class_names
    freeze(detector, app.texts(config.freeze))
    module: ActionDetectorTraining = app.build_module(config, detector)
    val = splits.val.every(splits.val_every)
    if not val.key_frames or not val.ground_truth:
        raise DataError(
            f"nobody does anything at validation seconds divisible by val_every={splits.val_every}"
        )
    module.validation, module.names = val, splits.names
    spec, count = detector.protocol, detector.config.num_classes
    reading = {"seed": config.seed, "open_file": app.build_decoder(config), "pending": True}
    augment = app.build(config.augment)
    clips = ActionClips(splits.train.key_frames, spec, count, "train", augment=augment, **reading)
    middle = ActionClips(val.key_frames, spec, count, "val", **reading)
    loaders = app.build_loaders(config, trainer, clips, middle, collate)
    _describe(detector, splits.train, val, splits.class_names)
    identity = {
        "data": {
            "classes": splits.class_names,
            "train": _sha256(splits.train),
            "val": _sha256(val),
        },
        "clips": asdict(detector.protocol),
        "model": model_identity(detector.config) | detector.roi_options,
        **files_identity(train=splits.train.key_frames, val=val.key_frames),
    }
    files = {frame.path for index in (splits.train, val) for frame in index.key_frames}
    return Training(module, *loaders, len(files), identity)


def evaluate(config: DictConfig) -> None:
    """Score the people of every key frame of a split once; print and save how precisely."""
    if config.class_map or config.class_names:
        raise ConfigError("class_map= and class_names= are for classification")
    with app.evaluation(config) as (ranks, output):
        device = app.choose_device(config.device)
        detector = trained_detector(config)
        splits = _build_splits(config)
        index: ActionIndex = app.chosen_split(splits, config.split)
        check_same_classes(detector.class_names, detector.config.num_classes, splits.class_names)
        identity = fingerprint(
            weights=weights_sha256(detector),
            model=asdict(detector.config) | detector.roi_options,
            clips=asdict(detector.protocol),
            key_frames=_sha256(index),
            decoder=app.decoding(config),
            precision=config.precision,
        )
        scored = score_index(
            detector.to(device),
            index,
            output,
            ranks=ranks,
            identity=identity,
            max_bad_videos=config.max_bad_videos,
            batch_size=config.batch_size,
            device=device,
            autocast=autocast(device, config.precision),
            open_file=app.build_decoder(config),
            num_workers=config.num_workers,
            worker_type=WORKER_TYPES[config.loader],
        )
        if scored is None:  # rank 0 reports
            return
        settings = {"weights": str(config.weights), "split": config.split, "precision": config.precision}
        settings |= {"protocol": str(detector.protocol), "versions": versions()}
        results = report(scored, index, splits.names, output, settings=settings)
    if results:
        rows = [(name, f"{100 * found['mAP']:.2f} %") for name, found in results["evaluators"].items()]
        print_table(f"{len(scored)} key frames", ("evaluator", "mAP at IoU 0.5"), rows)
    log.info("detections.csv%s in %s", ", results.json and report.html are" if results else " is", output)


def export(config: DictConfig) -> None:
    """ConfigError: there is no file that others run yet."""
    raise ConfigError("an action detector can't be exported; Python reads it, see load_action_detector")


def trained_detector(config: DictConfig) -> ActionDetector:
    """The detector that ``config.weights`` describes, or ``config.model`` with them, in eval mode."""
    if not config.weights:
        raise ConfigError("no weights given: set weights=FILE")
    if "model" not in config:
        detector = load_action_detector(config.weights)
    else:
        detector = _build_detector(config)
        load_weights(detector, config.weights)
    detector.protocol = app.override_protocol(detector.protocol, config.views)
    return detector.eval()


def _build_detector(config: DictConfig, **arguments: Any) -> ActionDetector:
    detector = app.build(config.model, **arguments)
    if not isinstance(detector, ActionDetector):
        raise ConfigError("task=action_detection needs an action detector: model=action_mvitv2_s_16x4, ...")
    detector.protocol = app.override_protocol(detector.protocol, config.views)
    return detector


def _build_splits(config: DictConfig) -> ActionSplits:
    splits = app.build_data(config.data)
    if not isinstance(splits, ActionSplits):
        raise ConfigError("task=action_detection needs videos with boxes: data=ava, ava_kinetics or actions")
    return splits


def _describe(
    detector: ActionDetector, train: ActionIndex, val: ActionIndex, class_names: tuple[str, ...]
) -> None:
    log.info(
        "%.1f M parameters, %d actions, %d training and %d validation key frames; %s",
        sum(p.numel() for p in detector.parameters()) / 1e6,
        len(class_names),
        len(train.key_frames),
        len(val.key_frames),
        detector.protocol,
    )
    counts = Counter(number for frame in train.key_frames for ids in frame.class_ids for number in ids)
    shown = ", ".join(f"{class_names[number - 1]} {count}" for number, count in counts.most_common(20))
    log.info("training boxes of the most frequent actions: %s", printable(shown))


def _sha256(index: ActionIndex) -> str:
    """Of all key frames with their boxes and actions."""
    digest = hashlib.sha256()
    for frame in index.key_frames:
        row = (frame.video, frame.second, frame.boxes, frame.class_ids)
        digest.update(repr(row).encode(errors="surrogateescape"))
    return digest.hexdigest()


def predict(config: DictConfig, arguments: list[str]) -> None:
    """Say what the people in films do: a table, or files of rows, subtitles and an annotated copy."""
    _check_prediction(config, arguments)
    rows = read_boxes(config.persons) if str(config.persons).lower().endswith(".csv") else None
    watcher, open_file = build_watcher(config, find=rows is None), app.build_decoder(config)
    if config.live:
        _watch_live(config, watcher, arguments[0], getattr(open_file, "max_pixels", MAX_PIXELS))
        return
    videos = expand(arguments)
    names = output_names(videos)
    shown: list[PersonActions] = []
    failed: list[VideoError] = []
    with ExitStack() as stack:
        output = stack.enter_context(_open_output(config, videos, watcher)) if config.output else None
        todo = output.todo if output else videos
        if len(todo) < len(videos):
            log.info("resuming: %d of them are in %s already", len(videos) - len(todo), config.output)
        for path in todo:
            kept: list[PersonActions] = []  # what subtitles and copies tell
            mine = [row for row in rows or () if row.video in (Path(path).stem, Path(path).name)]
            count = 0
            try:
                with open_file(path) as video:
                    total = len(watcher.key_seconds(video, mine))
                    for found in track(watcher.watch(video, mine), total, what="watching"):
                        count += len(found)
                        if output:
                            output.add(path, [asdict(one) for one in found])
                        else:
                            shown += found[: max(MAX_TABLE - len(shown), 0)]
                        kept += [one.likely(_least(config)) for one in found if config.save]
            except VideoError as error:
                log.warning("%s", printable(str(error)))
                failed.append(error)
                continue
            if not count:
                sought = f"nobody was detected, at min_person_score={config.min_person_score:g}"
                why = sought if rows is None else f"{config.persons} has no row of it"
                log.warning("%s: %s", printable(path), why)
            if config.save:
                _save(config, path, kept, Path(config.save_dir) / names[path], watcher.every)
            if output:
                output.finish(path)
    if shown:
        texts = [to_text(one, config.min_score, config.topk) for one in shown]
        rows_shown = [(p.path, f"{p.second:g}", text) for p, text in zip(shown, texts, strict=True)]
        print_table("", ("video", "second", "person: actions"), rows_shown)
    if failed and len(failed) == len(videos):
        raise DataError(f"no video could be predicted, the first: {failed[0]}")


def build_watcher(config: DictConfig, *, find: bool) -> PeopleWatcher:
    """An action detector that is asked about the people whom ``config.persons`` finds, or who are given."""
    device = app.choose_device(config.device)
    detector = trained_detector(config).to(device)
    weights = config.persons_weights if config.persons == "auto" else config.persons
    return PeopleWatcher(
        detector,
        find_people(weights, device) if find else None,
        every=config.stride or 1.0,
        min_person_score=config.min_person_score,
        device=device,
        autocast=autocast(device, config.precision),
    )


def _watch_live(config: DictConfig, watcher: PeopleWatcher, source: str, max_pixels: int) -> None:
    """Tell what people do as soon as it was seen, a line for each of them."""
    drop = source.startswith(("rtsp://", "rtsps://", "/dev/video"))
    with ExitStack() as stack:
        write: Callable[[str], None] = partial(print, end="", flush=True)
        if config.output:
            settings = _settings(config, watcher)
            write = stack.enter_context(open_live_output(config.output, settings, resume=config.resume))
        for people in watcher.watch_stream(source, follow=config.follow, drop=drop, max_pixels=max_pixels):
            for one in people:
                if config.output or config.format == "jsonl":
                    write(to_json(one, config.min_score) + "\n")
                else:
                    said = to_text(one, config.min_score, config.topk)
                    write(f"{one.second:.2f}  person {printable(said)}\n")


def _check_prediction(config: DictConfig, arguments: list[str]) -> None:
    """ConfigError for values that don't go together."""
    if config.explain or config.window or config.engine != "local":
        raise ConfigError("explain=, window= and engine= are for classification; key frames: stride=1")
    if "png" in config.save:
        raise ConfigError("save=[png] is for classification; action detection has srt, vtt and video")
    if config.live and (len(arguments) != 1 or config.save or str(config.persons).lower().endswith(".csv")):
        raise ConfigError("live=true is for one stream, camera, file or pipe (-); no save=, no rows")
    if config.output and not config.live and format_of(config.output, config.format) == "parquet":
        raise ConfigError("action detection writes .csv, .json and .jsonl")


def _least(config: DictConfig) -> float:
    """The score from which subtitles and copies tell of an action."""
    return max(config.min_score, SHOWN_SCORE)


def _open_output(
    config: DictConfig, videos: Sequence[str], watcher: PeopleWatcher
) -> AbstractContextManager[Rows]:
    """A file of people, which appears when all videos are watched; a killed run goes on."""
    kind = format_of(config.output, config.format)
    stems = Counter(Path(video).stem for video in videos)
    if kind == "csv" and len(stems) < len(videos):
        twice = stems.most_common(1)[0][0]
        raise ConfigError(
            f"several videos are called {twice}, all that AVA's form tells; write .json or .jsonl"
        )
    saved = {"save": list(config.save), "save_dir": str(Path(config.save_dir).absolute())}
    return rows_of_files(
        config.output,
        videos,
        settings=_settings(config, watcher) | {"format": kind} | (saved if config.save else {}),
        resume=config.resume,
        write=partial(_write_people, kind=kind, minimum=config.min_score),
        replaces=kind != "jsonl",
    )


def _settings(config: DictConfig, watcher: PeopleWatcher) -> Fingerprint:
    """What is told of people depends on it."""
    detector = watcher.detector
    persons = Path(config.persons_weights or PUBLISHED.url if config.persons == "auto" else config.persons)
    return fingerprint(
        weights=weights_sha256(detector),
        model=asdict(detector.config) | detector.roi_options,
        clips=asdict(detector.protocol),
        class_names=detector.class_names,
        persons=file_sha256(persons) if persons.is_file() else persons,
        decoder=app.decoding(config),
        **{key: config[key] for key in ("stride", "min_score", "min_person_score", "precision")},
    )


def _write_people(path: Path, rows: Iterator[dict[str, Any]], *, kind: str, minimum: float) -> None:
    people = (PersonActions(**row) for row in rows)
    with replacing(path, "w", newline="") as file:
        if kind == "csv":
            file.writelines(box_lines(to_rows(people, minimum)))
        elif kind == "jsonl":
            file.writelines(to_json(one, minimum) + "\n" for one in people)
        else:
            texts = (to_json(one, minimum) for one in people)
            file.write("[" + next(texts, ""))
            file.writelines(f",\n{text}" for text in texts)
            file.write("]\n")


def _save(config: DictConfig, path: str, people: list[PersonActions], name: Path, every: float) -> None:
    """Subtitles and an annotated copy, where ``save`` asks for them."""
    segments = to_segments(people, every, _least(config))
    name.parent.mkdir(parents=True, exist_ok=True)
    write_subtitles(segments, name, config.save)
    if "video" in config.save:
        try:
            painter = people_painter(people, every=every, min_score=_least(config))
            redraw_video(path, painter, Path(f"{name}.annotated.mp4"))
        except VideoError as error:
            log.warning("%s", error)
