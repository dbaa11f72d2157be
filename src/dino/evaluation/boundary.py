"""How well masks of a video fit: contour accuracy, and the statistics of DAVIS over its frames.

Source: Perazzi et al. 2016, "A benchmark dataset and evaluation methodology for video object segmentation", section 4,
in the form that the DAVIS 2017 evaluation computes. The region similarity J is ``dino.evaluation.metrics.jaccard``.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Statistics(NamedTuple):
    """Of one measure over the frames of a video, for every object."""

    mean: Float[Tensor, "*b"]
    recall: Float[Tensor, "*b"]  # Share of the frames above 0.5.
    decay: Float[Tensor, "*b"]  # Mean of the first quarter minus mean of the last: what is lost over time.


def statistics(scores: Float[Tensor, "*b frames"]) -> Statistics:
    """Mean, recall and decay over the frames. The four quarters share the frames at their borders.

    >>> [value.item() for value in statistics(torch.tensor([0.75, 0.75, 0.25, 0.25]))]
    [0.5, 0.5, 0.5]
    """
    ends = (torch.linspace(1, scores.shape[-1], 5, dtype=torch.float64) + 1e-10).round().long().tolist()
    first, last = scores[..., : ends[1]], scores[..., ends[3] - 1 :]
    return Statistics(scores.mean(-1), (scores > 0.5).to(scores.dtype).mean(-1), first.mean(-1) - last.mean(-1))


def boundary_f(
    predicted: Bool[Tensor, "*b h w"], true: Bool[Tensor, "*b h w"], tolerance: float = 0.008
) -> Float[Tensor, "*b"]:
    """Contour accuracy F: harmonic mean of the precision and the recall of the boundary pixels, 0 to 1, in float64.

    A boundary pixel is right when the other mask has one within ``tolerance`` times the image's diagonal (rounded up to
    whole pixels). Two empty masks agree: 1. On the CPU, whatever the device of the masks.
    """
    radius = math.ceil(tolerance * math.hypot(*predicted.shape[-2:]))
    edges, true_edges = boundaries(predicted), boundaries(true)
    precision, recall = _share_near(edges, true_edges, radius), _share_near(true_edges, edges, radius)
    return 2 * precision * recall / (precision + recall).clamp_min(torch.finfo(torch.float64).tiny)


def boundaries(masks: Bool[Tensor, "*b h w"]) -> Bool[Tensor, "*b h w"]:
    """Pixels that differ from the one to the right, below, or both; the border of the image is no boundary."""
    right = torch.cat([masks[..., 1:], masks[..., -1:]], -1)
    below = torch.cat([masks[..., 1:, :], masks[..., -1:, :]], -2)
    diagonal = torch.cat([right[..., 1:, :], right[..., -1:, :]], -2)
    return (masks ^ right) | (masks ^ below) | (masks ^ diagonal)


def dilate(masks: Bool[Tensor, "*b h w"], radius: int) -> Bool[Tensor, "*b h w"]:
    """All pixels at most ``radius`` pixels (Euclidean) from one of the mask.

    A disk is a run of pixels per row, shorter the farther the row is from its centre. So the masks grow sideways, and
    with each length of the run they are put that many rows up and down.
    """
    h, w = masks.shape[-2:]
    room = masks.new_zeros(*masks.shape[:-2], h + 2 * radius, w + 2 * radius)
    room[..., radius : radius + h, radius : radius + w] = masks
    grown = room[..., radius : radius + w].clone()
    reached, reach = torch.zeros_like(masks), 0
    for row in range(radius, -1, -1):
        while reach < math.isqrt(radius**2 - row**2):
            reach += 1
            grown |= room[..., radius - reach :][..., :w] | room[..., radius + reach :][..., :w]
        reached |= grown[..., radius - row :, :][..., :h, :] | grown[..., radius + row :, :][..., :h, :]
    return reached


def _share_near(edges: Tensor, others: Tensor, radius: int) -> Tensor:
    """Share of the edges that lie near another one, 1 where there are none."""
    count, near = edges.sum((-2, -1)).cpu(), (edges & dilate(others, radius)).sum((-2, -1)).cpu()
    return torch.where(count == 0, 1.0, near.double() / count.clamp_min(1))
