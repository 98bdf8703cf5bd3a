"""Who does what, where: actions of the people in a clip, on AVA and on one's own videos."""

from mvit_video.action_detection.boxes import key_frame_indices
from mvit_video.action_detection.detector import ActionDetector, create_action_detector
from mvit_video.action_detection.metrics import mean_average_precision

__all__ = ["ActionDetector", "create_action_detector", "key_frame_indices", "mean_average_precision"]
