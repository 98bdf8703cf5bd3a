"""mvit-export: a model as one file that runs without this package."""

from __future__ import annotations

import importlib
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from mvit_video.cli import app
from mvit_video.errors import ConfigError, refusing
from mvit_video.io.console import print_table
from mvit_video.io.writing import replacing
from mvit_video.model import MViT
from mvit_video.weights import hub
from mvit_video.weights.export import ExportedModel, export_model, load_exported, require_exported_suffix
from mvit_video.weights.model_card import push_to_hub

log = logging.getLogger(__name__)


def export_and_check(config: DictConfig) -> None:
    """Write ``config.output``, compare it with the model that it was made of, and time both."""
    if (task := app.task_of(config)) != "classification":
        importlib.import_module(f"mvit_video.cli.tasks.{task}").export(config)
        return
    path, to_hub = Path(config.output), config.output.startswith(hub.PREFIX)
    if not to_hub:
        require_exported_suffix(path)
    model = app.build_model(config)
    if not isinstance(model, MViT):
        raise ConfigError(f"only MViT models can be exported, not {type(model).__name__}")
    if to_hub:
        results = _read_results(config.results)
        address = push_to_hub(model, config.output, results=results, licence=config.licence)
        log.info("%s (private until you publish it there)", address)
        return
    with replacing(path) as file:  # a wrong file is never taken for a good one
        export_model(model, file.name, compiled=config.compiled)
        exported = load_exported(file.name, trust=True)  # just written
        rows = [_compare(model, exported, batch, config.runs) for batch in (1, config.batch_size)]
        worst = max(difference for _, _, _, difference in rows)
        if not worst <= config.tolerance:
            raise ConfigError(
                f"{path}: its logits differ by {worst:.2g}, more than tolerance={config.tolerance}"
            )
    log.info("%s: %.1f MB; %s", path, path.stat().st_size / 1e6, model.protocol)
    print_table(
        "",
        ("clips", "PyTorch, ms", f"{path.name}, ms", "largest difference of logits"),
        [(batch, f"{ours:.1f}", f"{theirs:.1f}", f"{diff:.1e}") for batch, ours, theirs, diff in rows],
    )


def _read_results(path: str | None) -> dict[str, Any] | None:
    """The results.json of an evaluation."""
    if path is None:
        return None
    with refusing(ConfigError, f"results={path}: not a results.json of mvit-eval"):
        results: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(results["video_top1"], float):
            raise ValueError("no video_top1")
        return results


@torch.inference_mode()
def _compare(model: MViT, exported: ExportedModel, batch: int, runs: int) -> tuple[int, float, float, float]:
    """Median milliseconds of both, taken in turn after a first run, and their largest difference."""
    clips = torch.randn(batch, 3, *model.config.input_size, generator=torch.Generator().manual_seed(batch))
    difference = (model(clips) - exported(clips)).abs().max().item()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for run, times in zip((model, exported), seconds, strict=True):
            start = time.perf_counter()
            run(clips)
            times.append(time.perf_counter() - start)
    ours, theirs = (1000 * statistics.median(times) for times in seconds)
    return batch, ours, theirs, difference
