"""MaskFeat: an MViT that predicts the features of masked parts of a clip (arXiv 2112.09133)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvit_video.model import ClipSpec, MViT, MViTConfig
from mvit_video.model.attention import NORM_EPS
from mvit_video.model.config import Grid, floor_divide, plan_blocks
from mvit_video.pretraining.hog import BINS, CELL, hog_targets, pixel_targets
from mvit_video.weights import LoadReport
from mvit_video.weights.checkpoint import fit_weights, require_head
from mvit_video.weights.formats import adapt_shape
from mvit_video.weights.reading import find_weights, read_checkpoint

Features = Literal["hog", "pixels"]


class MaskFeat(MViT):
    """An MViT without its head, and for each depth a linear one that predicts features of masked tokens.

    Parameter names are those of facebookresearch/SlowFast at 287ec007 (``models/masked.py``).

    Args:
        config: of the backbone; the official one doesn't pool queries where its last stage begins.
        depths: numbers of the blocks whose outputs predict, from 0; the last one is the model's last block.
        features: what is predicted: histograms of oriented gradients, or normalised pixels.

    Raises:
        ValueError: there is no such block, ``features`` is unknown, or tokens don't divide the crop into
            whole cells.
    """

    classifier = "pred_head"

    def __init__(
        self,
        config: MViTConfig,
        *,
        depths: Sequence[int] = (15,),
        features: Features = "hog",
        protocol: ClipSpec | None = None,
    ) -> None:
        super().__init__(config, protocol)
        if not depths or list(depths) != sorted({*depths} & {*range(len(self.blocks))}):
            raise ValueError(f"depths must be rising numbers from 0 to {len(self.blocks) - 1}, got {depths}")
        if features not in ("hog", "pixels"):
            raise ValueError(f"features must be hog or pixels, got {features!r}")
        self.depths, self.features = tuple(depths), features
        del self.norm, self.head, self.blocks[depths[-1] + 1 :]
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        plans = list(plan_blocks(config))
        grids = [floor_divide(plans[depth].grid, plans[depth].q_stride) for depth in depths]
        lengths = [self.target_length(grid, config.crop_size) for grid in grids]
        self.token_side = config.crop_size // grids[-1][1]  # pixels, at the last depth
        self.pred_head = PredictionHeads([plans[depth].dim_out for depth in depths], lengths)

    def target_length(self, grid: Grid, size: int) -> int:
        """How many numbers a token of ``grid`` has to predict of clips of ``size`` pixels.

        Raises ValueError where tokens don't hold whole cells.
        """
        if size % grid[1]:
            raise ValueError(f"crop {size} doesn't divide evenly into {grid[1]} tokens; 224 and 256 do")
        height, width = size // grid[1], size // grid[2]
        if self.features == "pixels":
            return 3 * height * width
        if height < CELL or width < CELL:
            raise ValueError(f"tokens of {height} x {width} pixels hold no whole cells of {CELL} pixels")
        return 3 * BINS * (height // CELL) * (width // CELL)

    def forward(self, clips: Tensor, masks: Tensor) -> list[tuple[Tensor, Tensor]]:  # type: ignore[override]
        """Predicted and true features of the masked tokens, for each depth.

        Args:
            clips: float (B, 3, T, H, W).
            masks: (B, T', h, w), nonzero where masked: T' tokens along time; in space, a token takes the cell
                that it lies in, as with 7 x 7 cells for 14 x 14 tokens.

        Returns:
            for each depth predictions and float32 targets, both (M, features), of all clips' masked tokens.

        Raises:
            ValueError: for other shapes, or where nothing is masked.
        """
        pairs = []
        for predictions, grid in self.predict(clips, masks):
            masked = resize_masks(masks, grid).bool()
            pairs.append((predictions[masked], self.targets(clips, grid)[masked]))
        if not len(pairs[0][0]):
            raise ValueError("nothing is masked")
        return pairs

    def loss(self, clips: Tensor, masks: Tensor) -> Tensor:
        """The mean squared difference of predictions and targets, summed over the depths; see ``forward``."""
        return self.loss_of(self(clips, masks))

    def loss_of(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """``loss`` of what ``forward`` gives."""
        losses = [F.mse_loss(predictions.float(), targets) for predictions, targets in pairs]
        total = torch.stack(losses).sum()
        return total / len(losses) if self.features == "pixels" else total

    def predict(self, clips: Tensor, masks: Tensor) -> list[tuple[Tensor, Grid]]:
        """For each depth, predictions (B, N, features) for all tokens, and their grid; see ``forward``."""
        x, grid = self.patch_embed(clips)
        hidden = resize_masks(masks, grid).unsqueeze(-1).to(x.dtype)  # (B, N, 1)
        if len(hidden) != len(x):
            raise ValueError(f"{len(masks)} masks for {len(clips)} clips")
        x = self.add_positions(x * (1 - hidden) + self.mask_token.to(x.dtype) * hidden, grid)
        found: list[tuple[Tensor, Grid]] = []
        for number, block in enumerate(self.blocks):
            x, grid = self._run(block, x, grid)
            if number in self.depths:
                patch_tokens = x[:, self.config.num_prefix_tokens :]
                found.append((self.pred_head(patch_tokens, len(found)), grid))
        return found

    def targets(self, clips: Tensor, grid: Grid) -> Tensor:
        """What the tokens of ``grid`` have to predict, float32 (B, N, features)."""
        return (hog_targets if self.features == "hog" else pixel_targets)(clips, grid)

    def load_weights(
        self, source: str | Path | Mapping[str, Any], *, head: Literal["strict", "new"] = "strict"
    ) -> LoadReport:
        """Load the weights of a pre-training, official or of this toolkit, strictly.

        Args:
            source: a file or what is in one.
            head: "new" keeps the model's own layers that predict, as for other features.

        Raises:
            CheckpointError: the file can't be read, or names or shapes differ.
            ConfigError: there is no such ``head``.
        """
        require_head(head)
        name = "state dict" if isinstance(source, Mapping) else str(source)
        weights = find_weights(source if isinstance(source, Mapping) else read_checkpoint(source), name)[0]
        expected = self.state_dict()
        own = [key for key in expected if head == "new" and key.startswith("pred_head.")]
        # Officially, the constants of HOG lie among the weights.
        left_out = ("hogs.", "pred_head.") if own else "hogs."
        weights = {key: value for key, value in weights.items() if not key.startswith(left_out)}
        adapt = functools.partial(adapt_shape, grid=self.grid)
        fitted, report = fit_weights(expected, weights, name, kept=own, adapt=adapt)
        self.load_state_dict(fitted, strict=False)
        return report


class PredictionHeads(nn.Module):
    """LayerNorm and one linear layer for each depth: tokens (B, N, C) -> (B, N, features)."""

    def __init__(self, dims: Sequence[int], num_features: Sequence[int]) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim, eps=NORM_EPS)) for dim in dims)
        self.projections = nn.ModuleList(
            nn.Linear(dim, length) for dim, length in zip(dims, num_features, strict=True)
        )
        for projection in self.projections:
            assert isinstance(projection, nn.Linear)
            nn.init.trunc_normal_(projection.weight, std=0.02)
            nn.init.zeros_(projection.bias)

    def forward(self, tokens: Tensor, number: int) -> Tensor:
        return self.projections[number](self.transforms[number](tokens))


def resize_masks(masks: Tensor, grid: Grid) -> Tensor:
    """Masks (B, T', h, w) for the tokens of a grid, float (B, T' * H' * W')."""
    if masks.ndim != 4 or masks.shape[1] != grid[0]:
        raise ValueError(f"expected masks (B, {grid[0]}, h, w) for {grid} tokens, got {tuple(masks.shape)}")
    return F.interpolate(masks.float(), size=grid[1:], mode="nearest").flatten(1)
