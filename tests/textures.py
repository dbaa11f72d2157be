"""Sets of images in the values of instruments, with classes that are known: for tests and benchmarks/cases.py."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

KINDS = ("microscopy", "elevation", "five")


def draw(kind: str) -> Iterator[tuple[int, np.ndarray]]:
    """80 images of 48 x 48 pixels, four classes of texture: fine and coarse blobs, stripes across and down.

    ``microscopy``: 12-bit counts over an offset; ``elevation``: float32 with a "no data" value; ``five``: 16-bit
    channels.
    """
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:48, :48]
    for i in range(80):
        label, phase = i % 4, rng.uniform(0, 6.28)
        if label < 2:
            cells = rng.random((6, 6) if label else (24, 24))
            shape = np.kron(cells, np.ones((8, 8) if label else (2, 2)))
        else:
            shape = 0.5 + 0.5 * np.sin((x if label == 2 else y) * 0.8 + phase)
        shape = shape * rng.uniform(0.5, 1) + rng.normal(0, 0.03, shape.shape)
        if kind == "microscopy":  # 12-bit counts over an offset.
            yield label, (300 + 200 * shape).clip(0, 4095).astype(np.uint16)
        elif kind == "elevation":
            heights = (1500 + 80 * shape).astype(np.float32)
            heights[:4, : 4 + i % 5] = -9999
            yield label, heights
        else:
            gains = np.array([1.0, 0.2, 2.0, 0.5, 1.5])
            yield label, (500 + 300 * shape[..., None] * gains).astype(np.uint16)


def write(kind: str, folder: Path) -> None:
    """``folder/c0/0.tif``, ...; half of the microscopy images as .png."""
    import tifffile

    for i, (label, pixels) in enumerate(draw(kind)):
        path = folder / f"c{label}" / str(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "microscopy" and i % 2:
            Image.fromarray(pixels).save(path.with_suffix(".png"))
        else:
            # Without a word on the last axis, tifffile writes a page a row.
            channels = {"planarconfig": "contig"} if pixels.ndim == 3 else {}
            tifffile.imwrite(path.with_suffix(".tif"), pixels, photometric="minisblack", **channels)
