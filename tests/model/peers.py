"""Other implementations' models under our names: weights are copied into them, logits compared."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torchvision.models.video import mvit as torchvision_mvit

from mvit_video.model import MViT
from mvit_video.model.config import MViTConfig, plan_blocks

TORCHVISION_NAMES = [
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^cls_token$", "pos_encoding.class_token"),
    (r"^pos_embed_(spatial|temporal|class)$", r"pos_encoding.\1_pos"),
    (r"\.attn\.proj\.", ".attn.project.0."),
    (r"\.attn\.pool_([qkv])\.", r".attn.pool_\1.pool."),
    (r"\.attn\.norm_([qkv])\.", r".attn.pool_\1.norm_act.0."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
    (r"^(blocks\.\d+)\.proj\.", r"\1.project."),
    (r"^head\.projection\.", "head.1."),
]
PYTORCHVIDEO_NAMES = [
    (r"^patch_embed\.proj\.", "patch_embed.patch_model."),
    (r"^(cls_token|pos_embed.*)$", r"cls_positional_encoding.\1"),
    (r"^norm\.", "norm_embed."),
    (r"^norm_stem\.", "norm_embed_stem."),
    (r"^head\.projection\.", "head.proj."),
]


def randomized(model: MViT, std: float = 0.1) -> MViT:
    """Every parameter random, so that none is without effect; in eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise + 1 if re.search(r"norm\w*\.weight$", name) else noise)
    return model.eval()


def renamed(state: dict[str, Tensor], names: list[tuple[str, str]]) -> dict[str, Tensor]:
    result = {}
    for name, value in state.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        result[name] = value
    return result


def torchvision_layout(config: MViTConfig) -> nn.Module:
    """torchvision's MViT of the same layout, freshly initialised as torchvision does."""
    blocks = [
        torchvision_mvit.MSBlockConfig(
            num_heads=plan.num_heads,
            input_channels=plan.dim,
            output_channels=plan.dim_out,
            kernel_q=list(config.pool_kernel) if plan.pools_q else [],
            kernel_kv=list(config.pool_kernel) if plan.pools_kv else [],
            stride_q=list(plan.q_stride) if plan.pools_q else [],
            stride_kv=list(plan.kv_stride) if plan.pools_kv else [],
        )
        for plan in plan_blocks(config)
    ]
    return torchvision_mvit.MViT(
        spatial_size=(config.crop_size, config.crop_size),
        temporal_size=config.num_frames,
        block_setting=blocks,
        residual_pool=config.residual_pooling,
        residual_with_cls_embed=False,
        rel_pos_embed=config.rel_pos_spatial,
        proj_after_attn=config.dim_mul_in_attention,
        dropout=config.head_dropout,
        stochastic_depth_prob=config.drop_path,
        num_classes=config.num_classes,
    )


def torchvision_twin(model: MViT) -> nn.Module:
    """torchvision's MViT of the same layout and weights."""
    twin = torchvision_layout(model.config)
    state = renamed(model.state_dict(), TORCHVISION_NAMES)
    expected = twin.state_dict()
    assert state.keys() == expected.keys()
    twin.load_state_dict({name: value.reshape(expected[name].shape) for name, value in state.items()})
    return twin.eval()


def pytorchvideo_twin(model: MViT) -> nn.Module:
    """pytorchvideo's MViT of the same layout and weights; it has the first version's options alone."""
    from pytorchvideo.models.vision_transformers import create_multiscale_vision_transformers

    config = model.config
    plans = list(plan_blocks(config))
    doubled = [[start, 2.0] for start in config.stage_starts[1:]]
    twin = create_multiscale_vision_transformers(
        spatial_size=config.crop_size,
        temporal_size=config.num_frames,
        cls_embed_on=config.class_token,
        sep_pos_embed=config.abs_pos == "separable",
        depth=len(plans),
        patch_embed_dim=config.embed_dim,
        conv_patch_embed_kernel=config.patch_kernel,
        conv_patch_embed_stride=config.patch_stride,
        conv_patch_embed_padding=tuple(k // 2 for k in config.patch_kernel),
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        qkv_bias=config.qkv_bias,
        pooling_mode=config.pool_mode,
        pool_first=config.pool_first,
        embed_dim_mul=doubled,
        atten_head_mul=doubled,
        pool_q_stride_size=[[i, *p.q_stride] for i, p in enumerate(plans) if p.pools_q],
        pool_kv_stride_size=[[i, *p.kv_stride] for i, p in enumerate(plans) if p.pools_kv],
        pool_kvq_kernel=None if config.pool_kernel == "stride" else config.pool_kernel,
        head_num_classes=config.num_classes,
    )
    twin.load_state_dict(renamed(model.state_dict(), PYTORCHVIDEO_NAMES))
    for module in twin.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6  # as in PySlowFast; pytorchvideo has 1e-5 behind its poolings
    return twin.eval()
