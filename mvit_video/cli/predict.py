"""mvit-predict: the classes of video files."""

from __future__ import annotations

import importlib
import io
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mvit_video.cli import app
from mvit_video.errors import ConfigError, DataError, VideoError
from mvit_video.io.console import print_table, printable, track
from mvit_video.io.fingerprint import Fingerprint, fingerprint
from mvit_video.io.writing import naming
from mvit_video.model import VideoModel
from mvit_video.model.inference import prepare
from mvit_video.prediction.inputs import STDIN, expand
from mvit_video.prediction.prediction import NOT_FINITE, Prediction
from mvit_video.prediction.ray import Predict, predict_with_ray
from mvit_video.prediction.recognizer import Recognizer
from mvit_video.prediction.saving import output_names, save_explanation, save_timeline
from mvit_video.prediction.stream import redact_credentials
from mvit_video.prediction.writer import Format, as_text, format_of, open_live_output, open_output, rows_of
from mvit_video.weights import weights_sha256
from mvit_video.weights.export import ExportedModel, load_exported
from mvit_video.weights.reading import EXPORTED

log = logging.getLogger(__name__)

MAX_TABLE = 100  # videos; the others are in the output


def predict_files(config: DictConfig, files: list[str]) -> None:
    """Classify the files given as arguments and in ``config.videos``: a table, or a file."""
    arguments = files + list(config.videos)
    if not arguments:
        raise ConfigError("no files given; type videos, pictures or their folders after the command")
    if (task := app.task_of(config)) != "classification":
        importlib.import_module(f"mvit_video.cli.tasks.{task}").predict(config, arguments)
        return
    _check(config, arguments)
    recognizer, settings = build_recognizer(config)
    if config.live:
        watch(config, recognizer, settings, arguments[0])
        return
    videos = [STDIN] if arguments == [STDIN] and config.window else expand(arguments)
    log.info("%d video%s; %s", len(videos), "s"[: len(videos) != 1], recognizer.protocol)
    predict = partial(_predict_here, config, recognizer, names := output_names(videos))
    if config.engine == "ray":
        predict = partial(
            predict_with_ray,
            make=partial(_of_actor, OmegaConf.to_yaml(config), names),
            actors=config.actors,
            cpus=max(config.num_workers, 1),
            gpus=float(str(recognizer.device).startswith("cuda")),
            address=config.ray_address,
        )
    predict_all(config, videos, predict, settings)


def predict_all(config: DictConfig, videos: Sequence[str], predict: Predict, settings: Fingerprint) -> None:
    """Tell the predictions of videos: in a file, as lines on standard output, or as a table.

    Raises DataError where no video could be predicted.
    """
    shown: list[Prediction] = []
    failed: list[Prediction] = []
    with ExitStack() as stack:
        todo, tell = list(videos), list[Callable[[Prediction], object]]()
        if config.output:
            format = format_of(config.output, config.format)
            settings = settings | {"format": format}
            options = {"format": format, "per_clip": config.per_clip, "resume": config.resume}
            output = open_output(config.output, videos, settings=settings, **options)
            todo, add = stack.enter_context(output)
            tell += [add, lambda prediction: shown.extend([prediction][: MAX_TABLE - len(shown)])]
        elif config.format in ("jsonl", "csv"):
            tell.append(_print_lines(config.format, per_clip=config.per_clip))
        else:
            tell.append(shown.append)
        done = len(videos) - len(todo)
        if done:
            log.info("resuming: %d of them are in %s already", done, config.output)
        for prediction in track(predict(todo), len(videos), done=done, what="predicting"):
            if prediction.error == NOT_FINITE and all(p.error != NOT_FINITE for p in failed):
                log.warning("%s: %s", prediction.path, NOT_FINITE)  # before hours of them
            if prediction.error is not None:
                failed.append(prediction)
            for one in tell:
                one(prediction)
    if shown:
        title = "random weights" * (settings["weights"] == "random")
        rows = _table(shown, per_clip=config.per_clip)
        print_table(title, ("video", "seconds", "class", "score"), rows)
    _summarize(config, len(todo), failed)
    if todo and len(failed) == len(videos):
        raise DataError(f"no video could be predicted, the first: {failed[0].path}: {failed[0].error}")


