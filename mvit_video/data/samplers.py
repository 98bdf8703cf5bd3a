"""Which videos an epoch reads, in which order, by which process."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mvit_video.errors import DataError


class EpochBatches:
    """Every video once an epoch, in an order that depends on the seed and the epoch alone.

    A batch is a list of (epoch, index), so that a sample's random choices follow from its key, whoever makes
    it; a video that comes again in an epoch, as ``weights`` may have it, has a count as third part. Of
    several processes, each takes every ``num_replicas``-th video of the same order: the batches of a step
    together are what one process would have as one batch, whatever their number. An incomplete last batch is
    dropped, unless it is the only one.

    Args:
        batch_size: videos of one process.
        rank, num_replicas: number of this process, and how many there are.
        shuffle: False gives the order of epoch 0 again and again.
        weights: of each video; an epoch then draws as many as there are, with these probabilities and with
            replacement. None: each once.
        arrange: gives another order of an epoch's videos, told it and how many a step has over all processes.

    Raises DataError where there are fewer videos than processes.
    """

    def __init__(
        self,
        num_videos: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        num_replicas: int = 1,
        shuffle: bool = True,
        weights: Sequence[float] | None = None,
        arrange: Callable[[list[int], int], list[int]] | None = None,
    ) -> None:
        if num_videos < num_replicas:
            raise DataError(f"{num_replicas} processes can't share {num_videos} training videos")
        self.weights, self.arrange = weights, arrange
        self.num_videos, self.seed, self.epoch = num_videos, seed, 0
        self.rank, self.num_replicas, self.shuffle = rank, num_replicas, shuffle
        share = num_videos // num_replicas
        self.batch_size = min(batch_size, share)
        self._length = share // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch if self.shuffle else 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[Any]]:
        order = list(range(self.num_videos))
        rng = random.Random(f"{self.seed} {self.epoch}")
        if self.weights is None:
            rng.shuffle(order)
        else:
            order = rng.choices(order, self.weights, k=self.num_videos)
        drawn: Counter[int] = Counter()
        keys: list[tuple[int, ...]] = []
        if self.arrange is not None:
            order = self.arrange(order, self.batch_size * self.num_replicas)
        for index in order:
            keys.append((self.epoch, index, drawn[index]) if drawn[index] else (self.epoch, index))
            drawn[index] += 1
        keys = keys[self.rank :: self.num_replicas]
        for start in range(0, self._length * self.batch_size, self.batch_size):
            yield keys[start : start + self.batch_size]


def inverse_frequencies(labels: Sequence[int], num_classes: int) -> list[float]:
    """A weight for each class that makes up for its share of the labels: their mean over the labels is 1.

    A class without any has the weight 1.
    """
    counts = Counter(labels)
    return [
        len(labels) / (len(counts) * counts[label]) if label in counts else 1.0
        for label in range(num_classes)
    ]


class AllVideos:
    """Every video once, in order, a batch of ``batch_size`` at a time.

    Of several processes, each takes every ``num_replicas``-th video; all have equally many batches, so those
    of some may be empty at the end. Raises DataError where there are fewer videos than processes.
    """

    def __init__(self, num_videos: int, batch_size: int, *, rank: int = 0, num_replicas: int = 1) -> None:
        if 0 < num_videos < num_replicas:
            raise DataError(f"{num_replicas} processes can't share {num_videos} validation videos")
        self._share = list(range(rank, num_videos, num_replicas))
        self._batch_size = batch_size
        self._length = math.ceil(math.ceil(num_videos / num_replicas) / batch_size)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self._length):
            yield self._share[batch * self._batch_size : (batch + 1) * self._batch_size]
