"""Where images come from: ``open_source(DATA)`` gives a ``Source``, whatever DATA is."""

import contextlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from dino.config import ReadConfig
from dino.data.decode import RGB, BrokenImage, Pixels
from dino.data.folders import understand
from dino.data.listing import PARTS, count_kinds, list_data, nothing_found
from dino.data.raw import Kind, Range, Raw, estimate_range, fewest_levels
from dino.data.readers import Files, Reader, Shapes, Torchvision
from dino.data.shapes import CLASSES
from dino.data.torchvision_sets import TORCHVISION, labels_and_classes, torchvision_set
from dino.machine.files import printable
from dino.machine.randomness import generator

_log = logging.getLogger(__name__)
_SAMPLE = 64  # Images that tell a set's channels, range, mean and sizes.
_FEW_LEVELS = 16


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


def open_source(
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    part: str | None = None,
    read: ReadConfig = ReadConfig(),
) -> Source:
    """Opens DATA: any number of folders, archives, lists, tables, videos, images and patterns of those, or a named set.

    Top-level folders that are named like parts (train, Training, val, dev, test_images, ...) are parts, and the next
    level is the class; without them the first level is. A folder around everything is neither. Named sets (``shapes``,
    ``shapes:COUNTxSIZE``, ``cifar10``, ``hf:NAME``) are their train part as a whole. ``part`` selects one. ``read``
    decides where DATA leaves a choice. Images of more than 8 bits get one range for all (``pixel_range``). What was
    taken for what is logged. docs/data.md says it all.

    Raises:
        ValueError: DATA does not exist, holds no images, or has no such part; says what was found.

    >>> source = open_source("shapes:40x32")
    >>> len(source), source.load(0).shape, source.classes[source.labels[3]]
    (40, torch.Size([3, 32, 32]), 'star')
    """
    paths = [os.fspath(data)] if isinstance(data, str | os.PathLike) else [os.fspath(path) for path in data]
    if not paths:
        raise ValueError("no DATA given")
    named = [path for path in paths if _is_name(path) and not os.path.exists(path)]
    if named and len(paths) > 1:
        raise ValueError(f"{named[0]} is a named data set: it cannot be joined with other DATA")
    source = _open_named(named[0]) if named else _open_files(paths, read)
    source = _with_own_pixels(source, read)
    return source.part(part) if part else source


def train_and_val(source: Source, val_fraction: float, seed: int) -> tuple[Source, Source | None]:
    """What to train on, and what to judge by: the parts of DATA, or a share of the labelled images held out by seed.

    Without parts and without labels there is nothing to judge by: (source, None).
    """
    if "train" in source.parts:
        train, val = source.parts["train"], source.parts.get("val")
        if val is not None or train.labels is None:
            return train, val
        source = train
    if source.labels is None:
        return source, None
    return source.split(val_fraction, seed)


def _open_files(paths: list[str], read: ReadConfig) -> Source:
    unknown = [path for path in paths if not os.path.lexists(path) and re.fullmatch(r"[\w:-]+", path)]
    if unknown:
        known = ", ".join(["shapes", *TORCHVISION])
        raise ValueError(f"{unknown[0]} does not exist and is no named data set; names: {known}")
    listing = list_data(paths, read)
    if not len(listing.images):
        raise ValueError(nothing_found(paths, listing))
    origin = " ".join(map(printable, paths))
    images = listing.images
    reader: Reader = Files(images)
    meaning = understand(
        [folder for folder, _ in images.folders],
        np.frombuffer(images.folder_of, np.int32),
        np.frombuffer(listing.labels, np.int32),
        list(listing.names),
        np.frombuffer(listing.parts, np.int8),
    )
    notes = [*listing.notes, *(f"{origin}: {note}" for note in meaning.notes)]
    if listing.seen:
        notes.append(f"{origin}: {sum(listing.seen.values()):,} files are not read: {count_kinds(listing.seen)}")

    def select(rows: np.ndarray, what: str) -> Source:
        labelled, own = len(meaning.classes) > 1, meaning.labels[rows]
        if labelled and (own < 0).any():
            rows, labelled = _without_strays(rows, own, what, reader, notes)
        labels = torch.from_numpy(meaning.labels[rows].astype(np.int64)) if labelled else None
        return Source(reader, rows, labels, meaning.classes if labelled else [], origin)

    rows_of = {name: np.flatnonzero(meaning.parts == PARTS.index(name)) for name in PARTS}
    judged = "val" if len(rows_of["val"]) else "test"
    parts = {
        name: select(rows, f"the {name} part of {origin}")
        for name, rows in (("train", rows_of["train"]), ("val", rows_of[judged]))
        if len(rows)
    }
    said = len(notes)
    whole = select(np.arange(len(images)), origin)
    for note in dict.fromkeys(notes[:said] if parts else notes):
        _log.warning("%s", note)
    return replace(whole, parts=parts)


