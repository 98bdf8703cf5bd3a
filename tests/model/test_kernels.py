"""The CPU kernels against the plain expressions of torch that they stand for."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from mvit_video.model import MViTConfig, cpu_kernels, kernels
from mvit_video.model.attention import PoolingAttention
from mvit_video.model.config import plan_blocks
from mvit_video.model.cpu_kernels import ROWS, depthwise_conv3d, partition


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 5, 1)])
@pytest.mark.parametrize(
    ("size", "stride"),
    [
        ((3, 7, 5), (1, 1, 1)),
        ((4, 8, 9), (1, 2, 2)),
        ((5, 13, 11), (1, 8, 8)),
        ((6, 6, 6), (2, 3, 1)),
        ((5, 4, 7), (2, 1, 2)),
        ((1, 5, 5), (1, 4, 4)),
        ((1, 1, 1), (1, 1, 1)),
    ],
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_value_and_gradients_are_torchs(
    kernel: tuple, size: tuple, stride: tuple, channels_last: bool
) -> None:
    torch.manual_seed(0)
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    x = torch.randn(2, 4, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(4, 1, *kernel, dtype=torch.float64).requires_grad_()
    padding = tuple(k // 2 for k in kernel)
    ours = depthwise_conv3d(x, weight, stride, padding)
    theirs = F.conv3d(x, weight, None, stride, padding, groups=4)
    grad = torch.randn_like(theirs)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    for found, expected in zip(
        torch.autograd.grad(ours, (x, weight), grad),
        torch.autograd.grad(theirs, (x, weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (1, 8, 8)])
def test_bf16_gradients_are_as_good_as_torchs(stride: tuple) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 8, 4, 16, 16), torch.randn(8, 1, 3, 3, 3)

    def gradients(dtype: torch.dtype, convolution) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        y = convolution(*leaves)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return [g.float() for g in torch.autograd.grad(y, leaves, grad)]

    def ours(x, weight):
        return depthwise_conv3d(x, weight, stride, (1, 1, 1))

    def theirs(x, weight):
        return F.conv3d(x, weight, None, stride, (1, 1, 1), groups=8)

    exact = gradients(torch.float32, theirs)
    for found, stock, expected in zip(
        gradients(torch.bfloat16, ours), gradients(torch.bfloat16, theirs), exact, strict=True
    ):
        error, stock_error = ((g - expected).abs().max() for g in (found, stock))
        assert error <= 1.5 * stock_error + 1e-6


def test_autocast_casts_both_passes_of_the_convolution() -> None:
    pool = torch.nn.Conv3d(4, 4, 3, padding=1, groups=4, bias=False)
    x = torch.randn(1, 2, 5, 5, 3, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kernels.pool_heads(pool, x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == pool.weight.grad.dtype == torch.float32


def gradients(function, inputs: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The value and the gradients of a weighted sum of it, as float64."""
    leaves = [x.detach().clone().to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [x.double() for x in (out.detach(), *torch.autograd.grad(out, leaves, grad))]


def plain_attention(q, k, v):
    return torch.einsum("bnhm,bmhc->bnhc", torch.einsum("bnhc,bmhc->bnhm", q, k).softmax(-1), v)


K_POSITIONS = torch.randn(17, 7, generator=torch.Generator().manual_seed(2))


def attention_with_positions(q, k, v, q_positions):
    k_positions = K_POSITIONS.to(q.dtype)
    return kernels.attend(q, k, v, q_positions, k_positions, scale=0.3, num_prefix_tokens=1)


def plain_attention_with_positions(q, k, v, q_positions):
    scores = torch.einsum("bnhc,bmhc->bnhm", q, 0.3 * k)
    scores = scores + torch.einsum("bnhe,me->bnhm", q_positions, K_POSITIONS.to(q.dtype))
    out = torch.einsum("bnhm,bmhc->bnhc", scores.softmax(-1), v)
    return torch.cat([out[:, :1], out[:, 1:] + q[:, 1:]], 1)


def plain_mlp(x, w1, b1, w2, b2):
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def fast_mlp(x, w1, b1, w2, b2):
    return kernels.linear(kernels.linear(x, w1, b1), w2, b2, gelu_input=True)


def random(*shapes: tuple[int, ...], scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * scale for shape in shapes]


PAIRS = {
    "attention": (kernels.attend, plain_attention, random((2, 50, 3, 20), (2, 17, 3, 20), (2, 17, 3, 12))),
    "attention with positions": (
        attention_with_positions,
        plain_attention_with_positions,
        random((2, 50, 3, 20), (2, 17, 3, 20), (2, 17, 3, 20), (2, 50, 3, 7)),
    ),
    "mlp": (fast_mlp, plain_mlp, random((2, 70, 12), (48, 12), (48,), (10, 48), (10,), scale=0.5)),
    "linear": (kernels.linear, F.linear, random((2, 70, 12), (48, 12), (48,))),
    "linear without bias": (
        lambda x, weight: kernels.linear(x, weight, None),
        lambda x, weight: F.linear(x, weight),
        random((70, 12), (48, 12)),
    ),
}


@pytest.fixture(params=PAIRS.values(), ids=PAIRS)
def pair(request):
    return request.param


@pytest.fixture(
    params=[(2**20, 1), (2**10, 1), (2**20, 64), (2**10, 2)],
    ids=["one chunk", "many chunks", "heads and clips at once", "heads at once, many chunks"],
)
def chunk(request, monkeypatch):
    size, threads = request.param
    monkeypatch.setattr(cpu_kernels, "CHUNK", size)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)


