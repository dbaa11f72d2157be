"""Gaussian blur of a batch of crops, each with its own width."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import embedding_bag

_PASSES = 3
_ONE, _HALF = 2**24, 2**12  # Pillow's fixed point: weights are whole numbers of 1 / 2^24.


def _box(sigma: Float[Tensor, " n"], reach: int) -> Float[Tensor, "n taps"]:
    """Weights of one box filter at distances ``-reach`` to ``reach``; ``_PASSES`` of them have variance sigma^2.

    A box of fractional length: equal weights up to ``radius``, the rest on the two pixels beyond (Gwosdek et al. 2011,
    "Theoretical foundations of Gaussian convolution by extended box filtering").
    """
    variance = (sigma**2 / _PASSES)[:, None]
    radius = ((torch.sqrt(12 * variance + 1) - 1) / 2).floor()
    rest = (2 * radius + 1) * (radius * (radius + 1) - 3 * variance) / (6 * (variance - (radius + 1) ** 2))
    inner = (_ONE / (2 * (radius + rest) + 1)).floor()
    outer = ((_ONE - (2 * radius + 1) * inner) / 2).floor()
    distance = torch.arange(-reach, reach + 1, device=sigma.device).abs()
    return ((distance <= radius) * inner + (distance == radius + 1) * outer) / _ONE


def _filter(table: Float[Tensor, "n size c other"], box: Float[Tensor, "n taps"]) -> Float[Tensor, "n size c other"]:
    """The passes along the second dimension, each ending on whole levels. Border pixels repeat outwards."""
    (n, size), taps = table.shape[:2], box.shape[1]
    index = torch.arange(size, device=box.device)[:, None] + torch.arange(taps, device=box.device) - taps // 2
    index = index.clamp_(0, size - 1) + (torch.arange(n, device=box.device) * size)[:, None, None]
    # Two sums, of the upper and the lower half of each weight's bits, are exact in float32 where one would not be.
    # Plain widths such as 1.0 make ties everywhere, and rounding them the other way shows.
    high = (box * _HALF).floor_() / _HALF
    low = (box - high) * _HALF
    high, low = (half[:, None].expand(n, size, taps).reshape(n * size, taps) for half in (high, low))
    index, rows = index.view(n * size, taps), table.reshape(n * size, -1)
    for _ in range(_PASSES):
        carry = embedding_bag(index, rows, per_sample_weights=low, mode="sum").add_(_HALF / 2).floor_()
        rows = embedding_bag(index, rows, per_sample_weights=high, mode="sum").add_(carry, alpha=1 / _HALF).floor_()
    return rows.view_as(table)


def gaussian_blur(
    levels: Float[Tensor, "n c h w"], sigma: Float[Tensor, " n"], max_sigma: float
) -> Float[Tensor, "n c h w"]:
    """Blurs each crop by a Gaussian of standard deviation ``sigma`` pixels, approximated by three boxes as Pillow does.

    Levels are whole numbers from 0 to 255. ``max_sigma`` bounds ``sigma`` (a number on the host: it sizes the filter).
    """
    box = _box(sigma, reach=int((math.sqrt(4 * max_sigma**2 + 1) - 1) / 2) + 1)
    columns = _filter(levels.permute(0, 3, 1, 2), box)  # (n, w, c, h)
    return _filter(columns.permute(0, 3, 2, 1), box).permute(0, 2, 1, 3)  # (n, h, c, w)
