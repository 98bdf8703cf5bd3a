"""Pickles as plain data: arrays, tensors and what holds them; nothing that could run code is ever called.

A pickle calls what it names, with arguments and a state of its own. NumPy's constructors take addresses of
memory for objects and change types that all arrays share, so what is named here only stands for them.
"""

from __future__ import annotations

import collections
import functools
import io
import pickle
import re
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


class _Type:
    """A type of numbers, in the place of ``numpy.dtype``."""

    def __init__(self, code: str, *_: object) -> None:
        if not re.fullmatch(r"[biufc]\d{1,2}", str(code)):
            raise RefusedPickle(f"holds an array of {str(code)[:80]}, only numbers are read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array before its numbers are known, in the place of ``numpy.ndarray``."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, kind, in_columns, content = state
        super().__setstate__((version, shape, kind.dtype, in_columns, content))


def _of_bytes(content: Any, kind: _Type, shape: Any = (), order: Any = "C") -> Any:
    return np.frombuffer(content, kind.dtype).reshape(shape, order=order)


def _load_storage(content: bytes) -> Any:
    """What torch puts into pickles in place of a storage; torch's own function would run code in it."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,  # named as the type to reconstruct
    ("numpy", "dtype"): _Type,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): _load_storage,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # how old protocols write bytes
}
for _package in ("numpy.core", "numpy._core"):  # before and since numpy 2
    _ALLOWED[f"{_package}.multiarray", "_reconstruct"] = lambda *_: _Array(0)
    _ALLOWED[f"{_package}.multiarray", "scalar"] = lambda kind, content: _of_bytes(content, kind)[()]
    _ALLOWED[f"{_package}.numeric", "_frombuffer"] = _of_bytes


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise RefusedPickle(
                f"asks for {module}.{name}; only numpy arrays, torch tensors, lists, tuples, "
                "dicts, numbers and text are read from pickles"
            )
        found = _ALLOWED[module, name]
        # A pickle may set attributes of what it names: of this one alone.
        return functools.partial(found) if callable(found) and not isinstance(found, type) else found

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedPickle("refers to data outside of the file; only plain pickles are read")
