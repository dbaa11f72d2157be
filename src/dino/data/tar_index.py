"""Where the members of a .tar lie: its headers are read once, and what they say is kept.

A .tar has no table of contents: finding its members means a read for each of them, over the network perhaps, at every
start and in every process. Shards of a gigabyte hold some ten thousand.
"""

import contextlib
import hashlib
import itertools
import logging
import os
import tarfile
import zipfile
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dino.data.files import open_binary
from dino.data.remote import is_remote, version
from dino.machine.files import printable, whole_file

_log = logging.getLogger(__name__)
Member = tuple[str, int, int, bytes]  # Name, offset and size in bytes; the bytes themselves of a small text.
_TEXTS = (".cls", ".json")  # WebDataset's labels: read while they are come by, or each would be a read of its own.
_SMALL = 4096  # Bytes.
WORTH_IT = 2**26  # Bytes: the index of a smaller archive is not kept.


def members(path: str, cache: Path) -> Iterator[Member]:
    """The plain files of a .tar in order. The index of one that is large, or lies elsewhere, is kept in the folder
    ``cache`` where that can be written, under a name that changes with the archive.

    Raises:
        tarfile.TarError, OSError, EOFError: the archive is damaged.
    """
    size, version = file_version(path)
    if size < WORTH_IT and not is_remote(path):
        return _headers(path)
    digest = hashlib.sha256(version.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return _kept(path, cache / f"{digest}.npz")


def file_version(path: str) -> tuple[int, str]:
    """The size of a file in bytes, and a text that changes when it does.

    Raises:
        OSError: it cannot be looked at.
    """
    if is_remote(path):
        return version(path)
    status = os.stat(path)
    return status.st_size, f"{os.path.abspath(path)} {status.st_mtime_ns} {status.st_size}"


def _kept(path: str, index: Path) -> Iterator[Member]:
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), np.load(index) as kept:
        names = bytes(kept["names"]).decode("utf-8", "surrogateescape").split("\0")
        texts, ends = bytes(kept["texts"]), kept["text_ends"].tolist()
        said = [texts[start:end] for start, end in itertools.pairwise([0, *ends])]
        columns = zip(names, kept["offsets"].tolist(), kept["sizes"].tolist(), said, strict=True)
        return iter(list(columns) if names != [""] else [])
    return _headers_and_keep(path, index)


def _headers_and_keep(path: str, index: Path) -> Iterator[Member]:
    names, offsets, sizes, texts, ends = [], array("q"), array("q"), bytearray(), array("q")
    for name, offset, size, said in _headers(path):
        names.append(name)
        offsets.append(offset)
        sizes.append(size)
        texts += said
        ends.append(len(texts))
        yield name, offset, size, said
    text = np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8)
    with contextlib.suppress(OSError), whole_file(index) as partial:  # A cache that cannot be written is none.
        columns = {"offsets": np.array(offsets, np.int64), "sizes": np.array(sizes, np.int64)}
        said = {"texts": np.frombuffer(bytes(texts), np.uint8), "text_ends": np.array(ends, np.int64)}
        np.savez(partial, names=text, **columns, **said)


def _headers(path: str) -> Iterator[Member]:
    with open_binary(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            archive.members = []  # pyright: ignore # Or tarfile keeps every header: 1 GB for a million images.
            if member.isreg():
                small = member.size <= _SMALL and member.name.endswith(_TEXTS)
                content = archive.extractfile(member) if small else None
                yield member.name, member.offset_data, member.size, content.read() if content else b""
        # tarfile takes whatever is no header for the end; the end is a block of zeros.
        file.seek(archive.offset)
        block = file.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0") or 0 < len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"damaged at byte {archive.offset}")
    if not block:
        _log.warning("%s has no mark at its end: it may have been cut short", printable(path))
