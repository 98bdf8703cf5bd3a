"""mvit-predict: the classes of video files."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from mvit_video import cli
from mvit_video.data.index import find_videos
from mvit_video.errors import ConfigError, DataError
from mvit_video.model import VideoModel
from mvit_video.predict import Prediction, iter_predictions
from mvit_video.report import print_table

log = logging.getLogger(__name__)

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
        if argument.startswith("-"):
            others.append(argument)
            if argument in _HYDRA_VALUE_OPTIONS:
                others.extend(value for value in [next(rest, None)] if value is not None)
        elif "=" not in argument or Path(argument).exists():
            files.append(argument)
        else:
            others.append(argument)
    return files, others


def predict_files(config: DictConfig, files: list[str]) -> None:
    """Classify the files given as arguments and in ``config.videos``; print a table, write the json file."""
    if config.topk < 1:
        raise ConfigError(f"topk must be at least 1, got {config.topk}")
    cli.check_loading(config)
    paths = files + list(config.videos)
    if not paths:
        raise ConfigError("no videos given; type their files or folders after the command")
    device = cli.choose_device(config.device)
    model = cli.build_model(config)
    weights = config.weights or OmegaConf.select(config, "model.weights") or "random"
    if weights == "random":
        log.warning("the model has random weights: its answers mean nothing")
    videos = find_videos(paths)
    log.info("%d videos; %s", len(videos), model.protocol)
    found = iter_predictions(
        videos,
        model,
        topk=config.topk,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        device=device,
        open_file=cli.build_decoder(config),
    )
    predictions = list(track(found, "predicting", total=len(videos)))
    if config.output:
        _write_json(predictions, model, weights, Path(config.output))
    print_table(
        "random weights" if weights == "random" else "",
        ("video", "seconds", "class", "score"),
        [row for prediction in predictions for row in _rows(prediction, per_clip=config.per_clip)],
    )
    if all(prediction.error for prediction in predictions):
        raise DataError("no video could be read")


def _rows(prediction: Prediction, *, per_clip: bool) -> list[tuple[str, str, str, str]]:
    """Table rows of one video; its name and each span are said once."""
    if prediction.error:
        return [(prediction.path, "", f"error: {prediction.error}", "")]
    found = [("all", prediction.classes, prediction.scores)]
    if per_clip:
        found += [(f"{c.start:.2f} - {c.end:.2f}", c.classes, c.scores) for c in prediction.clips]
    rows = [
        (span if rank == 0 else "", class_name, f"{score:.4f}")
        for span, classes, scores in found
        for rank, (class_name, score) in enumerate(zip(classes, scores, strict=True))
    ]
    return [(prediction.path if index == 0 else "", *row) for index, row in enumerate(rows)]


def _write_json(predictions: list[Prediction], model: VideoModel, weights: str, path: Path) -> None:
    answer: dict[str, Any] = {
        "weights": weights,
        "protocol": str(model.protocol),
        "videos": [asdict(prediction) for prediction in predictions],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(answer, indent=2))
    log.info("predictions: %s", path)


if __name__ == "__main__":
    main()
