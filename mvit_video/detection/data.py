"""Images as batches: augmented ones to train on, whole ones to find objects in."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from mvit_video.data.datasets import BadVideo, read_or_replace, training_loader, validation_loader
from mvit_video.data.loader import ClipLoader
from mvit_video.detection.augment import LargeScaleJitter, MultiScale, Objects, shortest_edge
from mvit_video.detection.coco import AnnotatedImage, OpenImage, load_objects, open_listed, read_image
from mvit_video.detection.roi_heads import Target
from mvit_video.errors import VideoError


class ImageBatch(NamedTuple):
    """Images of several sizes, uint8 RGB (3, H, W), and those that can't be read; samples are batches of one.

    Attributes:
        targets: the objects of each, in training.
        ids: of each in its json file, and ``sizes`` its height and width as it lies on the disk, in testing.
    """

    images: list[Tensor]
    bad: list[BadVideo]
    paths: list[str]
    targets: Sequence[Target] = ()
    ids: Sequence[int] = ()
    sizes: Sequence[tuple[int, int]] = ()


class TrainingImages(Dataset[ImageBatch]):
    """An augmented version of each image; keys are (epoch, index).

    Args:
        seed: random choices depend on it, the epoch and the image alone.

    Raises:
        DataError: when a sample is made, if many images in a row can't be read.
    """

    def __init__(
        self, images: Sequence[AnnotatedImage], augment: MultiScale | LargeScaleJitter, *, seed: int
    ) -> None:
        self.images, self.augment, self.seed = images, augment, seed
        self.open_file: OpenImage = read_image
        self.sample_nbytes = 3 * augment.largest

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> ImageBatch:
        epoch, index = key
        rng = random.Random(f"{self.seed} {epoch} {index}")

        def read(index: int) -> Objects:
            return load_objects(self.images[index], self.open_file)

        objects, index, bad = read_or_replace(read, index, len(self.images), rng, "images")
        image, target = self.augment(objects, rng)
        return ImageBatch([image], bad, [self.images[index].path], [target])


class TestImages(Dataset[ImageBatch]):
    """Whole images, resized by their short side as ``shortest_edge`` does."""

    __test__ = False  # no test case, whatever pytest thinks of its name

    def __init__(self, images: Sequence[AnnotatedImage], *, short_side: int, max_side: int) -> None:
        self.images, self.open_file = images, read_image
        self.short_side, self.max_side = short_side, max_side
        self.sample_nbytes = 3 * short_side * max_side

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ImageBatch:
        listed = self.images[index]
        try:
            image = open_listed(listed, self.open_file)
        except VideoError as error:
            return ImageBatch([], [BadVideo(listed.path, error.reason)], [])
        pixels = resized(image, self.short_side, self.max_side)
        return ImageBatch([pixels], [], [listed.path], (), [listed.id], [(image.height, image.width)])


def resized(image: Image.Image, short_side: int, max_side: int) -> Tensor:
    """A picture as a detector takes it: uint8 (3, H, W)."""
    height, width = shortest_edge(image.height, image.width, short_side, max_side)
    return pil_to_tensor(image.resize((width, height), Image.Resampling.BILINEAR))


def by_aspect(order: Sequence[int], size: int, *, wide: Sequence[bool]) -> list[int]:
    """Upright images with upright ones, ``size`` of them a step, so that little of a batch is padding.

    Those that are left at the end are of both kinds.

    Args:
        wide: of each image, whether it is wider than high.
    """
    waiting: dict[bool, list[int]] = {False: [], True: []}
    arranged: list[int] = []
    for index in order:
        group = waiting[wide[index]]
        group.append(index)
        if len(group) == size:
            arranged += group
            group.clear()
    return arranged + waiting[False] + waiting[True]


def image_loader(dataset: TrainingImages, **loading: Any) -> ClipLoader[ImageBatch]:
    """Batches of images of one kind, see ``by_aspect``; ``loading`` as of ``training_loader``."""
    arrange = partial(by_aspect, wide=[image.width > image.height for image in dataset.images])
    return training_loader(dataset, collate, arrange=arrange, device=torch.device("cpu"), **loading)


def whole_image_loader(dataset: TestImages, **loading: Any) -> ClipLoader[ImageBatch]:
    """Every image once, in order, one by one: what pads it to another's size changes its detections.

    ``loading`` as of ``validation_loader``.
    """
    alone = {"batch_size": 1, "device": torch.device("cpu")}
    return validation_loader(dataset, collate, **(loading | alone))


def collate(samples: list[ImageBatch]) -> ImageBatch:
    """All of them as one batch, which may have no images."""
    nothing = ImageBatch([], [], [])
    return ImageBatch(*(list(chain(*parts)) for parts in zip(nothing, *samples, strict=True)))
