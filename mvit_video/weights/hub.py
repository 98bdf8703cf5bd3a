"""Models on the Hugging Face Hub: ``hf://user/name`` takes the place of a file.

What comes from there is data as any other file is: nothing but tensors and plain values is read.
"""

from __future__ import annotations

import re
from pathlib import Path

from mvit_video.errors import CheckpointError, import_extra, refusing
from mvit_video.io.console import printable

PREFIX = "hf://"
WEIGHTS = "model.safetensors"
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+?))?(?:/([\w./-]+))?", re.ASCII)


def download(address: str) -> Path:
    """The local copy of ``hf://user/name``, of ``hf://user/name@revision`` or of ``hf://user/name/file``.

    Without a file it is ``model.safetensors``. What was fetched before is taken from the Hub's cache, also
    without a network (``HF_HUB_OFFLINE=1``).

    Raises:
        CheckpointError: no such address, repository or file, or it can't be fetched.
        ConfigError: huggingface_hub isn't installed.
    """
    repo, revision, file = parse(address)
    hub = import_extra("huggingface_hub", "hub", address)
    with refusing(CheckpointError, address):
        return Path(hub.hf_hub_download(repo, file or WEIGHTS, revision=revision))


def parse(address: str) -> tuple[str, str | None, str | None]:
    """Repository, revision and file. Raises CheckpointError for another address."""
    match = _ADDRESS.fullmatch(address)
    if not match:
        raise CheckpointError(f"{printable(address)}: expected hf://user/name, also with @revision or /file")
    return match[1], match[2], match[3]
