"""Files that lie elsewhere (``https://``, ``s3://``, ``gs://``, ...): by fsspec, and tried again where a read fails."""

import glob
import io
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from dino.machine.files import printable

T = TypeVar("T")
_TRIES = 5
_WAIT = 0.5  # Seconds before the second try; twice as long before each further one.
_BLOCK = 2**23  # Bytes that are asked for at once where a file is read from its beginning.


def is_remote(path: str) -> bool:
    """Whether a path is a URL.

    >>> is_remote("s3://bucket/a.tar"), is_remote("C:/a.tar"), is_remote("images/a.tar")
    (True, False, False)
    """
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", path) is not None


def matches(pattern: str) -> list[str]:
    """The URLs that one with ``*`` stands for, where the service can list; one without stands for itself.

    Raises:
        ValueError: it stands for none, or the service cannot be asked.
    """
    if pattern.startswith("http") or not glob.has_magic(pattern):  # In those ? begins a query.
        return [pattern]
    system, path = _system(pattern)
    try:
        found = _persist(pattern, lambda: sorted(system.glob(path)))
    except OSError as error:
        raise ValueError(str(error)) from None
    if not found:
        raise ValueError(f"{printable(pattern)} matches nothing")
    return [system.unstrip_protocol(name) for name in found]


def version(path: str) -> tuple[int, str]:
    """The size in bytes, and a text that changes when the file does.

    Raises:
        OSError: there is no such file, or it cannot be asked for.
    """
    system, place = _system(path)
    facts = _persist(path, lambda: system.info(place))
    if facts.get("size") is None:
        raise OSError(f"{printable(path)}: its server does not say how large it is")
    stamps = (
        "ETag",
        "etag",
        "Content-MD5",
        "Digest",
        "Last-Modified",
        "LastModified",
        "last_modified",
        "mtime",
        "updated",
        "created",
    )
    stamp = next((facts[key] for key in stamps if facts.get(key)), "")
    return int(facts["size"]), f"{path} {stamp} {facts['size']}"


def read_range(path: str, offset: int, size: int) -> bytes:
    """``size`` bytes from ``offset``.

    Raises:
        OSError: they cannot be had, after several tries; says why.
    """
    if not size:
        return b""
    system, place = _system(path)

    def ask() -> bytes:
        data = bytes(system.cat_file(place, start=offset, end=offset + size))
        if len(data) > size:
            raise PermissionError("its server sends whole files only: copy it to a disk")
        if len(data) < size:
            raise EOFError(f"{len(data)} of {size} bytes came")
        return data

    return _persist(path, ask)


def open_remote(path: str) -> io.BufferedReader:
    """The file, to be read from its beginning or here and there.

    Raises:
        OSError: as ``version``.
    """
    return io.BufferedReader(_Ranges(path), _BLOCK)


class _Ranges(io.RawIOBase):
    def __init__(self, path: str) -> None:
        self._path, self._at = path, 0
        self._size, _ = version(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = read_range(self._path, self._at, max(min(len(buffer), self._size - self._at), 0))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _system(path: str) -> tuple[Any, str]:
    """fsspec's file system (kept by it, anew after a fork) and how it calls the file.

    Raises:
        ValueError: nothing that is installed reads such URLs; says what does.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        way = " (pip install 'dino-ssl[remote]')" if path.startswith("http") else ""
        raise ValueError(f"{printable(path)} cannot be read: {error}{way}") from None


def _persist(path: str, ask: Callable[[], T]) -> T:
    """What ``ask`` gives, after as many tries as it takes; what waiting does not mend is not tried again."""
    for i in range(_TRIES):
        try:
            return ask()
        except Exception as error:  # Every service has errors of its own.
            if isinstance(error, PermissionError):
                raise OSError(f"{printable(path)} cannot be read: {error or 'permission denied'}") from None
            if _is_missing(error):
                raise OSError(f"{printable(path)} cannot be read: it does not exist") from None
            if i + 1 == _TRIES:
                cause = error.__cause__ or error
                reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
                raise OSError(f"{printable(path)} cannot be read after {_TRIES} tries: {reason}") from None
        time.sleep(_WAIT * 2**i)
    raise AssertionError


def _is_missing(error: Exception) -> bool:
    """Over http, fsspec calls every failure to ask for a file's size a missing file; its cause tells."""
    cause = error.__cause__ or error
    missing = isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) in (404, 410)
    return isinstance(error, FileNotFoundError) and missing
