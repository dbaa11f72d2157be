"""The sizes at which images are shown: the central crop, whole patches, and batches of one size."""

import functools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor


def by_pillow(image: UInt8[Tensor, "c _ _"], operation: Callable[[Image.Image], Image.Image]) -> UInt8[Tensor, "c _ _"]:
    """An operation of Pillow on an image of any number of channels: on the colours together, or channel by channel,
    which gives the same bytes."""
    planes = [image.permute(1, 2, 0).contiguous().numpy()] if len(image) == 3 else [*image.contiguous().numpy()]
    made = [torch.from_numpy(np.array(operation(Image.fromarray(plane)))) for plane in planes]
    return made[0].permute(2, 0, 1) if len(image) == 3 else torch.stack(made)


def resized(image: UInt8[Tensor, "c _ _"], height: int, width: int) -> UInt8[Tensor, "c {height} {width}"]:
    """The image at another size, in the bytes of Pillow's antialiased bicubic resize."""
    if tuple(image.shape[1:]) == (height, width):
        return image
    return by_pillow(image, lambda picture: picture.resize((width, height), Image.Resampling.BICUBIC))


def center_crop(resize: int, size: int) -> Callable[[Tensor], Tensor]:
    """torchvision's ``Resize(resize)`` and ``CenterCrop(size)`` on a PIL image: (c, h, w) to (c, size, size), 8 bits.

    A function that worker processes can be sent. ``size`` is at most ``resize``.

    >>> center_crop(8, 4)(torch.zeros(3, 20, 10, dtype=torch.uint8)).shape
    torch.Size([3, 4, 4])
    """
    return functools.partial(_center_crop, resize=resize, size=size)


def _center_crop(image: UInt8[Tensor, "c _ _"], resize: int, size: int) -> UInt8[Tensor, "c {size} {size}"]:
    _, height, width = image.shape
    short = min(height, width)
    image = resized(image, resize * height // short, resize * width // short)
    top, left = (round((side - size) / 2) for side in image.shape[1:])  # Half to even, as torchvision rounds.
    return image[:, top : top + size, left : left + size].contiguous()


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
    side = resize - resize % patch_size
    return resized((image * 255).round().to(torch.uint8).cpu(), side, side).to(image.device) / 255


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
