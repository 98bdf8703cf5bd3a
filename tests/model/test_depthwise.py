"""The depthwise convolution's own backward pass against torch's."""

import pytest
import torch
import torch.nn.functional as F

from mvit_video.model.depthwise import depthwise_conv3d


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


def test_autocast_casts_both_passes() -> None:
    x = torch.randn(1, 4, 2, 5, 5, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = depthwise_conv3d(x, weight, (1, 1, 1), (1, 1, 1))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == weight.grad.dtype == torch.float32
