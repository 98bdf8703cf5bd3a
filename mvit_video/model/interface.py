"""What timm's users expect of a model, by timm's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from mvit_video.model.config import plan_blocks

if TYPE_CHECKING:
    from mvit_video.model.mvit import MViT


class TimmInterface:
    """Methods of ``MViT`` that look at it from outside."""

    @property
    def num_classes(self: Any) -> int:
        return self.config.num_classes

    @property
    def num_features(self: Any) -> int:
        """Channels of what the head reads, ``forward_features``."""
        return self.norm.normalized_shape[0]

    def get_classifier(self: Any) -> nn.Linear:
        return self.head.projection

    def reset_classifier(self: Any, num_classes: int) -> None:
        """Give the model a new head, initialised as ever, for other classes; their names are unknown."""
        model = self  # mypy takes assignments to self for declarations
        old = model.head.projection
        new = nn.Linear(old.in_features, num_classes, device=old.weight.device, dtype=old.weight.dtype)
        nn.init.trunc_normal_(new.weight, std=0.02)
        nn.init.constant_(new.bias, 0.02)
        model.head.projection = new
        model.config, model.class_names = replace(model.config, num_classes=num_classes), None

    def no_weight_decay(self: Any) -> set[str]:
        """Parameters that timm's optimizers leave without decay. (The official video recipe decays them.)"""
        names = [name for name, _ in self.named_parameters()]
        return {name for name in names if name.startswith(("pos_embed", "cls_token")) or "rel_pos" in name}

    def set_grad_checkpointing(self: Any, enable: bool = True) -> None:
        """Keep the inputs of blocks alone for the backward pass, which computes the rest again."""
        self.config = replace(self.config, checkpoint_blocks=enable)

    def forward_intermediates(
        self: Any,
        clips: Tensor,
        indices: Sequence[int] | int | None = None,
        *,
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of stages, (B, C, T', H', W') each, and what the head reads, (B, C).

        Args:
            clips: float (B, 3, T, H, W).
            indices: of the stages, from 0; a number n: the last n; None: all.
            intermediates_only: give the maps alone.

        Raises:
            IndexError: there is no such stage.
        """
        tokens, maps = self.run_blocks(clips, after=self.config.stage_ends)
        if isinstance(indices, int):
            maps = maps[-indices:]
        elif indices is not None:
            maps = [maps[index] for index in indices]
        return maps if intermediates_only else (self.pool_tokens(tokens), maps)


class StageFeatures(nn.Module):
    """A model without its head: float clips (B, 3, T, H, W) -> the maps of stages, (B, C, T', H', W') each.

    Attributes:
        feature_info: of each map, the channels ("num_chs") and the stride in frames and pixels ("reduction").

    Raises:
        IndexError: ``out_indices`` (None: all) names a stage that isn't there.
    """

    def __init__(self, model: MViT, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        model.head = cast(Any, nn.Identity())
        self.model = model
        info: list[dict[str, Any]] = []
        stride = model.config.patch_stride
        for index, plan in enumerate(plan_blocks(model.config)):
            stride = (
                stride[0] * plan.q_stride[0],
                stride[1] * plan.q_stride[1],
                stride[2] * plan.q_stride[2],
            )
            if index in model.config.stage_ends:
                info.append({"num_chs": plan.dim_out, "reduction": stride, "module": f"blocks.{index}"})
        self.out_indices = tuple(range(len(info)) if out_indices is None else out_indices)
        self.feature_info = [info[index] for index in self.out_indices]

    def forward(self, clips: Tensor) -> list[Tensor]:
        maps = self.model.forward_stages(clips)
        return [maps[index] for index in self.out_indices]
