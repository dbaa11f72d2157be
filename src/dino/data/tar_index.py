"""Where the members of a .tar lie: its headers are read once, and what they say is kept.

A .tar has no table of contents: finding its members means a read for each of them, over the network perhaps, at every
start and in every process. Shards of a gigabyte hold some ten thousand.
"""

import contextlib
import hashlib
import os
import tarfile
import zipfile
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dino.machine.files import whole_file

Member = tuple[str, int, int]  # Name, offset and size in bytes.
WORTH_IT = 2**26  # Bytes: the index of a smaller archive is not kept.


def members(path: str, cache: Path) -> Iterator[Member]:
    """The plain files of a .tar in order; the index of a large one is kept in the folder ``cache`` where that can be
    written, under a name that changes with the archive.

    Raises:
        tarfile.TarError, OSError, EOFError: the archive is damaged.
    """
    status = os.stat(path)
    if status.st_size < WORTH_IT:
        return _headers(path)
    version = f"{os.path.abspath(path)} {status.st_mtime_ns} {status.st_size}"
    digest = hashlib.sha256(version.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return _kept(path, cache / f"{digest}.npz")


def _kept(path: str, index: Path) -> Iterator[Member]:
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), np.load(index) as kept:
        names = bytes(kept["names"]).decode("utf-8", "surrogateescape").split("\0")
        found = list(zip(names, kept["offsets"].tolist(), kept["sizes"].tolist(), strict=True)) if names != [""] else []
        return iter(found)
    return _headers_and_keep(path, index)


def _headers_and_keep(path: str, index: Path) -> Iterator[Member]:
    names, offsets, sizes = [], array("q"), array("q")
    for name, offset, size in _headers(path):
        names.append(name)
        offsets.append(offset)
        sizes.append(size)
        yield name, offset, size
    text = np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8)
    with contextlib.suppress(OSError), whole_file(index) as partial:  # A cache that cannot be written is none.
        np.savez(partial, names=text, offsets=np.array(offsets, np.int64), sizes=np.array(sizes, np.int64))


def _headers(path: str) -> Iterator[Member]:
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            archive.members = []  # pyright: ignore # Or tarfile keeps every header: 1 GB for a million images.
            if member.isreg():
                yield member.name, member.offset_data, member.size
