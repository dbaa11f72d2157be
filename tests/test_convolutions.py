"""Convolutions in bfloat16 on a CPU: every gradient is that of float32, whatever the memory held before."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dino.models.backbone import as_backbone
from dino.models.convolutions import Convolution, every_entry_meets_a_pixel, mend_convolutions
from dino.models.timm_backbone import TimmBackbone


def gradient(convolution, images):
    """Of the weights, in bfloat16, after memory of their size was left full of NaN."""
    convolution.weight.grad = None
    size = convolution.weight.numel()
    for kind in (torch.bfloat16, torch.float32):
        full = [torch.full((size,), torch.nan, dtype=kind) for _ in range(4)]
        del full
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = convolution(images)
    out.float().square().sum().backward()
    return convolution.weight.grad


@settings(max_examples=60, deadline=None)
@given(
    side=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    kernel=st.sampled_from([1, 2, 3, 5, 7]),
    stride=st.integers(1, 4),
    full=st.booleans(),
)
def test_gradients_are_those_of_float32(side, kernel, stride, full):
    padding = kernel - 1 if full else kernel // 2
    if min(side) + 2 * padding < kernel:
        return
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 16, kernel, stride, padding)
    mended = nn.Conv2d(16, 16, kernel, stride, padding)
    mended.load_state_dict(plain.state_dict())
    mend_convolutions(mended)
    images = torch.randn(4, 16, *side)
    plain(images).square().sum().backward()
    exact = plain.weight.grad
    torch.testing.assert_close(gradient(mended, images), exact, atol=0.03 * exact.abs().max().item(), rtol=0)


def test_entries_that_meet_a_pixel_have_a_gradient():
    """By the naive formula: an entry meets a pixel when ones give its weight a gradient."""
    for side in range(1, 6):
        for kernel, stride, padding, dilation in ((1, 1, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), (3, 2, 2, 2), (7, 4, 3, 1)):
            if side + 2 * padding < dilation * (kernel - 1) + 1:
                continue
            weight = torch.zeros(1, 1, kernel, kernel, requires_grad=True)
            F.conv2d(torch.ones(1, 1, side, side), weight, None, stride, padding, dilation).sum().backward()
            assert every_entry_meets_a_pixel(side, kernel, stride, padding, dilation) == bool((weight.grad > 0).all())


def test_networks_are_mended():
    """The small convnet of ``auto`` on its smallest crops; a network that a caller wrote."""
    network = TimmBackbone("test_resnet")
    assert not [m for m in network.modules() if type(m) is nn.Conv2d]
    own = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1))
    names = list(own.state_dict())
    assert isinstance(as_backbone(own)[0], Convolution)
    assert list(own.state_dict()) == names


@pytest.mark.parametrize("size", [8, 16])
def test_the_network_of_auto_on_tiny_crops(size):
    torch.manual_seed(0)
    network = TimmBackbone("test_resnet").train()
    images = torch.randn(8, 3, size, size)
    for _ in range(3):
        full = [torch.full((2**16,), torch.nan) for _ in range(64)]
        del full
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = network(images).cls_token
        out.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_other_precision_is_left_alone(dtype):
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 16, 3, 2, 1).to(dtype)
    mended = nn.Conv2d(16, 16, 3, 2, 1).to(dtype)
    mended.load_state_dict(plain.state_dict())
    mend_convolutions(mended)
    images = torch.randn(4, 16, 1, 1, dtype=dtype)
    assert mended(images).dtype == dtype
    torch.testing.assert_close(mended(images), plain(images), rtol=0, atol=0)
