"""Finds image files: in folders, in tar archives read in place, in lists, by patterns. Opens no image."""

import csv
import functools
import glob
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from typing import IO, NamedTuple

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"}
)
PARTS = ("train", "val", "valid", "validation", "test")  # Names of top-level folders that are parts, not classes.
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".gz", ".7z")
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
_LABEL_COLUMNS = ("label", "class", "target", "category")


class Found(NamedTuple):
    """Where one image lies: a whole file, or ``size`` bytes from ``offset`` of a tar archive."""

    key: str  # Below the DATA it was found in; folders in it tell part and class.
    path: str
    offset: int = -1
    size: int = -1
    label: str | None = None  # From a list's column or a WebDataset sidecar.

    @property
    def name(self) -> str:
        return self.path if self.offset < 0 else f"{self.path}/{self.key}"


def find_images(data: Sequence[str]) -> list[Found]:
    """Lists the images of every DATA: folder, tar archive, list (.txt, .csv, .tsv), image, or a pattern of those.

    Raises:
        ValueError: a path does not exist, is of no known kind, or there is no image in it; says what was seen.
    """
    paths = [path for pattern in data for path in _expand(os.path.expanduser(pattern))]
    # data/train data/val: several folders named like parts are parts.
    named = len(paths) > 1 and all(os.path.basename(os.path.abspath(p)) in PARTS for p in paths if os.path.isdir(p))
    found: list[Found] = []
    seen: Counter[str] = Counter()
    for path in paths:
        if os.path.isdir(path):
            found += _folder(path, os.path.basename(os.path.abspath(path)) + "/" if named else "", seen)
        elif path.lower().endswith(".tar"):
            found += _tar(path, seen)
        elif path.lower().endswith((".txt", ".csv", ".tsv")):
            found += _table(path)
        elif path.lower().endswith(_PACKED):
            raise ValueError(
                f"{path} is compressed: unpack it and name the folder or the .tar (tars are read in place)"
            )
        elif _is_image(path):
            found.append(Found(path.lstrip("/"), path))
        else:
            raise ValueError(f"{path} is no folder, .tar, .txt, .csv, .tsv or image")
    if not found:
        kinds = ", ".join(f"{count} {kind or 'without extension'}" for kind, count in seen.most_common(5))
        hint = "; name the archives themselves, as in 'FOLDER/*.tar'" if seen[".tar"] else ""
        raise ValueError(f"no images in {' '.join(data)} (files there: {kinds or 'none'}){hint}")
    return found


def read(found: Found) -> bytes:
    """The bytes of the file.

    Raises:
        OSError: it cannot be read.
    """
    if found.offset < 0:
        with open(found.path, "rb") as file:
            return file.read()
    return os.pread(_archive(found.path).fileno(), found.size, found.offset)


@functools.lru_cache(maxsize=128)
def _archive(path: str) -> IO[bytes]:
    return open(path, "rb", buffering=0)  # Stays open: pread has no position, so threads and forks can share it.


def _expand(pattern: str) -> list[str]:
    if os.path.exists(pattern):
        return [pattern]
    if braces := re.search(r"\{([^{}]*)\}", pattern):
        inner = braces[1]
        if span := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
            width = len(span[1]) if span[1].startswith("0") else 0
            values = [f"{number:0{width}d}" for number in range(int(span[1]), int(span[2]) + 1)]
        else:
            values = inner.split(",")
        return [
            path for value in values for path in _expand(pattern[: braces.start()] + value + pattern[braces.end() :])
        ]
    if glob.has_magic(pattern) and (matches := sorted(glob.glob(pattern, recursive=True))):
        return matches
    raise ValueError(f"{pattern} {'matches nothing' if glob.has_magic(pattern) else 'does not exist'}")


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_image(name: str) -> bool:
    return _extension(name) in EXTENSIONS


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _folder(root: str, prefix: str, seen: Counter[str]) -> list[Found]:
    """Every image below ``root``, sorted; links are followed, but not back into a folder that they are in."""
    found: list[Found] = []
    pending = [(root, prefix, frozenset[tuple[int, int]]())]
    while pending:
        folder, above, inside = pending.pop()
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in inside:
            continue
        try:
            entries = os.scandir(folder)
        except OSError as error:
            raise ValueError(f"{folder} cannot be listed: {error.strerror}") from None
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            if _is_image(entry.name):  # Whatever it is: a folder named x.png is a broken image, not a silent gap.
                found.append(Found(above + entry.name, entry.path))
            elif entry.is_dir():
                pending.append((entry.path, f"{above}{entry.name}/", inside | {identity}))
            else:
                seen[_extension(entry.name)] += 1
    return sorted(found)


def _tar(path: str, seen: Counter[str]) -> list[Found]:
    """Every image of an archive, by its place in the file. WebDataset: KEY.cls or KEY.json beside KEY.jpg labels it."""
    found: list[Found] = []
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # pyright: ignore # Or tarfile keeps every header: 1 GB for a million images.
                name = member.name.removeprefix("./")
                if not member.isreg() or any(map(_is_hidden, name.split("/"))):
                    continue
                if _is_image(name):
                    found.append(Found(name, path, member.offset_data, member.size))
                elif _extension(name) in (".cls", ".json"):
                    sidecar = Found(name, path, member.offset_data, member.size)
                    if (label := _sidecar_label(sidecar)) is not None:
                        labels[_webdataset_key(name)] = label
                else:
                    seen[_extension(name)] += 1
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a whole .tar archive: {error}") from None
    return [item._replace(label=labels.get(_webdataset_key(item.key))) for item in found] if labels else found


def _webdataset_key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _sidecar_label(sidecar: Found) -> str | None:
    text = read(sidecar).decode("utf-8", errors="replace").strip()
    if sidecar.key.endswith(".cls"):
        return text
    try:
        values = json.loads(text)
    except ValueError:
        return None
    label = (
        next((values[k] for k in ("cls", *_LABEL_COLUMNS) if k in values), None) if isinstance(values, dict) else None
    )
    return None if label is None else str(label)


def _table(path: str) -> list[Found]:
    """Every line of a list: one path a line (.txt), or columns with a path and perhaps a label (.csv, .tsv)."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if _extension(path) == ".txt":
                rows = [[line.strip()] for line in file]
            else:
                rows = list(csv.reader(file, delimiter="\t" if _extension(path) == ".tsv" else ","))
    except (OSError, UnicodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a list of images: {error}") from None
    rows = [[cell.strip() for cell in row] for row in rows if any(map(str.strip, row))]
    path_column, label_column = 0, 1
    if rows and not any(map(_is_image, rows[0])):
        header = [cell.lower() for cell in rows.pop(0)]
        path_column = next((header.index(name) for name in _PATH_COLUMNS if name in header), 0)
        label_column = next((header.index(name) for name in _LABEL_COLUMNS if name in header), len(header))
    folder = os.path.dirname(path)
    found = []
    for row in rows:
        image = row[path_column] if path_column < len(row) else ""
        label = row[label_column] if label_column < len(row) else None
        found.append(Found(os.path.normpath(image).lstrip("/"), os.path.join(folder, image), label=label or None))
    return found
