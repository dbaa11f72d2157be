"""Files that appear whole or not at all, and names of files as they can be shown."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

_PARTIAL = ".partial"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to (of the same suffix, in the same folder): when the block ends, the file is at ``path``,
    complete and on the disk. When it fails, or the machine does, ``path`` is what it was before.

    Raises:
        OSError: the file could not be written (a full disk, say); names ``path``, and nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{_PARTIAL}{os.getpid()}.{path.name}")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # What the umask gives: safetensors makes files that only their owner can read.
        yield partial
        partial.chmod(mode)
        _to_disk(partial)
        os.replace(partial, path)
        _to_disk(path.parent)  # Or a power cut may take the new name back.
    except Exception as error:
        if (number := _os_error(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A small text file, written whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def remove_partial(folder: Path) -> None:
    """Removes what processes that were killed while they wrote have left in a folder; only for who owns the folder."""
    for path in folder.glob(f"{_PARTIAL}*"):
        path.unlink(missing_ok=True)


def printable(name: str) -> str:
    r"""A file's name in one line of UTF-8: bytes that are not UTF-8 and control characters are escaped.

    >>> printable("caf\udce9\t.png")
    'caf\\xe9\\t.png'
    """
    if name.isprintable():
        return name
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _os_error(error: Exception) -> int | None:
    """The operating system's number for what went wrong; safetensors has it in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
