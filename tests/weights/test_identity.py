"""Which weights these are: by content, not by the name of a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import small_model

import mvit_video as mv
from mvit_video.weights import save_weights, weights_sha256


def test_the_same_weights_through_another_format_are_the_same(tmp_path: Path) -> None:
    model = small_model(0)
    for name in ("a.ckpt", "b.safetensors"):
        save_weights(model, tmp_path / name)
        assert weights_sha256(mv.load_model(tmp_path / name)) == weights_sha256(model)
    assert weights_sha256(torch.compile(model)) == weights_sha256(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_number_more_or_less_is_another_identity(dtype: torch.dtype) -> None:
    model = small_model(0).to(dtype)
    before = weights_sha256(model)
    assert before == weights_sha256(small_model(0).to(dtype)) != weights_sha256(small_model(1).to(dtype))
    with torch.no_grad():
        model.norm.bias[0] += 1
    assert weights_sha256(model) != before
