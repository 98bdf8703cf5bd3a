"""Published weights by name: where they are, what they reach, and fetching them once."""

from __future__ import annotations

import re
import urllib.error
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from mvit_video.errors import CheckpointError, ConfigError
from mvit_video.io.fingerprint import file_sha256
from mvit_video.model.mvit import MViT
from mvit_video.model.variants import VARIANTS, Variant, build
from mvit_video.weights.checkpoint import (
    checkpoint_names,
    described_by,
    from_slowfast,
    load_weights,
    read_checkpoint,
)
from mvit_video.weights.slowfast import believe_weights

_SLOWFAST = "https://dl.fbaipublicfiles.com/pyslowfast/model_zoo"
_TORCHVISION = "https://download.pytorch.org/models"


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
    views: str
    top1: float
    top5: float
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


def _v2(file: str) -> str:
    return f"{_SLOWFAST}/mvitv2/pysf_video_models/{file}"


# PySlowFast's MViTv2 page and model zoo; torchvision's weight enumerations.
PUBLISHED = (
    PublishedWeights(
        "mvitv2_s_16x4", "kinetics400", 400, _v2("MViTv2_S_16x4_k400_f302660347.pyth"), "5x1", 81.0, 94.6
    ),
    PublishedWeights(
        "mvitv2_b_32x3", "kinetics400", 400, _v2("MViTv2_B_32x3_k400_f304025456.pyth"), "5x1", 82.9, 95.7
    ),
    PublishedWeights(
        "mvitv2_l_40x3", "kinetics400", 400, _v2("MViTv2_L_40x3_k400_f306903192.pyth"), "5x3", 86.1, 97.0
    ),
    PublishedWeights(
        "mvitv2_s_16x4", "ssv2", 174, _v2("MViTv2_S_16x4_ssv2_f308341823.pyth"), "1x3", 68.2, 91.4
    ),
    PublishedWeights(
        "mvitv2_b_32x3", "ssv2", 174, _v2("MViTv2_B_32x3_ssv2_f305803282.pyth"), "1x3", 70.5, 92.7
    ),
    PublishedWeights(
        "mvitv2_l_40x3", "ssv2", 174, _v2("MViTv2_L_40x3_ssv2_f309603968.pyth"), "1x3", 73.3, 94.1
    ),
    PublishedWeights(
        "mvitv2_s_16x4",
        "kinetics400_torchvision",
        400,
        f"{_TORCHVISION}/mvit_v2_s-ae3be167.pth",
        "5x1",
        80.757,
        94.665,
    ),
    PublishedWeights(
        "mvitv1_b_16x4",
        "kinetics400_torchvision",
        400,
        f"{_TORCHVISION}/mvit_v1_b-dbeb1030.pth",
        "5x1",
        78.477,
        93.582,
    ),
    *(
        PublishedWeights(
            "mvitv1_b_32x3",
            f"kinetics{classes}",
            classes,
            f"{_SLOWFAST}/mvit/k{classes}.pyth",
            "5x1",
            top1,
            top5,
            saved_as=f"MViTv1_B_32x3_k{classes}.pyth",
        )
        for classes, top1, top5 in ((400, 80.4, 94.8), (600, 83.9, 96.5))
    ),
)


def create_published(
    model: str,
    name: str,
    num_classes: int | None = None,
    *,
    head: Literal["strict", "new"] = "strict",
    **overrides: Any,
) -> MViT:
    """Build a model with published weights, fetched on first use into torch hub's folder; in eval mode.

    Args:
        model, name: see ``PUBLISHED``.
        num_classes: that of the weights where None; another needs ``head="new"``.
        head: "new" gives a fresh head.
        overrides: fields of ``MViTConfig``; tables for another size are interpolated.

    Raises:
        ConfigError: there are no such weights.
        CheckpointError: the file can't be fetched, is damaged, or doesn't fit.
    """
    known = {entry.name: entry for entry in PUBLISHED if entry.model == model}
    if name not in known:
        names = ", ".join(known) or "none"
        raise ConfigError(f"there are no weights {name!r} of {model}; published are: {names}")
    entry = known[name]
    checkpoint = fetch(entry)
    changed = head == "new" or num_classes not in (None, entry.num_classes)
    if "cfg" in checkpoint and not changed and all(value is None for value in overrides.values()):
        return from_slowfast(checkpoint)
    variant = VARIANTS[model]
    if "cfg" in checkpoint:  # the file knows its layout and protocol best
        variant = Variant(*described_by(checkpoint, entry.file_name))
    built = build(variant, num_classes=num_classes or entry.num_classes, **overrides)
    layout = believe_weights(built.config, checkpoint_names(checkpoint, entry.file_name))
    if layout != built.config:  # the published L is another model than its configuration gives
        built = MViT(layout, built.protocol)
    load_weights(built, checkpoint, head=head)
    if name == "ssv2" and "cfg" not in checkpoint:
        crop = built.protocol.crop
        built.protocol = replace(
            built.protocol,
            sampling="segment",
            num_clips=1,
            num_crops=3,
            short_side=crop,
            # These models saw BGR frames, swapped behind the normalisation.
            mean=built.protocol.mean[::-1],
            std=built.protocol.std[::-1],
        )
    elif name.endswith("_torchvision"):
        built.protocol = replace(built.protocol, sampling="torchvision", pixels="torchvision")
    return built.eval()


def fetch(entry: PublishedWeights) -> dict[str, Any]:
    """Read a published file from torch hub's folder, downloading it there first if it is missing.

    A download is verified by the hash in its name, or where it has none by being a readable file of weights,
    and only then stays. Raises CheckpointError.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / entry.file_name
    if path.is_file():
        _check_hash(path, entry)
        return read_checkpoint(path)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    by_hand = f"put {entry.file_name} into {folder} by hand"
    try:
        torch.hub.download_url_to_file(entry.url, str(part), entry.hash_prefix)
        checkpoint = read_checkpoint(part)
        part.rename(path)
    except (urllib.error.URLError, OSError) as error:
        raise CheckpointError(f"{entry.url} can't be fetched ({error}); {by_hand}") from None
    except (CheckpointError, RuntimeError) as error:
        raise CheckpointError(f"{entry.url} arrived damaged ({error}); try again, or {by_hand}") from None
    finally:
        part.unlink(missing_ok=True)
    return checkpoint


def _check_hash(path: Path, entry: PublishedWeights) -> None:
    """CheckpointError where a file that was put there by hand isn't the published one."""
    if entry.hash_prefix is None:
        return
    found = file_sha256(path)[: len(entry.hash_prefix)]
    if found != entry.hash_prefix:
        raise CheckpointError(f"{path}: damaged or another file, its SHA-256 starts with {found}; delete it")
