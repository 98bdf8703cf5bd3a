"""A model that is loaded once and asked often: decoding, batches and predictions."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvit_video.data.clips import centre_views, read_test_views
from mvit_video.data.datasets import OpenVideo, VideoViews, ViewDataset, in_full_batches
from mvit_video.data.decode import device_of, open_video
from mvit_video.data.decode.container import MAX_PIXELS
from mvit_video.data.index import LabelledVideo
from mvit_video.data.pixels import resize_for_test
from mvit_video.data.threads import threaded_map
from mvit_video.errors import ConfigError, VideoError
from mvit_video.model import MViT, VideoModel
from mvit_video.model.base import require_clips
from mvit_video.model.variants import change_views
from mvit_video.prediction.inputs import expand, is_address
from mvit_video.prediction.prediction import NOT_FINITE, ClipPrediction, Prediction, Segment
from mvit_video.prediction.stream import Source, iter_windows, redact_credentials
from mvit_video.prediction.timeline import Timeline
from mvit_video.weights import load_model
from mvit_video.weights.reading import EXPORTED

if TYPE_CHECKING:
    from mvit_video.prediction.explain import Explanation
    from mvit_video.weights.export import ExportedModel

Out = TypeVar("Out")
Files = str | Path | Iterable[str | Path]


class Recognizer:
    """Classifies videos; load it once, call it as often as you like, from any thread.

    The clips of several videos fill each batch, and ``num_workers`` threads decode while the model works.

    >>> recognizer = Recognizer(checkpoint, topk=2)
    >>> cat, dog = recognizer([folder / "cats" / "0.mp4", folder / "dogs and birds" / "0.webm"])
    >>> cat.classes
    ('cats', 'dogs and birds')
    >>> len(cat.clips), len(cat.clips[0].scores)
    (5, 2)
    >>> recognizer.embed(folder / "cats").shape  # for retrieval: six videos
    torch.Size([6, 128])

    Args:
        model: a model, or a file of one: a checkpoint of ``mvit-train`` or PySlowFast, or an exported model.
        topk: how many classes a prediction has.
        min_score: of a model of several classes a video: those below it are left out.
        num_clips, num_crops: views of each video; None: what the model's ``ClipSpec`` says.
        batch_size: clips that go through the model at once.
        num_workers: threads that decode ahead; 0: the calling one.
        device: where the model runs.
        open_file: opens a file for decoding, as ``mvit_video.open_video`` does.

    Raises:
        CheckpointError: the file can't be read. ValueError: a number is out of range.
    """

    def __init__(
        self,
        model: VideoModel | ExportedModel | str | Path,
        *,
        topk: int = 5,
        min_score: float = 0.0,
        num_clips: int | None = None,
        num_crops: int | None = None,
        batch_size: int = 8,
        num_workers: int = 2,
        device: str | torch.device = "cpu",
        open_file: OpenVideo = open_video,
    ) -> None:
        numbers = (("topk", topk, 1), ("batch_size", batch_size, 1), ("num_workers", num_workers, 0))
        for name, value, least in numbers:
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        model = model if isinstance(model, nn.Module) else load_any(model, device)
        self.protocol = change_views(model.protocol, num_clips=num_clips, num_crops=num_crops)
        self.class_names: tuple[str, ...] = tuple(
            model.class_names or map(str, range(model.config.num_classes))
        )
        self.topk, self.batch_size, self.num_workers = topk, batch_size, num_workers
        self.min_score = min_score
        self.device, self.open_file = device, open_file
        self.max_pixels: int = getattr(open_file, "max_pixels", MAX_PIXELS)  # of a frame
        self._model = model.to(device).eval()
        self._lock = threading.Lock()  # threads share a device: one batch at a time is fastest

    def __call__(self, videos: Files | Tensor) -> list[Prediction]:
        """Classify video files or clips.

        >>> clips = torch.randint(256, (3, 3, 8, 72, 96), dtype=torch.uint8)
        >>> [prediction.path for prediction in recognizer(clips)]
        ['clip 0', 'clip 1', 'clip 2']

        Args:
            videos: files, folders, globs and lists, see ``inputs.expand``; or clips (B, 3, T, H, W): uint8
                frames of any size, RGB, or floats prepared as the model wants them.

        Returns:
            One prediction a file or clip, in order; one that can't be read has an ``error``.

        Raises:
            DataError: a path doesn't exist.
        """
        if isinstance(videos, Tensor):
            return [
                replace(self.predict(f"clip {index}", row[None], [(0.0, 0.0)]), clips=())
                for index, row in enumerate(self.scores(videos))
            ]
        return list(self.iterate(expand(videos)))

    def iterate(self, files: Iterable[str]) -> Iterator[Prediction]:
        """Predictions for video files as they are made, in order."""
        crops = self.protocol.num_crops
        for views, scores in self._read_all(files, self._probabilities):
            if views.error is not None:
                yield Prediction(views.video.path, error=views.error)
            else:
                of_clips = scores.unflatten(0, (-1, crops)).mean(1)
                yield self.predict(views.video.path, of_clips, views.spans[::crops])

    def watch(
        self,
        source: Source,
        *,
        length: float,
        stride: float,
        follow: float | None = None,
        drop: bool = False,
    ) -> Iterator[ClipPrediction]:
        """What happens in each window of a video, a stream, a camera or a pipe, as soon as it was seen.

        Windows of several seconds are seen through ``num_clips`` clips. Arguments and errors are those of
        ``stream.iter_windows``; with ``batch_size=1`` no window waits for others. ``drop`` leaves windows out
        where the model is slower than the source, as for cameras.

        >>> video = folder / "cats" / "5.mp4"  # 17 frames at 12 a second
        >>> [(round(w.start, 2), round(w.end, 2)) for w in recognizer.watch(video, length=1, stride=0.25)]
        [(0.0, 1.0), (0.25, 1.25), (0.5, 1.42)]
        """
        for span, scores in self._watch(source, drop=drop, length=length, stride=stride, follow=follow):
            yield ClipPrediction(*span, *self._likeliest(scores))

    def timeline(
        self,
        path: str | Path,
        *,
        length: float,
        stride: float,
        progress: Callable[[float], None] = lambda _: None,
    ) -> Timeline:
        """Scores of all windows of a video file, in bounded memory. Arguments and errors: see ``watch``.

        ``progress`` is told of the last second of each window.
        """
        spans, rows = [], []
        for span, scores in self._watch(path, length=length, stride=stride):
            progress(span[1])
            spans.append(span)
            rows.append(scores)
        several = self._model.multi_label
        return Timeline(str(path), self.class_names, spans, torch.stack(rows), stride, several)

    def _watch(
        self, source: Source, *, drop: bool = False, **windows: Any
    ) -> Iterator[tuple[tuple[float, float], Tensor]]:
        """The span and the scores of each window; ``windows`` as of ``iter_windows``."""
        windows |= {"device": device_of(self.open_file), "max_pixels": self.max_pixels}

        def views() -> Generator[VideoViews, None, None]:
            shrink = partial(resize_for_test, spec=self.protocol)  # as ``read_test_views`` does it
            for window in iter_windows(source, transform=shrink, **windows):
                clips, _ = read_test_views(window, self.protocol)
                video = LabelledVideo(window.path, None, window.path)
                yield VideoViews(video, clips, [(window.start, window.end)] * len(clips))

        ahead = prefetch(views(), 1 if drop else max(self.num_workers, 1), drop=drop)
        for window, scores in in_full_batches(ahead, self._probabilities, self.batch_size):
            if not scores.isfinite().all():
                raise VideoError(redact_credentials(source), NOT_FINITE)
            yield window.spans[0], scores.mean(0)

    def predict(
        self,
        path: str,
        scores: Tensor,
        spans: Sequence[tuple[float, float]],
        segments: tuple[Segment, ...] = (),
    ) -> Prediction:
        """What the scores (clips, num_classes) of a video's clips and their seconds come to."""
        if not scores.isfinite().all():
            return Prediction(path, error=NOT_FINITE)
        clips = tuple(
            ClipPrediction(*span, *self._likeliest(row)) for row, span in zip(scores, spans, strict=True)
        )
        return Prediction(path, *self._likeliest(scores.mean(0)), clips=clips, segments=segments)

    def scores(self, clips: Tensor) -> Tensor:
        """Probabilities (B, num_classes) of clips (B, 3, T, H, W), uint8 or prepared floats."""
        return torch.cat([self._probabilities(part) for part in self._prepare(clips).split(self.batch_size)])

    def embed(self, videos: Files | Tensor) -> Tensor:
        """Vectors (N, C) of length 1 for files or clips, similar where the content is: the head's input.

        Raises:
            VideoError: a file can't be read, or its vectors aren't finite.
            ConfigError: the model is no MViT, or an exported one.
        """
        self._require_mvit("embeddings need")
        if isinstance(videos, Tensor):
            parts = self._prepare(videos).split(self.batch_size)
            return F.normalize(torch.cat([self._features(part) for part in parts]), dim=-1)
        vectors = []
        for views, features in self._read_all(expand(videos), self._features):
            error = views.error or (None if features.isfinite().all() else NOT_FINITE)
            if error is not None:
                raise VideoError(views.video.path, error)
            vectors.append(features.mean(0))
        return F.normalize(torch.stack(vectors), dim=-1)

    def explain(self, path: str | Path, *, method: Literal["gradcam", "rollout"] = "gradcam") -> Explanation:
        """Where and when in a video file the evidence for its class is; see ``prediction.explain``.

        >>> explanation = recognizer.explain(folder / "cats" / "0.mp4")
        >>> explanation.maps.shape, explanation.importance.shape
        (torch.Size([8, 64, 64]), torch.Size([2, 8]))

        Raises:
            VideoError: the file can't be read. ConfigError: the model is no MViT, or an exported one.
        """
        from mvit_video.prediction.explain import explain

        model = self._require_mvit("explanations need")
        with self.open_file(str(path)) as video, self._lock:
            return explain(video, model, method=method, topk=min(self.topk, 3), protocol=self.protocol)

    def _likeliest(self, scores: Tensor) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """The names and scores of the ``topk`` best of (num_classes,) scores, best first."""
        top = scores.topk(min(self.topk, len(self.class_names)))
        if self._model.multi_label:
            count = int((top.values >= self.min_score).sum())
            top = scores.topk(count)
        return tuple(self.class_names[i] for i in top.indices.tolist()), tuple(top.values.tolist())

    def _require_mvit(self, what: str) -> MViT:
        if not isinstance(self._model, MViT):
            raise ConfigError(f"this model gives scores only; {what} the checkpoint of an MViT")
        return self._model

    def _read_all(
        self, files: Iterable[str], run: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[VideoViews, Tensor]]:
        return in_full_batches(threaded_map(self._read, files, self.num_workers), run, self.batch_size)

    def _read(self, path: str) -> VideoViews:
        if is_address(path):
            name = redact_credentials(path)
            reason = "an address isn't a file; add window=SECONDS, and live=true for a stream without an end"
            return VideoViews(LabelledVideo(name, None, name), torch.empty(0), error=reason)
        return ViewDataset([LabelledVideo(path, None, path)], self.protocol, open_file=self.open_file)[0]

    def _prepare(self, clips: Tensor) -> Tensor:
        require_clips(clips)
        return clips if clips.is_floating_point() else centre_views(clips, self.protocol)

    def _probabilities(self, clips: Tensor) -> Tensor:
        return self._model.probabilities(self._run(self._model, clips)).cpu()

    def _features(self, clips: Tensor) -> Tensor:
        return self._run(cast(MViT, self._model).forward_features, clips).cpu()

    @torch.inference_mode()
    def _run(self, forward: Callable[[Tensor], Tensor], clips: Tensor) -> Tensor:
        with self._lock:
            return forward(clips.to(self.device, non_blocking=True)).float()


