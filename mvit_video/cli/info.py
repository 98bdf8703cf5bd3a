"""mvit-info: what a model is made of, and what this machine can do (``mvit-info system``)."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib import metadata

import av
import torch
from omegaconf import DictConfig

from mvit_video.cli import app
from mvit_video.data.decode.choice import why_no_gpu, why_no_nvdec
from mvit_video.data.decode.engines import import_decord, import_torchcodec
from mvit_video.errors import ConfigError
from mvit_video.io.console import print_table
from mvit_video.model import MViT
from mvit_video.model.describe import describe

_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mjpeg", "prores")
_NVDEC_CODECS = ("h264", "hevc", "vp8", "vp9", "av1")  # those that the toolkit decodes there


def print_model(config: DictConfig) -> None:
    """Print the stages of the model that ``config.model`` names, its parameters and its cost per view."""
    with torch.device("meta"):
        model = app.build(config.model, weights=None)
    if not isinstance(model, MViT):
        parameters = sum(parameter.numel() for parameter in model.parameters())
        clips = f"; {model.protocol}" if hasattr(model, "protocol") else ""  # a detector takes pictures
        print(f"{config.model.name}: {parameters:,} parameters{clips}")
        return
    described = describe(model.config)
    rows = []
    for number, stage in enumerate(described.stages, start=1):
        grids = ["x".join(map(str, grid)) for grid in (stage.tokens, stage.q_stride, stage.kv_stride)]
        size = (stage.blocks, grids[0], stage.channels, stage.num_heads)
        rows.append((number, *size, *grids[1:], round(stage.gmacs, 2)))
    columns = ("stage", "blocks", "tokens", "channels", "heads", "q stride", "kv stride", "GMACs")
    print_table(config.model.name, columns, rows)
    print(f"{described.parameters:,} parameters, {described.gmacs:.2f} GMACs a view; {model.protocol}")


def print_system(_: DictConfig) -> None:
    """Print versions, GPU, and each decoder with its codecs, as this process finds them."""
    no_gpu, no_nvdec = why_no_gpu(), why_no_nvdec()
    gpus = [] if no_gpu else [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    nvdec = ("no", no_nvdec) if no_nvdec else (", ".join(_NVDEC_CODECS), "the CPU decodes other codecs")
    rows = [
        ("machine", f"{platform.machine()}, {os.cpu_count()} CPU cores, {platform.system()}", ""),
        ("Python", platform.python_version(), ""),
        ("PyTorch", torch.__version__, ""),
        ("GPU", ", ".join(gpus) or "none", no_gpu or ""),
        ("PyAV", f"{av.__version__}, FFmpeg {av.ffmpeg_version_info}", ""),
        ("PyAV on the CPU", ", ".join(codec for codec in _CODECS if _decodes(codec)), ""),
        ("PyAV on the GPU (NVDEC)", *nvdec),
        ("torchcodec", *_engine("torchcodec", import_torchcodec)),
        ("decord", *_engine("decord", import_decord)),
    ]
    print_table("", ("", "here", "what is missing, and how to get it"), rows)


def _engine(name: str, load: Callable[[], object]) -> tuple[str, str]:
    try:
        load()
    except ConfigError as error:
        return "no", str(error)
    return metadata.version(name), ""


def _decodes(codec: str) -> bool:
    try:
        av.Codec(codec, "r")
    except av.codec.codec.UnknownCodecError:
        return False
    return True
