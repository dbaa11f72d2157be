"""Linear layers by the fastest matrix product that this CPU has, in float32.

torch multiplies float32 matrices on x86 with MKL, which leaves AVX-512 unused on AMD's processors; oneDNN, which torch
also brings, uses it wherever it is (2.2 times as fast on an EPYC: docs/performance.md). The numbers are the same up to
the order of summation.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dino.machine import private_calls


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return private_calls.onednn_linear(_dense(x), _dense(weight), bias)


def _dense(matrix: Tensor) -> Tensor:
    """For columns of a wider matrix oneDNN has nothing but plain loops, far slower."""
    return matrix if matrix.is_contiguous() or matrix.mT.is_contiguous() else matrix.contiguous()


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # pyright: ignore
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        return (
            _onednn(grad, weight.mT) if for_x else None,
            _transposed_product(rows, inputs) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """``a.T @ b``. oneDNN copies what stands first into rows: the narrower of the two."""
    return _onednn(a.mT, b.mT) if a.shape[1] < b.shape[1] else _onednn(b.mT, a.mT).mT


def linear(
    x: Float[Tensor, "*b d"], weight: Float[Tensor, "e d"], bias: Float[Tensor, "e"] | None = None
) -> Float[Tensor, "*b e"]:
    """``x @ weight.T + bias``, as ``torch.nn.functional.linear``; gradients of gradients only where that one is used
    (float64, accelerators, autocast)."""
    ours = private_calls.onednn_linear.usable and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    # torch.compile chooses for itself, and refuses this operation where the weight is trained.
    if not ours or x.ndim < 2 or x.numel() == 0 or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _OneDNNLinear.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
    return _onednn(x, weight, bias)


class Linear(nn.Linear):
    """``torch.nn.Linear`` on ``linear``."""

    def forward(self, input: Float[Tensor, "*b d"]) -> Float[Tensor, "*b e"]:
        return linear(input, self.weight, self.bias)


class Product(NamedTuple):
    """Logits over the prototypes, not multiplied out, because they may be too large to hold.

    A prototype is a row of ``directions``, scaled to its ``lengths``: weight normalisation (arXiv 1602.07868).
    """

    embeddings: Float[Tensor, "*b e"]
    directions: Float[Tensor, "k e"]  # Of any length.
    lengths: Float[Tensor, "k 1"]

    def logits(self) -> Float[Tensor, "*b k"]:
        prototypes = private_calls.weight_norm(self.directions, self.lengths)
        return linear(self.embeddings, prototypes)
