"""Where images come from: ``open_source(DATA)`` gives a ``Source``, whatever DATA is."""

import contextlib
import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from PIL import Image
from torch import Tensor

from dino.data.decode import BrokenImage, decode, from_pillow, image_size
from dino.data.files import PARTS, Found, find_images, read
from dino.data.shapes import CLASSES, make_shapes
from dino.data.torchvision_sets import TORCHVISION, labels_and_classes, torchvision_set
from dino.machine.randomness import generator


@runtime_checkable
class Reader(Protocol):
    """What a kind of data can do: say image ``i``'s name, decode it, and tell its height and width beforehand."""

    def name(self, i: int) -> str: ...
    def load(self, i: int, max_side: int | None) -> Tensor: ...
    def size(self, i: int, max_side: int | None) -> tuple[int, int]: ...


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

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        return self.reader.name(int(self.rows[i]))

    def load(self, i: int, max_side: int | None = None) -> UInt8[Tensor, "3 h w"]:
        """Image ``i`` as RGB, its longest side at most ``max_side`` pixels.

        Raises:
            BrokenImage: it cannot be read.
        """
        return self.reader.load(int(self.rows[i]), max_side)

    def size(self, i: int, max_side: int | None = None) -> tuple[int, int]:
        """Height and width (to a pixel) that ``load`` will give, without decoding where the format allows.

        Raises:
            BrokenImage: it cannot be read.
        """
        return self.reader.size(int(self.rows[i]), max_side)

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
        return self.reader.masks[torch.from_numpy(self.rows)] if isinstance(self.reader, _Shapes) else None

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
                f"{self.origin} has no part {name!r} (parts: {has}): parts are top-level folders of that name"
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


