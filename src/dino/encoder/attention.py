"""Attention as masks (figure 4)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def mass_masks(attention: Float[Tensor, "*b h w"], share: float = 0.6) -> Bool[Tensor, "*b h w"]:
    """Masks obtained by thresholding the self-attention maps to keep a share of the mass (figure 4: 60 %).

    Each map keeps its largest patches, the fewest that hold at least that share of its own sum.

    Raises:
        ValueError: the share is not between 0 and 1.

    >>> mass_masks(torch.tensor([[0.1, 0.5, 0.1, 0.3]]), share=0.6).tolist()
    [[False, True, False, True]]
    """
    if not 0 < share < 1:
        raise ValueError(f"share of the attention mass {share} is not allowed: between 0 and 1, both excluded")
    values, order = attention.flatten(-2).sort(dim=-1)  # Ascending: what stays below 1 - share in sum is dropped.
    kept = (values / values.sum(-1, keepdim=True)).cumsum(-1) > 1 - share
    return torch.zeros_like(kept).scatter_(-1, order, kept).view_as(attention)
