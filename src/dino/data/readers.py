"""Readers: what each kind of DATA can do with image ``i``. ``sources`` decides which one reads what."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image
from torch import Tensor

from dino.data.decode import RGB, BrokenImage, Pixels, decode, from_pillow, image_size
from dino.data.files import read
from dino.data.listing import Images
from dino.data.raw import Kind, Raw, kind_of, read_raw
from dino.data.shapes import make_shapes
from dino.data.torchvision_sets import torchvision_set

ORDINARY = Kind(3, raw=False)


@runtime_checkable
class Reader(Protocol):
    """What a kind of data can do: say image ``i``'s name, decode it, and tell its height and width beforehand."""

    def name(self, i: int) -> str: ...
    def load(self, i: int, max_side: int | None, pixels: Pixels = RGB) -> Tensor: ...
    def size(self, i: int, max_side: int | None, pixels: Pixels = RGB) -> tuple[int, int]: ...
    def kind(self, i: int) -> Kind: ...
    def raw(self, i: int, channels: int) -> Raw: ...


class EncodedReader:
    """Images that are bytes of an image file, wherever these lie: give ``name`` and ``read``."""

    def name(self, i: int) -> str:
        raise NotImplementedError

    def read(self, i: int) -> bytes:
        """Raises OSError."""
        raise NotImplementedError

    def load(self, i: int, max_side: int | None, pixels: Pixels = RGB) -> Tensor:
        return decode(self._bytes(i), max_side, pixels)

    def size(self, i: int, max_side: int | None, pixels: Pixels = RGB) -> tuple[int, int]:
        return image_size(self._bytes(i), max_side, pixels)

    def kind(self, i: int) -> Kind:
        return kind_of(self._bytes(i))

    def raw(self, i: int, channels: int) -> Raw:
        return read_raw(self._bytes(i), channels)

    def _bytes(self, i: int) -> bytes:
        try:
            return self.read(i)
        except OSError as error:
            raise BrokenImage(error.strerror or str(error)) from None


@dataclass(frozen=True)
class Files(EncodedReader):
    """Image files, in folders and archives."""

    images: Images

    def name(self, i: int) -> str:
        return self.images[i].name

    def read(self, i: int) -> bytes:
        return read(self.images[i])


class EightBits:
    """Images that come as pixels of 8 bits, not as files: give ``image``, a Pillow image of the reader's own."""

    def image(self, i: int) -> Image.Image:
        """Raises nearly anything."""
        raise NotImplementedError

    def load(self, i: int, max_side: int | None, pixels: Pixels = RGB) -> Tensor:
        if pixels.channels not in (1, 3):
            raise BrokenImage(f"it has 3 channels, not {pixels.channels}")
        try:
            return from_pillow(self.image(i), max_side, pixels.channels)
        except Exception as error:
            raise BrokenImage(" ".join(f"{type(error).__name__}: {error}".split())) from None

    def size(self, i: int, max_side: int | None, pixels: Pixels = RGB) -> tuple[int, int]:
        _, height, width = self.load(i, max_side, pixels).shape
        return height, width

    def kind(self, i: int) -> Kind:  # noqa: ARG002 - all are alike
        return ORDINARY

    def raw(self, i: int, channels: int) -> Raw:
        return self.load(i, None, Pixels(channels)).permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class Shapes(EightBits):
    """The built-in set, drawn when it is first looked at."""

    count: int
    image_side: int
    seed: int

    @property
    def masks(self) -> Tensor:
        return _drawn(self)[2]

    def name(self, i: int) -> str:
        return f"shapes/{self.seed}/{i}"

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(_drawn(self)[0][i].permute(1, 2, 0).numpy())

    def size(self, i: int, max_side: int | None, pixels: Pixels = RGB) -> tuple[int, int]:  # noqa: ARG002
        side = min(self.image_side, max_side or self.image_side)
        return side, side


@functools.lru_cache(maxsize=4)
def _drawn(shapes: Shapes) -> tuple[Tensor, Tensor, Tensor]:
    return make_shapes(shapes.count, shapes.image_side, shapes.seed)


@dataclass(frozen=True)
class Torchvision(EightBits):
    """A public set by its name."""

    dataset: str
    part: str

    def name(self, i: int) -> str:
        return f"{self.dataset}/{self.part}/{i}"

    def image(self, i: int) -> Image.Image:
        return torchvision_set(self.dataset, self.part)[i][0]


@dataclass(frozen=True)
class Joined:
    """Several readers, one after the other."""

    readers: Sequence[Reader]
    starts: np.ndarray  # Of each, its first image.

    def _at(self, i: int) -> tuple[Reader, int]:
        which = int(np.searchsorted(self.starts, i, "right")) - 1
        return self.readers[which], i - int(self.starts[which])

    def name(self, i: int) -> str:
        reader, row = self._at(i)
        return reader.name(row)

    def load(self, i: int, max_side: int | None, pixels: Pixels = RGB) -> Tensor:
        reader, row = self._at(i)
        return reader.load(row, max_side, pixels)

    def size(self, i: int, max_side: int | None, pixels: Pixels = RGB) -> tuple[int, int]:
        reader, row = self._at(i)
        return reader.size(row, max_side, pixels)

    def kind(self, i: int) -> Kind:
        reader, row = self._at(i)
        return reader.kind(row)

    def raw(self, i: int, channels: int) -> Raw:
        reader, row = self._at(i)
        return reader.raw(row, channels)
