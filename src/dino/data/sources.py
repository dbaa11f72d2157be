"""Where images come from: ``open_source(DATA)`` gives a ``Source``, whatever DATA is."""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from dino.config import ReadConfig
from dino.data.folders import understand
from dino.data.gather import gather
from dino.data.listing import PARTS, count_kinds
from dino.data.own_pixels import with_own_pixels
from dino.data.readers import Reader, Shapes, Torchvision
from dino.data.shapes import CLASSES
from dino.data.source import Source
from dino.data.tables import HUGGING_FACE
from dino.data.torchvision_sets import TORCHVISION, labels_and_classes, torchvision_set
from dino.machine.files import printable

_log = logging.getLogger(__name__)


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
    source = with_own_pixels(source, read)
    return source.part(part) if part else source


def train_and_val(source: Source, val_fraction: float, seed: int) -> tuple[Source, Source | None]:
    """What to train on, and what to judge by: the parts of DATA, or a share of the labelled images held out by seed.

    Without parts, and without labels or with a share of 0, there is nothing to judge by: (source, None).
    """
    if "train" in source.parts:
        train, val = source.parts["train"], source.parts.get("val")
        if val is not None or train.labels is None:
            return train, val
        source = train
    if source.labels is None or not val_fraction:
        return source, None
    return source.split(val_fraction, seed)


def _open_files(paths: list[str], read: ReadConfig) -> Source:
    unknown = [
        path
        for path in paths
        if not os.path.lexists(path) and re.fullmatch(r"[\w:-]+", path) and not path.startswith(HUGGING_FACE)
    ]
    if unknown:
        known = ", ".join(["shapes", *TORCHVISION, "hf:NAME"])
        raise ValueError(f"{unknown[0]} does not exist and is no named data set; names: {known}")
    found = gather(paths, read)
    origin = " ".join(map(printable, paths))
    meaning = understand(found.folders, found.folder_of, found.labels, found.names, found.parts)
    notes = [*found.notes, *(f"{origin}: {note}" for note in meaning.notes)]
    if found.seen:
        count = sum(found.seen.values())
        notes.append(
            f"{origin}: {count:,} {'file is' if count == 1 else 'files are'} not read: {count_kinds(found.seen)}"
        )

    def select(rows: np.ndarray, what: str) -> Source:
        labelled, own = len(meaning.classes) > 1, meaning.labels[rows]
        if labelled and (own < 0).any():
            rows, labelled = _without_strays(rows, own, what, found.reader, notes)
        labels = torch.from_numpy(meaning.labels[rows].astype(np.int64)) if labelled else None
        return Source(found.reader, rows, labels, meaning.classes if labelled else [], origin)

    rows_of = {name: np.flatnonzero(meaning.parts == PARTS.index(name)) for name in PARTS}
    judged = "val" if len(rows_of["val"]) else "test"
    parts = {
        name: select(rows, f"the {name} part of {origin}")
        for name, rows in (("train", rows_of["train"]), ("val", rows_of[judged]))
        if len(rows)
    }
    said = len(notes)
    whole = select(np.arange(len(meaning.labels)), origin)
    for note in dict.fromkeys(notes[:said] if parts else notes):  # The parts are what is used.
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
