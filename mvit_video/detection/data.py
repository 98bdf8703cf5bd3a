"""Images as batches: augmented ones to train on, whole ones to find objects in."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mvit_video.data.datasets import BadVideo, read_or_replace, validation_loader
from mvit_video.data.loader import ClipLoader
from mvit_video.data.samplers import EpochBatches
from mvit_video.detection.augment import Objects, shortest_edge
from mvit_video.detection.coco import AnnotatedImage, load_objects, open_listed, read_image
from mvit_video.detection.roi_heads import Target
from mvit_video.errors import VideoError

OpenImage = Callable[[str], Image.Image]
Augmentation = Callable[[Objects, random.Random], tuple[Tensor, Target]]


class TrainingSample(NamedTuple):
    """An image, uint8 (3, H, W), its objects, and the images that it stands in for."""

    image: Tensor
    target: Target
    bad: list[BadVideo]
    path: str


class ImageBatch(NamedTuple):
    """Images of several sizes, uint8 RGB (3, H, W), and those that can't be read.

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


class TestImage(NamedTuple):
    """An image of the size that a detector takes, or an error."""

    listed: AnnotatedImage
    image: Tensor  # uint8 (3, H, W)
    size: tuple[int, int]  # height and width on the disk
    error: str | None = None


class TrainingImages(Dataset[TrainingSample]):
    """An augmented version of each image; keys are (epoch, index).

    Args:
        seed: random choices depend on it, the epoch and the image alone.
        largest: pixels of the largest image that ``augment`` makes, for the bound on memory.

    Raises:
        DataError: when a sample is made, if many images in a row can't be read.
    """

    def __init__(
        self,
        images: Sequence[AnnotatedImage],
        augment: Augmentation,
        *,
        seed: int,
        open_file: OpenImage = read_image,
        largest: int = 0,
    ) -> None:
        self.images, self.augment, self.seed, self.open_file = images, augment, seed, open_file
        self.sample_nbytes = 3 * largest

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> TrainingSample:
        epoch, index = key
        rng = random.Random(f"{self.seed} {epoch} {index}")
        objects, index, bad = read_or_replace(
            lambda index: load_objects(self.images[index], self.open_file),
            index,
            len(self.images),
            rng,
            "images",
        )
        return TrainingSample(*self.augment(objects, rng), bad, self.images[index].path)


class TestImages(Dataset[TestImage]):
    """Whole images, resized by their short side as ``shortest_edge`` does."""

    __test__ = False  # no test case, whatever pytest thinks of its name

    def __init__(
        self,
        images: Sequence[AnnotatedImage],
        *,
        short_side: int,
        max_side: int,
        open_file: OpenImage = read_image,
    ) -> None:
        self.images, self.open_file = images, open_file
        self.short_side, self.max_side = short_side, max_side
        self.sample_nbytes = 3 * short_side * max_side

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> TestImage:
        listed = self.images[index]
        try:
            image = open_listed(listed, self.open_file)
        except VideoError as error:
            return TestImage(listed, torch.empty(0), (0, 0), error.reason)
        return TestImage(listed, resized(image, self.short_side, self.max_side), (image.height, image.width))


def resized(image: Image.Image, short_side: int, max_side: int) -> Tensor:
    """A picture as a detector takes it: uint8 (3, H, W)."""
    height, width = shortest_edge(image.height, image.width, short_side, max_side)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class AspectBatches(EpochBatches):
    """Every image once an epoch, upright ones with upright ones, so that little of a batch is padding.

    Args:
        wide: of each image, whether it is wider than high.
        Others as of ``EpochBatches``, of which it keeps all else: the images of a step over all processes
        are of one kind, but for those that are left at an epoch's end.
    """

    def __init__(self, wide: Sequence[bool], batch_size: int, **order: Any) -> None:
        super().__init__(len(wide), batch_size, **order)
        self.wide = wide

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = list(range(self.num_videos))
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        size = self.batch_size * self.num_replicas
        waiting: dict[bool, list[int]] = {False: [], True: []}
        sorted_order: list[int] = []
        for index in order:
            group = waiting[self.wide[index]]
            group.append(index)
            if len(group) == size:
                sorted_order += group
                group.clear()
        sorted_order += waiting[False] + waiting[True]
        for start in range(0, len(self) * size, size):
            share = sorted_order[start : start + size][self.rank :: self.num_replicas]
            yield [(self.epoch, index) for index in share]


def training_loader(
    dataset: TrainingImages,
    *,
    batch_size: int,
    rank: int = 0,
    num_replicas: int = 1,
    shuffle: bool = True,
    **loading: Any,
) -> ClipLoader[ImageBatch]:
    """Batches in the order of ``AspectBatches``; ``loading`` as of ``ClipLoader``."""
    wide = [image.width > image.height for image in dataset.images]
    batches = AspectBatches(
        wide, batch_size, seed=dataset.seed, rank=rank, num_replicas=num_replicas, shuffle=shuffle
    )
    return ClipLoader(dataset, batches, collate_training, device=torch.device("cpu"), **loading)


def whole_image_loader(dataset: TestImages, **loading: Any) -> ClipLoader[ImageBatch]:
    """Every image once, in order, one by one: what pads it to another's size changes its detections.

    ``loading`` as of ``validation_loader``.
    """
    alone = {"batch_size": 1, "device": torch.device("cpu")}
    return validation_loader(dataset, collate_test, **(loading | alone))


def collate_training(samples: list[TrainingSample]) -> ImageBatch:
    return ImageBatch(
        [sample.image for sample in samples],
        [bad for sample in samples for bad in sample.bad],
        [sample.path for sample in samples],
        targets=[sample.target for sample in samples],
    )


def collate_test(samples: list[TestImage]) -> ImageBatch:
    """Without those that can't be read; a batch may have none."""
    good = [sample for sample in samples if sample.error is None]
    return ImageBatch(
        [sample.image for sample in good],
        [BadVideo(sample.listed.path, sample.error) for sample in samples if sample.error is not None],
        [sample.listed.path for sample in good],
        ids=[sample.listed.id for sample in good],
        sizes=[sample.size for sample in good],
    )