def watch(config: DictConfig, recognizer: Recognizer, settings: Fingerprint, source: str) -> None:
    """Tell what happens in each window of a live source as soon as it was seen, a line each."""
    with ExitStack() as stack:
        write: Callable[[str], None] = _print
        if config.output:
            settings = settings | {"format": "live"}
            write = stack.enter_context(open_live_output(config.output, settings, resume=config.resume))
        for clip in recognizer.watch(
            source,
            length=config.window,
            stride=config.stride or config.window / 2,
            follow=config.follow,
            drop=source.startswith(("rtsp://", "rtsps://", "/dev/video")),
        ):
            if config.output or config.format == "jsonl":
                row = {"path": redact_credentials(source), **asdict(clip)}
                write(json.dumps(row, allow_nan=False) + "\n")
            else:
                best = ", ".join(f"{n} {s:.3f}" for n, s in zip(clip.classes, clip.scores, strict=True))
                write(f"{clip.start:.2f} - {clip.end:.2f}  {printable(best)}\n")


def _check(config: DictConfig, arguments: Sequence[str]) -> None:
    """ConfigError for values that don't go together."""
    if config.explain and config.window:
        raise ConfigError("explain= takes no window=; it explains a video's clips")
    if config.save and not config.window:
        raise ConfigError("save= needs window=SECONDS, the length of the windows of a timeline")
    if STDIN in arguments and config.window and "video" in config.save:
        raise ConfigError("save=[video] reads a video twice, which a pipe doesn't allow")
    if config.live and (len(arguments) != 1 or not config.window):
        raise ConfigError("live=true watches one stream, camera, file or pipe (-), and needs window=SECONDS")


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
    save_timeline(timeline, segments, name, config.save, max_pixels=recognizer.max_pixels)
    return recognizer.predict(path, timeline.scores, timeline.spans, segments)


def build_recognizer(config: DictConfig) -> tuple[Recognizer, Fingerprint]:
    """The model that the configuration describes, ready to be asked, and what its predictions depend on."""
    device = app.choose_device(config.device)
    model = _build_model(config, device)
    digest = weights_sha256(model) if config.output else None  # of the file's digits
    precision = "exported"
    if not isinstance(model, ExportedModel):
        wanted = "fp32" if config.explain else config.precision  # gradients want the digits
        options = {"compiled": config.compile, "batch_size": config.batch_size}
        model = prepare(model, device, precision=wanted, **options)
        precision = str(next(model.parameters()).dtype)
    weights = str(config.weights or OmegaConf.select(config, "model.weights") or "random")
    if weights == "random":
        log.warning("the model has random weights: its predictions mean nothing")
    recognizer = Recognizer(
        model,
        topk=config.topk,
        min_score=config.min_score,
        num_clips=1 if config.window and config.views.num_clips is None else None,
        batch_size=1 if config.live else config.batch_size,
        num_workers=config.num_workers,
        device=device,
        open_file=app.build_decoder(config),
    )
    keys = ("topk", "per_clip", "window", "stride", "smoothing", "min_score", "save", "explain", "decoder")
    chosen: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, list(keys)), resolve=True)
    return recognizer, fingerprint(
        weights=weights,
        weights_sha256=digest,
        protocol=str(recognizer.protocol),
        clip_spec=asdict(recognizer.protocol),
        class_names=recognizer.class_names,
        precision=precision,
        save_dir=str(Path(config.save_dir).absolute()) if config.save or config.explain else None,
        **chosen,
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
    counts = ((count, "prediction"), (len(failed), "error"))
    told = ", ".join(f"{number} {what}{'' if number == 1 else 's'}" for number, what in counts)
    log.info("%s%s%s", told, where, more)
    kinds = [*config.save, *([f"{config.explain} picture and video"] if config.explain else [])]
    if kinds and len(failed) < count:
        log.info("%s of each video: %s", ", ".join(kinds), Path(config.save_dir).absolute())
    if failed:
        first = failed[0]
        log.warning("%d of %d videos failed, the first: %s: %s", len(failed), count, first.path, first.error)


def _table(predictions: Sequence[Prediction], *, per_clip: bool) -> list[tuple[str, str, str, str]]:
    """Rows in which a video's name and each span are shown once."""
    table: list[tuple[str, str, str, str]] = []
    for prediction in predictions:
        name = prediction.path
        if prediction.error:
            table.append((name, "", f"error: {prediction.error}", ""))
            continue
        for row in rows_of(prediction, per_clip=per_clip):
            if row["class"] is None:
                table.append((name, "all", "none", ""))
                continue
            span = "all" if row["part"] == "video" else f"{row['start']:.2f} - {row['end']:.2f}"
            table.append((name, span if row["rank"] == 1 else "", row["class"], f"{row['score']:.4f}"))
            name = ""
    return table


def _print_lines(format: Format, *, per_clip: bool) -> Callable[[Prediction], None]:
    """Gives a function that prints one video's lines."""
    if format == "csv" and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # as the file would be, whatever the locale
    _print(as_text(None, format, per_clip=per_clip))
    return lambda prediction: _print(as_text(prediction, format, per_clip=per_clip))


def _print(text: str) -> None:
    with naming(Path("standard output")):
        print(text, end="", flush=True)
