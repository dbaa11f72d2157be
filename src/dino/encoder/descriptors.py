"""Descriptors of images that keep their own size or shape: each image prepared by itself, then the encoder."""

import os
from collections.abc import Callable

import torch
from jaxtyping import UInt8
from torch import Tensor

from dino.data.decode import BrokenImage
from dino.data.sources import Source
from dino.encoder.encoder import Encoder, Features, collected
from dino.machine import distributed
from dino.machine.progress import ahead, tracked


def extract_descriptors(
    encoder: Encoder,
    source: Source,
    describe: Callable[[Tensor], Tensor],
    prepare: Callable[[UInt8[Tensor, "c _ _"], int], UInt8[Tensor, "c _ _"]],
    *,
    complete: bool = False,
    label: str = "features",
) -> Features:
    """``describe(images)`` for every image of a source, in its order; images are of equal size in a batch.

    ``prepare(image, i)`` gives image ``i`` the size it is to be seen in; it runs in threads. ``describe`` gets images
    (b, c, h, w) of 8 bits and returns (b, d), of any length. Broken images are left out, and counted in the log, unless
    the set must be ``complete``.

    Raises:
        ValueError: no image can be read, or one cannot where all must.
    """
    seen = source.with_pixels(encoder.channels, encoder.pixel_range)
    share, batch_size = distributed.share(len(source)), encoder.batch_size
    described: dict[int, Tensor] = {}
    broken: dict[str, str] = {}

    def read(i: int) -> tuple[int, Tensor | BrokenImage]:
        try:
            return i, prepare(seen.load(i), i)
        except BrokenImage as error:
            return i, error

    def work(group: list[tuple[int, Tensor]]) -> None:
        result = describe(torch.stack([image for _, image in group])).float().cpu()
        described.update(zip((i for i, _ in group), result, strict=True))

    # Decoding and resizing release the interpreter's lock: a few images ahead, in threads.
    images = ahead(read, share, 2 * batch_size, threads=os.cpu_count() or 1)
    # Images wait until a batch of their size is full; when too many wait, the largest group goes as it is.
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    for i, image in tracked(images, label, total=len(share), shown=encoder.progress):
        if isinstance(image, BrokenImage):
            broken[source.name(i)] = str(image)
            continue
        waiting.setdefault(tuple(image.shape), []).append((i, image))
        largest = max(waiting, key=lambda shape: len(waiting[shape]))
        if len(waiting[largest]) >= batch_size or sum(map(len, waiting.values())) >= 8 * batch_size:
            work(waiting.pop(largest))
    for group in waiting.values():
        work(group)
    found = sorted(described)
    parts = [torch.stack([described[i] for i in found])] if found else []
    return collected(source, parts, [torch.tensor(found, dtype=torch.long)], broken, complete)
