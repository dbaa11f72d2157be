"""All kinds of DATA brought together: one reader, and for every image its folder, label and part, as far as said."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dino.config import ReadConfig
from dino.data.files import Found, extension
from dino.data.films import Film, has_pyav, open_film
from dino.data.listing import BLANK, BY_FOLDER, PARTS, Listing, list_data, nothing_found, without_bad
from dino.data.parts import parts_of
from dino.data.readers import Files, Joined, Reader
from dino.data.tables import HUGGING_FACE, Columns, NoImages, is_saved_dataset, open_hugging_face, open_parquet


@dataclass(frozen=True)
class Gathered:
    """Images of one DATA in order; ``labels`` into ``names`` and ``parts`` into PARTS, or BLANK or BY_FOLDER."""

    reader: Reader
    folders: Sequence[str]
    folder_of: np.ndarray
    labels: np.ndarray
    names: Sequence[str]
    parts: np.ndarray
    notes: list[str]
    seen: Counter[str]


def gather(paths: list[str], config: ReadConfig) -> Gathered:
    """Files first, then tables, videos and data sets of Hugging Face, each in the order given.

    Raises:
        ValueError: a path does not exist, is of no known kind, or there is no image in it; says what was seen.
    """
    sets = [path for path in paths if path.startswith(HUGGING_FACE) or is_saved_dataset(path)]
    listing = list_data([path for path in paths if path not in sets], config)
    groups = _Groups(listing)
    part_of_table = _parts_of_stems(listing.tables)
    for found in listing.tables:
        with without_bad(listing.notes, config, len(listing.tables)):
            try:
                table = open_parquet(found.path, config)
            except NoImages:
                if found.path in paths:
                    raise
                listing.seen[extension(found.file)] += 1  # What ``dino embed`` wrote, say.
                continue
            groups.add_table(table, found.folder, part_of_table.get(found))
    for found in listing.videos:
        if not has_pyav() and found.path not in paths:
            listing.seen[extension(found.file)] += 1
            continue
        groups.add_film(found, open_film(found, config.every))
    for path in sets:
        splits = open_hugging_face(path, config)
        parts = parts_of(splits)
        for split, table in splits.items():
            groups.add_table(table, "", parts.get(split), others=BLANK if parts else BY_FOLDER)
    gathered = groups.done()
    if not len(gathered.labels):
        raise ValueError(nothing_found(paths, listing))
    return gathered


def _parts_of_stems(tables: list[Found]) -> dict[Found, str]:
    """Tables named ``train-00000-of-00004.parquet`` and ``validation-...`` are parts."""
    stems = {found: found.file.split(".")[0] for found in tables}
    parts = parts_of(dict.fromkeys(stems.values()))
    return {found: parts[stem] for found, stem in stems.items() if stem in parts} if len({*parts.values()}) > 1 else {}


class _Groups:
    """What was gathered so far, group by group."""

    def __init__(self, listing: Listing) -> None:
        self.listing, images = listing, listing.images
        self.folders = [folder for folder, _ in images.folders]
        self.readers: list[Reader] = [Files(images)] if len(images) else []
        self.counts = [len(images)] if len(images) else []
        self.folder_of = [np.frombuffer(images.folder_of, np.int32)]
        self.labels = [np.frombuffer(listing.labels, np.int32)]
        self.parts = [np.frombuffer(listing.parts, np.int8)]

    def _add(self, reader: Reader, count: int, folder: str, labels: object, parts: object) -> None:
        if not count:
            return
        self.readers.append(reader)
        self.counts.append(count)
        self.folder_of.append(np.full(count, len(self.folders), np.int32))
        self.folders.append(folder)
        self.labels.append(np.broadcast_to(np.asarray(labels, np.int32), (count,)))
        self.parts.append(np.broadcast_to(np.asarray(parts, np.int8), (count,)))

    def add_table(self, table: Columns, folder: str, part: str | None, others: int = BY_FOLDER) -> None:
        labels = BY_FOLDER if table.labels is None else [self.listing.number(label or "") for label in table.labels]
        parts: object = others if part is None else PARTS.index(part)
        if table.parts is not None:
            names = parts_of({name for name in table.parts if name})
            parts = [PARTS.index(names[name]) if name in names else BLANK for name in table.parts]
        self._add(table.reader, table.count, folder, labels, parts)
        self.listing.notes.append(table.note)

    def add_film(self, found: Found, film: Film) -> None:
        self._add(film, len(film.times), found.folder, BY_FOLDER, BY_FOLDER)

    def done(self) -> Gathered:
        reader = self.readers[0] if len(self.readers) == 1 else Joined(self.readers, np.cumsum([0, *self.counts[:-1]]))
        folder_of, labels, parts = (np.concatenate(values) for values in (self.folder_of, self.labels, self.parts))
        names, notes, seen = list(self.listing.names), self.listing.notes, self.listing.seen
        return Gathered(reader, self.folders, folder_of, labels, names, parts, notes, seen)
