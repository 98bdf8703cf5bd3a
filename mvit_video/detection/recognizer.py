"""Objects in pictures and videos: what ``mvit-predict`` does with a detector, for Python."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from av.error import FFmpegError
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from mvit_video.data.datasets import OpenVideo
from mvit_video.data.decode import open_video
from mvit_video.data.decode.container import MAX_PIXELS
from mvit_video.data.files import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, FileSearch
from mvit_video.detection.checkpoint import load_detector
from mvit_video.detection.coco import read_image
from mvit_video.detection.data import resized
from mvit_video.detection.detector import Detector
from mvit_video.detection.drawing import draw_objects
from mvit_video.detection.metrics import LIKELY, to_result
from mvit_video.errors import DataError, VideoError
from mvit_video.io.clips import clip_writer
from mvit_video.io.console import valid_text
from mvit_video.io.writing import replacing
from mvit_video.model.inference import autocast
from mvit_video.prediction.follower import LOST, Follower
from mvit_video.prediction.inputs import expand
from mvit_video.prediction.overview import Demo, Overview, Progress
from mvit_video.prediction.prediction import NOT_FINITE
from mvit_video.prediction.timeline import Timeline

FRAMES_AT_ONCE, PIXELS_AT_ONCE = 16, 1 << 25  # that are decoded of a video
PATIENCE = 5  # frames that an object may be missing from until it is another


@dataclass(frozen=True)
class FoundObjects:
    """The objects detected in a picture or in a frame of a video, the likeliest first; or an error.

    Attributes:
        image: uint8 RGB (3, H, W), upright.
        boxes: float (N, 4), xyxy pixels of ``image``.
        scores: float (N,).
        labels: int64 (N,).
        masks: bool (N, H, W).
        class_names: of all labels.
        frame, second: of a video: which frame, and when it is shown.
        tracks: of a video: numbers that follow objects from frame to frame; ``LOST`` for unlikely ones.
    """

    path: str
    image: Tensor
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor
    class_names: tuple[str, ...]
    frame: int | None = None
    second: float | None = None
    error: str | None = None
    tracks: tuple[int, ...] | None = None

    def draw(self, min_score: float = LIKELY) -> Tensor:
        """The picture with boxes, masks, names and scores, uint8 (3, H, W)."""
        kept = self.scores >= min_score
        return draw_objects(
            self.image,
            self.boxes[kept],
            self.labels[kept],
            self.masks[kept],
            self.class_names,
            self.scores[kept],
            None if self.tracks is None else torch.tensor(self.tracks)[kept].tolist(),
        )

    def rows(self, category_ids: Sequence[int]) -> list[dict[str, Any]]:
        """Each object as in COCO's results, with file, frame, second, class, track; an error is one row."""
        place = {"file_name": valid_text(self.path), "frame": self.frame, "second": self.second}
        if self.error is not None:
            return [place | {"error": valid_text(self.error)}]
        tensors = {name: getattr(self, name) for name in ("boxes", "scores", "labels", "masks")}
        height, width = self.image.shape[1:]
        names = dict(zip(category_ids, self.class_names, strict=True))
        tracks = [None if track == LOST else track for track in self.tracks or [LOST] * len(self.boxes)]
        rows = to_result(0, (height, width), tensors, category_ids).detections
        return [
            row | place | {"class": valid_text(names[row["category_id"]]), "track": track}
            for row, track in zip(rows, tracks, strict=True)
        ]


