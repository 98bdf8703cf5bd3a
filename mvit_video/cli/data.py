"""mvit-data: prepare a data set's index, or check it against the disk."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mvit_video.cli import app
from mvit_video.data.index import VideoSplits
from mvit_video.data.prepare import KINDS, Problem, compare, find_problems, prepare, summary
from mvit_video.data.table import INDEX_NAME, index_file, read_table
from mvit_video.errors import ConfigError, DataError
from mvit_video.io.console import print_table, printable, write_csv
from mvit_video.io.figures import new_figure
from mvit_video.io.writing import write_json

_SHOWN = 10  # paths of a kind


def prepare_index(config: DictConfig) -> None:
    """Probe every video of ``config.data``, write its index; the report goes to the output folder."""
    if "path" in config.data:
        raise ConfigError("data=index is what prepare makes; give the data set itself: data=folder, ...")
    file, folder = _index_path(config), Path(HydraConfig.get().runtime.output_dir)
    # Everything may be missing: to say so is the point.
    all_missing = {"max_missing": 1.0} if "max_missing" in config.data else {}
    splits: VideoSplits = app.build(config.data, **all_missing)
    root = OmegaConf.select(config, "data.root")
    table = prepare(
        splits,
        file,
        root=None if root is None else Path(root).expanduser(),
        num_workers=os.cpu_count() or 1 if config.num_workers is None else config.num_workers,
        frame_rate=config.frame_rate,
        index_cache=config.index_cache,
    )
    problems = find_problems(table)
    found = summary(table, problems)
    write_json(folder / "summary.json", found)
    write_csv(folder / "problems.csv", Problem._fields, problems)
    seconds = [entry.info.duration for entry in table.entries if entry.info.error is None]
    if seconds:
        _plot_durations(seconds, folder / "durations.png")
    _print_summary(found)
    for kind in KINDS:
        _print_some(kind, [f"{p.path}: {p.detail}" for p in problems if p.kind == kind])
    name = printable(file)
    print(f"index: {name}\nreport: {printable(folder)}\nuse it: mvit-train data=index data.path={name}")


def check_index(config: DictConfig) -> None:
    """Compare an index with the disk; DataError where they differ."""
    if str(config.data.get("_target_")).startswith("mvit_video.detection."):
        importlib.import_module("mvit_video.cli.tasks.detection").check_data(config)
        return
    file = index_file(_index_path(config))
    changes = compare(read_table(file))._asdict()
    for kind, paths in changes.items():
        _print_some(kind, paths)
    rows = [(kind, path) for kind, paths in changes.items() for path in paths]
    write_csv(Path(HydraConfig.get().runtime.output_dir) / "changes.csv", ("kind", "path"), rows)
    counts = ", ".join(f"{len(paths)} {kind}" for kind, paths in changes.items())
    if rows:
        raise DataError(f"{file} differs from the disk: {counts}; mvit-data prepare brings it up to date")
    print(f"{file} agrees with the disk: {counts}")


def _index_path(config: DictConfig) -> Path:
    """The index file that is named, or that in the folder of the data set."""
    place = config.index
    for key in ("path", "root"):
        if place is None and key in list(config.data):  # a value that isn't set raises
            place = config.data[key]
    place = Path(config.data.train).parent if place is None else Path(place)
    place = place.expanduser()
    is_folder = place.is_dir() or (config.index is None and "path" not in config.data)
    return place / INDEX_NAME if is_folder else place


def _print_summary(found: dict[str, Any]) -> None:
    rows = [(split, *counts.values()) for split, counts in found["splits"].items()]
    title = f"{len(found['classes'])} classes, {found['videos']} videos"
    print_table(title, ("split", "videos", "hours", *KINDS), rows)
    if seconds := found["seconds"]:
        codecs = ", ".join(f"{codec} {count}" for codec, count in found["codecs"].items())
        lengths = "{shortest:.1f} to {longest:.1f} s, median {median:.1f} s".format(**seconds)
        print(f"{lengths}; codecs: {printable(codecs)}")
    empty = [name for name, counts in found["classes"].items() if not counts.get("train")]
    _print_some("without training videos", empty)
    if found["unlisted_files"]:
        print(f"{found['unlisted_files']} files on disk aren't in the data set")


def _print_some(what: str, lines: list[str]) -> None:
    if lines:
        more = f"\n  ... and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        print(f"{what} ({len(lines)}):\n  " + "\n  ".join(map(printable, lines[:_SHOWN])) + more)


def _plot_durations(seconds: Sequence[float], path: Path) -> None:
    """Histogram of the durations of videos; the longest hundredth shares the last bar."""
    ordered = sorted(seconds)
    longest = ordered[int(0.99 * (len(ordered) - 1))]
    with new_figure(path, (8, 4), 120) as figure:
        axes = figure.subplots()
        axes.hist([min(value, longest) for value in ordered], bins=50)
        title = f"{len(ordered)} videos, the longest {ordered[-1]:.1f} s"
        axes.set(xlabel="seconds", ylabel="videos", title=title)
        axes.grid(alpha=0.3)
