"""Which weights these are."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from mvit_video.io.fingerprint import file_sha256


def weights_sha256(model: nn.Module) -> str:
    """The hexadecimal SHA-256 of a model's weights, whatever file they came from.

    Names, shapes and values count, so ask before the model is cast to another precision. An exported model is
    known by the content of its file.
    """
    if isinstance(path := getattr(model, "path", None), str):
        return file_sha256(path)
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name.replace('_orig_mod.', '')} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
