"""What a task brings to a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mvit_video.data.loader import ClipLoader
from mvit_video.training.module import TrainingModule


@dataclass(frozen=True)
class Training:
    """All of a training but the Trainer. Batches have ``bad``, a list of the ``BadVideo`` that they lack.

    Attributes:
        num_files: videos or images of training and validation together.
        identity: what a resumed run is compared by (model, data, clips), by part and key.
    """

    module: TrainingModule
    training: ClipLoader[Any]
    validation: ClipLoader[Any]
    num_files: int
    identity: Mapping[str, Mapping[str, Any]]


def model_identity(config: Any) -> dict[str, Any]:
    """The fields of a model's configuration that change what it computes."""
    return {key: value for key, value in asdict(config).items() if key != "checkpoint_blocks"}
