"""How an action detector is trained and validated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from mvit_video.action_detection.annotations import ActionIndex
from mvit_video.action_detection.checkpoint import action_metadata
from mvit_video.action_detection.clips import ActionBatch
from mvit_video.action_detection.detector import ActionDetector
from mvit_video.action_detection.drawing import draw_people
from mvit_video.action_detection.evaluation import Scored, detections_of
from mvit_video.action_detection.metrics import mean_average_precision
from mvit_video.data.pixels import denormalise
from mvit_video.data.ranks import Ranks
from mvit_video.io.writing import replacing
from mvit_video.training.metrics import Means
from mvit_video.training.module import Losses, TrainingModule

SHOWN = 6  # clips of a batch's picture


class ActionDetectorTraining(TrainingModule):
    """Trains an action detector on clips with people.

    The loss is binary cross entropy, the mean over boxes and actions, as in PySlowFast (there of the sigmoid,
    here of the logits, which is the same number). "val/mAP" is measured as there, too (``order="file"``).

    Args:
        recipe: as of ``TrainingModule``.

    Attributes:
        validation, names: what is validated on, and the actions that are evaluated; set before training.
    """

    val_metrics: ClassVar[Sequence[str]] = ("loss", "mAP")
    monitor: ClassVar[str] = "val/mAP"
    model: ActionDetector
    validation: ActionIndex
    names: dict[int, str]

    def __init__(self, model: ActionDetector, **recipe: Any) -> None:
        super().__init__(model, **recipe)
        self.val_means = Means(["val/loss"])
        self._scored: list[Scored] = []

    def training_losses(self, batch: ActionBatch, batch_index: int) -> Losses:
        logits = self(batch.clips, batch.boxes)
        loss = F.binary_cross_entropy_with_logits(logits.float(), batch.targets)
        saved = {"clips": batch.clips, "boxes": batch.boxes, "targets": batch.targets, "paths": batch.paths}
        return Losses({"loss": loss}, count=len(batch.clips), to_save={**saved, "logits": logits.detach()})

    def validation_losses(self, batch: ActionBatch) -> Losses | None:
        if not len(batch.boxes):
            return None
        logits = self(batch.clips, batch.boxes).float()
        counts = [len(frame.boxes) for frame in batch.key_frames]
        scores = logits.sigmoid().cpu().split(counts)
        self._scored += [Scored(*pair) for pair in zip(batch.key_frames, scores, strict=True)]
        loss = F.binary_cross_entropy_with_logits(logits, batch.targets)
        return Losses({"loss": loss}, count=len(batch.clips))

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        mine, self._scored = {one.key: one for one in self._scored}, []
        parts = Ranks(self.trainer.global_rank, self.trainer.world_size).all_gather(mine)
        scored = {key: one for part in parts for key, one in part.items()}
        # In the order of the index, whoever scored them: it decides between equal scores.
        order = [(frame.video, frame.second) for frame in self.validation.key_frames]
        mean, _ = mean_average_precision(
            self.validation.ground_truth,
            detections_of((scored[key] for key in order if key in scored), self.names),
            class_ids=self.names,
            excluded=self.validation.excluded,
            order="file",
        )
        if not self.trainer.sanity_checking:
            self.log("val/mAP", mean)

    def metadata(self) -> dict[str, Any]:
        return action_metadata(self.model)

    def draw_batch(self, batch: ActionBatch, batch_index: int, path: Path) -> None:
        spec, names = self.model.protocol, self.model.class_names or ()
        middle = denormalise(batch.clips[:SHOWN, :, spec.clip_frames // 2].cpu(), spec.mean, spec.std)
        pictures = []
        for number, picture in enumerate(middle):
            mine = batch.boxes[:, 0] == number
            texts = [", ".join(names[i] for i in row.nonzero().flatten()) for row in batch.targets[mine]]
            pictures.append(draw_people(picture, batch.boxes[mine, 1:].cpu(), texts))
        with replacing(path) as file:
            to_pil_image(make_grid(pictures, nrow=3)).save(file, "png")
