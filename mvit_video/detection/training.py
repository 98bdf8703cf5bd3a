"""How a detector is trained and validated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from mvit_video.data.ranks import Ranks
from mvit_video.detection.checkpoint import detector_metadata
from mvit_video.detection.coco import CocoImages
from mvit_video.detection.data import ImageBatch
from mvit_video.detection.detector import Detector
from mvit_video.detection.drawing import as_png, draw_objects, grid
from mvit_video.detection.metrics import ImageResult, measure, to_result
from mvit_video.errors import DataError
from mvit_video.io.writing import replacing
from mvit_video.training.module import Losses, TrainingModule

UNDECAYED = ("rel_pos_h", "rel_pos_w", "pos_embed")  # names of parameters
WARMUP_FACTOR = 0.001


class DetectorTraining(TrainingModule):
    """Trains a detector on images with objects (detectron2's ``projects/MViTv2`` at 02b5c4e2).

    Args:
        milestones: shares of the training after which the learning rate is a tenth of what it was.
        recipe: as of ``TrainingModule``; the warm-up is linear and starts at a thousandth of ``lr``.

    Attributes:
        validation: the images that are validated with; set before training.
    """

    val_metrics: ClassVar[Sequence[str]] = ("box_AP", "box_AP50", "mask_AP", "mask_AP50")
    monitor: ClassVar[str] = "val/box_AP"
    model: Detector
    validation: CocoImages

    def __init__(self, model: Detector, *, milestones: Sequence[float] = (), **recipe: Any) -> None:
        super().__init__(model, **recipe)
        self.milestones = milestones
        self._results: list[ImageResult] = []

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Norms and tables of positions don't decay; all other biases do."""
        norms = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)
        plain: list[nn.Parameter] = []
        decayed: list[nn.Parameter] = []
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    (plain if isinstance(module, norms) or name in UNDECAYED else decayed).append(parameter)
        return [
            {"params": decayed, "weight_decay": self.weight_decay, "lr_scale": 1.0},
            {"params": plain, "weight_decay": 0.0, "lr_scale": 1.0},
        ]

    def lr_factor(self, step: int, total: float) -> float:
        warmup = round(self.warmup * total)
        if step < warmup:
            return WARMUP_FACTOR + (1 - WARMUP_FACTOR) * step / warmup
        return 0.1 ** sum(step >= round(share * total) for share in self.milestones)

    def training_losses(self, batch: ImageBatch, batch_index: int) -> Losses:
        losses = self(batch.images, batch.targets)
        metrics = {"loss": torch.stack(list(losses.values())).sum()}
        saved = {
            "images": batch.images,
            "targets": list(batch.targets),
            "paths": batch.paths,
            "losses": {name: loss.detach() for name, loss in losses.items()},
        }
        return Losses(metrics, count=len(batch.images), to_save=saved)

    def validation_losses(self, batch: ImageBatch) -> None:
        """A detector has no losses on whole images: its detections are measured at the end."""
        if not batch.images:
            return
        try:
            found = self.model(batch.images, output_sizes=batch.sizes)
        except FloatingPointError:
            self.stop_validation()
        for image_id, size, objects in zip(batch.ids, batch.sizes, found, strict=True):
            self._results.append(to_result(image_id, size, objects, self.validation.category_ids))

    def on_validation_epoch_end(self) -> None:
        self.on_train_epoch_start()  # the time of validation doesn't count
        mine, self._results = self._results, []
        parts = Ranks(self.trainer.global_rank, self.trainer.world_size).all_gather(mine)
        results = [result for part in parts for result in part]
        if not results:
            if not self.trainer.sanity_checking:
                raise DataError("no validation image can be read")
            return
        for kind, precision in measure(self.validation, results).items():
            for name in ("AP", "AP50"):
                self.log(f"val/{kind}_{name}", max(precision.summary[name], 0.0))

    def metadata(self) -> dict[str, Any]:
        return detector_metadata(self.model)

    def draw_batch(self, batch: ImageBatch, batch_index: int, path: Path) -> None:
        names = self.model.class_names or ()
        pictures = [
            draw_objects(image, target["boxes"], target["labels"], target["masks"], names)
            for image, target in zip(batch.images, batch.targets, strict=True)
        ]
        with replacing(path) as file:
            file.write(as_png(grid(pictures)))
