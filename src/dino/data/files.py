"""Finds files: in folders, in archives read in place, by patterns. The one walk over them; opens no image."""

import bz2
import contextlib
import functools
import glob
import gzip
import hashlib
import io
import lzma
import os
import re
import stat
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from dino.data.tar_index import members
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
    return _ARCHIVE.search(path) is not None


def expand(pattern: str) -> list[str]:
    """The paths that a path with ``~``, ``*``, ``**``, ``{a,b}`` or ``{000..123}`` stands for.

    Raises:
        ValueError: it stands for none.
    """
    pattern = os.path.expanduser(pattern)
    if os.path.lexists(pattern):
        return [pattern]
    if braces := re.search(r"\{([^{}]*)\}", pattern):
        inner = braces[1]
        if span := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
            width = len(span[1]) if span[1].startswith("0") else 0
            values = [f"{number:0{width}d}" for number in range(int(span[1]), int(span[2]) + 1)]
        else:
            values = inner.split(",")
        return [
            path for value in values for path in expand(pattern[: braces.start()] + value + pattern[braces.end() :])
        ]
    if glob.has_magic(pattern) and (matches := sorted(glob.glob(pattern, recursive=True))):
        return matches
    raise ValueError(f"{printable(pattern)} {'matches nothing' if glob.has_magic(pattern) else 'does not exist'}")


def walk(path: str) -> Iterator[Found]:
    """Every file of a folder, by its path below it, or of an archive (.tar, compressed or not, .zip), in its order.

    Hidden files are left out. Links are followed, but not back into a folder that they are in. Of an archive only plain
    files are given: its names lead nowhere, since they are never opened. A compressed .tar is read from an unpacked
    copy that is kept in the cache; everything else in place.

    Raises:
        ValueError: it is neither, cannot be listed, or is damaged; says which.
    """
    if os.path.isdir(path):
        return _folder(path)
    if not os.path.lexists(path):
        raise ValueError(f"{printable(path)} does not exist")
    if not is_archive(path):
        raise ValueError(f"{printable(path)} is neither a folder nor an archive (.tar, .tar.gz, .zip, ...)")
    return _archive(path)


def read(found: Found) -> bytes:
    """The bytes of the file.

    Raises:
        OSError: it cannot be read, or is no plain file (a FIFO would wait for ever for its other end).
    """
    if found.offset < 0:
        with open(found.path, "rb", opener=_open_without_waiting) as file:
            return file.read()
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


def _open_without_waiting(path: str, flags: int) -> int:
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
def _open_archive(path: str) -> IO[bytes]:
    return open(path, "rb", buffering=0)  # Stays open: pread has no position, so threads and forks can share it.


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _folder(root: str) -> Iterator[Found]:
    """Sorted as the whole paths would be, with no more than one way down in memory."""

    def entries(place: str, folder: str, inside: frozenset[tuple[int, int]]) -> Iterator[Found]:
        try:
            status = os.stat(place)
            identity = (status.st_dev, status.st_ino)
            if identity in inside:
                return
            with os.scandir(place) as listed:
                # What has an image's name is one: a folder named x.png is a broken image, not a silent gap.
                names = [
                    entry.name + ("/" if not is_image(entry.name) and _is_folder(entry) else "")
                    for entry in listed
                    if not _is_hidden(entry.name)
                ]
        except OSError as error:
            raise ValueError(f"{printable(place)} cannot be listed: {error.strerror}") from None
        for name in sorted(names):
            if name.endswith("/"):
                yield from entries(os.path.join(place, name[:-1]), folder + name, inside | {identity})
            else:
                yield Found(folder, name, place)

    return entries(root, "", frozenset())


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link to itself.
        return False


def _archive(path: str) -> Iterator[Found]:
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            start = file.read(6)
    except OSError as error:
        raise ValueError(f"{printable(path)} cannot be read: {error.strerror or error}") from None
    if start.startswith(b"PK"):
        yield from _zip(path)
        return
    unpack = next((opener for magic, opener in _PACKED.items() if start.startswith(magic)), None)
    place = _unpacked(path, unpack) if unpack else path
    try:
        for name, offset, size in members(place, cache_folder() / "indexes"):
            if parts := _parts(name):
                yield Found("".join(f"{part}/" for part in parts[:-1]), parts[-1], place, offset, size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{printable(path)} is not a whole .tar archive: {error}") from None


def _parts(name: str) -> list[str]:
    """The names in a member's path, without those that lead up or nowhere; none for hidden ones."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return [] if any(map(_is_hidden, parts)) else parts


def _zip(path: str) -> Iterator[Found]:
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            for member in archive.infolist():
                if member.is_dir() or not (parts := _parts(member.filename)):
                    continue
                if member.flag_bits & 1:
                    raise ValueError(f"{printable(path)} is encrypted: unpack it and name the folder")
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError(
                        f"{printable(path)} is packed by a method that is not read in place "
                        f"({member.compress_type}): unpack it and name the folder"
                    )
                file.seek(member.header_offset + 26)  # The local header says itself how long it is.
                lengths = file.read(4)
                offset = member.header_offset + 30 + int.from_bytes(lengths[:2], "little")
                offset += int.from_bytes(lengths[2:], "little")
                packed = member.compress_type == zipfile.ZIP_DEFLATED
                folder = "".join(f"{part}/" for part in parts[:-1])
                yield Found(folder, parts[-1], path, offset, member.compress_size, packed)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ValueError(f"{printable(path)} is not a whole .zip archive: {error}") from None


def _zstd(path: str) -> Any:
    if sys.version_info < (3, 14):
        raise ValueError(f"{printable(path)} is compressed by Zstandard, which Python reads from 3.14 on: unpack it")
    from compression import zstd  # pyright: ignore

    return zstd.open(path)


_PACKED: dict[bytes, Callable[[str], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": _zstd,
}


def cache_folder() -> Path:
    """Where what is downloaded or unpacked is kept: ``DINO_DATA``, else ~/.cache/dino/data."""
    return Path(os.environ.get("DINO_DATA", "~/.cache/dino/data")).expanduser()


def _unpacked(path: str, opener: Callable[[str], Any]) -> str:
    """A copy without compression, made once: compressed bytes can only be read from the start."""
    status = os.stat(path)
    version = f"{os.path.abspath(path)} {status.st_mtime_ns} {status.st_size}"
    name = hashlib.sha256(version.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    copy = cache_folder() / "unpacked" / f"{os.path.basename(path)}-{name}.tar"
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=copy.parent, delete=False) as target:
            try:
                with opener(path) as source:
                    while block := source.read(io.DEFAULT_BUFFER_SIZE * 64):
                        target.write(block)
                os.replace(target.name, copy)
            except BaseException as error:
                with contextlib.suppress(OSError):
                    os.unlink(target.name)
                if isinstance(error, EOFError | lzma.LZMAError | zlib.error | gzip.BadGzipFile):
                    raise ValueError(f"{printable(path)} is not a whole compressed .tar archive: {error}") from None
                raise
    return str(copy)
