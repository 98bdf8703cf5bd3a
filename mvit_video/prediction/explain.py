"""Grad-CAM and attention rollout: maps over a clip, importance over time, and what is drawn of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvit_video.data.clips import read_test_views
from mvit_video.data.pixels import denormalise
from mvit_video.errors import ConfigError, VideoError
from mvit_video.io.clips import write_clip
from mvit_video.io.console import printable
from mvit_video.io.figures import new_figure
from mvit_video.io.writing import replacing
from mvit_video.model import ClipSpec, MViT
from mvit_video.model.config import Grid
from mvit_video.prediction.prediction import NOT_FINITE

Method = Literal["gradcam", "rollout"]
METHODS: dict[Method, str] = {"gradcam": "Grad-CAM", "rollout": "attention rollout"}
MAX_PICTURES = 8  # of a strip


@dataclass(frozen=True)
class Explanation:
    """Where a model looks in one clip, and when it sees which class.

    Attributes:
        method: "gradcam", of the first of ``class_names``, or "rollout", of all classes alike.
        class_names, scores: the likeliest classes, best first.
        span: first and last second of the clip.
        frames: uint8 (T, 3, H, W), what the model sees.
        maps: (T, H, W), from 0 to 1, how much each pixel counts.
        importance: (classes, T), how much each frame counts for each of ``class_names``; the largest value
            of a class is 1.
    """

    method: Method
    class_names: tuple[str, ...]
    scores: tuple[float, ...]
    span: tuple[float, float]
    frames: Tensor
    maps: Tensor
    importance: Tensor


def explain(
    video: Any,
    model: MViT,
    *,
    method: Method = "gradcam",
    topk: int = 3,
    protocol: ClipSpec | None = None,
) -> Explanation:
    """Explain the prediction for the view of a video that is surest of the video's class.

    Args:
        video: from ``open_video``, or a window of a long one.
        topk: classes whose ``importance`` is told.
        protocol: the views; by default the model's.

    Raises:
        ConfigError: an unknown method, or rollout of a model with attention inside windows.
        VideoError: the video can't be decoded, or its scores aren't finite.
    """
    if method not in get_args(Method):
        raise ConfigError(f"explain={method} is not possible; it takes {', '.join(get_args(Method))}")
    protocol = protocol or model.protocol
    device = next(model.parameters()).device
    clips, spans = read_test_views(video, protocol)
    with torch.inference_mode():
        scores = torch.cat(
            [model.probabilities(model(clip[None].to(device)).float()).cpu() for clip in clips]
        )
    if not scores.isfinite().all():
        raise VideoError(video.path, NOT_FINITE)
    best = scores.mean(0).topk(min(topk, scores.shape[1]))
    view = int(scores[:, best.indices[0]].argmax())
    clip = clips[view, None].to(device)
    labels = best.indices.tolist()
    cams = grad_cam(model, clip, labels)
    size = clip.shape[2:]
    importance = F.interpolate(cams.mean((2, 3))[:, None], size=size[0], mode="linear")[:, 0]
    map_ = cams[0] if method == "gradcam" else attention_rollout(model, clip)
    maps = F.interpolate(map_[None, None], size=tuple(size), mode="trilinear")[0, 0].cpu()
    names = model.class_names or tuple(map(str, range(scores.shape[1])))
    return Explanation(
        method,
        tuple(names[label] for label in labels),
        tuple(best.values.tolist()),
        spans[view],
        denormalise(clips[view].cpu().transpose(0, 1), protocol.mean, protocol.std),
        _unit(maps),
        torch.stack([_unit(row) for row in importance.cpu()]),
    )


def grad_cam(model: MViT, clip: Tensor, labels: Sequence[int]) -> Tensor:
    """Grad-CAM (Selvaraju et al., ICCV 2017, eq. 1 and 2) on the tokens that the last block attends to.

    Args:
        clip: float (1, 3, T, H, W).

    Returns:
        (labels, T', H', W') on the last block's grid of tokens, not negative.
    """
    prefix = model.config.num_prefix_tokens
    last: Any = model.blocks[-1]
    grids, outputs = list[Grid](), list[Tensor]()
    with (
        last.register_forward_pre_hook(lambda _, inputs: grids.append(inputs[1])),
        last.norm1.register_forward_hook(lambda *call: outputs.append(call[2])),
        torch.enable_grad(),
    ):
        # The clip's gradient makes a graph even where all parameters are frozen.
        logits = model(clip.detach().clone().requires_grad_())
    (grid,), (tokens,) = grids, outputs
    maps = []
    for label in labels:
        (gradient,) = torch.autograd.grad(logits[0, label], tokens, retain_graph=True)
        weights = gradient[0, prefix:].mean(0)  # (C,)
        maps.append((tokens[0, prefix:].detach() @ weights).relu().unflatten(0, grid))
    return torch.stack(maps).float()


@torch.inference_mode()
def attention_rollout(model: MViT, clip: Tensor) -> Tensor:
    """Attention rollout (Abnar & Zuidema, ACL 2020) through pooled attention.

    What the head reads is followed back block by block: half of it comes through the skip connection from
    the tokens that were pooled into each query, half through the mean attention of the heads from the tokens
    that were pooled into each key; a pooled token comes from the patch tokens of its stride in equal parts.

    Args:
        clip: float (1, 3, T, H, W).

    Returns:
        (T', H', W') on the grid of patches; with the class token's part it sums to 1.

    Raises:
        ConfigError: the model has attention inside windows.
    """
    calls: list[tuple[Tensor, Grid]] = []
    with ExitStack() as hooks:
        for block in model.blocks:
            attention: Any = block.attn
            hooks.enter_context(attention.register_forward_pre_hook(lambda _, inputs: calls.append(inputs)))
        model(clip)
    prefix = model.config.num_prefix_tokens
    shares: Tensor | None = None
    for block, (tokens, grid) in zip(reversed(model.blocks), reversed(calls), strict=True):
        attention = block.attn
        try:
            weights, q_grid, k_grid = attention.weights(tokens, grid)
        except NotImplementedError:
            raise ConfigError(
                "attention rollout needs a model without windows; explain=gradcam has no such limit"
            ) from None
        if shares is None:
            shares = torch.zeros(weights.shape[1], device=weights.device)
            if prefix and not model.config.mean_pooling:
                shares[0] = 1
            else:
                shares[prefix:] = 1 / len(shares[prefix:])
        by_attention = _spread(shares @ weights[0], k_grid, grid, prefix)
        shares = (_spread(shares, q_grid, grid, prefix) + by_attention) / 2
    assert shares is not None
    return shares[prefix:].unflatten(0, calls[0][1]).float()


def _spread(shares: Tensor, pooled: Grid, grid: Grid, num_prefix_tokens: int) -> Tensor:
    """Hand the shares of pooled tokens down to the patch tokens that they were pooled from."""
    tokens = shares[num_prefix_tokens:].unflatten(0, pooled)
    for axis, (few, many) in enumerate(zip(pooled, grid, strict=True)):
        source = torch.arange(many, device=tokens.device) * few // many
        counts = torch.bincount(source, minlength=few).clamp(min=1)
        shape = [1, 1, 1]
        shape[axis] = few
        tokens = (tokens / counts.reshape(shape)).index_select(axis, source)
    return torch.cat([shares[:num_prefix_tokens], tokens.flatten()])


def _unit(values: Tensor) -> Tensor:
    return values / values.max().clamp(min=1e-12)


def overlays(explanation: Explanation) -> Tensor:
    """uint8 (T, 3, H, W): the frames with the maps over them, from clear to red and yellow."""
    from matplotlib import colormaps

    colours = torch.from_numpy(colormaps["inferno"](explanation.maps.numpy())[..., :3]).permute(0, 3, 1, 2)
    share = 0.7 * explanation.maps.sqrt()[:, None]
    return ((1 - share) * explanation.frames + share * 255 * colours).round().to(torch.uint8)


def write_strip(explanation: Explanation, path: Path) -> None:
    """A picture: frames of the clip, the same with the maps, and below how much each frame counts."""
    num_frames = len(explanation.frames)
    shown = np.linspace(0, num_frames - 1, min(MAX_PICTURES, num_frames)).round().astype(int)
    seconds = np.linspace(*explanation.span, num_frames)
    with new_figure(path, (1.8 * len(shown), 6), 100, keep=True) as figure:
        rows = figure.add_gridspec(3, len(shown))
        for row, frames in enumerate((explanation.frames, overlays(explanation))):
            for column, index in enumerate(shown):
                axes = figure.add_subplot(rows[row, column])
                axes.imshow(frames[index].permute(1, 2, 0).numpy())
                axes.axis("off")
                if row == 0:
                    axes.set_title(f"{seconds[index]:.2f} s", fontsize=9)
        axes = figure.add_subplot(rows[2, :])
        classes = zip(explanation.class_names, explanation.scores, explanation.importance, strict=True)
        for name, score, values in classes:
            axes.plot(seconds, values.numpy(), marker=".", label=f"{printable(name)} ({score:.0%})")
        axes.set(xlabel="seconds", ylabel="frame importance", ylim=(0, 1.05))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.suptitle(f"{METHODS[explanation.method]}; predicted: {printable(explanation.class_names[0])}")


def write_overlay_video(explanation: Explanation, path: Path) -> None:
    """The clip with the maps over it, as long as it was shown."""
    start, end = explanation.span
    num_frames = len(explanation.frames)
    rate = (num_frames - 1) / (end - start) if end > start else 1.0
    with replacing(path, keep=True) as file:
        write_clip(file, overlays(explanation).permute(0, 2, 3, 1).numpy(), rate)
