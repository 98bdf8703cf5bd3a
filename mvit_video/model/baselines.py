"""Other people's models to compare with, from pytorchvideo and torchvision, behind the same interface."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mvit_video.errors import ConfigError, look_up
from mvit_video.model.base import VideoModel, require_clips
from mvit_video.model.clip_spec import MAX_SIZE, ClipSpec
from mvit_video.model.fields import check_types

_SLOWFAST_ALPHA = 4  # the fast pathway has so many times the frames of the slow one

_TEN_BY_THREE = ClipSpec(num_clips=10, num_crops=3)
_TORCHVISION = ClipSpec(sampling="torchvision", pixels="torchvision")
# Protocols as published: pytorchvideo's model zoo, torchvision's weight enumerations.
BASELINES = {
    "x3d_s": replace(_TEN_BY_THREE, clip_frames=13, stride=6, short_side=182, crop=160),
    "slow_r50": replace(_TEN_BY_THREE, clip_frames=8, stride=8),
    "slowfast_r50": replace(_TEN_BY_THREE, clip_frames=32, stride=2),
    "mvit_base_16x4": ClipSpec(clip_frames=16, stride=4),
    "mvit_v2_s": _TORCHVISION,
    "r2plus1d_18": replace(
        _TORCHVISION,
        stride=2,
        short_side=128,
        crop=112,
        mean=(0.43216, 0.394666, 0.37645),
        std=(0.22803, 0.22145, 0.216989),
    ),
}


@dataclass(frozen=True)
class BaselineConfig:
    """What shapes a baseline; ``name`` is one of ``BASELINES``, sizes are in frames and pixels.

    ``head_dropout`` None: as published.
    """

    name: str
    num_classes: int = 400
    num_frames: int = 16
    crop_size: int = 224
    head_dropout: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        look_up(self.name, BASELINES, "baseline")
        for field in ("num_frames", "crop_size"):
            if not 1 <= getattr(self, field) <= MAX_SIZE:
                raise ValueError(f"{field} must be from 1 to {MAX_SIZE}, got {getattr(self, field)}")
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be positive, got {self.num_classes}")
        if self.name == "slowfast_r50" and self.num_frames % _SLOWFAST_ALPHA:
            raise ValueError(f"num_frames must be a multiple of {_SLOWFAST_ALPHA}, got {self.num_frames}")
        if self.head_dropout is not None and not 0 <= self.head_dropout < 1:
            raise ValueError(f"head_dropout must be in [0, 1), got {self.head_dropout}")
        if self.name == "r2plus1d_18" and self.head_dropout:
            raise ValueError(f"r2plus1d_18 has no head_dropout, got {self.head_dropout}")


class Baseline(VideoModel):
    """A network ``net`` of another library; float clips (B, 3, T, H, W) -> logits (B, num_classes)."""

    config: BaselineConfig

    def __init__(self, config: BaselineConfig, protocol: ClipSpec) -> None:
        super().__init__()
        self.config, self.protocol, self.class_names = config, protocol, None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of scripted activations in pytorchvideo
            self.net = _build(config)
        linear = [name for name, module in self.named_modules() if isinstance(module, nn.Linear)]
        self.classifier = linear[-1]

    def forward(self, clips: Tensor) -> Tensor:
        require_clips(clips)
        if self.config.name != "slowfast_r50":
            return self.net(clips)
        frames = clips.shape[2]
        slow = torch.linspace(0, frames - 1, frames // _SLOWFAST_ALPHA, device=clips.device).long()
        return self.net([clips.index_select(2, slow), clips])


def create_baseline(
    name: str,
    num_classes: int | None = None,
    *,
    num_frames: int | None = None,
    crop_size: int | None = None,
    head_dropout: float | None = None,
    weights: str | None = None,
) -> Baseline:
    """Build a baseline with fresh weights; None leaves what it was published with.

    Raises:
        ConfigError: there is no such baseline, or published weights are asked for by name.
        ValueError: a value is out of range.
    """
    if weights is not None:
        raise ConfigError(f"weights of {name} aren't known by name; give their file with weights=FILE")
    spec = BASELINES.get(name, ClipSpec())
    config = BaselineConfig(
        name,
        400 if num_classes is None else num_classes,
        spec.clip_frames if num_frames is None else num_frames,
        spec.crop if crop_size is None else crop_size,
        head_dropout,
    )
    short_side = round(spec.short_side * config.crop_size / spec.crop)
    spec = replace(spec, clip_frames=config.num_frames, crop=config.crop_size, short_side=short_side)
    return Baseline(config, spec)


def _build(config: BaselineConfig) -> nn.Module:
    """The network with fresh weights. Libraries are imported here, as most of the time none is needed."""
    frames, crop, num_classes = config.num_frames, config.crop_size, config.num_classes
    dropout = 0.5 if config.head_dropout is None else config.head_dropout
    last_side = -(-crop // 32)  # pixels of the last feature map of a ResNet
    match config.name:
        case "x3d_s":
            from pytorchvideo.models.x3d import create_x3d

            return create_x3d(
                input_clip_length=frames,
                input_crop_size=crop,
                model_num_class=num_classes,
                dropout_rate=dropout,
                head_activation=None,
            )
        case "slow_r50":
            from pytorchvideo.models.resnet import create_resnet

            return create_resnet(
                stem_conv_kernel_size=(1, 7, 7),
                head_pool_kernel_size=(frames, last_side, last_side),
                model_num_class=num_classes,
                dropout_rate=dropout,
            )
        case "slowfast_r50":
            from pytorchvideo.models.slowfast import create_slowfast

            pools = tuple((length, last_side, last_side) for length in (frames // _SLOWFAST_ALPHA, frames))
            return create_slowfast(
                slowfast_fusion_conv_kernel_size=(7, 1, 1),
                head_pool_kernel_sizes=pools,
                model_num_class=num_classes,
                dropout_rate=dropout,
            )
        case "mvit_base_16x4":
            from pytorchvideo.models.hub.vision_transformers import mvit_video_base_config
            from pytorchvideo.models.vision_transformers import create_multiscale_vision_transformers

            sizes = {"spatial_size": crop, "temporal_size": frames}
            with torch.device("cpu"):  # it reads values of tensors while it is built
                return create_multiscale_vision_transformers(
                    **mvit_video_base_config | sizes,
                    droppath_rate_block=0.2,
                    head_dropout_rate=dropout,
                    head_num_classes=num_classes,
                )
        case "mvit_v2_s":
            from torchvision.models.video import mvit_v2_s

            net = mvit_v2_s(num_classes=num_classes, dropout=dropout)
            # It interpolates its tables to the grid of tokens, which it takes from here.
            net.pos_encoding.temporal_size = -(-frames // 2)
            net.pos_encoding.spatial_size = (-(-crop // 4),) * 2
            return net
        case _:
            from torchvision.models.video import r2plus1d_18

            return r2plus1d_18(num_classes=num_classes)
