"""Files beside the predictions: subtitles, pictures and videos, under a name of its own for each video.

What lies there with another content may be someone's work, such as the subtitles of a film: it is kept as
``<name>.former``.
"""

from __future__ import annotations

import hashlib
import html
import logging
import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from mvit_video.errors import VideoError
from mvit_video.io.console import caption
from mvit_video.io.writing import replacing
from mvit_video.prediction.explain import Explanation, write_overlay_video, write_strip
from mvit_video.prediction.prediction import Segment
from mvit_video.prediction.render import annotate_video, plot_timeline
from mvit_video.prediction.stream import redact_credentials
from mvit_video.prediction.timeline import Timeline

log = logging.getLogger(__name__)

_MAX_NAME = 200  # bytes, so that a suffix has room on every file system


def output_names(videos: Sequence[str]) -> dict[str, Path]:
    """For each video a relative path without suffix, all of them different."""
    shown = [os.path.abspath(redact_credentials(video)) for video in videos]  # noqa: PTH100 (links stay)
    common = os.path.commonpath(map(os.path.dirname, shown)) if shown else ""
    full = {video: Path(path).relative_to(common) for video, path in zip(videos, shown, strict=True)}
    stems = Counter(path.with_suffix("") for path in full.values())
    # a.mp4 and a.webm side by side keep their suffixes, and so does what would be called like one of these
    clashing = {path for path in full.values() if stems[path.with_suffix("")] > 1}
    names = {
        video: path if {path, path.with_suffix("")} & clashing else path.with_suffix("")
        for video, path in full.items()
    }
    if len(set(names.values())) < len(set(full.values())):
        names = full
    return {video: _shortened(name) for video, name in names.items()}


def _shortened(path: Path) -> Path:
    name = os.fsencode(path.name)
    if len(name) <= _MAX_NAME:
        return path
    kept = name[:_MAX_NAME].decode("utf-8", "ignore")
    return path.with_name(f"{kept}-{hashlib.sha256(name).hexdigest()[:8]}")


def save_timeline(
    timeline: Timeline, segments: Sequence[Segment], name: Path, kinds: Collection[str], *, max_pixels: int
) -> None:
    """Write those ``kinds`` of "srt", "vtt", "png" and "video" (an annotated copy) that are asked for.

    Args:
        name: of the files, without suffix.
        max_pixels: of a frame of the video.

    Raises OSError. A video that can't be annotated is only logged.
    """
    write_subtitles(segments, name, kinds)
    if "png" in kinds:
        plot_timeline(timeline, segments, Path(f"{name}.timeline.png"))
    if "video" in kinds:
        try:
            annotate_video(timeline.path, segments, Path(f"{name}.annotated.mp4"), max_pixels=max_pixels)
        except VideoError as error:
            log.warning("%s", error)


def save_explanation(explanation: Explanation, name: Path) -> tuple[Path, Path]:
    """Write a picture and a video of an explanation, and tell their paths. Raises OSError."""
    strip, overlay = (Path(f"{name}.{explanation.method}.{suffix}") for suffix in ("png", "mp4"))
    write_strip(explanation, strip)
    write_overlay_video(explanation, overlay)
    return strip, overlay


def write_subtitles(segments: Sequence[Segment], name: Path, kinds: Collection[str]) -> None:
    """A subtitle for each segment: SubRip if "srt" is among ``kinds``, WebVTT if "vtt" is."""
    for kind in sorted({"srt", "vtt"} & set(kinds)):
        is_vtt = kind == "vtt"
        blocks = ["WEBVTT\n"] * is_vtt
        for number, segment in enumerate(segments, start=1):
            start, end = (_clock(second, "." if is_vtt else ",") for second in (segment.start, segment.end))
            line = f"{caption(segment.class_name)} ({segment.score:.0%})"
            cue = f"{start} --> {end}\n{html.escape(line, quote=False) if is_vtt else line}\n"
            blocks.append(cue if is_vtt else f"{number}\n{cue}")
        with replacing(f"{name}.{kind}", "w", keep=True) as file:
            file.write("\n".join(blocks))


def _clock(seconds: float, point: str) -> str:
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
