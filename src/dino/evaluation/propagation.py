"""Labels of one frame propagated to the next ones, along the nearest neighbours of their patches.

Source: Jabri et al. 2020 (arXiv 2006.14613), as DINO's evaluation on videos does it (section 4.2.2).
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dino.machine import device as hardware

_TILE = (6, 18)  # Rows and columns of target patches that are worked together: measured, not a setting.


def propagate(
    target: Float[Tensor, "h w d"],
    sources: Float[Tensor, "f h w d"],
    labels: Float[Tensor, "f h w c"],
    *,
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.1,
) -> Float[Tensor, "h w c"]:
    """Soft labels of a frame: the weighted mean of those of its k most similar patches in the source frames.

    Features have length 1; weights are the softmax of cosine / temperature over the k. ``radius``: only patches at most
    that many rows and columns away are considered; 0: all.

    The target is worked in tiles, each of which meets only the rows and columns within reach of it: memory stays small
    whatever the size of the frame, and most of the similarities that are computed count.
    """
    h, w, _ = target.shape
    reach = radius or max(h, w)
    propagated = target.new_empty(h, w, labels.shape[-1])
    for left in range(0, w, _TILE[1]):
        x, u = _reached(left, _TILE[1], w, reach)
        band, band_labels = sources[:, :, u].contiguous(), labels[:, :, u]
        for top in range(0, h, _TILE[0]):
            y, v = _reached(top, _TILE[0], h, reach)
            far = _far(y, v, reach)[:, None, :, None] | _far(x, u, reach)[:, None]  # (y, x, v, u)
            bias = hardware.upload(torch.where(far, -torch.inf, 0.0).flatten(2).flatten(0, 1), target.device)
            closeness = target[y, x].flatten(0, 1) @ band[:, v].flatten(1, 2).mT + bias  # (f, y x, v u)
            closeness = closeness.transpose(0, 1).flatten(1)  # (y x, f v u)
            values, chosen = closeness.topk(min(topk, closeness.shape[1]))
            weights = (values / temperature).softmax(1)  # 0 for what is out of reach, where fewer than k are in it.
            chosen_labels = band_labels[:, v].reshape(-1, labels.shape[-1])[chosen]  # (y x, k, c)
            propagated[y, x] = (weights[:, :, None] * chosen_labels).sum(1).view(far.shape[0], far.shape[1], -1)
    return propagated


def _reached(start: int, length: int, size: int, reach: int) -> tuple[slice, slice]:
    """The rows (or columns) of a tile, and those of the sources within reach of it."""
    stop = min(start + length, size)
    return slice(start, stop), slice(max(0, start - reach), min(size, stop + reach))


def _far(own: slice, near: slice, reach: int) -> Tensor:
    return (torch.arange(own.start, own.stop)[:, None] - torch.arange(near.start, near.stop)).abs() > reach


def propagate_labels(
    features: Iterable[Float[Tensor, "h w d"]],
    first_labels: Float[Tensor, "h w c"],
    *,
    n_last_frames: int = 7,
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.1,
) -> Iterator[Float[Tensor, "h w c"]]:
    """Soft labels of every frame from the second on, from those of the first frame and of the last few before it.

    A stream: of the frames gone by only the first and the last ``n_last_frames`` are kept.
    """
    for i, target in enumerate(features):
        if i == 0:
            sources = target.new_empty(1 + n_last_frames, *target.shape)
            labels = target.new_empty(1 + n_last_frames, *first_labels.shape)
            place, propagated = 0, first_labels
        else:
            there = min(i, 1 + n_last_frames)
            propagated = propagate(
                target, sources[:there], labels[:there], radius=radius, topk=topk, temperature=temperature
            )
            yield propagated
            place = 1 + (i - 1) % n_last_frames  # The oldest makes room; the first frame stays.
        sources[place], labels[place] = target, propagated


def scaled_scores(soft: Float[Tensor, "h w c"], scale: int) -> Float[Tensor, "c height width"]:
    """Soft labels at ``scale`` times the size (bilinear), each object's from their minimum, 0, to their maximum, 1.

    The object of a pixel is the one with the highest score there.
    """
    scores = F.interpolate(soft.permute(2, 0, 1)[None], scale_factor=scale, mode="bilinear", align_corners=False)[0]
    scores = scores - scores.amin((1, 2), keepdim=True)
    return scores / scores.amax((1, 2), keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