class ObjectRecognizer:
    """Detects objects in picture and video files.

    Args:
        detector: or the checkpoint of one, from ``mvit-train``.
        min_score: objects below it are left out, besides those below the detector's ``box_score_thresh``.
        stride: seconds from one sampled frame of a video to the next; 0: every frame.
        precision: "fp32", "bf16", or "auto": bf16 on GPUs that compute with it.
        open_file: opens a video; its ``max_pixels``, if it has such, is the limit for pictures too.
    """

    def __init__(
        self,
        detector: Detector | str | Path,
        *,
        min_score: float = 0.0,
        stride: float = 0.0,
        device: str = "cpu",
        precision: str = "fp32",
        open_file: OpenVideo = open_video,
    ) -> None:
        loaded = detector if isinstance(detector, Detector) else load_detector(detector)
        self.detector = loaded.to(device).eval()
        self.min_score, self.stride, self.device = min_score, stride, device
        self.open_file = open_file
        self.autocast = autocast(device, precision, on_cpus=False)
        names = self.detector.class_names
        self.class_names = names or tuple(map(str, range(self.detector.config.num_classes)))

    def predict(self, files: str | Path | Iterable[str | Path]) -> list[FoundObjects]:
        """For files, folders and globs: an entry for each picture, and for each frame of a video."""
        return [found for file in expand_files(files) for found in self.iterate(file)]

    def iterate(self, file: str) -> Iterator[FoundObjects]:
        """The objects of a picture, or of a video frame by frame; a file that can't be read is one entry."""
        follow = Follower(PATIENCE)
        try:
            for image, frame, second in _open(file, self.stride, self.open_file):
                found = self._detect(file, image, frame, second)
                if frame is not None:
                    numbers = follow(found.boxes, found.labels, found.scores >= LIKELY)
                    found = replace(found, tracks=tuple(numbers))
                yield found
        except VideoError as error:
            empty = torch.empty(0)
            yield FoundObjects(
                *(file, empty, empty.reshape(0, 4), empty, empty.long(), empty.bool(), self.class_names),
                error=error.reason,
            )

    @torch.inference_mode()
    def _detect(self, file: str, image: Image.Image, frame: int | None, second: float | None) -> FoundObjects:
        config = self.detector.config
        small = resized(image, config.min_size, config.max_size).to(self.device)
        try:
            with self.autocast:
                (found,) = self.detector([small], output_sizes=[(image.height, image.width)])
        except FloatingPointError:
            raise VideoError(file, NOT_FINITE) from None
        kept = found["scores"] >= self.min_score
        values = {name: value[kept].cpu() for name, value in found.items()}
        return FoundObjects(
            file,
            pil_to_tensor(image),
            class_names=self.class_names,
            frame=frame,
            second=second,
            **values,
        )


def expand_files(arguments: str | Path | Iterable[str | Path]) -> list[str]:
    """As ``expand``, but of folders all pictures and videos."""
    found: list[str] = []
    for argument in [arguments] if isinstance(arguments, str | Path) else arguments:
        folder = Path(argument).expanduser()
        if folder.is_dir():
            found += FileSearch((*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS)).below(folder)
        else:
            found += expand(argument)
    return list(dict.fromkeys(found))


def _open(
    file: str, stride: float, open_file: OpenVideo
) -> Iterator[tuple[Image.Image, int | None, float | None]]:
    """Upright pictures; of a video with the number of the frame and its second. Raises VideoError."""
    if file.lower().endswith(IMAGE_EXTENSIONS):
        yield read_image(file, getattr(open_file, "max_pixels", MAX_PIXELS)), None, None
        return
    with open_file(file) as video:
        wanted, due = [], 0.0
        for index, second in enumerate(video.times.tolist()):
            if second >= due - 1e-6:
                wanted.append(index)
                due += stride
        at_once = max(1, min(FRAMES_AT_ONCE, PIXELS_AT_ONCE // (video.height * video.width)))
        for start in range(0, len(wanted), at_once):
            part = wanted[start : start + at_once]
            for index, frame in zip(part, video.get_frames(part), strict=True):
                yield to_pil_image(frame), index, video.frame_time(index)


@contextlib.contextmanager
def video_writer(path: Path) -> Iterator[Any]:
    """A function that adds a drawn picture, uint8 (3, H, W), and its second to a new MP4 file."""
    try:
        with replacing(path, keep=True) as file, clip_writer(file, crf="20", preset="veryfast") as add:
            yield lambda image, second: add(image.permute(1, 2, 0).numpy(), second)
    except FFmpegError as error:
        raise VideoError(str(path), f"can't be written ({error})") from None


class ObjectDemo(Demo):
    """As ``Demo``, by a detector of objects. Its timeline has of each class the likeliest object."""

    has_choices = False
    title = "Objects"

    def __init__(self, recognizer: ObjectRecognizer, **limits: Any) -> None:
        super().__init__(cast("Any", recognizer.detector), **limits)
        self.finder = recognizer

    def _overview(self, path: str, duration: float, progress: Progress, *_: Any) -> Overview:
        names, every = self.finder.class_names, self.finder.stride
        ids = self.finder.detector.category_ids or tuple(range(len(names)))
        name = self._new_files(path)
        rows: list[dict[str, Any]] = []
        spans, likeliest = [], []
        with video_writer(copy := Path(f"{name}.annotated.mp4")) as add:
            for found in self.finder.iterate(path):
                if found.error is not None or found.second is None:
                    raise DataError(found.error or "this is a picture, not a video")
                progress(found.second / max(duration, 1e-6), desc="detecting objects")
                add(found.draw(), found.second)
                rows += [row | {"file_name": Path(path).name} for row in found.rows(ids)]
                spans.append((found.second, found.second + every))
                best = torch.zeros(len(names))
                likeliest.append(best.scatter_reduce(0, found.labels, found.scores.float(), "amax"))
        if not rows:
            raise DataError("no object was detected in this video")
        timeline = Timeline(Path(path).name, names, spans, torch.stack(likeliest), every)
        return self._of_timeline(name, timeline, copy, {"objects": rows})
