"""Calls of torch that are not public, faster than the public way, and what stands in for each of them.

A new torch may take them away or change them. So each is tried once, at import, on a small example: where it does not
give what the public way gives, the public way is taken. ``use_public_calls()``, or DINO_PUBLIC_CALLS=1 in the
environment before the start, takes it everywhere.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ENVIRONMENT = "DINO_PUBLIC_CALLS"


class Call:
    """A private call, and the public way to the same numbers. ``usable``: whether the private one is taken."""

    def __init__(
        self, name: str, private: Callable[..., Any], public: Callable[..., Any], example: Callable[[], Sequence[Any]]
    ) -> None:
        self.name, self.private, self.public = name, private, public
        self.trusted = self._check(example)
        self.usable = self.trusted and not _asked_for_public()

    def __call__(self, *args: Any) -> Any:
        return (self.private if self.usable else self.public)(*args)

    @torch.no_grad()
    def _check(self, example: Callable[[], Sequence[Any]]) -> bool:
        try:
            results = []
            for function in (self.public, self.private):
                args = example()
                result = function(*args)
                results.append(args[0] if result is None else result)  # Of calls that work in place: what they changed.
            torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
        except AttributeError:  # Builds for other processors lack some.
            return False
        except Exception as error:
            warnings.warn(
                f"torch {torch.__version__}: {self.name} no longer does what it did "
                f"({type(error).__name__}); the public way is taken, which may be slower",
                stacklevel=2,
            )
            return False
        return True


def use_public_calls(public: bool = True) -> None:
    """Takes the public way everywhere; ``False``: the private ones again, as far as they passed their check."""
    for call in CALLS:
        call.usable = call.trusted and not public


def _asked_for_public() -> bool:
    return os.environ.get(ENVIRONMENT, "0") not in ("", "0")


def _example(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What torch.compile calls for a linear layer."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        raise AttributeError("this build of torch has no oneDNN")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _multiply(tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    for tensor, factor in zip(tensors, factors, strict=True):
        tensor.mul_(factor)


def _lerp(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    for tensor, end in zip(tensors, ends, strict=True):
        tensor.lerp_(end, weight)


_torch: Any = torch  # Whose private names type checkers do not know.
onednn_linear = Call(
    "mkldnn._linear_pointwise",
    lambda x, weight, bias: _onednn(x, weight, bias),
    F.linear,
    lambda: _example((2, 3, 5), (4, 5), (4,)),
)
weight_norm = Call(
    "_weight_norm",
    lambda directions, lengths: _torch._weight_norm(directions, lengths, 0),
    lambda directions, lengths: directions * (lengths / directions.norm(dim=1, keepdim=True)),
    lambda: _example((4, 3), (4, 1)),
)
norms = Call(
    "_foreach_norm",
    lambda tensors: _torch._foreach_norm(tensors),
    lambda tensors: [tensor.norm() for tensor in tensors],
    lambda: [_example((2, 3), (4,))],
)
multiply_ = Call(
    "_foreach_mul_",
    lambda tensors, factors: _torch._foreach_mul_(tensors, factors),
    _multiply,
    lambda: [_example((2, 3), (4,)), [torch.tensor(0.5), torch.tensor(2.0)]],
)
lerp_ = Call(
    "_foreach_lerp_",
    lambda tensors, ends, weight: _torch._foreach_lerp_(tensors, ends, weight),
    _lerp,
    lambda: [_example((2, 3), (4,)), [torch.zeros(2, 3), torch.ones(4)], 0.25],
)
CALLS = (onednn_linear, weight_norm, norms, multiply_, lerp_)
