"""Scores that other tools have written: PySlowFast's pickles, mmaction2's pickles and json files.

A pickle can run code when it is read. This reader builds arrays, tensors and plain containers and nothing
else; whatever else a file asks for is refused by its name.
"""

from __future__ import annotations

import _codecs
import collections
import io
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvit_video.data.index import LabelledVideo
from mvit_video.errors import DataError
from mvit_video.evaluation.tables import ScoreTable

SUFFIXES = (".pkl", ".pickle", ".json")


def read_foreign_scores(path: Path) -> ScoreTable:
    """Read the scores of another tool as a table with one view a video.

    Known forms:
        - PySlowFast's ``TEST.SAVE_RESULTS_PATH``: a pickled pair of scores (N, C), summed over views, and
          labels (N,).
        - mmaction2's ``--dump``: a pickled or json list of ``{"pred_score": (C,), "gt_label": label}``
          (releases before 1.1 say ``{"pred_scores": {"item": ...}, "gt_labels": {"item": ...}}``).
        - the list of scores alone (mmaction's ``--out``, pickled or json), without labels.

    Scores that aren't negative are divided by their sum; others are logits and go through a softmax. Videos
    are called "0", "1", ... in the order of the file.

    Raises:
        DataError: the file has another form, or asks for anything but arrays.
    """
    try:
        content = json.loads(path.read_text()) if path.suffix == ".json" else _read_pickle(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no json ({error})") from None
    try:
        scores, labels = _scores_and_labels(content)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise DataError(
            f"{path}: neither PySlowFast's (scores, labels) nor mmaction2's list of pred_score and gt_label "
            f"({type(error).__name__}: {' '.join(str(error).split())[:100]})"
        ) from None
    bad = ~torch.isfinite(scores).all(1)
    if bad.any():
        raise DataError(f"{path}: row {int(bad.nonzero()[0])} has scores that are no numbers")
    if labels is not None and not all(0 <= label < scores.shape[1] for label in labels):
        raise DataError(f"{path}: labels must be in 0 to {scores.shape[1] - 1}")
    number, classes = scores.shape
    return ScoreTable(
        tuple(LabelledVideo("", None if labels is None else labels[row], str(row)) for row in range(number)),
        _probabilities(scores)[:, None],
        torch.full((number, 1, 2), torch.nan, dtype=torch.float64),
        tuple(map(str, range(classes))),
        {"scores": path.name},
    )


def _scores_and_labels(content: Any) -> tuple[Tensor, list[int] | None]:
    if isinstance(content, list | tuple) and len(content) == 2 and np.ndim(content[0]) == 2:
        scores, labels = (torch.as_tensor(np.asarray(part)) for part in content)
        if labels.shape != scores.shape[:1]:
            raise ValueError(f"{len(scores)} rows of scores, labels of shape {tuple(labels.shape)}")
        return scores.float(), [int(label) for label in labels]
    rows: Sequence[Any] = content if isinstance(content, list | tuple) else list(content)
    if not rows:
        raise ValueError("it is empty")
    if not isinstance(rows[0], dict):
        return _stacked(rows), None
    scores = _stacked([_item(row, "pred_score", "pred_scores") for row in rows])
    if not any("gt_label" in row or "gt_labels" in row for row in rows):
        return scores, None
    return scores, [int(np.ravel(_item(row, "gt_label", "gt_labels"))[0]) for row in rows]


def _item(row: dict[str, Any], name: str, old_name: str) -> Any:
    return row[name] if name in row else row[old_name]["item"]


def _stacked(rows: Sequence[Any]) -> Tensor:
    stacked = torch.stack([torch.as_tensor(np.asarray(row), dtype=torch.float32) for row in rows])
    if stacked.ndim != 2:
        raise ValueError(f"scores of shape {tuple(stacked.shape)}, expected videos x classes")
    return stacked


def _probabilities(scores: Tensor) -> Tensor:
    totals = scores.sum(1, keepdim=True)
    return scores / totals if bool((scores >= 0).all() and (totals > 0).all()) else scores.softmax(1)


# Pickles


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        try:
            return _Arrays(file, str(path)).load()
        except DataError:
            raise
        except Exception as error:  # a damaged pickle can raise anything
            raise DataError(
                f"{path}: no readable pickle ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
            ) from None


def _load_storage(content: bytes) -> Any:
    """What torch puts into pickles in place of a storage; torch's own function would run code in it."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _allowed() -> dict[tuple[str, str], Callable[..., Any]]:
    reconstruct = np.empty(0).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    assert callable(reconstruct)
    assert callable(scalar)
    frombuffer = np.empty(1).__reduce_ex__(5)[0]
    assert callable(frombuffer)
    found: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch.storage", "_load_from_bytes"): _load_storage,
        ("torch", "Size"): torch.Size,
        ("torch", "device"): torch.device,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("_codecs", "encode"): _codecs.encode,  # how old protocols write bytes
    }
    for package in ("numpy.core", "numpy._core"):  # before and since numpy 2
        found[f"{package}.multiarray", "_reconstruct"] = reconstruct
        found[f"{package}.multiarray", "scalar"] = scalar
        found[f"{package}.numeric", "_frombuffer"] = frombuffer
    return found


class _Arrays(pickle.Unpickler):
    _ALLOWED = _allowed()

    def __init__(self, file: Any, name: str) -> None:
        super().__init__(file)
        self._name = name

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise DataError(
                f"{self._name}: asks for {module}.{name}; only numpy arrays, torch tensors, lists, tuples, "
                "dicts, numbers and text are read from pickles"
            )
        return self._ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise DataError(f"{self._name}: refers to data outside of the file; only plain pickles are read")
