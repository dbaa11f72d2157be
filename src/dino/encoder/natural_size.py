"""Images as large as they are: made to fill whole patches, and gathered into batches of one size."""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from dino.augment.resample import resize_crops


def whole_patches(image: Float[Tensor, "c height width"], patch_size: int, resize: int = 0) -> Float[Tensor, "c h w"]:
    """What a backbone sees of an image: cut on the right and below, or resized to a square of ``resize`` pixels.

    Both down to multiples of the patch. Values from 0 to 1; resized they are rounded to 8 bits, as Pillow does.

    Raises:
        ValueError: less than one patch is left.
    """
    _, height, width = image.shape
    if min(resize or height, resize or width) < patch_size:
        seen = f"resized to {resize} pixels" if resize else f"of {height} x {width} pixels"
        raise ValueError(f"an image {seen} is smaller than a patch of {patch_size}")
    if not resize:
        return image[:, : height - height % patch_size, : width - width % patch_size]
    levels = (image * 255).round().to(torch.uint8)[None]
    whole, unflipped = torch.tensor([[[0, 0, height, width]]]), torch.zeros(1, 1, dtype=torch.bool)
    return resize_crops(levels, whole, unflipped, resize - resize % patch_size)[0, 0] / 255


def batches_of_one_size(
    pairs: Iterable[tuple[Float[Tensor, "c _ _"], Tensor]], batch_size: int
) -> Iterator[tuple[Float[Tensor, "b c h w"], list[Tensor]]]:
    """Stacks images of one size, each with what belongs to it, as soon as there are enough; at the end what is left.

    >>> wide, tall = torch.zeros(3, 2, 4), torch.zeros(3, 4, 2)
    >>> pairs = [(image, torch.tensor(i)) for i, image in enumerate([wide, tall, wide, wide])]
    >>> [(tuple(images.shape), [int(i) for i in mine]) for images, mine in batches_of_one_size(pairs, 2)]
    [((2, 3, 2, 4), [0, 2]), ((1, 3, 4, 2), [1]), ((1, 3, 2, 4), [3])]
    """
    waiting: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
    for pair in pairs:
        shape = tuple(pair[0].shape)
        same = waiting.setdefault(shape, [])
        same.append(pair)
        if len(same) == batch_size:
            yield _stacked(waiting.pop(shape))
    yield from map(_stacked, waiting.values())


def _stacked(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    images, others = zip(*pairs, strict=True)
    return torch.stack(images), list(others)
