"""Labels of one frame propagated to the next ones, along the nearest neighbours of their patches.

Source: Jabri et al. 2020 (arXiv 2006.14613), as DINO's evaluation on videos does it (section 4.2.2).
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_ENTRIES = 2**22  # Similarities in memory at a time: 16 MB.


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

    The target is worked in strips of rows, which meet only the rows within the radius. Columns outside it are masked:
    cutting them off as well would copy more than it saves.
    """
    f, h, w, _ = sources.shape
    reach = radius or max(h, w)
    device = target.device
    rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
    far_columns = (columns[:, None] - columns).abs() > reach
    strip = max(1, _ENTRIES // (f * min(h, 2 * reach + 1) * w * w))
    propagated = []
    for top in range(0, h, strip):
        own, near = rows[top : top + strip], rows[max(0, top - reach) : top + strip + reach]
        low, high = max(0, top - reach), top + strip + reach
        far = ((own[:, None] - near).abs() > reach)[:, None, :, None] | far_columns[:, None]  # (own, w, near, w)
        closeness = (
            target[top : top + strip].flatten(0, 1) @ sources[:, low:high].flatten(1, 2).mT
        )  # (f, own w, near w)
        closeness.view(f, *far.shape).add_(torch.zeros_like(far, dtype=target.dtype).masked_fill_(far, -torch.inf))
        closeness = closeness.transpose(0, 1).flatten(1)  # (own w, f near w)
        values, chosen = closeness.topk(min(topk, closeness.shape[1]), dim=1)
        chosen_labels = labels[:, low:high].reshape(-1, labels.shape[-1])[chosen]  # (own w, k, c)
        weights = (values / temperature).softmax(1)  # Out of reach, if fewer are in reach: weight 0.
        propagated.append((weights[:, :, None] * chosen_labels).sum(1))
    return torch.cat(propagated).unflatten(0, (h, w))


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
