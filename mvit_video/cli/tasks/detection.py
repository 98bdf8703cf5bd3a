"""Detection of objects in images."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mvit_video.cli import app
from mvit_video.data.class_names import check_same_classes
from mvit_video.data.loader import WORKER_TYPES
from mvit_video.detection.checkpoint import load_detector
from mvit_video.detection.coco import (
    AnnotatedImage,
    CocoImages,
    CocoSplits,
    Problem,
    load_objects,
    summary,
)
from mvit_video.detection.data import TestImages, TrainingImages, image_loader, whole_image_loader
from mvit_video.detection.detector import Detector
from mvit_video.detection.drawing import as_png, name_of_track
from mvit_video.detection.evaluation import detect_in_images, report
from mvit_video.detection.export import export_backbone, load_maps
from mvit_video.detection.metrics import LIKELY, SUMMARY
from mvit_video.detection.recognizer import FoundObjects, ObjectRecognizer, expand_files, video_writer
from mvit_video.detection.training import DetectorTraining
from mvit_video.detection.writer import COLUMNS, as_text, open_objects
from mvit_video.errors import ConfigError, DataError, VideoError
from mvit_video.evaluation.provenance import versions
from mvit_video.io.console import print_table, printable, track, write_csv
from mvit_video.io.fingerprint import Fingerprint, fingerprint
from mvit_video.io.writing import replacing
from mvit_video.model.inference import autocast
from mvit_video.prediction.prediction import NOT_FINITE
from mvit_video.prediction.saving import output_names
from mvit_video.prediction.writer import Format, format_of
from mvit_video.training.module import Training
from mvit_video.training.recipe import freeze
from mvit_video.training.resume import files_identity, model_identity
from mvit_video.weights import weights_sha256

PAGE_STRIDE = 1.0  # seconds from one frame to the next
MAX_TABLE = 100  # rows; the others are in the output

log = logging.getLogger(__name__)


def sketch(config: DictConfig) -> Detector:
    """The model without memory. Raises ConfigError for whatever can be refused before data are read."""
    if not callable(app.build(config.augment)):
        raise ConfigError("augment= is for videos; detection takes augment=multi_scale or large_scale_jitter")
    with torch.device("meta"):
        return _build_detector(config)


def train(config: DictConfig, trainer: pl.Trainer) -> Training:
    """Augmented images for training, whole ones for validation."""
    splits = _build_splits(config)
    detector = _build_detector(config, len(splits.train.class_names))
    app.load_weights_of(config, detector)
    detector.class_names, detector.category_ids = splits.train.class_names, splits.train.category_ids
    scales = "backbone.bottom_up"  # what a classifier's weights are for
    parts = [scales if part == "backbone" else part for part in app.texts(config.freeze)]
    freeze(cast(Any, detector), parts)
    module: DetectorTraining = app.build_module(config, detector)
    module.validation = splits.val
    loading = app.loading(config, trainer)
    trained, augment = splits.train.with_objects, app.build(config.augment)
    if not trained.images:
        crowds = summary(splits.train)["crowds"]
        raise DataError(f"no training image has a usable object; {crowds} are crowds (iscrowd=1 in its json)")
    shuffle = not config.trainer.overfit_batches
    training = image_loader(
        TrainingImages(trained.images, augment, seed=config.seed), shuffle=shuffle, **loading
    )
    whole = TestImages(
        splits.val.images, short_side=detector.config.min_size, max_side=detector.config.max_size
    )
    validation = whole_image_loader(whole, **loading)
    _describe(detector, splits, trained)
    identity = {
        "data": {
            "classes": splits.train.class_names,
            "train": trained.sha256(),
            "val": splits.val.sha256(),
        },
        "model": model_identity(detector.config),
        **files_identity(train=trained.images, val=splits.val.images),
    }
    return Training(module, training, validation, len(trained) + len(splits.val), identity)


def _build_detector(config: DictConfig, num_classes: int = 1) -> Detector:
    detector = app.build(config.model, num_classes=num_classes)
    if not isinstance(detector, Detector):
        raise ConfigError("task=detection needs a detector, such as model=mask_rcnn_mvitv2_t")
    return detector


def _build_splits(config: DictConfig, only: str | None = None) -> CocoSplits:
    """Training and validation images; ``only`` one of them is read, in the place of both, if it is known."""
    if only == "test":
        raise ConfigError("split=test: the data set has no such split")
    other = {"train": "val", "val": "train"}.get(only or "")
    data, same = config.data, {}
    if other and data.get(only):
        same = {other: data[only], f"{other}_images": data.get(f"{only}_images")}
    splits = app.build(data, **same)
    if not isinstance(splits, CocoSplits):
        raise ConfigError("task=detection needs images with objects: data=coco, coco_folder or shapes")
    return splits


def _describe(detector: Detector, splits: CocoSplits, trained: CocoImages) -> None:
    counts = summary(splits.train)
    log.info(
        "%.1f M parameters, %d classes, %d training images with objects (%d have none), %d validation images",
        sum(p.numel() for p in detector.parameters()) / 1e6,
        len(splits.train.class_names),
        len(trained),
        len(splits.train) - len(trained),
        len(splits.val),
    )
    objects = ", ".join(f"{name} {count}" for name, count in counts["objects"].items())
    log.info("training objects of each class: %s", printable(objects)[:2000])
    _warn(splits)
    problems = [*splits.train.problems, *splits.val.problems]
    if problems:
        log.warning(
            "%d images, objects and classes can't be used, the first: %s; %s lists them",
            len(problems),
            printable(": ".join(problems[0])),
            _write_problems(problems),
        )


def _warn(splits: CocoSplits) -> None:
    for split, coco in splits._asdict().items():
        counts = summary(coco)
        if not any(counts["objects"].values()):
            log.warning("%s: no object but crowds: nothing can be measured", split)
        if counts["without_mask"]:
            log.warning(
                "%s: %d objects have no mask, their box is taken for it", split, counts["without_mask"]
            )
        if counts["beyond_border"]:
            log.warning(
                "%s: %d boxes [x, y, width, height] reach beyond their image", split, counts["beyond_border"]
            )


def _write_problems(problems: Sequence[Problem]) -> Path:
    path = Path(HydraConfig.get().runtime.output_dir) / "problems.csv"
    write_csv(path, ("what", "reason"), problems)
    return path


def evaluate(config: DictConfig) -> None:
    """Detect the objects of every image of a split once; print and save how precisely."""
    if config.scores or config.class_map:
        raise ConfigError("scores= and class_map= are for classification")
    with app.evaluation(config) as (ranks, output):
        device = app.choose_device(config.device)
        splits = _build_splits(config, only=config.split)
        detector = _trained_detector(config, len(splits.train.class_names))
        coco: CocoImages = getattr(splits, config.split)
        if {*coco.class_names} == {*(detector.class_names or ())}:  # in another order, perhaps
            coco = coco.with_classes(detector.class_names or ())
        check_same_classes(detector.class_names, detector.config.num_classes, coco.class_names)
        settings = {
            "weights": str(config.weights),
            "model_sha256": weights_sha256(detector),
            "precision": config.precision,
            "split": config.split,
            "data": OmegaConf.to_container(config.data, resolve=True),
            "versions": versions(),
        }
        identity = fingerprint(
            weights=settings["model_sha256"],
            model=asdict(detector.config),
            images=coco.sha256(),
            precision=config.precision,
        )
        results = detect_in_images(
            detector.to(device),
            coco,
            output,
            ranks=ranks,
            identity=identity,
            max_bad_videos=config.max_bad_videos,
            device=device,
            autocast=autocast(device, config.precision, on_cpus=False),
            num_workers=config.num_workers,
            worker_type=WORKER_TYPES[config.loader],
        )
        if results is None:  # rank 0 reports
            return
        measured = report(coco, results, output, settings=settings, num_worst=config.worst_mistakes)
    if measured:
        rows = [
            (kind, *("-" if value < 0 else f"{value:.3f}" for value in list(precision.summary.values())[:6]))
            for kind, precision in measured.items()
        ]
        print_table(f"{len(results)} images", ("", *SUMMARY[:6]), rows)
        log.info("results.json and report.html are in %s", output)


def predict(config: DictConfig, arguments: list[str]) -> None:
    """Detect objects in pictures and videos: a table, or a file."""
    _check_prediction(config)
    recognizer, settings = _build_recognizer(config)
    ids = recognizer.detector.category_ids or tuple(range(recognizer.detector.config.num_classes))
    paths = expand_files(arguments)
    names = output_names(paths)
    _require_other_files(config, names)
    shown: list[tuple[Any, ...]] = []
    failed: list[FoundObjects] = []
    as_lines: Format | None = None if config.output else config.format
    if as_lines == "csv":
        print(",".join(COLUMNS))
    with ExitStack() as stack:
        output = None
        if config.output:
            options = {"format": format_of(config.output, config.format), "resume": config.resume}
            output = stack.enter_context(open_objects(config.output, paths, settings=settings, **options))
        todo = output.todo if output else paths
        done = len(paths) - len(todo)
        if done:
            log.info("resuming: %d of them are in %s already", done, config.output)
        for path in track(todo, len(paths), done=done, what="detecting"):
            for found in _drawn(recognizer, path, Path(config.save_dir) / names[path], config):
                if found.error == NOT_FINITE and all(f.error != NOT_FINITE for f in failed):
                    log.warning("%s: %s", found.path, NOT_FINITE)  # before hours of them
                failed += [found] if found.error else []
                shown += _table(found, config.min_score or LIKELY) if len(shown) <= MAX_TABLE else []
                if output:
                    output.add(path, found.rows(ids))
                elif as_lines:
                    print(as_text(found.rows(ids), as_lines), end="", flush=True)
            if output and not any(found.path == path for found in failed[-1:]):
                output.finish(path)
    if not config.output and not as_lines:
        print_table("", ("file", "second", "class", "score", "box"), shown[:MAX_TABLE])
        if len(shown) > MAX_TABLE:
            log.info("the table shows the first %d rows, output=FILE takes all", MAX_TABLE)
    if config.save:
        log.info("drawn objects: %s", Path(config.save_dir).absolute())
    for found in failed[:1]:
        first = f"the first: {found.path}: {found.error}"
        log.warning("%d of %d files failed, %s", len(failed), len(paths), first)
        if len(failed) == len(paths):
            raise DataError(f"no file could be read, {first}")


def _build_recognizer(config: DictConfig) -> tuple[ObjectRecognizer, Fingerprint]:
    """What detects objects, and what these depend on besides the files."""
    detector = _trained_detector(config)
    settings = fingerprint(
        weights_sha256=weights_sha256(detector),
        model=asdict(detector.config),
        class_names=detector.class_names,
        **{key: config[key] for key in ("min_score", "stride", "precision")},
        decoder=app.decoding(config),
        save=list(config.save),
        save_dir=str(Path(config.save_dir).absolute()) if config.save else None,
    )
    recognizer = ObjectRecognizer(
        detector,
        min_score=config.min_score,
        stride=config.stride or 0.0,
        device=app.choose_device(config.device),
        precision=config.precision,
        open_file=app.build_decoder(config),
    )
    return recognizer, settings


def build_finder(config: DictConfig) -> ObjectRecognizer:
    """What the page detects with."""
    return ObjectRecognizer(
        config.weights,
        stride=config.stride or PAGE_STRIDE,
        device=app.choose_device(config.device),
        precision=config.precision,
        open_file=app.build_decoder(config),
    )


def _check_prediction(config: DictConfig) -> None:
    for key in ("window", "live", "explain", "per_clip"):
        if config[key]:
            raise ConfigError(f"{key}= is for classification; a detector takes min_score=, stride= and save=")
    if set(config.save) - {"png", "video"}:
        raise ConfigError("save= of a detector is png (pictures) or video, or both")
    if config.engine != "local":
        raise ConfigError("engine= is for classification; a detector works in this process")
    if not config.output and config.format not in (None, "jsonl", "csv"):
        raise ConfigError(f"format={config.format} needs output=FILE")


def _require_other_files(config: DictConfig, names: Mapping[str, Path]) -> None:
    """ConfigError where a drawn picture or video would take the place of an input."""
    inputs = {os.path.realpath(path) for path in names}
    suffixes = [suffix for suffix, kind in ((".png", "png"), (".mp4", "video")) if kind in config.save]
    stems = [Path(config.save_dir) / name for name in names.values()]
    for drawn in (f"{stem}{suffix}" for stem in stems for suffix in suffixes):
        if os.path.realpath(drawn) in inputs:
            raise ConfigError(f"save_dir={config.save_dir}: {drawn} is an input; name another folder")


def _trained_detector(config: DictConfig, num_classes: int = 80) -> Detector:
    """The detector that ``config.weights`` describes, or ``config.model`` with these weights."""
    if "model" not in config:
        if not config.weights:
            raise ConfigError("no weights given: set weights=FILE")
        return load_detector(config.weights)
    detector = _build_detector(config, num_classes)
    app.load_weights_of(config, detector)
    return detector.eval()


def _drawn(recognizer: ObjectRecognizer, path: str, name: Path, config: DictConfig) -> Iterator[FoundObjects]:
    """What is detected in a file; beside it writes the picture, or the video, that ``save`` asks for."""
    threshold = config.min_score or LIKELY
    with ExitStack() as stack:
        add = None
        for found in recognizer.iterate(path):
            yield found
            if found.error is not None or ("png" if found.frame is None else "video") not in config.save:
                continue
            drawn = found.draw(threshold)
            if found.frame is None:
                with replacing(Path(f"{name}.png"), keep=True) as file:
                    file.write(as_png(drawn))
            else:
                add = add or stack.enter_context(video_writer(Path(f"{name}.mp4")))
                add(drawn, found.second)


def _table(found: FoundObjects, threshold: float) -> list[tuple[Any, ...]]:
    second = "" if found.second is None else f"{found.second:.2f}"
    if found.error is not None:
        return [(found.path, second, f"error: {found.error}", "", "")]
    names = [found.class_names[label] for label in found.labels.tolist()]
    if found.tracks is not None:
        names = list(map(name_of_track, names, found.tracks))
    objects = zip(names, found.scores.tolist(), found.boxes.tolist(), strict=True)
    return [
        (found.path, second, name, f"{score:.3f}", " ".join(f"{x:.0f}" for x in box))
        for name, score, box in objects
        if score >= threshold
    ] or [(found.path, second, "", "", "")]


def export(config: DictConfig) -> None:
    """Write the backbone with its pyramid, and compare it with what it was made of."""
    if config.part == "detector":
        raise ConfigError(
            "part=detector: how much a whole detector computes depends on what it finds, which no program of "
            "fixed shapes can; part=backbone writes all of it up to the proposals"
        )
    detector, path = _trained_detector(config), Path(config.output)
    size = (config.image_size[0], config.image_size[1])
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with replacing(path) as file:  # a wrong file is never taken for a good one
        export_backbone(detector, file.name, size)
        with torch.inference_mode():
            ours = detector.backbone(images)
            theirs = load_maps(file.name, trust=True)(images)  # just written
        worst = max(float((a - b).abs().max()) for a, b in zip(ours.values(), theirs, strict=True))
        if not worst <= config.tolerance:
            raise ConfigError(
                f"{path}: its maps differ by {worst:.2g}, more than tolerance={config.tolerance}"
            )
    log.info("%s: %.1f MB; its maps differ by %.1e at most", path, path.stat().st_size / 1e6, worst)


def check_data(config: DictConfig) -> None:
    """Open every image and check every object; DataError where some can't be used."""
    splits: CocoSplits = app.build(config.data, max_missing=1.0)
    problems = [*splits.train.problems, *splits.val.problems]
    with ThreadPoolExecutor(config.num_workers or os.cpu_count()) as threads:
        for coco in splits:
            found = track(threads.map(_problem, coco.images), len(coco), done=0, what="opening")
            problems += [problem for problem in found if problem is not None]
    rows = []
    for split, coco in splits._asdict().items():
        counts = summary(coco)
        objects = sum(counts["objects"].values())
        rows.append((split, len(coco), counts["images_without_objects"], objects, counts["crowds"]))
        for name, count in counts["objects"].items():
            log.info("%s: %d objects of %s", split, count, printable(name)[:100])
    print_table("", ("split", "images", "without objects", "objects", "crowds"), rows)
    _warn(splits)
    for reason, count in Counter(problem.reason for problem in problems).most_common(20):
        log.warning("%d: %s", count, printable(reason))
    if problems:
        raise DataError(
            f"{len(problems)} images, objects and classes can't be used, the first: "
            f"{': '.join(problems[0])}; {_write_problems(problems)} lists them"
        )


def _problem(image: AnnotatedImage) -> Problem | None:
    try:
        load_objects(image)
    except VideoError as error:
        return Problem(error.path, error.reason)
    return None
