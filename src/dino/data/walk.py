"""The one walk over files: in folders and archives, and by patterns. Opens no image."""

import glob
import os
import re
from collections.abc import Iterator

from dino.data.archives import list_archive
from dino.data.files import Found, is_archive, is_hidden, is_image
from dino.data.remote import is_remote, matches
from dino.machine.files import printable


def expand(pattern: str) -> list[str]:
    """The paths that a path with ``~``, ``*``, ``**``, ``{a,b}`` or ``{000..123}`` stands for.

    Raises:
        ValueError: it stands for none.
    """
    pattern = pattern if is_remote(pattern) else os.path.expanduser(pattern)
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
    if is_remote(pattern):
        return matches(pattern)
    if glob.has_magic(pattern) and (found := sorted(glob.glob(pattern, recursive=True))):
        return found
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
    if not is_remote(path) and not os.path.lexists(path):
        raise ValueError(f"{printable(path)} does not exist")
    if not is_archive(path):
        raise ValueError(f"{printable(path)} is neither a folder nor an archive (.tar, .tar.gz, .zip, ...)")
    return list_archive(path)


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
                    if not is_hidden(entry.name)
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
