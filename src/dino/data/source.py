"""The noun of this wing: images by index, with labels where there are any."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from dino.data.decode import RGB, BrokenImage, Pixels
from dino.data.raw import Range
from dino.data.readers import Reader, Shapes
from dino.machine.randomness import generator


@dataclass(frozen=True, eq=False)
class Source:
    """Images by index, with labels where there are any. Can be pickled for worker processes.

    ``classes[labels[i]]`` is the class of image ``i``. The parts of one DATA share their classes.
    """

    reader: Reader
    rows: Int64[np.ndarray, " n"]  # Which of the reader's images.
    labels: Int64[Tensor, " n"] | None
    classes: list[str]
    origin: str  # DATA as given.
    parts: "dict[str, Source]" = field(default_factory=dict)  # "train" and "val", those that there are.
    pixels: Pixels = RGB
    fixed_range: bool = False  # The range was given: weights that know of another do not change it.

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        return self.reader.name(int(self.rows[i]))

    def load(self, i: int, max_side: int | None = None) -> UInt8[Tensor, "c h w"]:
        """Image ``i`` in 8 bits, RGB or with the source's channels, its longest side at most ``max_side`` pixels.

        Raises:
            BrokenImage: it cannot be read.
        """
        return self.reader.load(int(self.rows[i]), max_side, self.pixels)

    def size(self, i: int, max_side: int | None = None) -> tuple[int, int]:
        """Height and width (to a pixel) that ``load`` will give, without decoding where the format allows.

        Raises:
            BrokenImage: it cannot be read.
        """
        return self.reader.size(int(self.rows[i]), max_side, self.pixels)

    @property
    def channels(self) -> int:
        return self.pixels.channels

    @property
    def pixel_range(self) -> Range | None:
        """The raw values that become 0 and 255; None: all images have 8 bits."""
        return self.pixels.low_high

    def with_pixels(self, channels: int, pixel_range: Range | None) -> "Source":
        """The same images read with that number of channels and that range: as a network learned to see them.

        ``None``: the network knows no range, the source's own stands. So does one that was given for the source.

        Raises:
            ValueError: the images have other channels.
        """
        if channels != self.channels and not {channels, self.channels} <= {1, 3}:
            raise ValueError(f"{self.origin}: its images have {self.channels} channels, these weights take {channels}")
        low_high = self.pixels.low_high if pixel_range is None or self.fixed_range else pixel_range
        parts = {name: part.with_pixels(channels, pixel_range) for name, part in self.parts.items()}
        return replace(self, pixels=Pixels(channels, low_high), parts=parts)

    def statistics(self, sample: int = 256, max_side: int = 256) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, of values from 0 to 1, over an evenly spaced sample.

        Raises:
            ValueError: none of the sample can be read.
        """
        moments = []
        for i in range(0, len(self), max(1, len(self) // sample)):
            with contextlib.suppress(BrokenImage):
                values = self.load(i, max_side).double().flatten(1) / 255
                moments.append(torch.stack((values.mean(1), values.square().mean(1))))
        if not moments:
            raise ValueError(f"{self.origin}: none of a sample of its images can be read")
        mean, square = torch.stack(moments).mean(0)  # Each image counts the same, whatever its size.
        std = (square - mean.square()).clamp_min(0).sqrt().clamp_min(1 / 255)
        return tuple(round(value, 4) for value in mean.tolist()), tuple(round(value, 4) for value in std.tolist())

    def median_side(self, sample: int = 64) -> int:
        """Median of the shorter sides of an evenly spaced sample, in pixels.

        Raises:
            ValueError: none of the sample can be read.
        """
        sides = []
        for i in range(0, len(self), max(1, len(self) // sample)):
            with contextlib.suppress(BrokenImage):
                sides.append(min(self.size(i)))
        if not sides:
            raise ValueError(f"{self.origin}: none of a sample of its images can be read")
        return sorted(sides)[len(sides) // 2]

    @property
    def masks(self) -> Bool[Tensor, "n s s"] | None:
        """Where the object is; only the built-in ``shapes`` know."""
        return self.reader.masks[torch.from_numpy(self.rows)] if isinstance(self.reader, Shapes) else None

    @property
    def description(self) -> str:
        classes = "no labels" if self.labels is None else f"{len(self.classes)} classes"
        parts = "".join(f", {name} {len(part):,}" for name, part in self.parts.items())
        return f"{self.origin}: {len(self):,} images, {classes}{parts}"

    def part(self, name: str) -> "Source":
        """The part ``train`` or ``val`` that DATA itself has.

        Raises:
            ValueError: it has no such part; says which it has.
        """
        if name not in self.parts:
            has = " and ".join(self.parts) or "none"
            raise ValueError(
                f"{self.origin} has no part {name!r} (parts: {has}): parts are top-level folders, or values of a "
                "list's column, that are named train, val, test or alike"
            )
        return self.parts[name]

    def subset(self, indices: Sequence[int] | Int64[Tensor, " m"]) -> "Source":
        """The images with these indices, in this order."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        labels = None if self.labels is None else self.labels[index]
        return replace(self, rows=self.rows[index.numpy()], labels=labels, parts={})

    def split(self, fraction: float, seed: int) -> "tuple[Source, Source]":
        """Holds out ``fraction`` of every class (of all images where there are no labels), drawn by seed.

        At least one image of every class that has two is held out, and one stays.
        """
        held_out = torch.zeros(len(self), dtype=torch.bool)
        for label in [None] if self.labels is None else self.labels.unique().tolist():
            members = torch.arange(len(self)) if self.labels is None else (self.labels == label).nonzero().flatten()
            count = min(max(1, round(fraction * len(members))), len(members) - 1)
            order = torch.randperm(len(members), generator=generator(seed, "split", label or 0))
            held_out[members[order[:count]]] = True
        return self.subset((~held_out).nonzero().flatten()), self.subset(held_out.nonzero().flatten())
