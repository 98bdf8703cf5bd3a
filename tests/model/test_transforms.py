"""The CPU kernels step aside: where oneDNN lacks a product, in transforms, for hooks and replaced layers."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from peers import randomized
from plain_attention import PlainAttention
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from mvit_video.model import MViT, MViTConfig, kernels

TINY = MViTConfig(
    num_classes=5,
    num_frames=4,
    crop_size=32,
    embed_dim=16,
    stages=(1, 1),
    kv_stride=(1, 4, 4),
    window=(1, 4, 4),
    drop_path=0.0,
    head_dropout=0.0,
)

PASSES = """
import torch
from mvit_video.weights import create_model

torch.manual_seed(0)
model = create_model("mvitv2_nano_8x4", num_classes=5)
clips = torch.randn(2, 3, 8, 64, 64)
expected = model(clips)
for dtype in (torch.float32, torch.bfloat16):
    model.to(dtype)
    with torch.inference_mode():
        found = model(clips.to(dtype)).float()
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03)
    model(clips.to(dtype)).float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
model.float()
with torch.autocast("cpu", torch.bfloat16):
    found = model(clips).float()
torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03)
found.square().sum().backward()
"""


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_machines_without_bf16_products(isa: str) -> None:
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    subprocess.run([sys.executable, "-c", PASSES], env=environment, check=True, timeout=300)


@pytest.fixture
def model() -> MViT:
    return randomized(MViT(TINY))


@pytest.fixture
def plain(model: MViT) -> MViT:
    """The same model without a kernel: the paper's form, and torch's own linear layers."""
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        if type(module) is kernels.Linear:
            module.__class__ = nn.Linear
        if hasattr(module, "attn"):
            module.attn = PlainAttention(module.attn)
    return plain


def clips(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, 4, 32, 32, generator=torch.Generator().manual_seed(seed))


def through_jvp(model: MViT) -> Tensor:
    return jvp(model, (clips(),), (clips(seed=2),))[1]


def through_jvp_of_weights(model: MViT) -> Tensor:
    weights = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: torch.full_like(p, 0.01) for name, p in weights.items()}
    return jvp(lambda w: functional_call(model, w, clips()), (weights,), (tangents,))[1]


def through_dual_numbers(model: MViT) -> Tensor:
    with fwAD.dual_level():
        return fwAD.unpack_dual(model(fwAD.make_dual(clips(), clips(seed=2)))).tangent


def through_dual_weights(model: MViT) -> Tensor:
    weights = {name: p.detach() for name, p in model.named_parameters()}
    with fwAD.dual_level():
        dual = {name: fwAD.make_dual(p, torch.full_like(p, 0.01)) for name, p in weights.items()}
        return fwAD.unpack_dual(functional_call(model, dual, clips())).tangent


def through_vmap(model: MViT) -> Tensor:
    return vmap(lambda clip: model(clip[None])[0])(clips(3))


def through_grad(model: MViT) -> Tensor:
    return grad(lambda x: model(x).square().sum())(clips())


def through_gradients_of_each_clip(model: MViT) -> Tensor:
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], clip: Tensor) -> Tensor:
        return functional_call(model, weights, clip[None]).square().sum()

    gradients = vmap(grad(loss), (None, 0))(weights, clips(3))
    return torch.cat([x.flatten(1) for x in gradients.values()], 1)


def through_double_backward(model: MViT) -> Tensor:
    x = clips().to(model.cls_token.dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    gradients = torch.autograd.grad(gradient.square().sum(), [x, *model.parameters()], allow_unused=True)
    return torch.cat([g.flatten() for g in gradients if g is not None])


WAYS = {
    function.__name__.removeprefix("through_"): function
    for function in list(globals().values())
    if getattr(function, "__name__", "").startswith("through_")
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_transforms_give_what_plain_operations_give(
    model: MViT, plain: MViT, way: Callable[[MViT], Tensor]
) -> None:
    expected = way(plain.double() if way is through_double_backward else plain)
    found = way(model.double() if way is through_double_backward else model)
    assert expected.abs().max() > 1e-3
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, atol=2e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("way", [through_vmap, through_grad])
def test_compiled_transforms(model: MViT, way: Callable[[MViT], Tensor]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(way, backend="eager")
    torch.testing.assert_close(compiled(model), way(model), atol=1e-5, rtol=1e-4)


class LoRA(nn.Module):
    """A frozen layer and a product of two narrow matrices beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


LAYERS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "attn.pool_q", "attn.pool_k", "attn.pool_v"]


@torch.inference_mode()
@pytest.mark.parametrize("layer", [name for name in LAYERS if "pool" not in name])
def test_replaced_layers_are_called(model: MViT, layer: str) -> None:
    block, before = model.blocks[1], model(clips())
    parent, name = layer.split(".")
    given = block.get_submodule(layer)
    replaced = LoRA(given)
    setattr(block.get_submodule(parent), name, replaced)
    merged = copy.deepcopy(given)
    merged.weight += replaced.up.weight @ replaced.down.weight
    found = model(clips())
    setattr(block.get_submodule(parent), name, merged)
    torch.testing.assert_close(found, model(clips()), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, before, atol=1e-4)


def by_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda _, given, result: result.flip(-1))


def by_hook_before(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda _, given: (given[0].flip(-1),))


def by_method(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *given: forward(*given).flip(-1)  # type: ignore[method-assign]


def by_parametrization(module: nn.Module) -> None:
    class Flipped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flip(-1)

    nn.utils.parametrize.register_parametrization(module, "weight", Flipped())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", [by_hook, by_hook_before, by_method, by_parametrization])
@pytest.mark.parametrize("layer", LAYERS)
def test_changed_layers_are_not_bypassed(
    model: MViT, layer: str, change: Callable[[nn.Module], Any], training: bool
) -> None:
    with torch.set_grad_enabled(training):
        before = model(clips())
        change(model.blocks[0].get_submodule(layer))  # of the last, not everything is read
        assert not torch.allclose(model(clips()), before, atol=1e-4)


@pytest.mark.parametrize("layer", ["attn.qkv", "mlp.fc1", "mlp.fc2", "attn.pool_k"])
def test_backward_hooks_are_called(model: MViT, layer: str) -> None:
    called = []
    model.blocks[1].get_submodule(layer).register_full_backward_hook(lambda *given: called.append(given))
    model(clips()).sum().backward()
    assert len(called) == 1


def test_hooks_on_all_modules_see_every_layer(model: MViT) -> None:
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with torch.inference_mode():
            model(clips())
    finally:
        handle.remove()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv3d)]
    assert {id(m) for m in layers} <= {id(m) for m in seen}


class Scaled(Tensor):
    """A subclass of tensors, as quantised or sharded weights are."""


def test_subclasses_of_tensors_are_left_to_torch(model: MViT) -> None:
    expected = model(clips())
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().as_subclass(Scaled))
    torch.testing.assert_close(model(clips()).as_subclass(Tensor), expected, atol=1e-5, rtol=1e-4)


def test_autocast_leaves_float64_alone(model: MViT) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert model.double()(clips().double()).dtype == torch.float64