def load_any(path: str | Path, device: str | torch.device = "cpu") -> VideoModel | ExportedModel:
    """The model in a checkpoint or in a file of ``mvit-export``. Raises CheckpointError."""
    if Path(path).suffix in EXPORTED:
        from mvit_video.weights.export import load_exported

        return load_exported(path, device)
    return load_model(path)


def prefetch(items: Generator[Out, None, None], depth: int, *, drop: bool = False) -> Iterator[Out]:
    """The same items, made by a thread that is up to ``depth`` of them ahead of the reader.

    With ``drop`` it never waits: the oldest item gives way to a new one.
    """
    made: queue.Queue[Any] = queue.Queue(depth)  # of tuples, and at the end an error or None
    stopped = threading.Event()

    def work() -> None:
        end: BaseException | None = None
        try:
            with closing(items):
                for item in items:
                    if drop and made.full():
                        with suppress(queue.Empty):
                            made.get_nowait()
                    made.put((item,))
                    if stopped.is_set():
                        return
        except BaseException as error:
            end = error
        made.put(end)

    # A daemon, for a silent camera or pipe mustn't keep a process that was interrupted.
    worker = threading.Thread(target=work, name="read", daemon=True)
    worker.start()
    try:
        while isinstance(got := made.get(), tuple):
            yield got[0]
        if got is not None:
            raise got
    finally:
        stopped.set()
        with suppress(queue.Empty):
            while True:  # there must be room for what the thread waits to put
                made.get_nowait()
        worker.join(timeout=5)


def predict(
    paths: Files, model: VideoModel | str | Path, *, num_workers: int = 0, **options: Any
) -> list[Prediction]:
    """Classify video files: ``Recognizer`` for a single call; its arguments and errors.

    >>> [prediction] = predict(folder / "cats" / "0.mp4", checkpoint, topk=1)
    >>> prediction.classes
    ('cats',)

    Returns:
        One prediction a file, in order; folders in alphabetical order.
    """
    return Recognizer(model, num_workers=num_workers, **options)(paths)
