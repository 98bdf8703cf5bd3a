"""Say what happens in video files."""

from mvit_video.prediction.prediction import ClipPrediction, Prediction, Segment
from mvit_video.prediction.recognizer import Recognizer, predict

__all__ = ["ClipPrediction", "Prediction", "Recognizer", "Segment", "predict"]
