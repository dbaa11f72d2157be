"""Descriptors of images that keep their own size or shape: each image prepared by itself, then the encoder."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import UInt8
from torch import Tensor

from dino.data.decode import BrokenImage
from dino.data.sources import Source
from dino.encoder.encoder import Encoder, Features
from dino.machine.progress import tracked

_log = logging.getLogger(__name__)


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
    source = source.with_pixels(encoder.channels, encoder.pixel_range)
    batch_size = encoder.batch_size
    described: dict[int, Tensor] = {}
    broken: dict[str, str] = {}

    def read(i: int) -> Tensor | BrokenImage:
        try:
            pixels = source.load(i)
        except BrokenImage as error:
            return error
        return prepare(pixels, i)

    def work(group: list[tuple[int, Tensor]]) -> None:
        result = describe(torch.stack([image for _, image in group])).float().cpu()
        described.update(zip((i for i, _ in group), result, strict=True))

    images = tracked(_read_ahead(read, len(source), 2 * batch_size), label, total=len(source), shown=encoder.progress)
    # Images wait until a batch of their size is full; when too many wait, the largest group goes as it is.
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    for i, image in enumerate(images):
        if isinstance(image, BrokenImage):
            broken[source.name(i)] = str(image)
            continue
        waiting.setdefault(tuple(image.shape), []).append((i, image))
        largest = max(waiting, key=lambda shape: len(waiting[shape]))
        if len(waiting[largest]) >= batch_size or sum(map(len, waiting.values())) >= 8 * batch_size:
            work(waiting.pop(largest))
    for group in waiting.values():
        work(group)

    if broken:
        name, reason = next(iter(broken.items()))
        first = f"of the {len(source)} images cannot be read, the first {name}: {reason}"
        if complete or not described:
            raise ValueError(f"{len(broken)} {first}")
        _log.warning("%d %s; they are left out", len(broken), first)
    found = torch.tensor(sorted(described))
    labels = None if source.labels is None else source.labels[found]
    return Features(torch.stack([described[i] for i in found.tolist()]), labels, found)


def _read_ahead(read: Callable[[int], Tensor | BrokenImage], count: int, ahead: int) -> Iterator[Tensor | BrokenImage]:
    """``read(0)``, ``read(1)``, ... in order, some of them ahead in threads: decoding and resizing release the lock."""
    with ThreadPoolExecutor() as pool:
        pending = deque(pool.submit(read, i) for i in range(min(ahead, count)))
        for i in range(count):
            yield pending.popleft().result()
            if i + ahead < count:
                pending.append(pool.submit(read, i + ahead))
