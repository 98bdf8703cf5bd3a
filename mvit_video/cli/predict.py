"""mvit-predict: the classes of video files."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from mvit_video.cli import app
from mvit_video.errors import ConfigError, DataError, VideoError
from mvit_video.io.console import print_table, printable, track
from mvit_video.io.fingerprint import Fingerprint, fingerprint
from mvit_video.io.writing import append, growing, keep_whole_lines, naming, sole_writer
from mvit_video.model import VideoModel
from mvit_video.model.inference import prepare
from mvit_video.prediction.inputs import STDIN, expand
from mvit_video.prediction.prediction import NOT_FINITE, Prediction
from mvit_video.prediction.ray import Predict, predict_with_ray
from mvit_video.prediction.recognizer import Recognizer
from mvit_video.prediction.saving import output_names, save_explanation, save_timeline
from mvit_video.prediction.stream import redact_credentials
from mvit_video.prediction.writer import (
    COLUMNS,
    PredictionWriter,
    as_text,
    format_of,
    leave_settings,
    require_own,
    rows_of,
)
from mvit_video.weights import weights_sha256
from mvit_video.weights.export import ExportedModel, load_exported
from mvit_video.weights.reading import EXPORTED

log = logging.getLogger(__name__)

MAX_TABLE = 100  # videos; the others are in the output


def predict_files(config: DictConfig, files: list[str]) -> None:
    """Classify the files given as arguments and in ``config.videos``: a table, or a file."""
    arguments = files + list(config.videos)
    _check(config, arguments)
    recognizer, settings = build_recognizer(config)
    if config.live:
        watch(config, recognizer, settings, arguments[0])
        return
    videos = [STDIN] if arguments == [STDIN] and config.window else expand(arguments)
    log.info("%d video%s; %s", len(videos), "s"[: len(videos) != 1], recognizer.protocol)
    names = output_names(videos)
    text_format = config.format if config.format in ("jsonl", "csv") and not config.output else None
    if text_format == "csv":
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # as the file would be, whatever the locale
        _print(",".join(COLUMNS) + "\n")
    shown: list[Prediction] = []
    failed: list[Prediction] = []
    with _output(config, settings, videos) as writer:
        todo = writer.todo if writer else videos
        if len(todo) < len(videos):
            log.info("resuming: %d of them are in %s already", len(videos) - len(todo), config.output)
        predictions = _predictions(config, recognizer, todo, names)
        for prediction in track(predictions, len(videos), done=len(videos) - len(todo), what="predicting"):
            if prediction.error is not None:
                if prediction.error == NOT_FINITE and NOT_FINITE not in [p.error for p in failed]:
                    log.warning("%s: %s", prediction.path, NOT_FINITE)  # before hours of them
                failed.append(prediction)
            if writer:
                writer.add(prediction)
            if text_format:
                _print(as_text(prediction, text_format, per_clip=config.per_clip))
            elif not writer or len(shown) < MAX_TABLE:
                shown.append(prediction)
    if shown:
        title = "random weights" * (settings["weights"] == "random")
        rows = _table(shown, per_clip=config.per_clip)
        print_table(title, ("video", "seconds", "class", "score"), rows)
    _summarize(config, len(todo), failed)
    if todo and len(failed) == len(videos):
        raise DataError(f"no video could be predicted, the first: {failed[0].path}: {failed[0].error}")


def _output(
    config: DictConfig, settings: Fingerprint, videos: list[str]
) -> PredictionWriter | AbstractContextManager[None]:
    if not config.output:
        return nullcontext()
    format = format_of(config.output, config.format)
    return PredictionWriter(
        config.output,
        videos,
        format=format,
        settings=settings | {"format": format},
        per_clip=config.per_clip,
        resume=config.resume,
    )


def watch(config: DictConfig, recognizer: Recognizer, settings: Fingerprint, source: str) -> None:
    """Print what happens in each window of a live source as soon as it was seen, a line each."""
    with ExitStack() as stack:
        file = None
        if config.output:
            output = Path(os.path.realpath(config.output))
            stack.enter_context(sole_writer(output))
            settings = settings | {"format": "live"}
            require_own(output, settings, resume=config.resume and output.exists())
            if not config.resume:
                output.unlink(missing_ok=True)
            elif output.exists():
                keep_whole_lines(output)
            leave_settings(output, settings)
            file = stack.enter_context(growing(output))
        for clip in recognizer.watch(
            source,
            length=config.window,
            stride=config.stride or config.window / 2,
            follow=config.follow,
            drop=source.startswith(("rtsp://", "rtsps://", "/dev/video")),
        ):
            line = json.dumps({"path": redact_credentials(source), **asdict(clip)}, allow_nan=False) + "\n"
            if file is not None:
                append(file, line.encode(), sync=False)
            elif config.format == "jsonl":
                _print(line)
            else:
                best = ", ".join(f"{n} {s:.3f}" for n, s in zip(clip.classes, clip.scores, strict=True))
                _print(f"{clip.start:.2f} - {clip.end:.2f}  {printable(best)}\n")


def _check(config: DictConfig, arguments: Sequence[str]) -> None:
    """ConfigError for values that don't go together."""
    if not arguments:
        raise ConfigError("no videos given; type their files or folders after the command")
    if config.explain and config.window:
        raise ConfigError("explain= takes no window=; it explains a video's clips")
    if config.save and not config.window:
        raise ConfigError("save= needs window=SECONDS, the length of the windows of a timeline")
    if STDIN in arguments and config.window and "video" in config.save:
        raise ConfigError("save=[video] reads a video twice, which a pipe doesn't allow")
    if config.live and (len(arguments) != 1 or not config.window):
        raise ConfigError("live=true watches one stream, camera, file or pipe (-), and needs window=SECONDS")


