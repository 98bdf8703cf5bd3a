"""Objects in images: boxes, classes and masks (MViTv2 paper, sections 4.1.5 and 4.3)."""

from mvit_video.detection.checkpoint import load_detector, save_detector
from mvit_video.detection.detector import Detector, DetectorConfig
from mvit_video.detection.recognizer import FoundObjects, ObjectRecognizer
from mvit_video.detection.variants import create_detector, list_detectors

__all__ = [
    "Detector",
    "DetectorConfig",
    "FoundObjects",
    "ObjectRecognizer",
    "create_detector",
    "list_detectors",
    "load_detector",
    "save_detector",
]
