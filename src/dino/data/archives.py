"""What lies in archives, read in place: .tar (compressed ones from a copy that is kept) and .zip."""

import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import os
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from dino.data.files import Found, is_hidden, open_binary
from dino.data.remote import is_remote
from dino.data.tar_index import file_version, members
from dino.machine.files import printable


def list_archive(path: str) -> Iterator[Found]:
    try:
        with open_binary(path) as file:
            start = file.read(6)
    except OSError as error:
        said = str(error) if is_remote(path) else f"{printable(path)} cannot be read: {error.strerror or error}"
        raise ValueError(said) from None
    if start.startswith(b"PK"):
        yield from _zip(path)
        return
    unpack = next((opener for magic, opener in _PACKED.items() if start.startswith(magic)), None)
    place = _unpacked(path, unpack) if unpack else path
    try:
        for name, offset, size, said in members(place, cache_folder() / "indexes"):
            if parts := _parts(name):
                yield Found("".join(f"{part}/" for part in parts[:-1]), parts[-1], place, offset, size, said=said)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _damaged(path, ".tar", error) from None


def _damaged(path: str, kind: str, error: Exception) -> ValueError:
    if isinstance(error, OSError) and is_remote(path):  # It says itself which file, and why.
        return ValueError(str(error))
    return ValueError(f"{printable(path)} is not a whole {kind} archive: {error}")


def _parts(name: str) -> list[str]:
    """The names in a member's path, without those that lead up or nowhere; none for hidden ones."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return [] if any(map(is_hidden, parts)) else parts


def _zip(path: str) -> Iterator[Found]:
    try:
        with open_binary(path) as whole, zipfile.ZipFile(whole) as archive, open_binary(path) as file:
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
        raise _damaged(path, ".zip", error) from None


def _zstd(file: IO[bytes]) -> Any:
    if sys.version_info < (3, 14):
        name = printable(str(getattr(file, "name", "it")))
        raise ValueError(f"{name} is compressed by Zstandard, which Python reads from 3.14 on: unpack it")
    from compression import zstd  # pyright: ignore

    return zstd.open(file)


_PACKED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": _zstd,
}


def cache_folder() -> Path:
    """Where what is downloaded or unpacked is kept: ``DINO_DATA``, else ~/.cache/dino/data."""
    return Path(os.environ.get("DINO_DATA", "~/.cache/dino/data")).expanduser()


def _blocks(path: str, opener: Callable[[Any], Any]) -> Iterator[bytes]:
    """What is in a compressed file, piece by piece."""
    try:
        with open_binary(path) as packed, opener(packed) as source:
            while block := source.read(io.DEFAULT_BUFFER_SIZE * 64):
                yield block
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise _damaged(path, "compressed .tar", error) from None


def _unpacked(path: str, opener: Callable[[Any], Any]) -> str:
    """A copy without compression, made once: compressed bytes can only be read from the start."""
    _, version = file_version(path)
    name = hashlib.sha256(version.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    copy = cache_folder() / "unpacked" / f"{os.path.basename(path.partition('?')[0])}-{name}.tar"
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=copy.parent, delete=False) as target:
            try:
                for block in _blocks(path, opener):
                    target.write(block)
                os.replace(target.name, copy)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(target.name)
                raise
    return str(copy)