@pytest.mark.parametrize("threads", [1, 2, 16, 64])
@pytest.mark.parametrize(
    ("clips", "heads", "queries", "keys"),
    [(1, 1, 25089, 393), (2, 8, 393, 393), (3, 4, 1569, 393), (1, 2, 5, 3)],
)
def test_attention_is_cut_so_that_all_threads_have_work(
    clips: int, heads: int, queries: int, keys: int, threads: int
) -> None:
    parts = partition(clips, heads, queries, 4 * keys, threads)
    seen = torch.zeros(clips, queries, heads, dtype=torch.int64)
    at_once = []
    for some_clips, some_heads, chunks in parts:
        group = seen[some_clips, :, some_heads]
        at_once.append(group.shape[0] * group.shape[2])
        for chunk in chunks:
            seen[some_clips, chunk, some_heads] += 1
            rows = len(range(*chunk.indices(queries)))
            assert rows <= 16 or rows * at_once[-1] * 4 * keys <= cpu_kernels.CHUNK * threads
    assert seen.eq(1).all()
    # Whole clips at once are half of what was wanted at least, and never more than what keeps threads busy.
    assert max(at_once) * queries >= min(ROWS * threads, clips * heads * queries) / 2
    assert max(at_once) == 1 or (max(at_once) - 1) * queries < ROWS * threads


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.usefixtures("chunk")
def test_kernels_equal_their_plain_forms(pair, dtype, tolerance) -> None:
    fast, plain, inputs = pair
    exact = gradients(plain, inputs, torch.float64)
    for found, expected in zip(gradients(fast, inputs, dtype), exact, strict=True):
        scale = max(expected.abs().max().item(), 1)
        torch.testing.assert_close(found, expected, atol=tolerance * scale, rtol=0)


@pytest.mark.usefixtures("chunk")
def test_kernels_in_bf16_are_as_good_as_plain_forms(pair) -> None:
    fast, plain, inputs = pair
    rounded = [x.bfloat16().float() for x in inputs]
    exact = gradients(plain, rounded, torch.float64)
    for found, stock, expected in zip(
        gradients(fast, rounded, torch.bfloat16),
        gradients(plain, rounded, torch.bfloat16),
        exact,
        strict=True,
    ):
        error, stock_error = ((x - expected).square().mean().sqrt() for x in (found, stock))
        assert error <= 1.25 * stock_error + 1e-6


@pytest.mark.usefixtures("chunk")
def test_mlp_without_gradients_is_the_same() -> None:
    torch.manual_seed(0)
    fc1, fc2, x = kernels.Linear(12, 48), kernels.Linear(48, 10), torch.randn(2, 70, 12)
    with torch.no_grad():
        torch.testing.assert_close(kernels.mlp(fc1, fc2, x), fc2(F.gelu(fc1(x))), atol=1e-5, rtol=0)


def test_plain_operations_can_take_the_kernels_place(monkeypatch) -> None:
    x, weight = random((3, 4), (5, 4))
    expected = kernels.linear(x, weight, None)
    monkeypatch.setattr(cpu_kernels, "linear", None)
    with kernels.plain():
        torch.testing.assert_close(kernels.linear(x, weight, None), expected)
    with pytest.raises(TypeError):
        kernels.linear(x, weight, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits_give_no_nan(dtype) -> None:
    inputs = random((1, 40, 2, 8), (1, 30, 2, 8), (1, 30, 2, 8), scale=1e4)
    for found in gradients(kernels.attend, inputs, dtype):
        assert found.isfinite().all()


def test_deterministic_mode_repeats_gradients() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradients(*PAIRS["attention"][::2], torch.float32) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_reaches_the_kernels() -> None:
    fast, _, inputs = PAIRS["attention"]
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fast(*leaves)
        hidden = fast_mlp(*PAIRS["mlp"][2])
    out.float().sum().backward()
    assert out.dtype == hidden.dtype == torch.bfloat16
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in leaves)


