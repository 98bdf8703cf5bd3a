"""Models under torch's own tools: compile, export, copies, other dtypes and memory layouts."""

from __future__ import annotations

import copy
import io
import math
import operator
import pickle
from dataclasses import replace

import pytest
import torch
from peers import randomized
from torch import Tensor

from mvit_video.model import MViT, MViTConfig
from mvit_video.model.config import plan_blocks
from mvit_video.model.mvit import Block
from mvit_video.model.positions import relative_index

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
V1 = replace(
    TINY,
    abs_pos="separable",
    rel_pos_temporal=False,
    rel_pos_spatial=False,
    residual_pooling=False,
    pool_q_every_block=False,
    dim_mul_in_attention=False,
)
LAYOUTS = {
    "v2": TINY,
    "v1": V1,
    "image": replace(
        TINY, num_frames=1, patch_kernel=(1, 7, 7), patch_stride=(1, 4, 4), patch_2d=True, class_token=False
    ),
    "shifted windows": replace(TINY, attention="pooling_shifted_window", window=(2, 3, 3)),
    "joint space-time": replace(TINY, rel_pos_joint="space_time"),
    "average pooling first": replace(TINY, pool_mode="avg", pool_first=True),
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def model(request) -> MViT:
    return randomized(MViT(request.param))


# Recording a program takes seconds; these two have all that is difficult in it.
RECORDED = [
    pytest.param(layout, id=name, marks=[] if name == "v2" else [pytest.mark.slow])
    for name, layout in LAYOUTS.items()
]


def clips_for(model: MViT, batch: int = 2, seed: int = 1) -> Tensor:
    size = (batch, 3, *model.config.input_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
@pytest.mark.parametrize("layout", RECORDED)
def test_compiles_as_one_graph(layout):
    torch.compiler.reset()
    model = randomized(MViT(layout))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    clips = clips_for(model)
    torch.testing.assert_close(compiled(clips), model(clips), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_compiled_blocks_train():
    torch.compiler.reset()
    gradients = []
    for compiled in (False, True):
        model = randomized(MViT(TINY)).train()
        if compiled:
            model.compile(fullgraph=True, backend="aot_eager")
        model(clips_for(model)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_blocks_of_a_kind_and_batches_of_any_size_share_a_graph(training: bool) -> None:
    torch.compiler.reset()
    model = MViT(replace(TINY, stages=(1, 4), drop_path=0.3)).train(training)
    graphs = []
    model.compile(fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for batch in (2, 3):
        with torch.set_grad_enabled(training):
            model(clips_for(model, batch))
    assert len(graphs) == 3  # the first block of each stage, and the others of the second
    keys = list(model.state_dict())
    assert keys == list(MViT(model.config).state_dict())


def test_compiled_drop_path_keeps_the_expectation() -> None:
    torch.compiler.reset()
    config = replace(TINY, drop_path=0.25)
    *_, plan = plan_blocks(config)
    block = Block(plan, config)
    block.compile(fullgraph=True, backend="eager")
    branch = torch.ones(4000, 1, 1)
    block.forward = lambda x: block._drop(x)  # type: ignore[method-assign, assignment]
    dropped = block(branch).flatten()
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert dropped.mean().item() == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize("lengths", [(56, 7), (78, 10), (39, 10), (10, 39)], ids=str)
def test_products_of_positions_are_exact_inside_a_graph(lengths):
    # float32 rounding decides rows (78 or 39 against 10); a compiler that fused an inexact product with an
    # addition would move some.
    torch.compiler.reset()
    factors: list[float] = []

    def backend(graph, inputs):
        nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        factors.extend(node.args[1] for node in nodes if node.target is operator.mul)
        return graph

    compiled = torch.compile(relative_index, fullgraph=True, dynamic=False, backend=backend)
    assert torch.equal(compiled(*lengths), relative_index(*lengths))
    rounded = [factor for factor in factors if isinstance(factor, float)]
    assert len(factors) == 4
    assert all(math.frexp(factor)[0] == 0.5 for factor in rounded)  # a power of two


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["v2", "v1", "shifted windows"])
@torch.inference_mode()
def test_compiles_to_machine_code(layout):
    torch.compiler.reset()
    model = randomized(MViT(LAYOUTS[layout]))
    clips = clips_for(model)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(clips), model(clips), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", RECORDED)
def test_exports_with_any_batch(layout):
    model = randomized(MViT(layout))
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (clips_for(model),), dynamic_shapes={"clips": {0: batch}})
    stored = io.BytesIO()
    torch.export.save(exported, stored)
    stored.seek(0)
    run = torch.export.load(stored).module()
    for size in (1, 2, 5):
        clips = clips_for(model, size)
        torch.testing.assert_close(run(clips), model(clips), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_copies_and_pickles_are_the_same_and_apart(model):
    clips = clips_for(model)
    logits = model(clips)
    model.class_names = tuple("abcde")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (twin.config, twin.protocol) == (model.config, model.protocol)
        assert twin.class_names == model.class_names
        assert torch.equal(twin(clips), logits)
        twin.head.projection.bias += 1
    assert torch.equal(model(clips), logits)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(model, dtype):
    expected = model(clips_for(model))
    found = model.to(dtype)(clips_for(model).to(dtype))
    assert found.dtype == dtype
    tolerance = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-5}[dtype]
    assert (found.float() - expected).abs().max() < tolerance * expected.abs().max()


@torch.inference_mode()
def test_autocast(model):
    expected = model(clips_for(model))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(clips_for(model))
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()


@torch.inference_mode()
def test_memory_layout_of_the_input_does_not_matter(model):
    clips = clips_for(model)
    expected = model(clips)
    as_decoded = clips.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)  # from (B, T, H, W, 3)
    wider = torch.cat([clips, clips], -1)[..., : clips.shape[-1]]
    last = clips.contiguous(memory_format=torch.channels_last_3d)
    for other in (as_decoded, wider, last, clips.transpose(3, 4).contiguous().transpose(3, 4)):
        torch.testing.assert_close(model(other), expected, atol=1e-5, rtol=0)
    if all(parameter.ndim != 4 for parameter in model.parameters()):  # torch asks for five axes everywhere
        model = model.to(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(model(last), expected, atol=1e-5, rtol=0)
