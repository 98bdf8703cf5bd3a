"""MViTv2 for video: train, evaluate and use it.

import mvit_video as mv

model = mv.create_model("mvitv2_s_16x4", num_classes=400)
logits = model(clips)  # float (B, 3, T, H, W) -> (B, 400)
"""

import importlib
import os
from typing import Any

# Threads of OpenMP that wait for work spin for milliseconds by default, which starves those that decode
# beside them; if they sleep at once, waking them for the next operation takes a quarter of the model's time.
# Some tens of microseconds bridge two operations. It counts where torch isn't loaded yet.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Imported when they are first used, so that what a script doesn't need costs it nothing. Type checkers read
# the stub beside this file.
_HOMES = {
    "mvit_video.action_detection": ("ActionDetector", "create_action_detector"),
    "mvit_video.data.augment": ("Augment",),
    "mvit_video.data.clips": ("centre_views",),
    "mvit_video.data.datasets": ("ClipDataset", "ViewDataset", "collate_training", "collate_views"),
    "mvit_video.data.decode": ("open_video",),
    "mvit_video.data.index": ("folder_splits",),
    "mvit_video.data.lists": ("csv_splits", "json_splits"),
    "mvit_video.data.sampling": ("kinetics_frame_indices", "segment_frame_indices", "spatial_views"),
    "mvit_video.detection": ("ObjectRecognizer", "create_detector", "list_detectors", "load_detector"),
    "mvit_video.errors": ("CheckpointError", "ConfigError", "DataError", "MVitVideoError", "VideoError"),
    "mvit_video.evaluation.evaluate": ("evaluate",),
    "mvit_video.model": ("ClipSpec", "MViT", "MViTConfig", "list_models"),
    "mvit_video.prediction": ("Prediction", "Recognizer", "predict"),
    "mvit_video.pretraining": ("create_pretrainer", "list_pretrainers"),
    "mvit_video.training.train": ("train",),
    "mvit_video.weights": ("create_model", "from_slowfast", "load_model", "load_weights"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = ["Protocol", *_HOME_OF]


def __getattr__(name: str) -> Any:
    wanted = "ClipSpec" if name == "Protocol" else name  # its name until version 0.2
    if wanted not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME_OF[wanted]), wanted)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