# The peak of getrusage would be the parent's, which is larger.
MEMORY = """
import sys, torch
from pathlib import Path
from mvit_video.model import kernels

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

n = int(sys.argv[1])
q, k, v = (torch.randn(1, n, 1, 16, requires_grad=True) for _ in range(3))
kernels.attend(*(x[:, :64] for x in (q, k, v))).sum().backward()
bare = peak()
kernels.attend(q, k, v).sum().backward()
print(peak() - bare)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_attention_grows_with_n_plus_m() -> None:
    # A score tensor of 8192 x 8192 would be 256 MB; a plain backward pass needs three at once.
    used = [
        float(subprocess.run([sys.executable, "-c", MEMORY, n], capture_output=True, check=True).stdout)
        for n in ("4096", "8192")
    ]
    assert used[1] < 100
    assert used[1] < 2.5 * used[0] + 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gelu_input", [False, True])
@pytest.mark.parametrize("width", [4, 40])  # of the output, against 12 of the input
def test_compilers_are_told_the_layouts_of_linear_layers(width: int, gelu_input: bool, dtype) -> None:
    x, weight, grad = (t.to(dtype) for t in random((2, 70, 12), (width, 12), (2, 70, width)))
    torch.library.opcheck(cpu_kernels.linear, (x, weight, None, gelu_input), test_utils="test_faketensor")
    torch.library.opcheck(
        cpu_kernels._linear_backward, (grad, x, weight, None, gelu_input), test_utils="test_faketensor"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compilers_are_told_the_layouts_of_attention(dtype) -> None:
    q, k, v, q_positions = (t.to(dtype) for t in PAIRS["attention with positions"][2])
    inputs = (q, k, v, q_positions, K_POSITIONS.to(dtype), 0.3, 1)
    torch.library.opcheck(cpu_kernels.attention, inputs, test_utils="test_faketensor")
    grad = torch.ones(2, 50, 3, 20, dtype=dtype)
    torch.library.opcheck(cpu_kernels._attention_backward, (grad, *inputs), test_utils="test_faketensor")


def test_compiled_kernels_are_the_eager_ones(pair) -> None:
    torch.compiler.reset()
    fast, _, inputs = pair
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        gradients(compiled, inputs, torch.float32), gradients(fast, inputs, torch.float32), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (1, 8, 8)])
@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format])
def test_compilers_are_told_the_layouts_of_pooling(stride: tuple, layout) -> None:
    x, weight = random((2, 8, 3, 16, 16), (8, 1, 3, 3, 3))
    x = x.contiguous(memory_format=layout)
    grad = torch.ones_like(F.conv3d(x, weight, None, stride, (1, 1, 1), groups=8))
    torch.library.opcheck(depthwise_conv3d, (x, weight, stride, (1, 1, 1)), test_utils="test_faketensor")
    inputs = (grad, x, weight, stride, (1, 1, 1))
    torch.library.opcheck(cpu_kernels._depthwise_backward, inputs, test_utils="test_faketensor")


def test_compiled_pooling_has_the_eager_gradients() -> None:
    torch.compiler.reset()
    x, weight = (t.requires_grad_() for t in random((1, 8, 2, 8, 8), (8, 1, 3, 3, 3)))

    def pool(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return depthwise_conv3d(x * 2, weight, (1, 2, 2), (1, 1, 1)).square().sum()

    found = torch.autograd.grad(torch.compile(pool, fullgraph=True)(x, weight), (x, weight))
    for ours, expected in zip(found, torch.autograd.grad(pool(x, weight), (x, weight)), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("stride", "read"), [((1, 8, 8), 3 * 5 * 5), ((1, 4, 4), 3 * 8 * 8), ((5, 5, 2), 2 * 7 * 12)]
)
@pytest.mark.parametrize("class_token", [False, True])
def test_only_what_pooling_reads_is_projected(stride, read, class_token, monkeypatch) -> None:
    torch.manual_seed(0)
    config = MViTConfig(
        num_frames=6, crop_size=44, stages=(1,), embed_dim=8, kv_stride=stride, class_token=class_token
    )
    attention, grid = PoolingAttention(next(plan_blocks(config)), config), (3, 11, 12)
    (x,) = random((2, 3 * 11 * 12 + class_token, 8))
    projected, linear = [], kernels.linear
    monkeypatch.setattr(kernels, "linear", lambda x, *rest: projected.append(x.shape[1]) or linear(x, *rest))

    def results() -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        out, _ = attention(leaf, grid)
        return [out, *torch.autograd.grad(out.square().mean(), (leaf, *attention.parameters()))]

    found = results()
    assert projected[1:3] == [read + class_token] * 2
    with kernels.plain():
        for ours, expected in zip(found, results(), strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
