"""How well the self-attention of the class token outlines objects (section 4.2.2, figure 4)."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dino.config import IMAGENET_MEAN, IMAGENET_STD
from dino.features import attention_maps
from dino.metrics import jaccard


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


def upsample_masks(masks: Bool[Tensor, "*b h w"], patch_size: int) -> Bool[Tensor, "*b h_pixels w_pixels"]:
    """Masks over patches as masks over pixels: every patch becomes a square of its own value (nearest neighbour)."""
    return masks.repeat_interleave(patch_size, -2).repeat_interleave(patch_size, -1)


def best_head_jaccard(masks: Bool[Tensor, "heads h w"], ground_truth: Bool[Tensor, "h w"]) -> Float[Tensor, ""]:
    """Jaccard index, 0 to 1, of the head whose mask fits the ground truth best (figure 4 shows the best head)."""
    return jaccard(masks, ground_truth).max()


def run(
    backbone: nn.Module,
    images: Sequence[Float[Tensor, "c _ _"]],
    masks: Sequence[Bool[Tensor, "_ _"]],
    *,
    share: float = 0.6,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Mean over images of the best head's Jaccard index, with masks that keep a share of the attention mass (figure 4).

    Images hold values from 0 to 1 and may differ in size; what does not fill a patch is cut off on the right and below.
    Returns ``{"attention_jaccard": per cent}``.

    Raises:
        ValueError: no images, an image without its mask, or one smaller than a patch.
    """
    if not images or len(images) != len(masks):
        raise ValueError(
            f"{len(images)} images and {len(masks)} masks: every image needs one mask, and there must be one"
        )
    patch = int(backbone.patch_size)  # pyright: ignore[reportArgumentType]
    shift, scale = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (mean, std))
    scores = []
    for image, mask in zip(images, masks, strict=True):
        if image.shape[-2:] != mask.shape:
            raise ValueError(
                f"image of {tuple(image.shape[-2:])} pixels has a mask of {tuple(mask.shape)}: sizes must agree"
            )
        height, width = (side - side % patch for side in mask.shape)
        if not (height and width):
            raise ValueError(f"image of {tuple(mask.shape)} pixels is smaller than a patch of {patch}")
        pixels = (image[:, :height, :width].to(device) - shift) / scale
        attention = attention_maps(backbone, pixels[None])[0]  # (heads, h, w)
        predicted = upsample_masks(mass_masks(attention, share), patch)
        scores.append(best_head_jaccard(predicted, mask[:height, :width].to(device)))
    return {"attention_jaccard": 100 * torch.stack(scores).mean().item()}
