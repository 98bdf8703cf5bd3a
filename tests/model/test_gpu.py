"""What a GPU would be given to do, on any machine: passes over fake CUDA tensors, operation by operation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mvit_video.model import MViT, positions
from mvit_video.weights import create_model

NOTHING_TO_RUN = ("empty", "detach", "view", "lift_fresh", "sym_", "prim")
SYNCHRONISES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal.default")


class Operations(TorchDispatchMode):
    """Counts what runs on the device, copies from the host, and what the host would have to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.host_copies, self.synchronisations = 0, [], []
        self.convolutions: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        self.kernels += not func.is_view and not any(part in name for part in NOTHING_TO_RUN)
        is_copy = "_to_copy" in name or "copy_" in name  # others take a scalar as it is
        tensors = [x for x in (*args, result) if isinstance(x, Tensor) and (x.ndim or is_copy)]
        devices = {x.device.type for x in tensors}
        if len(devices) > 1:
            self.host_copies.append(name)
        on_device = any(isinstance(x, Tensor) and x.device.type != "cpu" for x in args)
        if on_device and any(part in name for part in SYNCHRONISES):
            self.synchronisations.append(name)
        if "convolution" in name and "backward" not in name and args[-1] > 1:
            self.convolutions.append(args[0])
        return result


@contextlib.contextmanager
def on_fake_gpu(name: str, batch: int = 1, **overrides: Any) -> Iterator[tuple[MViT, Tensor]]:
    with torch.device("meta"):
        model = create_model(name, **overrides)
    with FakeTensorMode():
        for module in model.modules():
            for key, parameter in module.named_parameters(recurse=False):
                fake = torch.empty(parameter.shape, device="cuda", dtype=parameter.dtype)
                module.register_parameter(key, torch.nn.Parameter(fake))
        yield model, torch.empty(batch, 3, *model.config.input_size, device="cuda")


@pytest.fixture
def autocast() -> Iterator[None]:
    # torch.autocast("cuda") switches itself off where there is no GPU.
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("batch", [1, 2])
def test_kernels_of_a_forward_pass_are_no_more_than_torchvisions(batch: int) -> None:
    with on_fake_gpu("mvitv2_s_16x4", batch) as (model, clips), torch.no_grad():
        model.eval()
        for _ in range(2):  # the first makes what is kept
            with Operations() as seen:
                model(clips)
            assert 300 < seen.kernels <= 687
            assert seen.host_copies == seen.synchronisations == []


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"attention": "pooling_hybrid_window", "window": (4, 4, 4)},
        {"attention": "shifted_window", "window": (3, 5, 5), "crop_size": 80},
        {"rel_pos_joint": "space"},
        {"rel_pos_joint": "space_time"},
        {"crop_size": 78, "num_frames": 6},  # odd ratios of queries and keys
        {"checkpoint_blocks": True},
    ],
    ids=str,
)
def test_a_training_step_leaves_the_host_alone(overrides: dict[str, Any]) -> None:
    options = {"drop_path": 0.2, "dropout": 0.1, "head_dropout": 0.5} | overrides
    # torch's engine wants a real GPU for gradients; the device "meta" has the same operations and no values.
    with torch.device("meta"):
        model = create_model("mvitv2_nano_8x4", **options)
    for _ in range(2):
        clips = torch.empty(2, 3, *model.config.input_size, device="meta")
        with Operations() as seen:
            model(clips).float().square().mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert seen.kernels > 100
        assert seen.host_copies == seen.synchronisations == []


@pytest.mark.parametrize("name", ["mvitv2_s_16x4", "mvitv2_b_32x3", "mvitv2_l_40x3"])
@pytest.mark.usefixtures("autocast")
def test_fused_attention_gets_what_it_is_fast_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        seen.append((q, k, v, mask))
        return q.new_empty(*q.shape[:3], v.shape[3])

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with on_fake_gpu(name) as (model, clips), torch.no_grad():
        model.eval()(clips)
    assert len(seen) == len(model.blocks)
    assert all(mask is None for *_, mask in seen)
    for *qkv, _ in seen:
        (width,) = {x.shape[-1] for x in qkv}
        assert width % 8 == 0
        assert width <= 160
        assert {x.dtype for x in qkv} == {torch.bfloat16}
        assert all(x.is_contiguous() for x in qkv)


@pytest.mark.usefixtures("autocast")
def test_queries_keys_and_values_are_of_the_compute_type() -> None:
    with on_fake_gpu("mvitv2_nano_8x4") as (model, clips), torch.no_grad():
        x, grid = model.embed(clips)
        for block in model.blocks:
            q, k, v, _, _ = block.attn._queries_keys_values(block.norm1(x), grid)
            assert q.dtype == k.dtype == v.dtype == torch.bfloat16
            x, grid = block(x, grid)


def test_poolings_are_contiguous_where_cudas_own_kernel_takes_them() -> None:
    with on_fake_gpu("mvitv2_nano_8x4", 2) as (model, clips), Operations() as seen:
        model(clips)
    assert len(seen.convolutions) == 9
    assert all(x.is_contiguous() for x in seen.convolutions)


def test_poolings_are_channels_last_on_cpus() -> None:
    model = create_model("mvitv2_nano_8x4")
    with Operations() as seen, torch.no_grad():
        model(torch.randn(2, 3, 8, 64, 64))
    assert len(seen.convolutions) == 9
    assert all(x.stride(1) == 1 for x in seen.convolutions)


def test_what_fake_tensors_left_behind_is_not_used_by_real_ones() -> None:
    torch.manual_seed(0)
    model, clips = create_model("mvitv2_nano_8x4").eval(), torch.randn(1, 3, 8, 64, 64)
    with torch.inference_mode():
        expected = model(clips)
    for _ in range(2):
        with on_fake_gpu("mvitv2_nano_8x4") as (fake, fake_clips):
            fake(fake_clips)
    logits = model(clips)  # and what inference mode made is fit for training
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()


def with_coordinates(x: Tensor) -> Tensor:
    """What is kept by sizes, of sizes that no model here has."""
    return x.sum() + positions.constant(positions.one_hot_keys, ("h", "w"), (1, 5, 11), 0, 16, like=x)


RECORDED: dict[str, Callable[[Tensor], object]] = {
    "vmap": lambda x: torch.func.vmap(with_coordinates)(x[None]),
    "grad": lambda x: torch.func.grad(lambda x: with_coordinates(x).sum())(x),
    "jvp": lambda x: torch.func.jvp(with_coordinates, (x,), (x,)),
    "compile": lambda x: torch.compile(with_coordinates, fullgraph=True, backend="eager")(x),
    "trace": lambda x: torch.jit.trace(with_coordinates, x, check_trace=False),
    "export": lambda x: torch.export.export(WithCoordinates(), (x,)),
}


class WithCoordinates(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return with_coordinates(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", RECORDED)
def test_what_a_recorded_program_makes_is_not_kept(way: str) -> None:
    torch.compiler.reset()
    positions._kept.cache_clear()
    RECORDED[way](torch.ones(3))
    assert positions._kept.cache_info().currsize == 0
    kept = [with_coordinates(torch.ones(3)) for _ in range(2)]
    assert torch.equal(*kept)
    assert positions._kept.cache_info()[:2] == (1, 1)  # found again, made once
