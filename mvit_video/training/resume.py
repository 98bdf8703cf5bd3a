"""A run that was stopped, killed at any time even, goes on with the very batch that was due.

What a step does depends on the weights, on the batch (a state of the loader) and on random numbers, whose
generators are seeded anew for every step, so that nothing about them needs to be kept. What else a run is
made of, its fingerprint, is kept in its checkpoints: a run goes on as the same run or not at all.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mvit_video.data.decode.images import image_files, is_images
from mvit_video.data.index import LabelledVideo
from mvit_video.data.loader import ClipLoader
from mvit_video.errors import CheckpointError, ConfigError, VideoError
from mvit_video.io.fingerprint import Fingerprint, differences, file_stamp, fingerprint, require_same
from mvit_video.training.checkpoints import CHECKPOINTS, LAST, PREVIOUS
from mvit_video.weights import METADATA_KEY

log = logging.getLogger(__name__)

FINGERPRINT_KEY = "run_fingerprint"  # of a checkpoint
_FREE = ("settings", "file_times")  # parts of a fingerprint that may change when a run goes on


def videos_sha256(videos: Iterable[LabelledVideo]) -> str:
    """Of the names and labels of videos, in their order."""
    return _sha256("".join(f"{video.id}\0{video.label}\n" for video in videos))


def model_identity(config: Any) -> dict[str, Any]:
    """The fields of a model's configuration that change what it computes."""
    return {key: value for key, value in asdict(config).items() if key != "checkpoint_blocks"}


def files_identity(**splits: Iterable[Any]) -> dict[str, dict[str, str]]:
    """The parts of a run's identity that tell files which were replaced under their names.

    Sizes count, and are the same on another disk. Times, which copying may change, are told. Of a sequence of
    pictures the first and the last are looked at.

    Args:
        splits: what has a ``path``, in an order that doesn't depend on where it lies.
    """
    sizes, times = {}, {}
    for split, samples in splits.items():
        paths = dict.fromkeys(sample.path for sample in samples)
        stamps = [file_stamp(file) for path in paths for file in _first_and_last(path)]
        sizes[f"{split}_sizes"] = _sha256(" ".join(str(stamp.get("size")) for stamp in stamps))
        times[f"{split}_file_times"] = _sha256(" ".join(str(stamp.get("mtime_ns")) for stamp in stamps))
    return {"files": sizes, "file_times": times}


def _first_and_last(path: str) -> tuple[str, ...]:
    try:
        files = image_files(path) if is_images(path) else [path]
    except VideoError:
        files = [path]
    return (files[0], files[-1]) if len(files) > 1 else (files[0],)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def resume(
    path: Path, now: Fingerprint, loader: ClipLoader[Any], max_epochs: int | None, max_steps: int = -1
) -> None:
    """Check that a checkpoint is of the same run, and make the loader go on where it was saved.

    (Lightning would restore the loader itself, had it not set it up before, to count the schedule's steps.)

    Raises ConfigError, which names what differs.
    """
    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    before = checkpoint.get(FINGERPRINT_KEY)
    if before is None:
        log.warning(
            "%s is of an older version and doesn't say which settings it comes from; they must be those of "
            "now. Of the epoch that goes on, the training loss and top-1 are those of the rest",
            path,
        )
        before = _described(checkpoint, now)
        now = {part: {key: now[part][key] for key in values} for part, values in before.items()}
    now = {part: value for part, value in now.items() if part in before}  # older versions noted fewer
    free: dict[str, str] = {}
    for part in _FREE:
        free |= differences(before.pop(part, {}), now.pop(part, {}))
    remedy = f"give those of before, or start a new run with weights={path}"
    require_same(before, now, what=str(path), remedy=remedy)
    fit_loop = checkpoint["loops"]["fit_loop"]
    done = fit_loop["epoch_progress"]["current"]["processed"]
    for unit, most, made in (("epochs", max_epochs, done), ("steps", max_steps, checkpoint["global_step"])):
        if most is not None and 0 <= most < made:
            raise ConfigError(f"trainer.max_{unit}={most}, but {path} has {made} {unit} behind it")
    if free:
        log.info("resuming with other settings: %s", "; ".join(f"{key} {text}" for key, text in free.items()))
    if not fit_loop["epoch_loop.batch_progress"]["is_last_batch"]:  # else the next epoch is due
        for state in fit_loop["state_dict"].get("combined_loader", []):
            loader.load_state_dict(state)


def _described(checkpoint: Mapping[str, Any], now: Fingerprint) -> Fingerprint:
    """The part of a fingerprint that a checkpoint without one describes."""
    metadata = checkpoint.get(METADATA_KEY, {})
    model = {key: value for key, value in metadata.get("config", {}).items() if key in now["model"]}
    return {
        "model": fingerprint(**model),
        "data": {"classes": metadata.get("class_names")},
    }


def find_checkpoint(ckpt_path: str | None, output: Path, *, own_only: bool) -> Path | None:
    """The checkpoint that ``ckpt_path`` means for a run in the folder ``output``; None: start at the front.

    "last" is what this run has left in its folder; where there is nothing, what the newest run beside it has
    left or, if ``own_only``, nothing. A damaged last checkpoint is reported, and the previous one taken.

    Raises CheckpointError for a file that isn't there, is damaged or holds weights alone, ConfigError where
    there is nothing to resume.
    """
    if ckpt_path is None:
        return None
    if ckpt_path != "last":
        found = [Path(ckpt_path)]
    else:
        found = _left_in(output)
        if not found and own_only:
            log.info("nothing to resume in %s yet: starting at the front", output)
            return None
        runs = output.parents[1]
        others = filter(None, map(_left_in, runs.glob("*/*")))
        found = found or max(others, key=lambda files: files[0].stat().st_mtime, default=[])
        if not found:
            raise ConfigError(f"ckpt_path=last: no run below {runs} has left a checkpoint")
    problems: list[str] = []
    for path in found:
        problem = _problem(path)
        if problem is None:
            for former in problems:
                log.warning("%s", former)
            log.info("resuming from %s", path)
            return path
        problems.append(f"{path}: {problem}")
    raise CheckpointError("; ".join(problems))


def _left_in(run: Path) -> list[Path]:
    return [file for name in (LAST, PREVIOUS) if (file := run / CHECKPOINTS / name).is_file()]


def _problem(path: Path) -> str | None:
    """Why nothing can be resumed from a checkpoint; None if it can."""
    if path.is_dir():
        return "a folder; ckpt_path takes a file, such as checkpoints/last.ckpt of a run, or 'last'"
    if not path.is_file():
        return "no such file; ckpt_path takes a checkpoint or 'last'"
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # by the checksums of what it holds
                return "the checkpoint is damaged"
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # whatever reading it raises
        return "the checkpoint is cut off or damaged"
    if not isinstance(checkpoint, dict) or not {"loops", "optimizer_states"} <= checkpoint.keys():
        return "no checkpoint of a run but weights alone; weights=FILE starts from them"
    return None
