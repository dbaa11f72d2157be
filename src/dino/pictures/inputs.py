"""What pictures are made from: image files found and decoded, brought to whole patches, pixels as patches.

Stands below the other files of this folder, like ``pictures``.
"""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from dino.data.decode import BrokenImage
from dino.data.files import is_archive
from dino.data.sources import open_source
from dino.encoder.encoder import Encoder
from dino.encoder.sizes import resized

# Images keep their size up to this many pixels: attention costs the square of the number of patches.
MOST_PIXELS = 854 * 480
_log = logging.getLogger(__name__)


class Input(NamedTuple):
    """An image as it was decoded, its name for messages, and the stem of the files that are made from it."""

    name: str
    stem: str
    image: UInt8[Tensor, "c h w"]


def read_images(
    data: Sequence[str], broken: dict[str, str] | None = None, encoder: Encoder | None = None
) -> Iterator[Input]:
    """Every image of files, folders, tar archives, lists and patterns, one at a time, read as the encoder reads them.

    Stems: the file's name without its extension, below the path inside the folder or archive; where two are equal, the
    later gets ``_2``, ``_3``, ... Images that cannot be read are left out, logged, and noted in ``broken`` (name ->
    reason).

    Raises:
        ValueError: no DATA, it does not exist or holds no image, or none can be read; says why.
    """
    if not data:
        raise ValueError("no images given: name them after the weights")
    unread = {} if broken is None else broken
    taken: set[str] = set()
    count = 0
    for path in data:
        source = open_source(path)
        if encoder is not None:
            source = source.with_pixels(encoder.channels, encoder.pixel_range)
        inside = os.path.isdir(path) or is_archive(path)
        for i in range(len(source)):
            name = source.name(i)
            key = name.removeprefix(path).lstrip("/") if inside else os.path.basename(name)
            stem = _free_stem(key, taken)
            try:
                image = source.load(i)
            except BrokenImage as error:
                unread[name] = str(error)
                _log.warning("%s cannot be read and is left out: %s", name, unread[name])
                continue
            count += 1
            yield Input(name, stem, image)
    if not count:
        name, reason = next(iter(unread.items()), (" ".join(data), "no image"))
        raise ValueError(f"{name} cannot be read: {reason}")


def fitted_images(
    data: Sequence[str], encoder: Encoder, size: int | None, broken: dict[str, str]
) -> Iterator[tuple[Input, UInt8[Tensor, "c _ _"]]]:
    """Every image as it is and as the encoder sees it (``fit``); one that is too small counts as broken.

    Raises:
        ValueError: as ``read_images``, or every image is too small; says why.
    """
    shown, reason = 0, ""
    for given in read_images(data, broken, encoder):
        try:
            fitted = fit(given.image, encoder.patch_size, size, name=given.name)
        except ValueError as error:
            reason = broken[given.name] = str(error)
            _log.warning("%s; it is left out", reason)
            continue
        shown += 1
        yield given, fitted
    if not shown:
        raise ValueError(reason)


def _free_stem(key: str, taken: set[str]) -> str:
    # An archive's names are not to be trusted: none may lead out of the folder of results.
    clean = "/".join(part for part in os.path.splitext(key)[0].split("/") if part not in ("", ".", ".."))
    stem, number = clean, 1
    while stem.casefold() in taken:
        number += 1
        stem = f"{clean}_{number}"
    taken.add(stem.casefold())
    return stem


def scaled_size(height: int, width: int, size: int | None) -> tuple[int, int]:
    """Height and width with the shorter side at ``size`` pixels; without, as they are or shrunk to ``MOST_PIXELS``.

    >>> scaled_size(480, 640, 240), scaled_size(375, 500, None), scaled_size(3000, 4000, None)
    ((240, 320), (375, 500), (554, 739))
    """
    scale = min(1.0, math.sqrt(MOST_PIXELS / (height * width))) if size is None else size / min(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def check_size(size: int | None) -> None:
    """Refuses a ``--size`` below one pixel, before anything is read."""
    if size is not None and size < 1:
        raise ValueError(f"--size {size} is not allowed: at least 1 pixel")


def check_picture(path: Path, flag: str = "out") -> None:
    """Refuses a name that says no picture format, before the work is done."""
    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--{flag} {path} is no name of a picture: end it in .png")


def fit(
    image: UInt8[Tensor, "c _ _"], patch: int, size: int | None = None, name: str = "an image"
) -> UInt8[Tensor, "c _ _"]:
    """The image at ``scaled_size``, cut on the right and below to whole patches.

    Raises:
        ValueError: it is then smaller than one patch.
    """
    height, width = scaled_size(image.shape[1], image.shape[2], size)
    if min(height, width) < patch:
        raise ValueError(
            f"{name} has {height} x {width} pixels, a patch of this backbone {patch}: give a larger --size"
        )
    image = resized(image, height, width)
    return image[:, : height - height % patch, : width - width % patch].contiguous()


def patch_at(
    pixel: tuple[int, int], image: UInt8[Tensor, "c _ _"], patch: int, size: int | None = None, name: str = "the image"
) -> tuple[int, int]:
    """Row and column of the patch of ``fit(image, patch, size)`` at a pixel (x, y) of the image itself.

    Where ``fit`` cuts the border off: the nearest patch.

    Raises:
        ValueError: the pixel lies outside the image.
    """
    x, y = pixel
    height, width = image.shape[1:]
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(
            f"--query {x} {y} lies outside {name}: x from 0 to {width - 1}, y from 0 to {height - 1} pixels"
        )
    high, wide = scaled_size(height, width, size)
    row, column = y * high // height // patch, x * wide // width // patch
    return min(row, high // patch - 1), min(column, wide // patch - 1)
