"""Linear layers through oneDNN: what torch's own give, and only where they can."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dino.machine import private_calls
from dino.models import products as module
from dino.models.products import Linear, linear

needs_onednn = pytest.mark.skipif(not private_calls.onednn_linear.usable, reason="torch has no oneDNN on this machine")


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.integers(1, 7), min_size=0, max_size=2),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    bias=st.booleans(),
)
def test_values_and_gradients_are_those_of_a_double_precision_product(rows, sizes, bias):
    torch.manual_seed(0)
    (d, e), leading = sizes, (*rows, 3)
    tensors = [torch.randn(*leading, d), torch.randn(e, d), *([torch.randn(e)] if bias else [])]
    ours = [t.clone().requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    out, expected = linear(*ours), F.linear(*exact)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(out.shape)
    (out * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=2e-5, rtol=1e-5)


@needs_onednn
def test_float32_on_the_cpu_goes_through_onednn_and_the_rest_does_not(monkeypatch):
    calls = []
    real = module._onednn
    monkeypatch.setattr(module, "_onednn", lambda *arguments: calls.append(1) or real(*arguments))
    layer, x = Linear(4, 3), torch.randn(2, 4)
    layer(x).sum().backward()
    assert len(calls) == 2  # The product, and the gradient of the weight: x needs none.
    with torch.no_grad():
        layer(x)
    assert len(calls) == 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.double()(x.double())
    layer.float()(x[:0])
    layer(torch.randn(8)[::2])
    assert len(calls) == 3


@needs_onednn
def test_columns_of_a_wider_matrix_are_not_left_to_plain_loops(monkeypatch):
    """oneDNN would take far longer for them."""
    seen = []
    real = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(
        torch.ops.mkldnn,
        "_linear_pointwise",
        lambda x, weight, *rest: seen.extend((x, weight)) or real(x, weight, *rest),
    )
    x, weight = torch.randn(6, 20, requires_grad=True), torch.randn(5, 30)[:, 3:11]
    out = linear(x[:, 4:12], weight.requires_grad_())
    out.sum().backward()  # Its gradient has no strides at all.
    assert len(seen) == 6
    assert all(m.is_contiguous() or m.mT.is_contiguous() for m in seen)
    torch.testing.assert_close(out, F.linear(x[:, 4:12], weight))


@needs_onednn
def test_only_the_gradients_that_are_asked_for_are_computed():
    layer = Linear(4, 3).requires_grad_(False)
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 4))
    assert layer.weight.grad is None


def test_it_is_saved_and_loaded_as_torchs_own():
    ours, theirs = Linear(4, 3), torch.nn.Linear(4, 3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 4)
    torch.testing.assert_close(ours(x), theirs(x))
