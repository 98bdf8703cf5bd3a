"""mvit-predict: the classes of video files."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mvit_video.cli import app
from mvit_video.data.files import VIDEO_EXTENSIONS
from mvit_video.errors import ConfigError, DataError, VideoError
from mvit_video.io.console import print_table
from mvit_video.model import VideoModel
from mvit_video.model.inference import prepare
from mvit_video.prediction.answers import COLUMNS, Answers, as_text, format_of
from mvit_video.prediction.at_scale import Predict, predict_with_ray
from mvit_video.prediction.explain import Method, write_overlay_video, write_strip
from mvit_video.prediction.inputs import STDIN, expand
from mvit_video.prediction.prediction import ClipPrediction, Prediction, best_classes, printable
from mvit_video.prediction.recognizer import Recognizer
from mvit_video.prediction.render import annotate_video, plot_timeline
from mvit_video.prediction.stream import public_name
from mvit_video.prediction.timeline import write_srt, write_vtt
from mvit_video.weights.export import SUFFIXES, ExportedModel, load_exported

log = logging.getLogger(__name__)

MAX_TABLE = 100  # videos; the others are in the output

# Options of Hydra's that take their value as the next argument.
_HYDRA_VALUE_OPTIONS = {
    "--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn",
    "--config-dir", "-cd", "--experimental-rerun", "--info", "-i",
}  # fmt: skip


def main() -> None:
    files, sys.argv[1:] = split_arguments(sys.argv[1:])
    app.run(lambda config: predict_files(config, files), "predict")


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separate files and folders from Hydra's arguments: what exists on disk or has no "=" is a file."""
    files, others = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("-") and argument != STDIN and not argument.lower().endswith(VIDEO_EXTENSIONS):
            others.append(argument)
            if argument in _HYDRA_VALUE_OPTIONS:
                others.extend(value for value in [next(rest, None)] if value is not None)
        elif "=" not in argument or "://" in argument.partition("=")[0] or Path(argument).exists():
            files.append(argument)
        else:
            others.append(argument)
    return files, others


def predict_files(config: DictConfig, files: list[str]) -> None:
    """Classify the files given as arguments and in ``config.videos``: a table, or a file."""
    _check(config)
    arguments = files + list(config.videos)
    if not arguments:
        raise ConfigError("no videos given; type their files or folders after the command")
    recognizer, weights = build_recognizer(config)
    if config.live:
        watch(config, recognizer, arguments)
        return
    if STDIN in arguments and config.window and "video" in config.save:
        raise ConfigError("save=[video] reads a video twice, which a pipe doesn't allow")
    videos = [STDIN] if arguments == [STDIN] and config.window else expand(arguments)
    log.info("%d video%s; %s", len(videos), "s"[: len(videos) != 1], recognizer.protocol)
    settings = {"weights": weights, "protocol": str(recognizer.protocol)}
    settings |= {key: config[key] for key in ("topk", "window", "stride", "smoothing", "min_score")}
    answers: Answers | None = None
    todo = videos
    if config.output:
        answers = Answers(
            config.output,
            format=format_of(config.output, config.format),
            settings=settings,
            per_clip=config.per_clip,
            resume=config.resume,
        )
        todo = [video for video in videos if printable(video) not in answers.finished]
        if len(todo) < len(videos):
            log.info("%d of them are in %s already", len(videos) - len(todo), config.output)
    to_stdout = answers is None and config.format in ("jsonl", "csv")
    if to_stdout and config.format == "csv":
        _say(",".join(COLUMNS) + "\n")
    names = output_names(videos)
    if config.engine == "ray":
        found = predict_with_ray(
            todo,
            partial(_predictor, OmegaConf.to_yaml(config), names),
            actors=config.actors,
            cpus=max(config.num_workers, 1),
            gpus=float(str(recognizer.device).startswith("cuda")),
            address=config.ray_address,
        )
    else:
        found = _predictions(config, recognizer, todo, names)
    shown: list[Prediction] = []
    errors = 0
    with answers or nullcontext():
        for prediction in _tracked(found, len(videos), len(videos) - len(todo)):
            errors += prediction.error is not None
            prediction = replace(prediction, path=printable(prediction.path))
            if answers is not None:
                answers.add(prediction)
            if to_stdout:
                _say(as_text(prediction, config.format, per_clip=config.per_clip))
            elif len(shown) < MAX_TABLE or answers is None:
                shown.append(prediction)
    _show(shown, random=weights == "random", per_clip=config.per_clip)
    if answers is not None:
        more = f"; the table shows the first {MAX_TABLE}" if len(todo) > MAX_TABLE else ""
        log.info("%d predictions, %d errors: %s%s", len(todo), errors, config.output, more)
    if todo and errors == len(todo) == len(videos):
        raise DataError("no video could be read")


