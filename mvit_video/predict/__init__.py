"""Say what happens in video files."""

from mvit_video.predict.prediction import ClipPrediction, Prediction, Segment
from mvit_video.predict.recognizer import Recognizer, predict

__all__ = ["ClipPrediction", "Prediction", "Recognizer", "Segment", "predict"]
