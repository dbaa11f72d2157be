"""One file of DATA, alone or inside an archive: where it lies, and its bytes."""

import functools
import io
import os
import re
import stat
import zlib
from typing import NamedTuple

from dino.data.remote import is_remote, open_remote, read_range
from dino.machine.files import printable

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"}
)
VIDEOS = frozenset(
    {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".mts", ".ogv", ".3gp"}
)
_ARCHIVE = re.compile(r"\.(tar|zip|tgz|tbz2?|txz|tzst|tar\.\w+)$", re.IGNORECASE)
_MOST_UNPACKED = 2**31  # Bytes of one member of a .zip: more is no image, but an attack.


class Found(NamedTuple):
    """Where one file lies: whole in the folder ``place``, or ``size`` bytes from ``offset`` of the archive there."""

    folder: str  # Below the DATA it was found in: "" or with a / at its end. Its names tell part and class.
    file: str
    place: str
    offset: int = -1
    size: int = -1
    packed: bool = False  # Deflated, in a .zip.
    said: bytes = b""  # Its bytes, of a small text in an archive that was come by.

    @property
    def key(self) -> str:
        return self.folder + self.file

    @property
    def path(self) -> str:
        """The file itself, or the archive that it is in."""
        return os.path.join(self.place, self.file) if self.offset < 0 else self.place

    @property
    def name(self) -> str:
        """For people: where it lies, without what a terminal or a UTF-8 file cannot hold."""
        return printable(self.path if self.offset < 0 else f"{self.place}/{self.key}")


def extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    return extension(name) in EXTENSIONS


def is_archive(path: str) -> bool:
    """Whether a path is named like an archive; of what kind it is, its first bytes say."""
    return _ARCHIVE.search(path.partition("?")[0] if is_remote(path) else path) is not None


def read(found: Found) -> bytes:
    """The bytes of the file.

    Raises:
        OSError: it cannot be read, or is no plain file (a FIFO would wait for ever for its other end).
    """
    if found.said:
        return found.said
    if found.offset < 0:
        with open_binary(found.path) as file:
            return file.read()
    if is_remote(found.place):
        data = read_range(found.place, found.offset, found.size)
    else:
        data = os.pread(_open_archive(found.place).fileno(), found.size, found.offset)
    if not found.packed:
        return data
    unpacking = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = unpacking.decompress(data, _MOST_UNPACKED)
    except zlib.error as error:
        raise OSError(f"damaged in its archive: {error}") from None
    if unpacking.unconsumed_tail:
        raise OSError(f"unpacked it has more than {_MOST_UNPACKED:,} bytes")
    return data


def read_file(path: str) -> bytes:
    """The bytes of a plain file by its path; raises as ``read``."""
    return read(Found("", os.path.basename(path), os.path.dirname(path)))


def open_binary(path: str) -> io.BufferedReader:
    """A plain file, here or elsewhere; raises as ``read``."""
    return open_remote(path) if is_remote(path) else open(path, "rb", opener=open_plain)


def open_plain(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(21, os.strerror(21), path)
        kind = "a FIFO" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise OSError(f"it is {kind}, not a file")
    return descriptor


@functools.lru_cache(maxsize=128)
def _open_archive(path: str) -> io.FileIO:
    return open(path, "rb", buffering=0)  # Stays open: pread has no position, so threads and forks can share it.


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