def watch(config: DictConfig, recognizer: Recognizer, sources: list[str]) -> None:
    """Say what happens in each window of a live source as soon as it was seen, a line each."""
    if len(sources) != 1 or not config.window:
        raise ConfigError("live=true watches one stream, camera, file or pipe (-), and needs window=SECONDS")
    lines = "jsonl" if config.output else config.format
    with Path(config.output).open("a", encoding="utf-8") if config.output else nullcontext() as out:
        for clip in recognizer.watch(
            sources[0],
            length=config.window,
            stride=config.stride or config.window / 2,
            follow=config.follow,
            drop=sources[0].startswith(("rtsp://", "rtsps://", "/dev/video")),
        ):
            if lines == "jsonl":
                text = json.dumps({"path": public_name(sources[0]), **asdict(clip)})
            else:
                best = ", ".join(f"{n} {s:.3f}" for n, s in zip(clip.classes, clip.scores, strict=True))
                text = f"{_span(clip.start, clip.end)}  {best}"
            if out is None:
                _say(text + "\n")
            else:
                print(text, file=out, flush=True)


def _say(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # whoever read the answers has had enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def output_names(videos: list[str]) -> dict[str, Path]:
    """For each video a path without suffix, below one folder and all of them different."""
    parents = [str(Path(video).resolve().parent) for video in videos]
    common = os.path.commonpath(parents) if parents else ""
    names = {v: Path(p).relative_to(common) / Path(v).stem for v, p in zip(videos, parents, strict=True)}
    counts = Counter(names.values())
    # a.mp4 and a.webm side by side keep their suffixes
    return {v: n if counts[n] == 1 else n.with_name(Path(v).name) for v, n in names.items()}


def _check(config: DictConfig) -> None:
    if config.topk < 1:
        raise ConfigError(f"topk must be at least 1, got {config.topk}")
    app.check_loading(config)
    if config.engine not in ("local", "ray"):
        raise ConfigError(f"engine={config.engine} is not possible; it takes local or ray")
    if config.actors < 1:
        raise ConfigError(f"actors must be at least 1, got {config.actors}")
    known = ("png", "srt", "vtt", "video")
    for kind in config.save:
        if kind not in known:
            raise ConfigError(f"save={kind} is not possible; it takes {', '.join(known)}")
    if config.explain and (config.explain not in get_args(Method) or config.window):
        raise ConfigError(f"explain takes {' or '.join(get_args(Method))}, and no window=")
    if config.save and not config.window:
        raise ConfigError("save= needs window=SECONDS, the length of the windows of a timeline")


def _predictor(settings: str, names: dict[str, Path]) -> Predict:
    """What an actor predicts with, from the configuration as YAML."""
    config = OmegaConf.create(settings)
    assert isinstance(config, DictConfig)
    recognizer, _ = build_recognizer(config)
    return lambda videos: _predictions(config, recognizer, list(videos), names)


def _predictions(
    config: DictConfig, recognizer: Recognizer, videos: list[str], names: dict[str, Path]
) -> Iterator[Prediction]:
    if not config.window:
        for prediction in recognizer.iterate(videos):
            if config.explain and prediction.error is None:
                name = Path(config.save_dir) / names[prediction.path]
                explanation = recognizer.explain(prediction.path, method=config.explain)
                name.parent.mkdir(parents=True, exist_ok=True)
                write_strip(explanation, name.with_name(f"{name.name}.{config.explain}.png"))
                write_overlay_video(explanation, name.with_name(f"{name.name}.{config.explain}.mp4"))
            yield prediction
        return
    for video in videos:
        yield _through_windows(config, recognizer, video, Path(config.save_dir) / names[video])


def _through_windows(config: DictConfig, recognizer: Recognizer, video: str, name: Path) -> Prediction:
    """The prediction with segments for a long video; writes what ``config.save`` asks for."""
    stride = config.stride or config.window / 2
    try:
        timeline = recognizer.timeline(video, length=config.window, stride=stride)
    except VideoError as error:
        return Prediction(video, error=error.reason)
    timeline = timeline.smoothed(config.smoothing)
    segments = timeline.segments(config.min_score)
    if config.save:
        name.parent.mkdir(parents=True, exist_ok=True)

    def target(suffix: str) -> Path:
        return name.with_name(name.name + suffix)

    if "srt" in config.save:
        write_srt(segments, target(".srt"))
    if "vtt" in config.save:
        write_vtt(segments, target(".vtt"))
    if "png" in config.save:
        plot_timeline(timeline, segments, target(".timeline.png"))
    if "video" in config.save:
        try:
            annotate_video(video, segments, target(".annotated.mp4"))
        except VideoError as error:  # the answer is there all the same
            log.warning("%s", error)
    clips = tuple(
        ClipPrediction(start, end, *best_classes(scores, recognizer.class_names, config.topk))
        for scores, (start, end) in zip(timeline.scores, timeline.spans, strict=True)
    )
    best = best_classes(timeline.scores.mean(0), recognizer.class_names, config.topk)
    return Prediction(video, *best, clips=clips, segments=segments)


def build_recognizer(config: DictConfig) -> tuple[Recognizer, str]:
    """The model that the configuration describes, ready to be asked, and the name of its weights."""
    device = app.choose_device(config.device)
    model = _build_model(config, device)
    weights = config.weights or OmegaConf.select(config, "model.weights") or "random"
    if weights == "random":
        log.warning("the model has random weights: its answers mean nothing")
    recognizer = Recognizer(
        model,
        topk=config.topk,
        num_clips=1 if config.window and config.views.num_clips is None else None,
        batch_size=1 if config.live else config.batch_size,
        num_workers=config.num_workers,
        device=device,
        open_file=app.build_decoder(config),
    )
    return recognizer, str(weights)


def _build_model(config: DictConfig, device: str) -> VideoModel | ExportedModel:
    if not str(config.weights).endswith(SUFFIXES):
        precision = "fp32" if config.explain else config.precision  # gradients want the digits
        return prepare(app.build_model(config), device, precision=precision, compiled=config.compile)
    if "model" in config:
        raise ConfigError(f"{config.weights} is a whole model: it takes no model=")
    model = load_exported(config.weights, device)
    model.protocol = app.override_protocol(model.protocol, config.views)
    return model


def _tracked(predictions: Iterable[Prediction], total: int, done: int) -> Iterator[Prediction]:
    """Show on standard error, where that is a terminal, how many of the videos are done and what is left."""
    console = Console(stderr=True)
    columns = (
        TextColumn("predicting"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=total, completed=done)
        for prediction in predictions:
            progress.advance(task)
            yield prediction


def _show(predictions: list[Prediction], *, random: bool, per_clip: bool) -> None:
    if predictions:
        print_table(
            "random weights" if random else "",
            ("video", "seconds", "class", "score"),
            [row for prediction in predictions for row in _rows(prediction, per_clip=per_clip)],
        )


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