def open_source(data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], part: str | None = None) -> Source:
    """Opens DATA: any number of folders, tar archives, lists, images and patterns of those, or one named data set.

    A folder or archive with top-level folders ``train`` and ``val`` (or valid, validation, test) has these parts, and
    is both of them as a whole. The next folder level is the class, when every image lies in one; a folder around
    everything is neither. Named sets (``shapes``, ``shapes:COUNTxSIZE``, ``cifar10``, ...) are their train part as a
    whole. ``part`` selects one.

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
    source = _open_named(named[0]) if named else _open_files(paths)
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


@dataclass(frozen=True)
class _Files:
    found: list[Found]

    def name(self, i: int) -> str:
        return self.found[i].name

    def load(self, i: int, max_side: int | None) -> Tensor:
        return decode(self._bytes(i), max_side)

    def size(self, i: int, max_side: int | None) -> tuple[int, int]:
        return image_size(self._bytes(i), max_side)

    def _bytes(self, i: int) -> bytes:
        try:
            return read(self.found[i])
        except OSError as error:
            raise BrokenImage(error.strerror or str(error)) from None


def _open_files(paths: list[str]) -> Source:
    unknown = [path for path in paths if not os.path.exists(path) and re.fullmatch(r"[\w:-]+", path)]
    if unknown:
        known = ", ".join(["shapes", *TORCHVISION])
        raise ValueError(f"{unknown[0]} does not exist and is no named data set; names: {known}")
    found = find_images(paths)
    keys = _below_common_folder([item.key for item in found])
    tops = {key.partition("/")[0] if "/" in key else "" for key in keys}
    part_of = [""] * len(keys)
    if tops <= set(PARTS) or ("train" in tops and tops & set(PARTS[1:])):
        part_of = [key.partition("/")[0] for key in keys]
        keys = [key.partition("/")[2] for key in keys]

    if all(item.label is not None for item in found):
        names = [item.label or "" for item in found]
        # Labels that are numbers keep the order of numbers; folders are sorted as torchvision's ImageFolder sorts them.
        numeric = all(name.isdecimal() for name in names)
        classes = sorted(set(names), key=lambda name: (int(name), name)) if numeric else sorted(set(names))
    else:
        names = [key.partition("/")[0] if "/" in key else "" for key in keys]
        classes = sorted({name for name in names if name})
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number.get(name, -1) for name in names])

    def select(rows: np.ndarray) -> Source:
        own = labels[torch.from_numpy(rows)]
        labelled = len(classes) > 1 and bool((own >= 0).all())
        return Source(reader, rows, own if labelled else None, classes if labelled else [], " ".join(paths))

    reader = _Files(found)
    is_part = np.array(part_of)
    val = next((name for name in PARTS[1:] if name in part_of), None)
    rows_of = {"train": np.flatnonzero(is_part == "train"), "val": np.flatnonzero(is_part == val)}
    parts = {name: select(rows) for name, rows in rows_of.items() if len(rows)}
    return replace(select(np.arange(len(found))), parts=parts)


def _below_common_folder(keys: list[str]) -> list[str]:
    """Cuts off the folders that are around everything, up to one that is named like a part."""
    shared = os.path.commonpath([os.path.dirname(min(keys)), os.path.dirname(max(keys))]).split("/")
    around = next((i for i, name in enumerate(shared) if name in PARTS), len(shared))
    cut = sum(len(name) + 1 for name in shared[:around] if name)
    return [key[cut:] for key in keys]


def _is_name(data: str) -> bool:
    return data in TORCHVISION or data.partition(":")[0] == "shapes"


def _open_named(name: str) -> Source:
    if name.startswith("shapes"):
        match = re.fullmatch(r"shapes(?::([1-9]\d*)x([1-9]\d*))?", name)
        if match is None:
            raise ValueError(f"{name!r}: write shapes, or shapes:COUNTxSIZE as in shapes:4096x48")
        count, size = int(match[1] or 4096), int(match[2] or 48)
        # The val part is drawn from another seed: no image is in both.
        parts = {"train": _Shapes(count, size, 0), "val": _Shapes(max(10, count // 4), size, 1)}
        sources = {
            part: Source(reader, np.arange(reader.count), torch.arange(reader.count) % 10, list(CLASSES), name)
            for part, reader in parts.items()
        }
    else:
        sources = {}
        for part in ("train", "val"):
            dataset = torchvision_set(name, part)
            rows = np.arange(len(dataset))
            sources[part] = Source(_Torchvision(name, part), rows, *labels_and_classes(dataset), name)
    return replace(sources["train"], parts=sources)


@dataclass(frozen=True)
class _Shapes:
    count: int
    image_side: int
    seed: int

    @property
    def masks(self) -> Tensor:
        return _drawn(self)[2]

    def name(self, i: int) -> str:
        return f"shapes/{self.seed}/{i}"

    def load(self, i: int, max_side: int | None) -> Tensor:
        image = _drawn(self)[0][i]
        if max_side is None or max_side >= self.image_side:
            return image
        return from_pillow(Image.fromarray(image.permute(1, 2, 0).numpy()), max_side)

    def size(self, i: int, max_side: int | None) -> tuple[int, int]:  # noqa: ARG002 - all have one size
        side = min(self.image_side, max_side or self.image_side)
        return side, side


@functools.lru_cache(maxsize=4)
def _drawn(shapes: _Shapes) -> tuple[Tensor, Tensor, Tensor]:
    return make_shapes(shapes.count, shapes.image_side, shapes.seed)


@dataclass(frozen=True)
class _Torchvision:
    dataset: str
    part: str

    def name(self, i: int) -> str:
        return f"{self.dataset}/{self.part}/{i}"

    def load(self, i: int, max_side: int | None) -> Tensor:
        try:
            return from_pillow(torchvision_set(self.dataset, self.part)[i][0], max_side)
        except Exception as error:
            raise BrokenImage(f"{type(error).__name__}: {error}") from None

    def size(self, i: int, max_side: int | None) -> tuple[int, int]:
        _, height, width = self.load(i, max_side).shape
        return height, width
