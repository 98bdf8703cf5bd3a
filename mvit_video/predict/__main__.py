"""mvit-predict: the classes of video files."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

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

from mvit_video import cli
from mvit_video.errors import ConfigError, DataError
from mvit_video.predict.answers import COLUMNS, Answers, as_text, format_of
from mvit_video.predict.inputs import STDIN, expand
from mvit_video.predict.prediction import Prediction
from mvit_video.predict.recognizer import Recognizer
from mvit_video.report import print_table

log = logging.getLogger(__name__)

MAX_TABLE = 100  # videos; the others are in the output

# Options of Hydra's that take their value as the next argument.
_HYDRA_VALUE_OPTIONS = {
    "--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn",
    "--config-dir", "-cd", "--experimental-rerun", "--info", "-i",
}  # fmt: skip


def main() -> None:
    files, sys.argv[1:] = split_arguments(sys.argv[1:])
    cli.run(lambda config: predict_files(config, files), "predict")


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separate files and folders from Hydra's arguments: what exists on disk or has no "=" is a file."""
    files, others = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("-") and argument != STDIN:
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
    if config.topk < 1:
        raise ConfigError(f"topk must be at least 1, got {config.topk}")
    cli.check_loading(config)
    arguments = files + list(config.videos)
    if not arguments:
        raise ConfigError("no videos given; type their files or folders after the command")
    recognizer, weights = build_recognizer(config)
    videos = expand(arguments)
    log.info("%d videos; %s", len(videos), recognizer.protocol)
    settings = {"weights": weights, "protocol": str(recognizer.protocol), "topk": config.topk}
    answers: Answers | None = None
    if config.output:
        format = format_of(config.output, config.format)
        answers = Answers(
            config.output, format=format, settings=settings, per_clip=config.per_clip, resume=config.resume
        )
        todo = [video for video in videos if video not in answers.finished]
        if len(todo) < len(videos):
            log.info("%d of them are in %s already", len(videos) - len(todo), config.output)
    else:
        todo = videos
    to_stdout = answers is None and config.format in ("jsonl", "csv")
    if to_stdout and config.format == "csv":
        print(",".join(COLUMNS))
    shown: list[Prediction] = []
    errors = 0
    with answers or nullcontext():
        for prediction in _tracked(recognizer.iterate(todo), len(videos), len(videos) - len(todo)):
            errors += prediction.error is not None
            if answers is not None:
                answers.add(prediction)
            if to_stdout:
                print(as_text(prediction, config.format, per_clip=config.per_clip), end="", flush=True)
            elif len(shown) < MAX_TABLE or answers is None:
                shown.append(prediction)
    _show(shown, random=weights == "random", per_clip=config.per_clip)
    if answers is not None:
        more = f"; the table shows the first {MAX_TABLE}" if len(todo) > MAX_TABLE else ""
        log.info("%d predictions, %d errors: %s%s", len(todo), errors, config.output, more)
    if todo and errors == len(todo) == len(videos):
        raise DataError("no video could be read")


def build_recognizer(config: DictConfig) -> tuple[Recognizer, str]:
    """The model that the configuration describes, ready to be asked, and the name of its weights."""
    device = cli.choose_device(config.device)
    model = cli.build_model(config)
    weights = config.weights or OmegaConf.select(config, "model.weights") or "random"
    if weights == "random":
        log.warning("the model has random weights: its answers mean nothing")
    recognizer = Recognizer(
        model,
        topk=config.topk,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        device=device,
        open_file=cli.build_decoder(config),
    )
    return recognizer, str(weights)


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


if __name__ == "__main__":
    main()
