"""Pickles as plain data: arrays, tensors and what holds them; nothing that could run code is ever called."""

from __future__ import annotations

import _codecs
import collections
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


class RefusedPickle(pickle.UnpicklingError):
    """A pickle asks for something that could run code."""


def load_arrays(path: Path, *, encoding: str = "ASCII") -> Any:
    """What a pickle holds. Raises RefusedPickle, or for a damaged file anything."""
    with path.open("rb") as file:
        return _Arrays(file, encoding=encoding).load()


def _load_storage(content: bytes) -> Any:
    """What torch puts into pickles in place of a storage; torch's own function would run code in it."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _allowed() -> dict[tuple[str, str], Callable[..., Any]]:
    reconstruct: Any = np.empty(0).__reduce__()[0]
    scalar: Any = np.float64(0).__reduce__()[0]
    frombuffer: Any = np.empty(1).__reduce_ex__(5)[0]
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

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise RefusedPickle(
                f"asks for {module}.{name}; only numpy arrays, torch tensors, lists, tuples, "
                "dicts, numbers and text are read from pickles"
            )
        return self._ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedPickle("refers to data outside of the file; only plain pickles are read")
