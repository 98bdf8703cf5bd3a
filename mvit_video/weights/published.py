"""Published weights by name: where they are, what they reach, and fetching them once."""

from __future__ import annotations

import math
import re
import shutil
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import wrap_file

from mvit_video.errors import CheckpointError, brief
from mvit_video.io.fingerprint import file_sha256
from mvit_video.io.writing import replacing
from mvit_video.weights.reading import read_checkpoint

_SLOWFAST = "https://dl.fbaipublicfiles.com/pyslowfast/model_zoo"


@dataclass(frozen=True)
class PublishedWeights:
    """One published file.

    Attributes:
        model: the model that it belongs to, as in ``list_models``.
        name: what ``create_model(model, weights=name)`` calls it: the data set, and the publisher where
            there are several.
        top1, top5: published accuracy in percent, with ``views`` (temporal x spatial).
        saved_as: a name for the file where the publisher's tells too little.
    """

    model: str
    name: str
    num_classes: int
    url: str
    views: str = ""
    top1: float = math.nan
    top5: float = math.nan
    saved_as: str | None = None

    @property
    def file_name(self) -> str:
        """The file's name in torch hub's folder."""
        return self.saved_as or self.url.rpartition("/")[2]

    @property
    def hash_prefix(self) -> str | None:
        """The first digits of the file's SHA-256, where its name has them, as torchvision's do."""
        found = re.search(r"-([0-9a-f]{8})\.pth$", self.file_name)
        return found[1] if found else None


def _v2(model: str, name: str, file: str, views: str, top1: float, top5: float) -> PublishedWeights:
    url = f"{_SLOWFAST}/mvitv2/pysf_video_models/{file}.pyth"
    return PublishedWeights(model, name, 174 if name == "ssv2" else 400, url, views, top1, top5)


def _v1(num_classes: int, file: str, top1: float, top5: float) -> PublishedWeights:
    name, url, saved_as = f"kinetics{num_classes}", f"{_SLOWFAST}/mvit/{file}", f"MViTv1_B_32x3_{file}"
    return PublishedWeights("mvitv1_b_32x3", name, num_classes, url, "5x1", top1, top5, saved_as)


def _torchvision(model: str, file: str, top1: float, top5: float) -> PublishedWeights:
    name, url = "kinetics400_torchvision", f"https://download.pytorch.org/models/{file}.pth"
    return PublishedWeights(model, name, 400, url, "5x1", top1, top5)


# github.com/facebookresearch/SlowFast: projects/mvitv2/README.md at 73c3ee69, MODEL_ZOO.md at c6b7655f;
# torchvision: MViT_V2_S_Weights and MViT_V1_B_Weights of torchvision/models/video/mvit.py.
PUBLISHED = (
    _v2("mvitv2_s_16x4", "kinetics400", "MViTv2_S_16x4_k400_f302660347", "5x1", 81.0, 94.6),
    _v2("mvitv2_b_32x3", "kinetics400", "MViTv2_B_32x3_k400_f304025456", "5x1", 82.9, 95.7),
    _v2("mvitv2_l_40x3", "kinetics400", "MViTv2_L_40x3_k400_f306903192", "5x3", 86.1, 97.0),
    _v2("mvitv2_s_16x4", "ssv2", "MViTv2_S_16x4_ssv2_f308341823", "1x3", 68.2, 91.4),
    _v2("mvitv2_b_32x3", "ssv2", "MViTv2_B_32x3_ssv2_f305803282", "1x3", 70.5, 92.7),
    _v2("mvitv2_l_40x3", "ssv2", "MViTv2_L_40x3_ssv2_f309603968", "1x3", 73.3, 94.1),
    _torchvision("mvitv2_s_16x4", "mvit_v2_s-ae3be167", 80.757, 94.665),
    _torchvision("mvitv1_b_16x4", "mvit_v1_b-dbeb1030", 78.477, 93.582),
    _v1(400, "k400.pyth", 80.4, 94.8),
    _v1(600, "k600.pyth", 83.9, 96.5),
)


def fetch(entry: PublishedWeights) -> dict[str, Any]:
    """Read a published file from torch hub's folder, downloading it there first if it is missing.

    Of several processes one downloads and the others wait. A download is verified by the hash in its name,
    or where it has none by being a readable file of weights, and only then stays. Raises CheckpointError.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / entry.file_name
    by_hand = f"put {entry.file_name} into {folder} by hand"
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock_file = folder / f".{entry.file_name}.lock"
            with FileLock(lock_file):
                try:
                    if not path.is_file():
                        _download(entry, path)
                finally:
                    lock_file.unlink(missing_ok=True)
        except (OSError, HTTPException, ValueError) as error:  # whatever a server answers
            raise CheckpointError(f"{entry.url} can't be fetched ({brief(error)}); {by_hand}") from None
        except CheckpointError as error:
            raise CheckpointError(f"{entry.url} arrived damaged ({error}); try again, or {by_hand}") from None
    _check_hash(path, entry)
    return read_checkpoint(path)


def _download(entry: PublishedWeights, path: Path) -> None:
    with replacing(path) as file, urllib.request.urlopen(entry.url, timeout=60) as response:
        size = int(response.headers.get("Content-Length") or 0)
        with wrap_file(
            cast(BinaryIO, response), size, description=entry.file_name, console=Console(stderr=True)
        ) as reader:
            shutil.copyfileobj(reader, file, 1 << 20)
        file.flush()
        arrived = Path(file.name)
        if size and arrived.stat().st_size != size:
            raise CheckpointError(f"{arrived.stat().st_size} of {size} bytes")
        _check_hash(arrived, entry)
        read_checkpoint(arrived)


def _check_hash(path: Path, entry: PublishedWeights) -> None:
    """CheckpointError where a file isn't the published one, such as one that was put there by hand."""
    if entry.hash_prefix is None:
        return
    found = file_sha256(path)[: len(entry.hash_prefix)]
    if found != entry.hash_prefix:
        raise CheckpointError(f"{path}: damaged or another file, its SHA-256 starts with {found}; delete it")