def _predictions(
    config: DictConfig, recognizer: Recognizer, videos: Sequence[str], names: Mapping[str, Path]
) -> Iterator[Prediction]:
    if config.engine != "ray":
        return _predict_here(config, recognizer, names, videos)
    return predict_with_ray(
        videos,
        partial(_of_actor, OmegaConf.to_yaml(config), names),
        actors=config.actors,
        cpus=max(config.num_workers, 1),
        gpus=float(str(recognizer.device).startswith("cuda")),
        address=config.ray_address,
    )


def _of_actor(settings: str, names: Mapping[str, Path]) -> Predict:
    config = DictConfig(OmegaConf.create(settings))
    return partial(_predict_here, config, build_recognizer(config)[0], names)


def _predict_here(
    config: DictConfig, recognizer: Recognizer, names: Mapping[str, Path], videos: Sequence[str]
) -> Iterator[Prediction]:
    """Predictions in order; beside them it writes what ``save`` and ``explain`` ask for."""
    folder = Path(config.save_dir)
    if config.window:
        for video in videos:
            yield _through_windows(config, recognizer, video, folder / names[video])
        return
    for prediction in recognizer.iterate(videos):
        if config.explain and prediction.error is None:
            try:
                explanation = recognizer.explain(prediction.path, method=config.explain)
                save_explanation(explanation, folder / names[prediction.path])
            except VideoError as error:  # the prediction is there all the same
                log.warning("%s", error)
        yield prediction


def _through_windows(config: DictConfig, recognizer: Recognizer, video: str, name: Path) -> Prediction:
    stride, path = config.stride or config.window / 2, redact_credentials(video)
    try:
        timeline = recognizer.timeline(video, length=config.window, stride=stride).smoothed(config.smoothing)
    except VideoError as error:
        return Prediction(path, error=error.reason)
    segments = timeline.segments(config.min_score)
    save_timeline(video, timeline, segments, name, config.save)
    return Prediction.from_scores(
        path, timeline.scores, timeline.spans, recognizer.class_names, config.topk, segments=segments
    )


def build_recognizer(config: DictConfig) -> tuple[Recognizer, Fingerprint]:
    """The model that the configuration describes, ready to be asked, and what its predictions depend on."""
    device = app.choose_device(config.device)
    model = _build_model(config, device)
    digest = weights_sha256(model) if config.output else None  # of the file's digits
    precision = "exported"
    if not isinstance(model, ExportedModel):
        wanted = "fp32" if config.explain else config.precision  # gradients want the digits
        model = prepare(model, device, precision=wanted, compiled=config.compile)
        precision = str(next(model.parameters()).dtype)
    weights = str(config.weights or OmegaConf.select(config, "model.weights") or "random")
    if weights == "random":
        log.warning("the model has random weights: its predictions mean nothing")
    recognizer = Recognizer(
        model,
        topk=config.topk,
        num_clips=1 if config.window and config.views.num_clips is None else None,
        batch_size=1 if config.live else config.batch_size,
        num_workers=config.num_workers,
        device=device,
        open_file=app.build_decoder(config),
    )
    keys = ("topk", "per_clip", "window", "stride", "smoothing", "min_score", "save", "explain", "decoder")
    chosen = OmegaConf.to_container(OmegaConf.masked_copy(config, list(keys)), resolve=True)
    return recognizer, fingerprint(
        weights=weights,
        weights_sha256=digest,
        protocol=str(recognizer.protocol),
        clip_spec=asdict(recognizer.protocol),
        class_names=recognizer.class_names,
        precision=precision,
        save_dir=str(Path(config.save_dir).absolute()) if config.save or config.explain else None,
        **cast(dict[str, Any], chosen),
    )


def _build_model(config: DictConfig, device: str) -> VideoModel | ExportedModel:
    if not str(config.weights).endswith(EXPORTED):
        return app.build_model(config)
    if "model" in config:
        raise ConfigError(f"{config.weights} is a whole model: it takes no model=")
    model = load_exported(config.weights, device, trust=config.trust)
    model.protocol = app.override_protocol(model.protocol, config.views)
    return model


def _summarize(config: DictConfig, count: int, failed: Sequence[Prediction]) -> None:
    more = f"; the table shows the first {MAX_TABLE}" if config.output and count > MAX_TABLE else ""
    where = f": {config.output}" if config.output else ""
    log.info("%d predictions, %d errors%s%s", count, len(failed), where, more)
    kinds = [*config.save, *([f"{config.explain} picture and video"] if config.explain else [])]
    if kinds and len(failed) < count:
        log.info("%s of each video: %s", ", ".join(kinds), Path(config.save_dir).absolute())
    if failed:
        log.warning(
            "%d of %d videos failed, the first: %s: %s", len(failed), count, failed[0].path, failed[0].error
        )


def _table(predictions: Sequence[Prediction], *, per_clip: bool) -> list[tuple[str, str, str, str]]:
    """Rows in which a video's name and each span are shown once."""
    table: list[tuple[str, str, str, str]] = []
    for prediction in predictions:
        name = prediction.path
        if prediction.error:
            table.append((name, "", f"error: {prediction.error}", ""))
            continue
        for row in rows_of(prediction, per_clip=per_clip):
            span = "all" if row["part"] == "video" else f"{row['start']:.2f} - {row['end']:.2f}"
            table.append((name, span if row["rank"] == 1 else "", row["class"], f"{row['score']:.4f}"))
            name = ""
    return table


def _print(text: str) -> None:
    try:
        with naming(Path("standard output")):
            print(text, end="", flush=True)
    except BrokenPipeError:  # whoever read the predictions has had enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
