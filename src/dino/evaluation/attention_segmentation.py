"""How well the self-attention of the class token outlines objects (section 4.2.2, figure 4)."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from dino.data.masks import objects
from dino.encoder.attention import mass_masks
from dino.encoder.encoder import Encoder
from dino.encoder.sizes import batches_of_one_size, whole_patches
from dino.evaluation.metrics import jaccard
from dino.machine.randomness import generator
from dino.options import AttentionSegmentationOptions

Sample = tuple[Float[Tensor, "c _ _"], Bool[Tensor, "_ _"] | Int64[Tensor, "_ _"]]  # An image and its mask.


def best_head_jaccard(masks: Bool[Tensor, "heads h w"], ground_truth: Bool[Tensor, "h w"]) -> Float[Tensor, ""]:
    """Jaccard index, 0 to 1, of the head whose mask fits the ground truth best (figure 4 shows the best head)."""
    return jaccard(masks, ground_truth).max()


def jaccard_of_objects(masks: Bool[Tensor, "heads h w"], labels: Int64[Tensor, "h w"]) -> Float[Tensor, " n"]:
    """Jaccard index, 0 to 1, of every object with the head that fits it best.

    ``labels``: 0 background, -1 void (left out of both), every other value an object.

    >>> masks = torch.tensor([[[True, True, False]], [[False, False, True]]])
    >>> jaccard_of_objects(masks, torch.tensor([[1, 0, 2]])).tolist()
    [0.5, 1.0]
    """
    masks = masks & (labels >= 0)
    return torch.stack([best_head_jaccard(masks, labels == value) for value in objects(labels)])


def shuffled(masks: Bool[Tensor, "heads h w"], random: torch.Generator) -> Bool[Tensor, "heads h w"]:
    """As many patches of every head, anywhere: what the size of the masks is worth alone."""
    order = torch.rand(masks.flatten(1).shape, generator=random).argsort(1).to(masks.device)
    return masks.flatten(1).gather(1, order).view_as(masks)


def at_size(masks: Bool[Tensor, "heads _ _"], size: tuple[int, int]) -> Bool[Tensor, "heads _ _"]:
    """Masks over patches as masks over pixels (height, width), by nearest neighbour."""
    return F.interpolate(masks[None].float(), size, mode="nearest-exact")[0] > 0


def run(
    encoder: Encoder, samples: Iterable[Sample], options: AttentionSegmentationOptions = AttentionSegmentationOptions()
) -> dict[str, float]:
    """Mean over objects of the best head's Jaccard index; masks keep a share of the attention's mass (figure 4).

    ``samples``: images (values from 0 to 1, of any sizes) with masks, labelled as in ``jaccard_of_objects``; a stream.
    They are seen at full size, and what does not fill a patch is cut off on the right and below; or resized to squares
    of ``resize`` pixels (down to a multiple of the patch), and the masks compared at full size. Images without an
    object are passed over.

    Returns per cent: ``attention_jaccard``; ``attention_jaccard_images``, the mean over images of each one's mean; and
    ``attention_jaccard_shuffled``, with the patches of every mask shuffled, drawn by ``seed``.

    Raises:
        ValueError: no image has an object, an image and its mask differ in size, or an image is smaller than a patch.
    """
    resize = options.resize
    random = generator(options.seed, "shuffled masks")
    of_objects, of_images, by_chance = [], [], []

    def seen() -> Iterator[tuple[Tensor, Tensor]]:
        for image, labels in samples:
            if labels.shape != image.shape[1:]:
                sizes = f"{tuple(image.shape[1:])} pixels has a mask of {tuple(labels.shape)}"
                raise ValueError(f"image of {sizes}: sizes must agree")
            image = whole_patches(image, encoder.patch_size, resize)
            yield image, (labels if resize else labels[: image.shape[1], : image.shape[2]]).long()

    for images, truth in batches_of_one_size(seen(), encoder.batch_size):
        kept = mass_masks(encoder.attention(images), options.share)  # (b, heads, h, w)
        for masks, labels in zip(kept, truth, strict=True):
            if not objects(labels):
                continue
            labels, size = labels.to(masks.device), (labels.shape[0], labels.shape[1])
            scores = jaccard_of_objects(at_size(masks, size), labels)
            of_objects.append(scores)
            of_images.append(scores.mean())
            by_chance.append(jaccard_of_objects(at_size(shuffled(masks, random), size), labels))
    if not of_objects:
        raise ValueError("no image has an object in its mask")
    means = {
        "attention_jaccard": torch.cat(of_objects),
        "attention_jaccard_images": torch.stack(of_images),
        "attention_jaccard_shuffled": torch.cat(by_chance),
    }
    return {name: 100 * values.mean().item() for name, values in means.items()}
