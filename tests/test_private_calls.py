"""Private calls of torch give what the public way gives, or are not taken."""

import os
import subprocess
import sys

import pytest
import torch

from dino.machine import private_calls
from dino.machine.private_calls import CALLS, Call, use_public_calls
from dino.method.optim import clip_gradients
from dino.models.head import DINOHead


@pytest.fixture
def public():
    use_public_calls()
    yield
    use_public_calls(False)


def test_on_this_torch_all_of_them_can_be_taken():
    """Where this fails, a new torch has changed one: the public way works, but look what it costs."""
    assert [call.name for call in CALLS[1:] if not call.trusted] == []


def head_and_gradients():
    torch.manual_seed(0)
    head = DINOHead(12, 20, hidden_dim=16, bottleneck_dim=8, norm_last_layer=False)
    rows = head(torch.randn(4, 3, 12))
    logits = rows.logits() if hasattr(rows, "logits") else rows
    logits.square().sum().backward()
    norms = clip_gradients(head.parameters(), 0.5)
    return [logits.detach(), norms, *[p.grad for p in head.parameters() if p.grad is not None]]


@pytest.mark.usefixtures("public")
def test_the_public_way_gives_the_same():
    assert not any(call.usable for call in CALLS)
    theirs = head_and_gradients()
    use_public_calls(False)
    assert all(call.usable == call.trusted for call in CALLS)
    ours = head_and_gradients()
    assert len(ours) > 5
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def example():
    return [torch.ones(2), torch.full((2,), 3.0)]


@pytest.mark.parametrize(
    "private",
    [
        lambda a, b: a + b + 0.1,
        lambda a: a,
        lambda a, b: (a + b).item(),
        lambda a, b: (a + b).double(),
    ],
)
def test_one_that_has_changed_is_not_taken_and_named(private):
    with pytest.warns(UserWarning, match=r"torch \S+: _add no longer does what it did .* the public way is taken"):
        call = Call("_add", private, torch.add, example)
    assert not call.usable
    assert call(*example()).tolist() == [4.0, 4.0]


def test_one_that_is_not_there_is_not_taken():
    call = Call("_add", lambda a, b: torch._no_such_call(a, b), torch.add, example)
    assert not call.trusted
    assert call(*example()).tolist() == [4.0, 4.0]


def test_by_the_environment():
    code = "from dino.machine.private_calls import CALLS; print(any(call.usable for call in CALLS))"
    environment = {**os.environ, private_calls.ENVIRONMENT: "1"}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout == "False\n"
