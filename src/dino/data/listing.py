"""The images of DATA as compact arrays: where each lies, and the label and the part that a list says.

A name costs its own bytes and 12 more, so ten million images fit a laptop.
"""

import contextlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

from dino.config import ReadConfig
from dino.data.files import EXTENSIONS, VIDEOS, Found, extension, is_archive, is_image, read
from dino.data.lists import LISTS, Row, read_list
from dino.data.parts import Part, parts_of
from dino.data.walk import expand, walk
from dino.machine.files import printable

BY_FOLDER = -2  # A label or part that no list states: the folder says it.
BLANK = -1  # Stated, but empty.
PARTS: tuple[Part, ...] = ("train", "val", "test")
_SIDECARS = (".cls", ".json")  # WebDataset: of the image with the same key.
_LABEL_KEYS = ("cls", "label", "class", "target", "category")


class Images(Sequence[Found]):
    """Files by index; of each only the name, its folder's number and, in archives, its place are kept."""

    def __init__(self) -> None:
        self.folders: list[tuple[str, str]] = []  # (below DATA, place)
        self.folder_of = array("i")
        self._numbers: dict[tuple[str, str], int] = {}
        self._names = bytearray()
        self._ends = array("q")
        self._offsets, self._sizes, self._packed = array("q"), array("q"), bytearray()

    def append(self, found: Found) -> None:
        folder = (found.folder, found.place)
        number = self._numbers.get(folder)
        if number is None:
            number = self._numbers[folder] = len(self.folders)
            self.folders.append(folder)
        if found.offset >= 0 and not self._offsets:  # The first in an archive: those before are whole files.
            self._offsets, self._sizes = (array("q", [-1]) * len(self) for _ in range(2))
            self._packed = bytearray(len(self))
        if found.offset >= 0 or self._offsets:
            self._offsets.append(found.offset)
            self._sizes.append(found.size)
            self._packed.append(found.packed)
        self.folder_of.append(number)
        self._names += os.fsencode(found.file)
        self._ends.append(len(self._names))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, i: int) -> Found: ...
    @overload
    def __getitem__(self, i: slice) -> list[Found]: ...
    def __getitem__(self, i: int | slice) -> Found | list[Found]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        name = os.fsdecode(bytes(self._names[self._ends[i - 1] if i else 0 : self._ends[i]]))
        folder, place = self.folders[self.folder_of[i]]
        if not self._offsets:
            return Found(folder, name, place)
        return Found(folder, name, place, self._offsets[i], self._sizes[i], bool(self._packed[i]))

    def key(self, i: int) -> str:
        return self[i].key


@dataclass
class Listing:
    """What was found in DATA: images, and whatever was said about each."""

    images: Images = field(default_factory=Images)
    labels: array = field(default_factory=lambda: array("i"))  # Into ``names``, or BLANK or BY_FOLDER.
    names: dict[str, int] = field(default_factory=dict)
    parts: array = field(default_factory=lambda: array("b"))  # Into PARTS, or BLANK or BY_FOLDER.
    notes: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)  # Other files by extension.
    tables: list[Found] = field(default_factory=list)  # Parquet files.
    videos: list[Found] = field(default_factory=list)

    def add(self, found: Found, label: str | None = None, part: int = BY_FOLDER) -> None:
        self.images.append(found)
        self.labels.append(self.number(label))
        self.parts.append(part)

    def number(self, label: str | None) -> int:
        """Of a label; "" has none, None leaves it to the folder."""
        if not label:
            return BY_FOLDER if label is None else BLANK
        return self.names.setdefault(printable(label), len(self.names))


def list_data(data: Sequence[str], config: ReadConfig) -> Listing:
    """Lists everything readable of every DATA: folder, archive, list, table, video, image, or a pattern of those.

    Raises:
        ValueError: a path does not exist, is of no known kind, or there is no image in it; says what was seen.
    """
    paths = [path for pattern in data for path in expand(pattern)]
    # data/train data/val: several paths that are named like parts are parts, unless they hold some themselves.
    named = _parts_of_paths(paths)
    listing = Listing()
    for path in paths:
        kind = extension(path)
        start = len(listing.images)
        if os.path.isdir(path) or is_archive(path):
            if os.path.isdir(path):
                _add_files(listing, walk(path), in_archive=False)
            else:
                with without_bad(listing.notes, config, len(paths)):
                    found = walk(path)
                    if config.bad_shards == "skip":  # All of it is read before any of it counts.
                        found = [_with_text(item) for item in found]
                    _add_files(listing, found, in_archive=True)
        elif kind in LISTS:
            _add_list(listing, path, config)
        elif kind == ".parquet":
            listing.tables.append(_alone(path))
        elif kind in VIDEOS:
            listing.videos.append(_alone(path))
        elif is_image(path):
            listing.add(_alone(path))
        else:
            raise ValueError(
                f"{printable(path)} is no folder, archive (.tar, .tar.gz, .zip, ...), list "
                f"({', '.join(sorted(LISTS))}), table (.parquet), video or image"
            )
        if path in named:
            _set_part(listing, start, PARTS.index(named[path]))
    return listing


def find_images(data: Sequence[str]) -> Images:
    """The images of every DATA, in order; raises as ``list_data``."""
    listing = list_data(data, ReadConfig())
    if not len(listing.images):
        raise ValueError(nothing_found(data, listing))
    return listing.images


