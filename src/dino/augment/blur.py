"""Gaussian blur of a batch of crops, each with its own width."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

_PASSES = 3
_ONE, _HALF = 2**24, 2**12  # Pillow's fixed point: weights are whole numbers of 1 / 2^24.


def _box_taps(
    sigma: Float[Tensor, " n"], size: int, reach: int
) -> tuple[Int[Tensor, "n size taps"], Float[Tensor, "n size taps"]]:
    """Indices and weights of one box filter: ``_PASSES`` of them in a row have variance sigma^2.

    A box of fractional length: whole weights up to ``radius``, the rest on the two pixels beyond (Gwosdek et al. 2011,
    "Theoretical foundations of Gaussian convolution by extended box filtering"). The border pixel is repeated outwards.
    """
    variance = sigma**2 / _PASSES
    radius = ((torch.sqrt(12 * variance + 1) - 1) / 2).floor()
    rest = (2 * radius + 1) * (radius * (radius + 1) - 3 * variance) / (6 * (variance - (radius + 1) ** 2))
    inner = (_ONE / (2 * (radius + rest) + 1)).floor()  # 
    outer = ((_ONE - (2 * radius + 1) * inner) / 2).floor()

    steps = torch.arange(-reach, reach + 1, device=sigma.device)
    distance = steps.abs()
    far = radius[:, None] + 1
    weight = torch.where(distance < far, inner[:, None], torch.where(distance == far, outer[:, None], 0.0)) / _ONE
    index = (torch.arange(size, device=sigma.device)[:, None] + steps).clamp_(0, size - 1)
    rows = torch.arange(len(sigma), device=sigma.device)[:, None, None] * size
    return rows + index, weight.to(torch.float32)[:, None].expand(-1, size, -1)


def _filter(table: Float[Tensor, "n size c other"], sigma: Tensor, reach: int) -> Float[Tensor, "n size c other"]:
    """The box filters along the second dimension; each pass ends on whole levels, as in 8-bit images."""
    n, size = table.shape[:2]
    index, weight = (x.reshape(n * size, -1) for x in _box_taps(sigma, size, reach))
    high = weight.mul(_HALF).floor_().div_(_HALF)
    low = (weight - high).mul_(_HALF)
    rows = table.reshape(n * size, -1)
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
    reach = int((math.sqrt(4 * max_sigma**2 + 1) - 1) / 2) + 1
    columns = _filter(levels.permute(0, 3, 1, 2), sigma, reach)  # (n, w, c, h)
    return _filter(columns.permute(0, 3, 2, 1), sigma, reach).permute(0, 2, 1, 3)  # (n, h, c, w)
