"""mvit-info: what a model is made of, and what this machine can do (``mvit-info system``)."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import av
import torch
from omegaconf import DictConfig

from mvit_video.cli import app
from mvit_video.data.decode.choice import why_no_nvdec
from mvit_video.data.decode.cuda import why_no_gpu
from mvit_video.data.decode.engines import import_decord, import_torchcodec
from mvit_video.errors import ConfigError
from mvit_video.io.console import print_table
from mvit_video.model import MViT
from mvit_video.model.describe import describe

_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mjpeg", "prores")
_NVDEC_CODECS = ("h264", "hevc", "vp8", "vp9", "av1")  # those that the toolkit decodes there


class Row(NamedTuple):
    """One finding: what was looked for, what there is, and how to get what is missing."""

    what: str
    found: str
    remedy: str = ""


def print_system() -> None:
    """Print what ``describe_system`` finds."""
    print_table("", ("", "here", "what is missing, and how to get it"), describe_system())


def print_model(config: DictConfig) -> None:
    """Print the stages of the model that ``config.model`` names, its parameters and its cost per view."""
    with torch.device("meta"):
        model = app.build(config.model, weights=None)
    if not isinstance(model, MViT):
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{config.model.name}: {parameters:,} parameters; {model.protocol}")
        return
    described = describe(model.config)
    rows = [
        (
            number,
            stage.blocks,
            "x".join(map(str, stage.tokens)),
            stage.channels,
            stage.num_heads,
            "x".join(map(str, stage.q_stride)),
            "x".join(map(str, stage.kv_stride)),
            round(stage.gmacs, 2),
        )
        for number, stage in enumerate(described.stages, start=1)
    ]
    print_table(
        config.model.name,
        ("stage", "blocks", "tokens", "channels", "heads", "q stride", "kv stride", "GMACs"),
        rows,
    )
    print(f"{described.parameters:,} parameters, {described.gmacs:.2f} GMACs a view; {model.protocol}")


def describe_system() -> list[Row]:
    """Versions, GPU, and each decoder with its codecs, as this process finds them."""
    return [
        Row("machine", f"{platform.machine()}, {os.cpu_count()} CPU cores, {platform.system()}"),
        Row("Python", platform.python_version()),
        Row("PyTorch", torch.__version__),
        _gpu(),
        Row("PyAV", f"{av.__version__}, FFmpeg {av.ffmpeg_version_info}"),
        Row("PyAV on the CPU", ", ".join(codec for codec in _CODECS if _decodes(codec))),
        _nvdec(),
        _engine("torchcodec", import_torchcodec),
        _engine("decord", import_decord),
    ]


def _gpu() -> Row:
    problem = why_no_gpu()
    if problem is not None:
        return Row("GPU", "none", problem)
    return Row("GPU", ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))


def _nvdec() -> Row:
    problem = why_no_nvdec()
    if problem is not None:
        return Row("PyAV on the GPU (NVDEC)", "no", problem)
    return Row("PyAV on the GPU (NVDEC)", ", ".join(_NVDEC_CODECS), "other codecs are decoded on the CPU")


def _engine(name: str, load: Callable[[], object]) -> Row:
    try:
        load()
    except ConfigError as error:
        return Row(name, "no", str(error))
    return Row(name, metadata.version(name))


def _decodes(codec: str) -> bool:
    try:
        av.Codec(codec, "r")
    except av.codec.codec.UnknownCodecError:
        return False
    return True
