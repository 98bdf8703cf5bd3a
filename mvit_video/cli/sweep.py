"""What the jobs of ``--multirun`` come to: each leaves its result, a table is made of them."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from mvit_video.cli.messages import is_users, one_line
from mvit_video.data.ranks import rank_and_size
from mvit_video.io.console import print_table, printable, write_csv
from mvit_video.io.writing import write_json

log = logging.getLogger(__name__)

_RESULT = "job.json"  # in the folder of a job


def leave_result(command: str, value: Any, error: Exception | None, full_error: bool) -> None:
    """Say what one of several jobs came to, for the table at their end."""
    number, problem = HydraConfig.get().job.num, None
    if error is not None:
        problem = one_line(error) if is_users(error) else f"{type(error).__name__}: {one_line(error)}"
        if full_error or not is_users(error):
            log.error("a job failed", exc_info=error)
        sys.stderr.write(f"mvit-{command}: error in job {number}: {printable(problem)}\n")
    if rank_and_size()[0] == 0:
        row = {
            "job": number,
            "overrides": list(HydraConfig.get().overrides.task),
            "metric": float(value) if isinstance(value, int | float) and math.isfinite(value) else None,
            "error": problem,
        }
        write_json(Path(HydraConfig.get().runtime.output_dir) / _RESULT, row)


class SweepTable(Callback):
    """Shows and saves what the jobs of ``--multirun`` came to, the best first; status 1 if one failed."""

    def __init__(self) -> None:
        self._before: dict[Path, int] = {}  # results that another sweep has left in the same folder

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        found = Path(config.hydra.sweep.dir).glob(f"**/{_RESULT}")
        self._before = {file: file.stat().st_mtime_ns for file in found}

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        files = [f for f in folder.glob(f"**/{_RESULT}") if f.stat().st_mtime_ns != self._before.get(f)]
        results = [json.loads(file.read_text()) for file in files]
        if not results:
            return
        sign = 1 if str(config.get("monitor")).endswith("loss") else -1  # the best come first
        results.sort(key=lambda r: (r["metric"] is None, sign * (r["metric"] or 0), r["job"]))
        common = set.intersection(*(set(r["overrides"]) for r in results)) if len(results) > 1 else set()
        rows = []
        for result in results:
            own = " ".join(override for override in result["overrides"] if override not in common)
            metric = "" if result["metric"] is None else result["metric"]
            rows.append((result["job"], own, metric, result["error"] or ""))
        columns = ("job", "overrides", "metric", "error")
        write_csv(folder / "jobs.csv", columns, rows)
        print_table(f"{folder / 'jobs.csv'}:", columns, rows)
        if any(result["error"] for result in results):
            sys.exit(1)
