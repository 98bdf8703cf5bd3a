"""mvit-predict: the classes of video files."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from mvit_video.cli import app
from mvit_video.errors import ConfigError, DataError, VideoError
from mvit_video.io.console import print_table, printable
from mvit_video.io.fingerprint import Fingerprint, fingerprint
from mvit_video.io.writing import append, keep_whole_lines, sole_writer
from mvit_video.model import VideoModel
from mvit_video.model.inference import prepare
from mvit_video.prediction.explain import write_overlay_video, write_strip
from mvit_video.prediction.inputs import STDIN, expand
from mvit_video.prediction.prediction import NOT_FINITE, Prediction
from mvit_video.prediction.ray import Predict, predict_with_ray
from mvit_video.prediction.recognizer import Recognizer
from mvit_video.prediction.render import annotate_video, plot_timeline
from mvit_video.prediction.stream import redact_credentials
from mvit_video.prediction.timeline import write_srt, write_vtt
from mvit_video.prediction.writer import COLUMNS, PredictionWriter, as_text, format_of
from mvit_video.weights import weights_sha256
from mvit_video.weights.export import ExportedModel, load_exported
from mvit_video.weights.reading import EXPORTED

log = logging.getLogger(__name__)

MAX_TABLE = 100  # videos; the others are in the output
_MAX_NAME = 200  # bytes of a saved file's name, so that a suffix has room on every file system


def predict_files(config: DictConfig, files: list[str]) -> None:
    """Classify the files given as arguments and in ``config.videos``: a table, or a file."""
    arguments = files + list(config.videos)
    _check(config, arguments)
    recognizer, settings = build_recognizer(config)
    if config.live:
        watch(config, recognizer, arguments[0])
        return
    videos = [STDIN] if arguments == [STDIN] and config.window else expand(arguments)
    log.info("%d video%s; %s", len(videos), "s"[: len(videos) != 1], recognizer.protocol)
    names = output_names(videos)
    text_format = None if config.output else config.format
    shown: list[Prediction] = []
    failed: list[Prediction] = []
    with ExitStack() as stack:
        writer, todo = None, videos
        if config.output:
            format = format_of(config.output, config.format)
            writer = PredictionWriter(
                config.output,
                format=format,
                settings=settings | {"format": format},
                per_clip=config.per_clip,
                resume=config.resume,
            )
            todo = stack.enter_context(writer).remaining(videos)
            if len(todo) < len(videos):
                log.info("resuming: %d of them are in %s already", len(videos) - len(todo), config.output)
        if text_format == "csv":
            _print(",".join(COLUMNS) + "\n")
        for prediction in _tracked(_predictions(config, recognizer, todo, names), len(videos), len(todo)):
            if prediction.error is not None:
                if prediction.error == NOT_FINITE and not failed:
                    log.warning("%s: %s", prediction.path, NOT_FINITE)
                failed.append(prediction)
            if writer is not None:
                writer.add(prediction)
            if text_format in ("jsonl", "csv"):
                _print(as_text(prediction, text_format, per_clip=config.per_clip))
            elif len(shown) < MAX_TABLE or writer is None:
                shown.append(prediction)
    _show(shown, title="random weights" * (settings["weights"] == "random"), per_clip=config.per_clip)
    _summarize(config, len(todo), failed)
    if todo and len(failed) == len(videos):
        raise DataError(f"no video could be predicted, the first: {failed[0].path}: {failed[0].error}")


def watch(config: DictConfig, recognizer: Recognizer, source: str) -> None:
    """Print what happens in each window of a live source as soon as it was seen, a line each."""
    output = Path(config.output) if config.output else None
    with ExitStack() as stack:
        file = None
        if output is not None:
            stack.enter_context(sole_writer(output))
            if output.exists():
                keep_whole_lines(output)
            file = stack.enter_context(output.open("a", encoding="utf-8"))
        for clip in recognizer.watch(
            source,
            length=config.window,
            stride=config.stride or config.window / 2,
            follow=config.follow,
            drop=source.startswith(("rtsp://", "rtsps://", "/dev/video")),
        ):
            line = json.dumps({"path": redact_credentials(source), **asdict(clip)}, allow_nan=False) + "\n"
            if file is not None:
                append(file, line, sync=False)
            elif config.format == "jsonl":
                _print(line)
            else:
                best = ", ".join(f"{n} {s:.3f}" for n, s in zip(clip.classes, clip.scores, strict=True))
                _print(f"{_span(clip.start, clip.end)}  {printable(best)}\n")


def output_names(videos: Sequence[str]) -> dict[str, Path]:
    """For each video a path without suffix, below one folder and all of them different."""
    parents = [os.path.dirname(os.path.abspath(video)) for video in videos]  # noqa: PTH100, PTH120 (links stay)
    common = os.path.commonpath(parents) if parents else ""
    whole = {v: Path(p).relative_to(common) / Path(v).name for v, p in zip(videos, parents, strict=True)}
    stems = Counter(path.with_suffix("") for path in whole.values())
    # a.mp4 and a.webm side by side keep their suffixes, and so does what would be called like one of these
    with_suffix = {path for path in whole.values() if stems[path.with_suffix("")] > 1}
    names = {
        video: path if path in with_suffix or path.with_suffix("") in with_suffix else path.with_suffix("")
        for video, path in whole.items()
    }
    if len(set(names.values())) < len(set(whole.values())):
        names = whole
    return {video: _shortened(name) for video, name in names.items()}


def _shortened(path: Path) -> Path:
    name = os.fsencode(path.name)
    if len(name) <= _MAX_NAME:
        return path
    kept = name[:_MAX_NAME].decode("utf-8", "ignore")
    return path.with_name(f"{kept}-{hashlib.sha256(name).hexdigest()[:8]}")


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
    config: DictConfig, recognizer: Recognizer, videos: list[str], names: Mapping[str, Path]
) -> Iterator[Prediction]:
    if config.engine != "ray":
        return _predict_here(config, recognizer, videos, names)
    return predict_with_ray(
        videos,
        partial(_predictor, OmegaConf.to_yaml(config), names),
        actors=config.actors,
        cpus=max(config.num_workers, 1),
        gpus=float(str(recognizer.device).startswith("cuda")),
        address=config.ray_address,
    )


def _predictor(settings: str, names: Mapping[str, Path]) -> Predict:
    """What an actor predicts with, from the configuration as YAML."""
    config = OmegaConf.create(settings)
    assert isinstance(config, DictConfig)
    recognizer, _ = build_recognizer(config)
    return lambda videos: _predict_here(config, recognizer, list(videos), names)


def _predict_here(
    config: DictConfig, recognizer: Recognizer, videos: list[str], names: Mapping[str, Path]
) -> Iterator[Prediction]:
    """Predictions in order; beside them it writes what ``save`` and ``explain`` ask for."""
    folder = Path(config.save_dir)
    if config.window:
        for video in videos:
            yield _through_windows(config, recognizer, video, folder / names[video])
        return
    for prediction in recognizer.iterate(videos):
        if config.explain and prediction.error is None:
            name = folder / f"{names[prediction.path]}.{config.explain}"
            try:
                explanation = recognizer.explain(prediction.path, method=config.explain)
                write_strip(explanation, Path(f"{name}.png"))
                write_overlay_video(explanation, Path(f"{name}.mp4"))
            except VideoError as error:  # the prediction is there all the same
                log.warning("%s", error)
        yield prediction


def _through_windows(config: DictConfig, recognizer: Recognizer, video: str, name: Path) -> Prediction:
    try:
        timeline = recognizer.timeline(
            video, length=config.window, stride=config.stride or config.window / 2
        ).smoothed(config.smoothing)
    except VideoError as error:
        return Prediction(video, error=error.reason)
    segments = timeline.segments(config.min_score)
    if "srt" in config.save:
        write_srt(segments, Path(f"{name}.srt"))
    if "vtt" in config.save:
        write_vtt(segments, Path(f"{name}.vtt"))
    if "png" in config.save:
        plot_timeline(timeline, segments, Path(f"{name}.timeline.png"))
    if "video" in config.save:
        try:
            annotate_video(video, segments, Path(f"{name}.annotated.mp4"))
        except VideoError as error:  # the prediction is there all the same
            log.warning("%s", error)
    return Prediction.from_scores(
        video, timeline.scores, timeline.spans, recognizer.class_names, config.topk, segments=segments
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
    settings = OmegaConf.to_container(OmegaConf.masked_copy(config, list(keys)), resolve=True)
    return recognizer, fingerprint(
        weights=weights,
        weights_sha256=digest,
        protocol=str(recognizer.protocol),
        clip_spec=asdict(recognizer.protocol),
        class_names=recognizer.class_names,
        precision=precision,
        save_dir=str(Path(config.save_dir).absolute()) if config.save or config.explain else None,
        **{str(key): value for key, value in dict(settings).items()},  # type: ignore[arg-type]
    )


def _build_model(config: DictConfig, device: str) -> VideoModel | ExportedModel:
    if not str(config.weights).endswith(EXPORTED):
        return app.build_model(config)
    if "model" in config:
        raise ConfigError(f"{config.weights} is a whole model: it takes no model=")
    model = load_exported(config.weights, device, trust=config.trust)
    model.protocol = app.override_protocol(model.protocol, config.views)
    return model


def _tracked(predictions: Iterable[Prediction], total: int, todo: int) -> Iterator[Prediction]:
    """Show on standard error, where that is a terminal, how many of the videos are done and what is left."""
    console = Console(stderr=True)
    columns = (
        "predicting",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        "left",
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=total, completed=total - todo)
        for prediction in predictions:
            progress.advance(task)
            yield prediction


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


def _show(predictions: Sequence[Prediction], *, title: str, per_clip: bool) -> None:
    rows = [row for prediction in predictions for row in _rows(prediction, per_clip=per_clip)]
    if rows:
        print_table(title, ("video", "seconds", "class", "score"), rows)


def _rows(prediction: Prediction, *, per_clip: bool) -> list[tuple[str, str, str, str]]:
    """Table rows of one video; its name and each span are said once."""
    if prediction.error:
        return [(prediction.path, "", f"error: {prediction.error}", "")]
    found: list[tuple[str, Any, Any]] = [("all", prediction.classes, prediction.scores)]
    found += [(_span(s.start, s.end), (s.class_name,), (s.score,)) for s in prediction.segments]
    if per_clip:
        found += [(_span(c.start, c.end), c.classes, c.scores) for c in prediction.clips]
    rows = [
        (span if rank == 0 else "", class_name, f"{score:.4f}")
        for span, classes, scores in found
        for rank, (class_name, score) in enumerate(zip(classes, scores, strict=True))
    ]
    return [(prediction.path if index == 0 else "", *row) for index, row in enumerate(rows)]


def _span(start: float, end: float) -> str:
    return f"{start:.2f} - {end:.2f}"


def _print(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # whoever read the predictions has had enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
