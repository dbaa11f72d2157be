"""What a run may add to its loss. The pull: tests/test_adapt.py; over processes: tests/test_processes.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from dino.config import replace
from dino.method.terms import CodingRate


def rate(features: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    """Of features (b, s, d) of which the first two are those of global crops."""
    return CodingRate(weight)(torch.zeros(len(features), 2, 3, 8, 8), features)


@settings(max_examples=25, deadline=None)
@given(b=st.integers(1, 5), s=st.integers(2, 4), d=st.integers(1, 9), seed=st.integers(0, 99))
def test_equals_the_formula_over_images(b, s, d, seed):
    """logdet of the (n, n) table of products: the same number, by Sylvester's identity; and the same gradient."""
    features = torch.randn(b, s, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    one, other = (features.clone().requires_grad_() for _ in range(2))
    z = F.normalize(other[:, :2].flatten(0, 1), dim=-1)
    n = 2 * b
    expected = -0.3 * torch.linalg.slogdet(torch.eye(n) + d / (n * 0.25) * z @ z.mT)[1] / 2
    found = rate(one, 0.3)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    grads = (torch.autograd.grad(value, of)[0] for value, of in ((found, one), (expected, other)))
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-7)


def test_by_hand():
    """Four features along four axes: every direction counts 1 + 4. All along one: 1 + 4 d, and nothing else."""
    axes = torch.eye(4).view(2, 2, 4) * 7  # Lengths do not count.
    assert rate(axes).item() == pytest.approx(-4 / 2 * math.log(5))
    assert rate(axes[:1, :1].expand(2, 2, 4)).item() == pytest.approx(-math.log(1 + 4 * 4) / 2)


def test_features_that_fall_together_are_spread():
    generator = torch.Generator().manual_seed(0)
    features = (1 + 0.1 * torch.randn(8, 2, 16, generator=generator)).requires_grad_()
    before = rate(features).item()
    for _ in range(50):
        (grad,) = torch.autograd.grad(rate(features), features)
        features = (features - grad).detach().requires_grad_()
    assert rate(features).item() < 2 * before < 0


def test_a_rate_below_zero_is_refused():
    with pytest.raises(ValueError, match=r"--method.coding-rate -1.0 is not allowed"):
        replace(tiny.CONFIG, method__coding_rate=-1.0)
