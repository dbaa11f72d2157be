"""How well the self-attention of the class token outlines objects (section 4.2.2, figure 4)."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dino.config import IMAGENET_MEAN, IMAGENET_STD
from dino.features import attention_maps, mass_masks, upsample_masks
from dino.metrics import jaccard


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