def _without_strays(
    rows: np.ndarray, labels: np.ndarray, what: str, reader: Reader, notes: list[str]
) -> tuple[np.ndarray, bool]:
    """Images without a class among others: a few are left out; where they are many there are no labels."""
    strays = rows[labels < 0]
    some = f"{what}: {len(strays):,} of {len(rows):,} images have no class (the first {reader.name(int(strays[0]))})"
    if few := len(strays) * 4 <= len(rows):
        notes.append(f"{some} and are left out")
    else:
        notes.append(f"{some}: so many that its labels are not used")
    return rows[labels >= 0] if few else rows, few


def _with_own_pixels(source: Source, read: ReadConfig) -> Source:
    """The source read with as many channels as its images have, and one range for all that have more than 8 bits."""
    kinds: list[tuple[int, Kind]] = []
    for i in range(0, len(source), max(1, len(source) // _SAMPLE)):
        with contextlib.suppress(Exception):  # What cannot be read is said when it is to be read.
            kinds.append((i, source.reader.kind(int(source.rows[i]))))
    counts = Counter(kind.channels for _, kind in kinds)
    if read.channels != "auto":
        channels = read.channels
    elif len(counts) > 1:
        some = " and ".join(map(str, sorted(counts)))
        raise ValueError(f"{source.origin}: images of {some} channels lie together: choose one by --data.channels")
    else:
        channels = next(iter(counts), 3)
    low_high = read.pixel_range
    sample = list(_raw_values(source, [i for i, kind in kinds if kind.raw], channels))
    if sample:
        low_high = low_high or estimate_range(sample)
        assert low_high is not None
        shown = f"{low_high[0]:.6g} {low_high[1]:.6g}"
        levels = fewest_levels(sample, low_high)
        few = f"; only {levels} of 256 levels are left in the median image" if levels < _FEW_LEVELS else ""
        how = "given" if read.pixel_range else "estimated from a sample; --data.pixel-range LOW HIGH sets it"
        _log.warning("%s: more than 8 bits: black to white is %s (%s)%s", source.origin, shown, how, few)
    if channels != 3:
        _log.warning("%s: images are read with %d channels", source.origin, channels)

    def changed(each: Source) -> Source:
        return replace(each, pixels=Pixels(channels, low_high), fixed_range=read.pixel_range is not None)

    return replace(changed(source), parts={name: changed(part) for name, part in source.parts.items()})


def _raw_values(source: Source, indices: Sequence[int], channels: int) -> Iterator[Raw]:
    for i in indices:
        with contextlib.suppress(Exception):
            values = source.reader.raw(int(source.rows[i]), channels)
            if values.dtype != np.uint8:
                yield values


def _is_name(data: str) -> bool:
    return data in TORCHVISION or data.partition(":")[0] == "shapes"


def _open_named(name: str) -> Source:
    if name.startswith("shapes"):
        match = re.fullmatch(r"shapes(?::([1-9]\d*)x([1-9]\d*))?", name)
        if match is None:
            raise ValueError(f"{name!r}: write shapes, or shapes:COUNTxSIZE as in shapes:4096x48")
        count, size = int(match[1] or 4096), int(match[2] or 48)
        # The val part is drawn from another seed: no image is in both.
        parts = {"train": Shapes(count, size, 0), "val": Shapes(max(10, count // 4), size, 1)}
        sources = {
            part: Source(reader, np.arange(reader.count), torch.arange(reader.count) % 10, list(CLASSES), name)
            for part, reader in parts.items()
        }
    else:
        sources = {}
        for part in ("train", "val"):
            dataset = torchvision_set(name, part)
            rows = np.arange(len(dataset))
            sources[part] = Source(Torchvision(name, part), rows, *labels_and_classes(dataset), name)
    return replace(sources["train"], parts=sources)
