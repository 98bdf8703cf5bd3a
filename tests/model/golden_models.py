"""Models of the official code as tests/reference/model_*.json records them, with weights made from names."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import golden_weights
import torch
from torch import Tensor

REFERENCE = Path(__file__).parents[1] / "reference"


@functools.cache
def golden(case: str) -> dict[str, Any]:
    return json.loads((REFERENCE / f"model_{case}.json").read_text())


def golden_state(case: str) -> dict[str, Tensor]:
    """The recorded model's weights under their official names."""
    return {name: torch.from_numpy(w) for name, w in golden_weights.weights(golden(case)["params"]).items()}


def golden_input(case: str) -> Tensor:
    """The recorded clip (1, 3, T, H, W) or image (1, 3, H, W)."""
    made = golden(case)["input"]
    return torch.from_numpy(getattr(golden_weights, made["fn"])(*made["args"]))
