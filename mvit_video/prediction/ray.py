"""The same predictions by Ray Data, on all machines of a cluster."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from mvit_video.errors import ConfigError, brief, import_extra
from mvit_video.prediction.prediction import Prediction

_FILES_PER_TASK = 32  # enough to fill batches, few enough to be done again after a crash

Predict: TypeAlias = Callable[[Sequence[str]], Iterable[Prediction]]


def predict_with_ray(
    files: Sequence[str],
    make: Callable[[], Predict],
    *,
    actors: int,
    cpus: int,
    gpus: float,
    address: str | None = None,
) -> Iterator[Prediction]:
    """Predictions for video files, in order, made by actors; those of an actor that dies are made anew.

    All machines must see the files and the weights under the same paths.

    Args:
        make: called once by each actor, gives what predicts.
        actors: how many work, each with its own model.
        cpus, gpus: what each of them takes.
        address: of a running cluster; None: one on this machine, for this run.

    Raises:
        ConfigError: Ray isn't installed, the cluster isn't there, or it is too small for one actor.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports its use to its makers otherwise
    import_extra("ray.data", "ray", "engine=ray")
    import ray.data
    import ray.exceptions

    started = not ray.is_initialized()
    try:
        if started:
            quiet: dict[str, Any] = {"log_to_driver": False, "include_dashboard": False}
            ray.init(address=address, logging_level=logging.ERROR, **quiet)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise ConfigError(f"there is no Ray cluster at {address}: {brief(error)}") from None
    try:
        available: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        for kind, wanted in (("CPU", cpus), ("GPU", gpus)):
            if wanted > available.get(kind, 0):
                raise ConfigError(f"an actor takes {wanted:g} {kind}s, Ray has {available.get(kind, 0):g}")
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        paths = ray.data.from_items([{"path": file} for file in files])
        predictions = paths.repartition(max(1, -(-len(files) // _FILES_PER_TASK))).map_batches(
            _Actor,
            fn_constructor_args=(make, torch.get_num_threads()),
            batch_size=_FILES_PER_TASK,
            concurrency=(1, actors),
            num_cpus=cpus,
            num_gpus=gpus,
        )
        for row in predictions.iter_rows():
            yield pickle.loads(row["prediction"])  # made by our own actors
    finally:
        if started:
            ray.shutdown()


class _Actor:
    def __init__(self, make: Callable[[], Predict], num_threads: int) -> None:
        torch.set_num_threads(num_threads)  # Ray sets OMP_NUM_THREADS to the CPUs of an actor
        self._predict = make()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        predictions = self._predict([str(path) for path in batch["path"]])
        return {"prediction": np.array([pickle.dumps(p) for p in predictions], dtype=object)}