def nothing_found(data: Sequence[str], listing: Listing) -> str:
    hint = "; name the archives themselves, as in 'FOLDER/*.tar'" if any(map(is_archive, listing.seen)) else ""
    return f"no images in {' '.join(map(printable, data))} (files there: {count_kinds(listing.seen) or 'none'}){hint}"


def count_kinds(seen: Counter[str]) -> str:
    """``12 .heic, 3 .dcm``, the most frequent first."""
    kinds = [f"{count:,} {printable(kind) or 'without extension'}" for kind, count in seen.most_common(8)]
    return ", ".join(kinds) + (", ..." if len(seen) > 8 else "")


def _alone(path: str) -> Found:
    return Found("", os.path.basename(path), os.path.dirname(path))


def _parts_of_paths(paths: list[str]) -> dict[str, Part]:
    if len(paths) < 2:
        return {}
    stems = {path: os.path.basename(os.path.abspath(path)).split(".")[0] for path in paths}
    parts = parts_of(dict.fromkeys(stems.values()))
    return {path: parts[stem] for path, stem in stems.items()} if len(parts) == len({*stems.values()}) > 1 else {}


def _set_part(listing: Listing, start: int, part: int) -> None:
    folders = {listing.images.folders[number][0] for number in set(listing.images.folder_of[start:])}
    tops = {folder.partition("/")[0] for folder in folders}
    if "" not in tops and len(parts_of(tops)) == len(tops):
        return  # An archive named like a part that holds the folder of that part.
    for i in range(start, len(listing.parts)):
        if listing.parts[i] == BY_FOLDER:
            listing.parts[i] = part


def _add_files(listing: Listing, files: Iterable[Found], in_archive: bool) -> None:
    """Every image of a folder or an archive. WebDataset: KEY.cls or KEY.json beside KEY.jpg in an archive labels it."""
    start, sidecars, videos = len(listing.images), {}, []
    for found in files:
        kind = extension(found.file)
        if kind in EXTENSIONS:
            listing.add(found)
        elif in_archive and kind in _SIDECARS:
            if (label := _sidecar_label(found)) is not None:
                sidecars[_webdataset_key(found)] = label
        elif kind in VIDEOS:
            videos.append(found)
        elif kind == ".parquet" and not in_archive:
            listing.tables.append(found)
        else:
            listing.seen[kind] += 1
    if len(listing.images) == start:
        listing.videos += videos
    else:  # Beside photos: a minute of film would be more images than all of them.
        listing.seen.update(extension(found.file) for found in videos)
    if sidecars:
        for i in range(start, len(listing.images)):
            listing.labels[i] = listing.number(sidecars.get(_webdataset_key(listing.images[i]), ""))


@contextlib.contextmanager
def without_bad(notes: list[str], config: ReadConfig, count: int) -> Iterator[None]:
    """Around the reading of one of ``count`` shards: where bad ones are to be left out, what is wrong becomes a note.

    Raises:
        ValueError: what was wrong, and the way out.
    """
    try:
        yield
    except ValueError as error:
        if config.bad_shards == "stop":
            raise ValueError(f"{error}{' (--data.bad-shards skip leaves it out)' if count > 1 else ''}") from error
        notes.append(f"{error}: left out")


def _webdataset_key(found: Found) -> str:
    return f"{found.folder}{found.file.partition('.')[0]}"


def _with_text(found: Found) -> Found:
    """With its bytes, if it is a sidecar.

    Raises:
        ValueError: they cannot be read.
    """
    if extension(found.file) not in _SIDECARS:
        return found
    try:
        return found._replace(said=read(found))
    except OSError as error:
        raise ValueError(f"{found.name} cannot be read: {error.strerror or error}") from None


def _sidecar_label(sidecar: Found) -> str | None:
    text = _with_text(sidecar).said.decode("utf-8", errors="replace").strip()
    if sidecar.file.endswith(".cls"):
        return text
    try:
        values = json.loads(text)
    except ValueError:
        return None
    found = next((values[key] for key in _LABEL_KEYS if key in values), None) if isinstance(values, dict) else None
    return None if found is None else str(found)


def _add_list(listing: Listing, path: str, config: ReadConfig) -> None:
    table = read_list(path, config)
    if table.note:
        listing.notes.append(table.note)
    said = {row.part for row in table.rows if row.part}
    parts = parts_of(said)
    if config.part_column is not None and said and not parts:
        raise ValueError(f"--data.part-column {config.part_column} holds {', '.join(sorted(said)[:5])}: none is a part")
    for row in table.rows:
        part = BY_FOLDER if row.part is None else PARTS.index(parts[row.part]) if row.part in parts else BLANK
        listing.add(_listed(row, os.path.dirname(path)), row.label, part)


def _listed(row: Row, folder: str) -> Found:
    image = row.path if is_image(row.path) or not row.path else _with_extension(row.path, folder)
    key = os.path.normpath(image).replace(os.sep, "/").lstrip("/")
    while key.startswith("../"):
        key = key[3:]
    below, file = os.path.split(key)
    return Found(below and f"{below}/", file, os.path.dirname(os.path.join(folder, image)))


def _with_extension(image: str, folder: str) -> str:
    """Many lists name images without their extension."""
    there = (image + kind for kind in (".jpg", ".png", ".jpeg", ".tif", ".JPG", ".PNG", ".tiff", ".webp", ".JPEG"))
    return next((name for name in there if os.path.exists(os.path.join(folder, name))), image)
